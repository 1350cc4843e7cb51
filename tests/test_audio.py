"""Audio comes in as the same mono samples whatever its container, rate, channels or block length, or says why not."""

import io
import random
import re
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from dsm_jax import audio, decoding
from dsm_jax.errors import AudioError
from dsm_jax.speech import Speech
from tests.benchmarks.mutations import mutated

DATA = Path(__file__).parent / "data"
SPEECH = DATA / "librispeech-1272-128104-0000.flac"


def tone(seconds: float, rate: int, hz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def closed() -> io.BytesIO:
    file = io.BytesIO(b"RIFF")
    file.close()
    return file


def write_tone(file: str | io.BytesIO, codec: str, seconds: float, format: str | None = None) -> None:
    """Write a tone to a container; its format is that of the file's name unless it is given."""
    write_sound(file, codec, tone(seconds, 48_000), format)


def write_sound(
    file: str | io.BytesIO,
    codec: str,
    pcm_T: np.ndarray,
    format: str | None = None,
    delay: Callable[[float], float] = lambda at_s: 0.0,
    options: dict[str, str] | None = None,
) -> None:
    """Write samples at 48 kHz to a container, each packet as many seconds late as `delay` says for its time."""
    rate = 48_000
    with av.open(file, "w", format=format, options=options) as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(pcm_T[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = rate, 0
        resampler = av.AudioResampler(format=stream.codec_context.format, layout="mono", rate=rate)
        for out in [*resampler.resample(frame), *resampler.resample(None), None]:
            for packet in stream.encode(out):
                packet.pts += round(delay(float(packet.pts * packet.time_base)) / packet.time_base)
                packet.dts = packet.pts
                container.mux(packet)


class Pipe(io.BytesIO):
    """Bytes that can be read once, as from another program."""

    name = None

    def seekable(self) -> bool:
        return False

    def seek(self, *_: int) -> int:
        raise io.UnsupportedOperation("seek")


@pytest.mark.parametrize(
    "container,subtype,rate,channels,tolerance",
    [
        ("wav", "PCM_16", 8_000, 1, 1e-3),
        ("wav", "FLOAT", 24_000, 6, 1e-6),
        ("wav", "PCM_24", 192_000, 2, 1e-3),
        ("flac", "PCM_16", 44_100, 2, 1e-3),
        ("ogg", "VORBIS", 22_050, 2, 5e-2),  # lossy, as the two below: the tone's size, not its samples, is kept
        ("ogg", "OPUS", 48_000, 1, 5e-2),
        ("mp3", "MPEG_LAYER_III", 16_000, 1, 5e-2),
    ],
)
def test_a_tone_survives_any_container_rate_and_channel_count(tmp_path, container, subtype, rate, channels, tolerance):
    gains = np.linspace(0.5, 1.5, channels) if channels > 1 else np.ones(1)  # unequal, but their mean is 1
    path = tmp_path / f"tone.{container}"
    soundfile.write(path, tone(2.0, rate)[:, None] * gains, rate, subtype=subtype)
    pcm = audio.read(path)
    assert pcm.dtype == np.float32
    assert abs(pcm.size - 48_000) <= (700 if tolerance > 1e-2 else 0)  # lossy ones may end in the encoder's padding
    np.testing.assert_allclose(pcm[2_400:45_600], tone(2.0, 24_000)[2_400:45_600], atol=tolerance)


@pytest.mark.parametrize("rate", [8_000, 11_025, 24_000, 44_100, 192_000])
def test_blocks_join_to_the_same_samples_whatever_their_length(tmp_path, rate):
    samples = round(1.7 * rate) + 1
    path = tmp_path / "noise.wav"
    soundfile.write(path, np.random.default_rng(0).uniform(-1, 1, (samples, 2)), rate, subtype="FLOAT")
    whole = audio.read(path)
    assert len(whole) == int(samples * 24_000 / rate + 0.5)
    for block_seconds in (0.004, 0.08, 0.3, 1.0, 1e6):
        pieces = list(audio.blocks(path, block_seconds=block_seconds))
        assert {len(piece) for piece in pieces[:-1]} <= {round(block_seconds * 24_000)}
        np.testing.assert_array_equal(np.concatenate(pieces), whole)


def test_matching_rate_passes_samples_through(tmp_path):
    pcm = np.random.default_rng(0).uniform(-1, 1, 50_000).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", pcm, 24_000, subtype="FLOAT")
    np.testing.assert_array_equal(audio.read(tmp_path / "a.wav"), pcm)


def test_paths_files_pipes_and_standard_input_read_alike(monkeypatch):
    content = SPEECH.read_bytes()
    whole = audio.read(SPEECH)
    assert whole.shape == (140_520,)
    file = io.BytesIO(content)
    for place in (100, len(content)):
        file.seek(place)  # read from the start wherever it stands
        np.testing.assert_array_equal(audio.read(file), whole)
    np.testing.assert_array_equal(audio.read(str(SPEECH)), whole)
    np.testing.assert_array_equal(audio.read(Pipe(content)), whole)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Pipe(content)))
    np.testing.assert_array_equal(audio.read("-"), whole)


@pytest.mark.parametrize(
    "kind",
    [
        audio.Recorded,
        lambda pcm, rate: {"array": pcm, "sampling_rate": rate},
        lambda pcm, rate: Speech(pcm, rate, (), np.zeros((1, 1)), "a model"),
    ],
)
def test_samples_with_a_rate_of_their_own_are_as_their_file(kind, tmp_path):
    pcm_CT = np.stack([tone(0.5, 16_000, 440), tone(0.5, 16_000, 220)])
    soundfile.write(tmp_path / "a.wav", pcm_CT.T, 16_000, subtype="FLOAT")
    recording = kind(pcm_CT, 16_000)
    assert audio.is_source(recording)
    np.testing.assert_array_equal(audio.read(recording), audio.read(tmp_path / "a.wav"))
    np.testing.assert_array_equal(audio.read(kind(pcm_CT.tolist(), 16_000)), audio.read(tmp_path / "a.wav"))
    assert len(audio.read(recording)) == 12_000


@pytest.mark.parametrize(
    ("recording", "message"),
    [
        ({"path": "a.wav"}, r"audio was given as a mapping of \['path'\]; expected array and sampling_rate. Add them"),
        (audio.Recorded(np.ones(9), 12), "the sample rate of the array is 12 Hz; expected 1000 to 768000 Hz"),
        (audio.Recorded(np.ones(9), "16k"), "the sample rate of the array is 16k Hz; expected 1000 to 768000 Hz"),
        (audio.Recorded("a.wav", 16_000), "the array has dtype <U5; expected float"),
    ],
)
def test_samples_without_a_true_rate_are_refused(recording, message):
    with pytest.raises(AudioError, match=message):
        audio.read(recording)


def test_arrays_are_taken_at_the_given_rate():
    pcm = tone(1.0, 16_000)
    np.testing.assert_array_equal(audio.read(pcm, 16_000), pcm)
    np.testing.assert_array_equal(audio.read(np.stack([pcm, 0.5 * pcm])), 0.75 * pcm)
    for order in "<>":
        pcm_T = np.array([-32768, 16384], f"{order}i2")
        np.testing.assert_array_equal(audio.read(pcm_T), np.array([-1.0, 0.5], np.float32))
    np.testing.assert_array_equal(audio.read(np.ones((8, 9))), np.ones(9))
    copy = audio.read(pcm)
    copy[:] = 0
    assert pcm.any()


def test_an_mp3_is_decoded_in_pieces_as_in_one(tmp_path):
    """An mp3 frame borrows bits from earlier ones, so a decoder that seeks between pieces garbles their starts."""
    soundfile.write(tmp_path / "tone.mp3", tone(4.0, 24_000), 24_000)
    one, _ = soundfile.read(tmp_path / "tone.mp3", dtype="float32")
    np.testing.assert_allclose(audio.read(tmp_path / "tone.mp3"), one, atol=1e-5)


def without_first_frame(content: bytes) -> bytes:
    """Return an mp3 without the frame that says how long it is, as an encoder that writes to a pipe leaves it."""
    return content[content.index(content[:2], 4) :]


@pytest.mark.parametrize("rate", [16_000, 44_100])
@pytest.mark.parametrize("bitrate_mode", ["CONSTANT", "AVERAGE", "VARIABLE"])
@pytest.mark.parametrize("header", [True, False])
def test_all_of_an_mp3_is_decoded(tmp_path, caplog, rate, bitrate_mode, header):
    loud = np.random.default_rng(0).uniform(-0.9, 0.9, rate * 4)
    path = tmp_path / "a.mp3"
    soundfile.write(path, np.concatenate([loud, np.zeros(rate * 6)]), rate, bitrate_mode=bitrate_mode)
    if not header:
        path.write_bytes(without_first_frame(path.read_bytes()))
    assert 10.0 <= len(audio.read(path, rate)) / rate < 10.2
    assert not caplog.messages


def test_joined_and_tagged_files_are_decoded_through_all_their_parts(tmp_path, caplog):
    for suffix, options in ((".mp3", {}), (".flac", {}), (".ogg", {"subtype": "VORBIS"}), (".opus", {"format": "OGG"})):
        one = tmp_path / f"one{suffix}"
        options = {"subtype": "OPUS", **options} if suffix == ".opus" else options
        soundfile.write(one, tone(2.0, 24_000), 24_000, **options)
        two = tmp_path / f"two{suffix}"
        two.write_bytes(one.read_bytes() * 2)
        assert 4.0 <= len(audio.read(two)) / 24_000 < 4.2, suffix
    tag = b"APETAGEX" + struct.pack("<IIII8x", 2000, 30_064, 1, 0xA0000000) + bytes(range(256)) * 117
    footer = b"APETAGEX" + struct.pack("<IIII8x", 2000, len(tag) - 32 + 32, 1, 0x80000000)
    tagged = tmp_path / "tagged.mp3"
    tagged.write_bytes((tmp_path / "one.mp3").read_bytes() + tag + footer)
    np.testing.assert_array_equal(audio.read(tagged), audio.read(tmp_path / "one.mp3"))
    tagged.write_bytes(tagged.read_bytes() + b"TAG" + b"a title".ljust(125, b"\0"))  # an ID3v1 tag behind it
    np.testing.assert_array_equal(audio.read(tagged), audio.read(tmp_path / "one.mp3"))
    footer_alone = footer[:20] + bytes(4) + footer[24:]
    tagged.write_bytes((tmp_path / "one.mp3").read_bytes() + tag[32:] + footer_alone)
    np.testing.assert_array_equal(audio.read(tagged), audio.read(tmp_path / "one.mp3"))
    assert not caplog.messages


def test_a_joined_file_may_change_its_rate_and_its_channels(tmp_path):
    def written(suffix: str, pcm: np.ndarray, rate: int) -> bytes:
        soundfile.write(tmp_path / f"a{suffix}", pcm, rate)
        return (tmp_path / f"a{suffix}").read_bytes()

    rates = written(".flac", tone(1.0, 24_000), 24_000) + written(".flac", tone(1.0, 48_000), 48_000)
    assert audio.read(io.BytesIO(rates)).size == 48_000
    stereo = written(".mp3", np.stack([tone(1.1, 24_000)] * 2, axis=1), 24_000)
    pcm_T = audio.read(io.BytesIO(stereo + written(".mp3", np.zeros(24_000), 24_000)))
    assert pcm_T[:24_000].std() > 0.3
    assert np.abs(pcm_T[-12_000:]).max() < 0.01, "nothing of the first part comes late"


@pytest.mark.parametrize(
    "name,codec", [("a.m4a", "aac"), ("a.mp4", "aac"), ("a.webm", "libopus"), ("a.aac", "aac"), ("a.mka", "libopus")]
)
def test_recordings_of_phones_and_meetings_are_read(tmp_path, caplog, name, codec):
    write_tone(str(tmp_path / name), codec, 3.0)
    pcm = audio.read(tmp_path / name)
    assert 3.0 <= pcm.size / 24_000 < 3.1
    piped = audio.read(Pipe((tmp_path / name).read_bytes()))
    for heard in (pcm, piped):
        np.testing.assert_allclose(heard[12_000:60_000].std(), 0.35, atol=0.05)
    assert audio.duration(tmp_path / name) == pytest.approx(3.0, abs=0.5)
    assert not caplog.messages
    if name in ("a.webm", "a.mka"):  # whose duration is that of the container
        content = (tmp_path / name).read_bytes()
        for opened in (io.BytesIO, Pipe):
            caplog.clear()
            audio.read(opened(content[: len(content) // 2]))
            assert re.search(r"lacks 1\.\d s of its 3\.\d s: it was cut short or is damaged", caplog.text)


@pytest.mark.parametrize(("kind", "codec"), [("mp4", "aac"), ("webm", "libopus"), ("matroska", "aac")])
def test_words_stand_where_the_container_has_their_sound(caplog, kind, codec):
    """A recorder leaves out what it could not hear, and a microphone may start after its camera."""
    file = io.BytesIO()
    write_sound(file, codec, tone(2.0, 48_000), kind, lambda at_s: 3.0 if at_s < 1.0 else 13.0)
    for opened in (io.BytesIO, Pipe):
        pcm_T = audio.read(opened(file.getvalue()))
        assert pcm_T.size / 24_000 == pytest.approx(15.0, abs=0.1)
        for start_s, end_s, level in ((0.0, 2.9, 0.0), (3.1, 3.9, 0.35), (4.1, 12.9, 0.0), (14.1, 14.9, 0.35)):
            part_T = pcm_T[round(start_s * 24_000) : round(end_s * 24_000)]
            assert part_T.std() == pytest.approx(level, abs=0.05), start_s
    assert not caplog.messages
    if kind != "mp4":  # an MP4 that is cut short has no index
        audio.read(io.BytesIO(file.getvalue()[: len(file.getvalue()) * 3 // 4]))
        assert re.search(r"lacks 0\.\d s of its 15\.\d s: it was cut short or is damaged", caplog.text)


@pytest.mark.parametrize(
    ("kind", "codec", "rate"),
    [("mp4", "aac", 8_000), ("matroska", "aac", 8_000), ("matroska", "libmp3lame", 8_000), ("webm", "libopus", 48_000)],
)
def test_padding_of_an_encoder_and_uneven_clocks_are_no_gaps(monkeypatch, kind, codec, rate):
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=rate, layout="mono")
        resampler = av.AudioResampler(format=stream.codec_context.format, layout="mono", rate=rate)
        frame = av.AudioFrame.from_ndarray(tone(4.0, rate)[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = rate, 0
        frames = [*resampler.resample(frame), *resampler.resample(None), None]
        packets = [packet for out in frames for packet in stream.encode(out)]
        first = packets[0].pts or 0  # negative: the padding
        for packet in packets:
            packet.pts = packet.dts = ((packet.pts or 0) - first) * 21 // 20  # 0.2 s late at its end
            container.mux(packet)
    pcm_T = audio.read(file)
    monkeypatch.setattr(decoding, "_origin", lambda container, stream: None)
    np.testing.assert_array_equal(pcm_T, audio.read(file))


def test_a_timestamp_that_cannot_be_true_and_the_clock_of_a_fragment_give_no_silence():
    file = io.BytesIO()
    write_sound(file, "libopus", tone(2.0, 48_000), "webm", lambda at_s: 0.0 if at_s < 1.0 else 9_000.0)
    assert audio.read(file).size / 24_000 == pytest.approx(2.0, abs=0.1)
    file = io.BytesIO()
    flags = {"movflags": "frag_keyframe+empty_moov+default_base_moof", "frag_duration": "500000"}
    write_sound(file, "aac", tone(4.0, 48_000), "mp4", options=flags)
    content = file.getvalue()
    places = [found.start() - 4 for found in re.finditer(b"moof", content)]
    half = content[: places[0]] + content[places[len(places) // 2] :]
    assert audio.read(io.BytesIO(half)).size / 24_000 == pytest.approx(2.0, abs=0.3)


def test_audio_streams_that_are_left_out_are_told(caplog):
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        streams = [container.add_stream("pcm_s16le", rate=24_000, layout="mono") for _ in range(3)]
        for stream in streams:
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 24_000), np.int16), format="s16", layout="mono")
            frame.sample_rate = 24_000
            container.mux(stream.encode(frame))
    assert audio.read(file).size == 24_000
    assert re.search(
        r"holds 3 audio streams and number 0 is used; for another one: ffmpeg -i INPUT -map 0:a:1 OUT", caplog.text
    )


def test_nothing_is_missed_of_a_length_that_was_guessed(tmp_path, caplog):
    loud_T = np.random.default_rng(0).uniform(-0.5, 0.5, 96_000).astype(np.float32)
    write_sound(str(tmp_path / "a.aac"), "aac", np.concatenate([np.zeros_like(loud_T), loud_T]))
    assert audio.duration(tmp_path / "a.aac") > 10, "guessed from the bytes of the silence"
    assert 4.0 <= audio.read(tmp_path / "a.aac").size / 24_000 < 4.1
    assert not caplog.messages


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 0x7FFFF000])
def test_a_wav_of_unknown_size_is_read_to_its_end(tmp_path, caplog, size):
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(1.0, 24_000), 24_000)
    content = bytearray(path.read_bytes())
    content[40:44] = struct.pack("<I", size)
    path.write_bytes(content)
    assert audio.read(path).size == 24_000
    assert not caplog.messages


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "IMA_ADPCM"])
def test_a_wav_is_read_past_the_length_of_a_header_that_was_not_updated(tmp_path, caplog, subtype):
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(2.0, 24_000), 24_000, subtype=subtype)
    whole, content = audio.read(path), bytearray(path.read_bytes())
    data = content.index(b"data")
    half = struct.unpack_from("<I", content, data + 4)[0] // 2 // 1024 * 1024  # whole blocks of ADPCM
    struct.pack_into("<I", content, 4, data + half)
    struct.pack_into("<I", content, data + 4, half)
    np.testing.assert_array_equal(audio.read(io.BytesIO(content)), whole)
    assert not caplog.messages


@pytest.mark.parametrize("behind", [b"LIST", b"\0LIST", b"ID3\3", b"TAGs", b"RIFF"])
def test_what_follows_the_samples_of_a_wav_is_no_sound(tmp_path, behind):
    soundfile.write(tmp_path / "a.wav", tone(1.0, 24_000), 24_000)
    whole = (tmp_path / "a.wav").read_bytes()
    pcm_T = audio.read(io.BytesIO(whole + behind + np.random.default_rng(0).bytes(50_000)))
    np.testing.assert_array_equal(pcm_T, audio.read(tmp_path / "a.wav"))


def test_channels_that_cancel_out_are_not_averaged(tmp_path):
    pcm = tone(2.0, 24_000)
    np.testing.assert_array_equal(audio.read(np.stack([pcm, -pcm])), pcm)
    np.testing.assert_array_equal(audio.read(np.stack([0.1 * pcm, 0.95 * pcm, -pcm])), np.float32(0.95) * pcm)
    soundfile.write(tmp_path / "a.wav", np.stack([-pcm, pcm], axis=1), 24_000, subtype="FLOAT")
    np.testing.assert_array_equal(audio.read(tmp_path / "a.wav"), -pcm)
    late = np.where(np.arange(pcm.size) < 24_000, 0.0, pcm)
    np.testing.assert_array_equal(audio.read(np.stack([late, np.zeros_like(pcm)])), late / 2)


def test_a_pipe_is_decoded_as_it_arrives(tmp_path):
    path = tmp_path / "a.wav"
    soundfile.write(path, np.random.default_rng(0).uniform(-1, 1, 24_000 * 20), 24_000)
    content = path.read_bytes()

    class Buffered(Pipe):
        def read(self, size: int = -1) -> bytes:
            assert 0 <= size < 100, "this waits until it has all that was asked for"
            return super().read(size)

    pipe = Buffered(content)
    first = next(audio.blocks(pipe, block_seconds=0.5))
    assert first.size == 12_000
    assert pipe.tell() < len(content) / 4


def peak_bytes(run) -> int:
    tracemalloc.start()
    try:
        run()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.slow
def test_an_hour_streams_in_constant_memory(tmp_path):
    path = tmp_path / "hour.wav"
    with soundfile.SoundFile(path, "w", 1_000, 1, subtype="PCM_U8") as sound:
        for _ in range(60):
            sound.write(np.zeros(60_000, np.float32))
    lengths = []
    streamed = peak_bytes(lambda: lengths.extend(len(block) for block in audio.blocks(path, 4_000)))
    assert sum(lengths) == 3_600 * 4_000
    assert streamed < 2e6
    assert peak_bytes(lambda: audio.read(path, 4_000)) > 50e6  # what the bound above would catch


@pytest.mark.parametrize(
    "content,message",
    [
        (b"", r"is empty \(0 bytes\); expected audio\. Record or fetch it again"),
        (b"these are words, not samples" * 9, r"is not audio that can be decoded: its first bytes are b'these are wo'"),
        (b"RIFF", r"is not audio that can be decoded: its first bytes are b'RIFF'"),
        (b"APETAGEX", r"is not audio that can be decoded: its first bytes are b'APETAGEX'"),
        (b"\x00\x00\x00\x18ftypM4A " * 9, r"is an MP4 without its index, as a recorder that was interrupted"),
        (
            b"\x1aE\xdf\xa3" * 9,
            r"is not audio .*; expected a recording .* convert it: ffmpeg -i .*a\.bin .*a-converted\.wav",
        ),
    ],
)
def test_what_is_not_audio_is_refused(tmp_path, content, message):
    path = tmp_path / "a.bin"
    path.write_bytes(content)
    with pytest.raises(AudioError, match=message) as error:
        audio.read(path)
    assert str(path) in str(error.value)
    assert audio.duration(path) is None
    with pytest.raises(AudioError, match="the file object " + message.split("; ")[0]):
        audio.read(Pipe(content))


def test_a_header_that_names_no_codec_is_refused():
    flac = SPEECH.read_bytes()
    with pytest.raises(AudioError, match=r"has a header that says neither codec nor sample rate; .* Fetch it again"):
        audio.read(io.BytesIO(flac[:8] + b"\x22" + flac[8:]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["flac", "wav", "adts", "mp4", "webm"])
def test_a_damaged_container_gives_sound_or_an_error_of_audio(kind):
    codecs = {"flac": "flac", "wav": "pcm_s16le", "adts": "aac", "mp4": "aac", "webm": "libopus"}
    whole, chance = io.BytesIO(), random.Random(0)
    write_tone(whole, codecs[kind], 0.5, format=kind)
    for opened in (io.BytesIO, Pipe):
        read = 0
        for _ in range(100):
            try:
                for block_T in audio.blocks(opened(mutated(whole.getvalue(), chance)), 24_000, 1.0):
                    read += block_T.size
                    if read > 100 * 24_000:
                        break
            except AudioError:
                pass
        assert read > 24_000


def test_headerless_samples_are_refused(tmp_path):
    path = tmp_path / "a.raw"
    path.write_bytes(b"\x01\x00" * 100)
    with pytest.raises(AudioError, match=r"a\.raw is not audio that can be decoded"):
        audio.read(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(AudioError, match=r"absent\.wav does not exist; expected an audio file\. Check the path"):
        audio.read(tmp_path / "absent.wav")
    with pytest.raises(AudioError, match=r"is a folder; expected an audio file\. Name the files in it"):
        audio.read(tmp_path)


def test_a_file_without_samples_is_refused(tmp_path):
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 16_000)
    with pytest.raises(AudioError, match=r"none\.wav holds no samples; expected at least one"):
        audio.read(tmp_path / "none.wav")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite_are_refused_with_their_time(tmp_path, bad):
    pcm = np.zeros((40_000, 2), np.float32)
    pcm[24_000, 1] = bad
    soundfile.write(tmp_path / "bad.wav", pcm, 16_000, subtype="FLOAT")
    with pytest.raises(AudioError, match=r"bad\.wav holds NaN or infinity at 1\.500 s; expected finite samples"):
        audio.read(tmp_path / "bad.wav")
    with pytest.raises(AudioError, match=r"the array holds NaN or infinity at 1\.000 s"):
        audio.read(pcm.T)


@pytest.mark.parametrize("subtype", ["IMA_ADPCM", "MS_ADPCM", "GSM610"])
@pytest.mark.parametrize("byte_rate", [None, 16_000, 1_000])  # None: as written
def test_compressed_wavs_are_whole_whatever_byte_rate_their_header_says(tmp_path, caplog, subtype, byte_rate):
    path = tmp_path / "a.wav"
    soundfile.write(path, tone(2.0, 24_000), 24_000, subtype=subtype)
    content = bytearray(path.read_bytes())
    if byte_rate is not None:
        struct.pack_into("<I", content, content.index(b"fmt ") + 16, byte_rate)
    path.write_bytes(content)
    assert len(audio.read(path, 24_000, strict=True)) == pytest.approx(48_000, abs=1_100)  # the last block is full
    assert caplog.text == ""
    path.write_bytes(content[: len(content) * 3 // 4])
    end = r"(lacks its end, after 1\.[45] s: it was cut short|is damaged from 1\.5 s on: 1 packet was left out)"
    with pytest.raises(AudioError, match=rf"a\.wav {end}; fetch it again"):
        audio.read(path, 24_000, strict=True)
    assert len(audio.read(path, 24_000)) == pytest.approx(36_000, abs=1_500)
    assert re.search(rf"a\.wav {end}; the rest is used", caplog.text)


@pytest.mark.parametrize(
    ("container", "piped"),
    [
        ("caf", False),  # of which FFmpeg needs a file
        *[
            (kind, piped)
            for kind in ("wav", "rf64", "w64", "aiff", "au", "flac", "ogg", "mp3")
            for piped in (False, True)
        ],
    ],
)
def test_a_file_that_was_cut_short_gives_what_is_there_and_a_warning(tmp_path, caplog, container, piped):
    whole, path = tmp_path / f"whole.{container}", tmp_path / f"cut.{container}"
    soundfile.write(whole, np.random.default_rng(0).uniform(-0.9, 0.9, 96_000), 24_000)
    path.write_bytes(whole.read_bytes()[: whole.stat().st_size * 3 // 4])
    audio.read(Pipe(whole.read_bytes()) if piped else whole)
    assert not caplog.messages
    assert 2.0 < len(audio.read(Pipe(path.read_bytes()) if piped else path)) / 24_000 < 3.5
    (record,) = caplog.records
    name = "the file object" if piped else rf"cut\.{container}"
    wanted = r"lacks its end" if container == "ogg" else r"lacks [01]\.\d s of its 4\.0 s"
    assert re.search(rf"{name} {wanted}", record.getMessage()), record.getMessage()


@pytest.mark.parametrize(("container", "size"), [("rf64", 1 << 62), ("w64", 1 << 62)])
def test_a_size_in_64_bits_may_be_unknown(tmp_path, caplog, container, size):
    path = tmp_path / f"a.{container}"
    soundfile.write(path, tone(1.0, 24_000), 24_000)
    content = bytearray(path.read_bytes())
    struct.pack_into(
        "<Q", content, content.index(b"ds64") + 16 if container == "rf64" else content.index(b"data") + 16, size
    )
    path.write_bytes(content)
    for opened in (io.BytesIO, Pipe):
        assert audio.read(opened(content)).size == 24_000
    assert not caplog.messages


def test_an_ogg_file_that_ends_within_its_last_page_was_cut_short(tmp_path, caplog):
    soundfile.write(tmp_path / "a.ogg", np.random.default_rng(0).uniform(-0.9, 0.9, 48_000), 24_000)
    whole = (tmp_path / "a.ogg").read_bytes()
    last = whole.rfind(b"OggS")
    audio.read(io.BytesIO(whole))
    assert caplog.messages == []
    for kept in (0, 20, 27, 28, len(whole) - last - 1):
        caplog.clear()
        audio.read(io.BytesIO(whole[: last + kept]))
        assert re.search("lacks its end", caplog.text), kept


def test_the_length_of_an_mp3_is_read_behind_its_tag_whatever_its_header_is_called(tmp_path, caplog):
    soundfile.write(tmp_path / "a.mp3", tone(4.0, 24_000), 24_000)
    whole = (tmp_path / "a.mp3").read_bytes()
    name = next(name for name in (b"Xing", b"Info") if name in whole[:4096])
    tag = b"ID3\4\0\0" + bytes((0, 0, 5000 >> 7, 5000 & 0x7F)) + bytes(5000)
    for head in (b"Xing", b"Info"):
        caplog.clear()
        named = tag + whole.replace(name, head, 1)
        audio.read(io.BytesIO(named))
        assert caplog.messages == []
        audio.read(io.BytesIO(named[: len(named) * 3 // 4]))
        assert re.search(r"lacks .* of its 4\.\d s", caplog.text)
    caplog.clear()
    at = whole.index(name) + 7
    silent = whole[:at] + b"\0" + whole[at + 1 :]  # a header that does not say the length
    audio.read(io.BytesIO(silent[: len(silent) * 3 // 4]))
    assert not re.search("lacks", caplog.text)


def test_the_chunks_of_a_wav_have_even_lengths(tmp_path, caplog):
    soundfile.write(tmp_path / "a.wav", tone(1.0, 24_000), 24_000)
    whole = (tmp_path / "a.wav").read_bytes()
    data = whole.index(b"data")
    with_junk = whole[:data] + b"JUNK" + struct.pack("<I", 3) + b"abc\0" + whole[data : len(whole) // 2]
    assert audio.read(io.BytesIO(with_junk)).size < 12_000
    assert re.search(r"lacks 0\.5 s of its 1\.0 s: it was cut short or is damaged", caplog.text)


@pytest.mark.parametrize(
    ("container", "where"), [("flac", "it was cut short or is damaged"), ("mp3", r"it is damaged from 0\.9 s on")]
)
def test_a_damaged_file_gives_what_is_left_and_a_warning(tmp_path, caplog, container, where):
    path = tmp_path / f"a.{container}"
    soundfile.write(path, np.random.default_rng(0).uniform(-0.9, 0.9, 96_000), 24_000)
    content = bytearray(path.read_bytes())
    for place in (len(content) // 4, len(content) * 3 // 4):
        content[place : place + 500] = np.random.default_rng(1).bytes(500)
    path.write_bytes(content)
    assert 3.0 < len(audio.read(path)) / 24_000 < 4.1
    assert re.search(rf"a\.{container} lacks 0\.\d s of its 4\.0 s: {where}; the rest is used", caplog.text)


@pytest.mark.parametrize("rate", [10, 2_000_000])
def test_sample_rates_out_of_range_are_refused(tmp_path, rate):
    path = tmp_path / "odd.wav"
    soundfile.write(path, np.zeros(100), rate)
    with pytest.raises(AudioError, match=rf"the sample rate of .*odd\.wav is {rate} Hz; expected 1000 to 768000 Hz"):
        audio.read(path)
    with pytest.raises(AudioError, match=rf"sample_rate is {rate} Hz; expected 1000 to 768000 Hz"):
        audio.blocks(SPEECH, rate)
    with pytest.raises(AudioError, match=rf"sample_rate is {rate} Hz; expected 1000 to 768000 Hz"):
        audio.write(tmp_path / "out.wav", np.zeros(100), rate)


@pytest.mark.parametrize(
    "pcm,message",
    [
        (np.zeros(0), r"the array is empty \(shape \(0,\)\); expected at least one sample"),
        (np.zeros((2, 0)), r"the array is empty \(shape \(2, 0\)\)"),
        (np.zeros(9, np.int32), r"the array has dtype int32; expected float in \[-1, 1\], or int16"),
        (np.zeros(9, bool), r"the array has dtype bool"),
        (np.zeros((9, 2)), r"the array has shape \(9, 2\); expected \[samples\], or .*at most 8 channels\. Transpose"),
        (np.zeros(()), r"the array has shape \(\)"),
        (np.full(9, 1e300), r"the array holds NaN or infinity at 0\.000 s"),
        (
            [0.0, 0.0],
            r"audio was given as list; expected a path, '-', a file opened in binary mode, an array, or Recorded",
        ),
        (io.StringIO("text"), r"audio was given as StringIO"),
        (b"a.wav", r"audio was given as bytes; expected a path"),
        (closed(), r"the file object is closed; expected an open file"),
    ],
)
def test_arrays_that_are_not_audio_are_refused(pcm, message):
    with pytest.raises(AudioError, match=message):
        audio.read(pcm)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_a_block_has_a_positive_length(seconds):
    with pytest.raises(ValueError, match="expected a positive number of seconds"):
        audio.blocks(SPEECH, block_seconds=seconds)
    assert [len(block) for block in audio.blocks(np.ones(3), block_seconds=1e-9)] == [1, 1, 1]


@pytest.mark.parametrize(
    "suffix,tolerance", [(".wav", 1e-4), (".flac", 1e-4), (".OGG", 5e-2), (".opus", 1e-1), (".mp3", 5e-2)]
)
def test_what_is_written_reads_back(tmp_path, suffix, tolerance):
    pcm = tone(1.0, 24_000)
    pcm[:900] *= 6  # clipped: neither wrapped around nor kept
    audio.write(tmp_path / f"out{suffix}", pcm, 24_000)
    back = audio.read(tmp_path / f"out{suffix}")
    np.testing.assert_allclose(back[1_000:23_000], pcm[1_000:23_000], atol=tolerance)
    np.testing.assert_allclose(np.abs(back).max(), 1.0, atol=0.3)
    assert (back[10:20] > 0.5).all()
    audio.write(tmp_path / f"out{suffix}", np.stack([pcm, pcm]), 24_000)
    assert soundfile.info(tmp_path / f"out{suffix}").channels == 2


@pytest.mark.slow
def test_four_minutes_of_ogg_can_be_written(tmp_path):
    """libsndfile 1.2.2 crashes the process when it is given them in one call; so this runs in another process."""
    path = tmp_path / "long.ogg"
    script = "import numpy, sys; from dsm_jax import audio; audio.write(sys.argv[1], numpy.zeros(24_000 * 240), 24_000)"
    subprocess.run([sys.executable, "-c", script, path], check=True, cwd=DATA.parents[1])
    assert soundfile.info(path).frames == 24_000 * 240


def test_places_that_cannot_be_written_are_refused(tmp_path):
    with pytest.raises(
        AudioError, match=r"a\.aac ends in '\.aac'; expected one of \.wav, \.flac, \.ogg, \.opus, \.mp3\. Rename"
    ):
        audio.write(tmp_path / "a.aac", np.zeros(9), 24_000)
    with pytest.raises(AudioError, match=r"there is no folder .*absent; make it first"):
        audio.write(tmp_path / "absent" / "a.wav", np.zeros(9), 24_000)
    (tmp_path / "folder.wav").mkdir()
    with pytest.raises(AudioError, match=r"folder\.wav cannot be written \(Is a directory\)\. Choose"):
        audio.write(tmp_path / "folder.wav", np.zeros(9), 24_000)
    with pytest.raises(AudioError, match=r"the audio for .*empty\.wav is empty"):
        audio.write(tmp_path / "empty.wav", np.zeros(0), 24_000)


def test_duration_comes_from_the_header(tmp_path, monkeypatch):
    assert audio.duration(SPEECH) == pytest.approx(5.855)
    assert audio.duration(DATA / "bria.mp3") == pytest.approx(44.852, abs=1e-3)
    monkeypatch.setattr(decoding, "duration", None)  # FFmpeg would fetch an address, and wait for a pipe
    for other in ("-", "http://localhost/a.wav", tmp_path / "absent.wav", tmp_path, Pipe(SPEECH.read_bytes())):
        assert audio.duration(other) is None


@pytest.mark.parametrize(
    ("kind", "subtype"),
    [
        *[("WAV", subtype) for subtype in ("PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "PCM_U8", "ULAW", "ALAW")],
        *[("FLAC", "PCM_24"), ("AIFF", "PCM_16"), ("W64", "PCM_16"), ("CAF", "PCM_24"), ("AU", "PCM_16")],
    ],
)
def test_lossless_samples_are_those_of_another_decoder(tmp_path, kind, subtype):
    path = tmp_path / "a.sound"
    soundfile.write(path, np.random.default_rng(0).uniform(-1, 1, (20_000, 2)), 24_000, format=kind, subtype=subtype)
    np.testing.assert_array_equal(audio.read(path), soundfile.read(path, dtype="float32")[0].mean(axis=1))

"""The page's modules that need no browser: its messages, transcripts, sound files and resampling, run in node."""

import base64
import io
import json
import math
import re
import struct

import msgpack
import numpy as np
import pytest
import soundfile

from dsm_jax.serving import app
from dsm_jax.serving.moshi import wire
from dsm_jax.stt import subtitles
from dsm_jax.stt.events import Pause, Word
from dsm_jax.stt.transcript import Transcript
from tests.helpers.node import PAGE, evaluate

RNG = np.random.default_rng(0)
VALUES = [
    *(None, True, False, "", "seven", "é" * 40, "x" * 300, "y" * 70_000),
    *(0, 1, 127, 128, 255, 256, 65_535, 65_536, 2**32 - 1, 2**32, 2**53 - 1),
    *(-1, -32, -33, -128, -129, -32_768, -32_769, -(2**31), -(2**31) - 1, -(2**53) + 1),
    *(0.5, -2.25, 1e300, 1e-300, 0.1),
    *([], [1, [2, ["three"]]], list(range(15)), list(range(16)), list(range(70_000)), {}),
    {"type": "Marker", "id": 7, "flush": True},
    {f"key {n}": n for n in range(20)},
]


def test_the_page_s_files_are_all_served_and_name_no_others():
    files = {path.name: path.read_text(encoding="utf-8") for path in PAGE.iterdir()}
    assert set(app.PAGE) == set(files)
    named = re.compile(r"""(?:from |import |href=|src=|url\(|addModule\()["']?(?:\./)?([\w./:-]+\.\w+)["')]""")
    found = {name for text in files.values() for name in named.findall(text)}
    assert set(files) - found == {"index.html"}
    assert found <= set(files)
    assert named.findall('<link href="https://elsewhere.org/a.css"> import "./b.js"; url(c.woff2)') == [
        *("https://elsewhere.org/a.css", "b.js", "c.woff2"),
    ]


def encoded(expression: str, argument=None) -> bytes:
    """Return the bytes of a Uint8Array."""
    return base64.b64decode(evaluate("wire.js", f"Buffer.from({expression}).toString('base64')", argument))


def decoded(data: bytes):
    """Return what the page reads in a message."""
    given = base64.b64encode(data).decode()
    return evaluate("wire.js", "m.decode(new Uint8Array(Buffer.from(x, 'base64')))", given)


def test_values_are_written_as_msgpack_writes_them():
    assert msgpack.unpackb(encoded("m.encode(x)", VALUES)) == VALUES
    assert encoded("m.encode(x)", VALUES) == msgpack.packb(VALUES)


def test_values_that_msgpack_wrote_are_read():
    assert decoded(msgpack.packb(VALUES)) == VALUES
    assert decoded(msgpack.packb([0.5, -1.25], use_single_float=True)) == [0.5, -1.25]
    # A map with a long head, and numbers that are longer than they need to be, as other writers may have them.
    assert decoded(b"\xde\x00\x01\xd9\x01a\xdd\x00\x00\x00\x01\xcf" + bytes(7) + b"\x05") == {"a": [5]}
    assert evaluate("wire.js", "[...m.decode(Uint8Array.of(0xc4, 2, 1, 255))]") == [1, 255]


def test_samples_are_written_as_the_server_writes_them():
    pcm_T = RNG.standard_normal(1920).astype(np.float32)
    for count in (0, 3, 15, 16, 1920):
        part_T = pcm_T[:count]
        message = encoded("m.encodeAudio(Float32Array.from(x))", part_T.tolist())
        assert message == wire.encode(wire.Audio(part_T))
        found = wire.decode(message, wire.TO_TRANSCRIBE)
        assert isinstance(found, wire.Audio)
        assert np.array_equal(found.pcm, part_T)


def test_the_server_reads_the_page_s_other_messages():
    assert wire.decode(encoded("m.encode({type: 'Marker', id: 1, flush: true})"), wire.TO_TRANSCRIBE) == wire.Marker(
        1, flush=True
    )
    assert wire.decode(encoded("m.encode({type: 'Text', text: 'sept — 7'})"), wire.TO_SPEAK) == wire.Text("sept — 7")
    assert wire.decode(encoded("m.encode({type: 'Eos'})"), wire.TO_SPEAK) == wire.Eos()


@pytest.mark.parametrize(
    "message",
    [
        *(wire.Ready(), wire.Word("it’s", 1.25), wire.EndWord(2.0), wire.Marker(2**40), wire.Error("no free channels")),
        *(wire.Step(300, (0.25, 0.5, 0.75, 1.0), 1920), wire.Text("one", 0.5, 0.75), wire.OggOpus(bytes(range(256)))),
        *(wire.Audio(RNG.standard_normal(1920).astype(np.float32)), wire.Pause(1.5, 2.0, 0.75)),
    ],
    ids=lambda message: type(message).__name__,
)
def test_the_page_reads_the_server_s_messages(message):
    given = {name: value for name, value in vars(message).items() if value is not None}  # details are not sent unasked
    expected = {"type": type(message).__name__, **given}
    if isinstance(message, wire.Marker):
        del expected["flush"], expected["end"]
    lists = {name: list(value) for name, value in expected.items() if isinstance(value, (bytes, tuple, np.ndarray))}
    assert decoded(wire.encode(message)) == {**expected, **lists}


@pytest.mark.parametrize(
    "data,sentence",
    [
        *((b"\x82\xa4type", "the message of 6 bytes is cut short"), (b"", "the message of 0 bytes is cut short")),
        *((b"\xa5Read", "the message of 5 bytes is cut short"), (b"\xc0\xc0", "1 bytes follow the message")),
        (b"\xc1", "the message holds a value of kind 0xc1, which no message has"),
    ],
)
def test_a_message_that_is_not_whole_is_refused(data, sentence):
    given = base64.b64encode(data).decode()
    refusal = "(() => { try { m.decode(new Uint8Array(Buffer.from(x, 'base64'))) } catch (e) { return e.message } })()"
    assert evaluate("wire.js", refusal, given) == sentence


def transcript(messages: list[list[wire.Outgoing]], expression: str):
    """Return the value of an expression in which `t` is the transcript of sessions of messages."""
    sessions = [[msgpack.unpackb(wire.encode(message)) for message in session] for session in messages]
    read = "x.forEach(s => { t.begin(); s.forEach(message => t.read(message)); t.finish(); })"
    script = f"(() => {{ const t = new m.Transcript(); {read}; return {expression}; }})()"
    return evaluate("transcript.js", script, sessions)


def step(index: int, pause: float = 0.0) -> wire.Step:
    return wire.Step(index, (0.0, 0.0, pause, 0.0), 0)


def test_a_further_message_of_a_word_brings_its_rest():
    messages = [
        wire.Word("sev", 0.5),
        wire.Word("en", 0.5),
        wire.EndWord(0.75),
        wire.Word("", 1.0),
        wire.Word("two", 1.0),
    ]
    assert transcript([messages], "t.words") == [
        {"text": "seven", "start": 0.5, "end": 0.75},
        {"text": "two", "start": 1.0, "end": 1.0},  # the session has ended before the word has
    ]


def test_the_times_of_a_further_session_follow_those_before_it():
    session = [wire.Word("one", 0.5), *(step(n) for n in range(25)), wire.EndWord(1.0)]
    assert transcript([session, session], "t.words.map(w => [w.start, w.end])") == [[0.5, 1.0], [2.5, 3.0]]
    assert transcript([session, session], "t.duration") == 4.0


def test_a_predicted_pause_stands_between_the_words_around_it_though_text_is_late():
    early = [step(n, 0.9 if 12 <= n < 20 else 0.1) for n in range(30)]
    words = [wire.Word("one", 0.5), wire.EndWord(0.75), wire.Word("two", 0.875), wire.EndWord(1.0)]
    more = [wire.Word("six", 2.0), wire.EndWord(2.25)]
    assert transcript([[*early, *words, *more]], "[0, 1, 2].map(n => t.pauseAfter(n))") == [False, True, False]
    assert transcript([[*early, *words, *more]], "m.toText(t)") == "one two\nsix\n"
    (pause,) = transcript([[*early, *words, *more]], "t.pauses")
    assert pause == {"time": pytest.approx(1.04), "horizon": 2, "probability": pytest.approx(0.9)}


def test_silence_of_more_than_a_second_is_a_pause_where_none_is_predicted():
    words = [wire.Word("one", 0.5), wire.EndWord(0.75), wire.Word("two", 1.75), wire.EndWord(2.0)]
    later = [wire.Word("six", 3.125), wire.EndWord(3.25)]
    assert transcript([[*words, *later]], "m.toText(t)") == "one two\nsix\n"


def test_subtitles_are_the_library_s_to_the_byte():
    texts = ["a", "two", "sentence.", "Why?”", "…", "pneumonoultramicroscopicsilicovolcanoconiosis-pneumono", "é" * 41]
    words, now = [], 0.0
    for _ in range(600):
        start = now + float(RNG.choice([0.0, 0.04, 0.2, 1.0, 1.08, 4.0]))
        now = start + float(RNG.choice([0.0, 0.08, 0.4, 3.0, 8.0], p=[0.1, 0.3, 0.5, 0.08, 0.02]))
        words.append(Word(str(RNG.choice([*texts, " "])), round(start, 3), round(now, 3), 1.0))
    rows = [{"text": word.text, "start": word.start, "end": word.end} for word in words]
    assert evaluate("transcript.js", "m.toSrt(x)", rows) == subtitles.srt(words)
    assert evaluate("transcript.js", "m.toSrt(x)", []) == ""


def test_the_json_has_the_library_s_keys_and_values():
    session = [*(step(n, 0.9 if n >= 12 else 0.0) for n in range(20)), wire.Word("one", 0.5), wire.EndWord(0.75)]
    session += [wire.Word("two", 2.0), wire.EndWord(2.25)]
    found = json.loads(transcript([session], "m.toJson(t, {model: 'digits', audio: 'a.flac'})"))
    words = (Word("one", 0.5, 0.75, 1.0), Word("two", 2.0, 2.25, 1.0))
    expected = Transcript("one two", words, (Pause(1.04, 2.0, 0.9),), 1.6, None, "a.flac", "digits").to_dict()
    for word in expected["words"]:
        del word["probability"]  # no message has it
    found["pauses"][0]["probability"] = round(found["pauses"][0]["probability"], 4)
    assert found == expected


def test_a_wav_file_is_read_back():
    pcm_T = np.clip(RNG.standard_normal(3000) * 0.4, -1.5, 1.5).astype(np.float32)
    script = "Buffer.from(m.wav(x.map(frame => Float32Array.from(frame)), 24000)).toString('base64')"
    data = base64.b64decode(evaluate("wav.js", script, [pcm_T[:1920].tolist(), pcm_T[1920:].tolist()]))
    assert struct.unpack("<I", data[4:8]) == (len(data) - 8,)
    found_T, rate = soundfile.read(io.BytesIO(data), dtype="float32")
    assert rate == 24_000
    # Half a step of 16 bits, and the readers' 32,768 for the writer's 32,767.
    assert np.abs(found_T - np.clip(pcm_T, -1, 1)).max() < 1.6 / 32_767


def resampled(pcm_T: np.ndarray, rate: int, size: int) -> np.ndarray:
    """Return samples at 24 kHz as the worklet makes them of pieces."""
    script = f"""(() => {{
        const resampler = new m.Resampler({rate}, 24000), found = [];
        const samples = new Float32Array(Uint8Array.from(Buffer.from(x, "base64")).buffer);
        for (let at = 0; at < samples.length; at += {size})
            found.push(...resampler.push(samples.slice(at, at + {size})));
        return [...found, ...resampler.finish()];
    }})()"""
    data = base64.b64encode(pcm_T.astype("<f4").tobytes()).decode()
    return np.asarray(evaluate("resample.js", script, data), np.float32)


def tone(hz: float, rate: int, count: int) -> np.ndarray:
    return np.sin(2 * math.pi * hz * np.arange(count) / rate).astype(np.float32)


@pytest.mark.parametrize("rate", [16_000, 44_100, 48_000, 96_000])
@pytest.mark.parametrize("hz", [200, 1_000, 6_000])
def test_a_tone_keeps_its_height_strength_and_place_at_another_rate(rate, hz):
    found_T = resampled(tone(hz, rate, rate // 4), rate, 128)
    assert abs(found_T.size - 6_000) <= 1
    middle = slice(200, 5_800)  # silence surrounds the tone, so that its ends ring
    assert np.abs(found_T[middle] - tone(hz, 24_000, found_T.size)[middle]).max() < 2e-3


@pytest.mark.parametrize("rate", [44_100, 48_000])
def test_what_24_khz_cannot_hold_is_taken_away(rate):
    # Without the filter 15 kHz would sound as 9 kHz: planted here, by leaving out every other sample.
    pcm_T = tone(15_000, rate, rate // 4)
    assert np.abs(pcm_T[::2]).max() > 0.9
    assert np.abs(resampled(pcm_T, rate, 128)[200:-200]).max() < 1e-3


def test_the_size_of_the_pieces_does_not_matter():
    pcm_T = RNG.standard_normal(5_000).astype(np.float32)
    whole_T = resampled(pcm_T, 44_100, 5_000)
    for size in (1, 37, 128, 999):
        assert np.array_equal(resampled(pcm_T, 44_100, size), whole_T)

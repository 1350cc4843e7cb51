"""moshi-server's dialect over real sockets, by a client that packs its messages itself."""

import asyncio
import contextlib
import dataclasses
import io
import json
import logging
import re
import sys
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import msgpack
import numpy as np
import pytest
import soundfile
import sphn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

import dsm_jax
from dsm_jax import audio
from dsm_jax.runtime.compile import compilations
from dsm_jax.serving.encoding import pcm16, wav_header
from dsm_jax.serving.moshi import routes, wire
from dsm_jax.serving.outbox import Ended, Started
from dsm_jax.serving.sockets import ClosedError
from dsm_jax.serving.speaking import Said, Sound
from dsm_jax.stt.events import Word, WordEnded, WordStarted
from tests.helpers.serving import post, running, served, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("idle")]
AUDIO = Path(__file__).resolve().parents[1] / "examples/audio"
FRAME = 1920
ASR, TTS = "/api/asr-streaming", "/api/tts_streaming"
SLOTS = 4


@pytest.fixture(scope="module")
def server():
    models = served("stt", "digits", slots=SLOTS), served("tts", "digits-tts")
    with running(*models, idle_s=20.0, page=False) as found:
        yield found


@pytest.fixture(scope="module")
def clips():
    return [audio.read(AUDIO / f"{name}.flac") for name in ("digits_jackson", "digits_lucas")]


@pytest.fixture(scope="module")
def wanted(clips):
    return dsm_jax.transcribe(dsm_jax.load("digits"), clips)


@pytest.fixture(scope="module")
def speaker():
    return dsm_jax.load("digits-tts")


def pack(type: str, **fields) -> bytes:
    return msgpack.packb({"type": type, **fields}, use_single_float=True)


async def receive(socket, until: str | None = None) -> list[dict]:
    """Return the messages up to one of a type, or to the close."""
    found = []
    with contextlib.suppress(ConnectionClosed):
        while not found or found[-1]["type"] != until:
            found.append(msgpack.unpackb(await asyncio.wait_for(socket.recv(), 60)))
    return found


async def transcribed(url: str, pcm, *, size: int = FRAME, dtype=np.float32, flush: bool = False) -> list[dict]:
    async with connect(url + ASR, max_size=None) as socket:
        for first in range(0, len(pcm), size):
            values = np.asarray(pcm[first : first + size])
            await socket.send(msgpack.packb({"type": "Audio", "pcm": values.astype(dtype).tolist()},
                                            use_single_float=dtype == np.float32))  # fmt: skip
        await socket.send(pack("Marker", id=7, flush=flush))
        return await receive(socket, "Marker")


def words(messages: list[dict]) -> list[tuple[str, float, float]]:
    texts = [message for message in messages if message["type"] == "Word"]
    ends = [message for message in messages if message["type"] == "EndWord"]
    return [(w["text"], w["start_time"], e["stop_time"]) for w, e in zip(texts, ends, strict=True)]


def expected(transcript) -> list[tuple[str, float, float]]:
    return [(word.text, word.start, word.end) for word in transcript.words]


@pytest.mark.parametrize(
    "size,dtype", [(FRAME, np.float32), (FRAME, np.float64), (700, np.float32), (24_000, np.float32)]
)
def test_words_are_those_of_transcribe_for_chunks_of_any_size_and_type(server, clips, wanted, size, dtype):
    messages = asyncio.run(transcribed(server.socket_url, clips[0], size=size, dtype=dtype))
    assert words(messages) == expected(wanted[0])
    assert messages[0] == {"type": "Ready"}
    assert messages[-1] == {"type": "Marker", "id": 7}
    assert {tuple(message) for message in messages if message["type"] == "EndWord"} == {("type", "stop_time")}
    steps = [message for message in messages if message["type"] == "Step"]
    assert [step["step_idx"] for step in steps] == list(range(-(-clips[0].size // FRAME)))
    assert all(step["prs"] == [0.0] * 4 for step in steps)
    assert size <= FRAME or max(step["buffered_pcm"] for step in steps) >= size - FRAME


def test_whole_numbers_are_samples_too(server, wanted, clips):
    loud = np.sign(clips[0]) * (np.abs(clips[0]) > 0.05)  # -1, 0 and 1
    found = [asyncio.run(transcribed(server.socket_url, loud, dtype=dtype)) for dtype in (np.int64, np.float32)]
    assert words(found[0]) == words(found[1])
    assert words(found[0])


def test_streams_beside_each_other_are_as_alone_and_nothing_is_compiled(server, clips, wanted):
    async def together():
        calls = [transcribed(server.socket_url, clips[n % 2], size=900 + 500 * n) for n in range(SLOTS)]
        return await asyncio.gather(*calls)

    before = compilations()
    for number, messages in enumerate(asyncio.run(together())):
        assert words(messages) == expected(wanted[number % 2])
    assert compilations() == before


def test_a_full_server_says_so_and_a_slot_that_becomes_free_is_taken(server, clips, wanted):
    async def run():
        held = [await connect(server.socket_url + ASR) for _ in range(SLOTS)]
        for socket in held:
            assert await receive(socket, "Ready") == [{"type": "Ready"}]
        async with connect(server.socket_url + ASR) as socket:
            assert await receive(socket) == [{"type": "Error", "message": "no free channels"}]
            assert (socket.close_code, socket.close_reason) == (1013, "no free channels")
        await held[0].close()
        for _ in range(200):
            if server.server.models[0].engine.used < SLOTS:
                break
            await asyncio.sleep(0.01)
        messages = await transcribed(server.socket_url, clips[0])
        for socket in held[1:]:
            await socket.close()
        return messages

    assert words(asyncio.run(run())) == expected(wanted[0])


def test_a_full_server_of_speech_says_so(server):
    async def run():
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(2):
                holder = await stack.enter_async_context(connect(f"{server.socket_url}{TTS}?format=PcmMessagePack"))
                assert await receive(holder, "Ready") == [{"type": "Ready"}]
            return await spoken(server.socket_url, []), await spoken(server.socket_url, [], "format=Pcm")

    packed, plain = asyncio.run(run())
    assert packed == ([{"type": "Error", "message": "no free channels"}], 1013)
    assert plain == ([], 1013)


@pytest.mark.parametrize("path", [ASR, TTS])
def test_a_client_that_is_not_taken_now_is_asked_to_come_again(server, monkeypatch, path):
    def told(url: str, body: bytes) -> tuple[int, str | None]:
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(url + path, body), timeout=60)
        with refused.value as answer:
            return answer.code, answer.headers["retry-after"]

    body = (AUDIO / "digits_jackson.flac").read_bytes() if path == ASR else b'{"text": "one", "voice": ""}'
    monkeypatch.setattr(server.server, "ready", False)
    assert told(server.url, body) == (503, "1")
    with pytest.raises(InvalidStatus) as refused:
        asyncio.run(connect(server.socket_url + path).__aenter__())
    assert (refused.value.response.status_code, refused.value.response.headers["retry-after"]) == (503, "1")


def test_a_posted_recording_has_a_largest_size_and_a_longest_time(server, monkeypatch):
    limits = dataclasses.replace(server.server.config, max_upload_mb=0.5, max_session_s=2.0)
    monkeypatch.setattr(server.server, "config", limits)
    clip_T = audio.read(AUDIO / "digits_jackson.flac")
    for body, status, said in (
        (bytes(500_001), 413, "the recording is larger than 0.5 MB; send it in parts"),
        (bytes(500_000), 400, "is not audio that can be decoded"),
        (wav_header(24_000) + pcm16(clip_T[:48_001]), 400, "the recording is longer than 2 s; send it in parts"),
        (wav_header(24_000) + pcm16(clip_T[:48_000]), 200, '"text":"three"'),
    ):
        told, answer = post(server.url + ASR, body)
        assert told == status, answer
        assert said in answer


def test_a_client_that_waits_gets_the_slot_that_becomes_free(server):
    async def run():
        held = [await connect(server.socket_url + ASR) for _ in range(SLOTS)]
        async with connect(server.socket_url + ASR + "?wait=1") as socket:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(socket.recv(), 0.3)
            await held[0].close()
            assert await receive(socket, "Ready") == [{"type": "Ready"}]
        for socket in held:
            await socket.close()

    asyncio.run(run())


def test_a_posted_file_is_answered_with_the_words_of_transcribe(server, wanted):
    for name, transcript in zip(("digits_jackson", "digits_lucas"), wanted, strict=True):
        body = (AUDIO / f"{name}.flac").read_bytes()
        request = urllib.request.Request(server.url + ASR, body, {"content-type": "audio/flac"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            found = json.load(answer)
        assert words(found) == expected(transcript)
        fields = {message["type"]: set(message) for message in found}
        assert fields == {"Word": {"type", "text", "start_time"}, "EndWord": {"type", "stop_time"}}


@pytest.mark.parametrize(
    "body,words",
    [
        (b"", "is empty (0 bytes); expected audio"),
        (
            b"not a recording",
            "is not audio that can be decoded: its first bytes are b'not a record'; expected a recording",
        ),
        (b"RIFF", "is not audio that can be decoded: its first bytes are b'RIFF'; expected a recording"),
    ],
)
def test_a_posted_file_that_is_none_is_refused_with_the_reason(server, body, words):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(server.url + ASR, body, method="POST"), timeout=60)
    with refused.value as answer:
        assert answer.code == 400
        assert words in answer.read().decode()
    assert server.server.models[0].engine.used == 0


async def spoken(url: str, pieces: list[str | bytes], query: str = "format=PcmMessagePack") -> tuple[list, int | None]:
    async with connect(f"{url}{TTS}?{query}", max_size=None) as socket:
        for piece in pieces:
            await socket.send(pack("Text", text=piece) if isinstance(piece, str) else piece)
        found = []
        with contextlib.suppress(ConnectionClosed):
            while True:
                data = await asyncio.wait_for(socket.recv(), 60)
                found.append(msgpack.unpackb(data) if "MessagePack" in query else data)
        return found, socket.close_code


def sound(messages: list[dict]) -> np.ndarray:
    return np.concatenate([np.array(m["pcm"], np.float32) for m in messages if m["type"] == "Audio"])


@pytest.mark.parametrize(
    "pieces", [["one two three four"], ["one", "two", "three", "four"], ["one two ", "three four"]]
)
def test_speech_is_that_of_synthesize_and_words_have_times(server, speaker, pieces):
    reference = dsm_jax.synthesize(
        speaker, "one two three four", voice="lucas", options=dsm_jax.SynthesizeOptions(seed=4)
    )
    messages, code = asyncio.run(
        spoken(server.socket_url, [*pieces, pack("Eos")], "format=PcmMessagePack&voice=lucas&seed=4&cfg_alpha=1.5")
    )
    assert messages[0] == {"type": "Ready"}
    assert code == 1000
    # One slot of several is computed with other blocks of products than one alone.
    np.testing.assert_allclose(sound(messages), np.clip(reference.pcm, -0.99, 0.99), atol=2e-6)
    texts = [(m["text"], m["start_s"], m["stop_s"]) for m in messages if m["type"] == "Text"]
    assert texts == [(word.text, word.start, word.end) for word in reference.words]
    assert {len(m["pcm"]) for m in messages if m["type"] == "Audio"} == {FRAME}


def test_plain_text_and_a_zero_byte_are_understood_and_plain_pcm_is_all_that_comes(server, speaker):
    reference = dsm_jax.synthesize(speaker, "seven eight", voice="george")

    async def run():
        async with connect(f"{server.socket_url}{TTS}?format=Pcm&voice=george") as socket:
            await socket.send("seven eight")
            await socket.send(b"\0")
            return b"".join([data async for data in socket]), socket.close_code

    data, code = asyncio.run(run())
    assert code == 1000
    np.testing.assert_allclose(np.frombuffer(data, "<f4"), np.clip(reference.pcm, -0.99, 0.99), atol=2e-6)


def test_posted_text_is_answered_with_a_wav_file(server, speaker):
    body = json.dumps({"text": "nine", "voice": "lucas"}).encode()
    with urllib.request.urlopen(urllib.request.Request(server.url + TTS, body), timeout=60) as answer:
        assert answer.headers["content-type"] == "audio/wav"
        data = answer.read()
    assert data[4:8] == data[40:44] == b"\xff" * 4
    pcm, rate = soundfile.read(
        io.BytesIO(
            data[:4] + len(data).to_bytes(4, "little") + data[8:40] + (len(data) - 44).to_bytes(4, "little") + data[44:]
        ),
        dtype="int16",
    )
    assert rate == 24_000
    reference = np.clip(dsm_jax.synthesize(speaker, "nine", voice="lucas").pcm, -0.99, 0.99) * 32767
    np.testing.assert_allclose(pcm, reference.astype(np.int16), atol=1)


@pytest.mark.parametrize(
    "pieces,reason",
    [
        (["one \U0001f600"], "which .* encodes as"),
        (['<break time="soon"/>'], "a break that cannot be read"),
        (["a" * 40_000], "a piece of text has 40000 characters; send up to 32000 at a time"),
        (["one"] * 2_000, "this server takes up to 1024, of 4096, in one session"),
        ([pack("Voice", embeddings=[0.0] * 8, shape=[2, 2, 2])], r"the voice has the shape \[2, 2, 2\]"),
        ([pack("Audio", pcm=[0.0])], "the type is 'Audio'; expected one of Text, Voice, Eos"),
        ([b"\xc1"], "the message is not MessagePack"),
    ],
)  # fmt: skip
def test_text_that_cannot_be_said_ends_its_session_alone_and_says_why(server, pieces, reason):
    async def run():
        good = asyncio.ensure_future(spoken(server.socket_url, ["one two", pack("Eos")]))
        bad = await spoken(server.socket_url, [*pieces, pack("Eos")])
        return bad, await good

    (messages, code), (others, good_code) = asyncio.run(run())
    assert messages[-1]["type"] == "Error"
    assert re.search(reason, messages[-1]["message"])
    assert (code, good_code) == (1007, 1000)
    assert [m["text"] for m in others if m["type"] == "Text"] == ["one", "two"]


def test_an_unknown_voice_or_format_is_refused(server):
    messages, code = asyncio.run(spoken(server.socket_url, [], "format=PcmMessagePack&voice=nobody"))
    assert "the voice 'nobody' is unknown; digits-tts has george, jackson" in messages[-1]["message"]
    assert code == 1008
    # Not a word of plain samples is an error's, but for the close code.
    assert asyncio.run(spoken(server.socket_url, [], "format=Pcm&voice=nobody")) == ([], 1008)
    with pytest.raises(InvalidStatus) as refused:
        asyncio.run(spoken(server.socket_url, [], "format=Wav"))
    assert refused.value.response.status_code == 400
    assert b"the format is 'Wav'; expected one of" in refused.value.response.body


@pytest.mark.parametrize("seed", ["-1", "one", str(2**63), "1" + 19 * "0", "1" + 5000 * "0"], ids=len)
def test_a_seed_that_no_generator_takes_is_refused_and_the_server_lives(server, seed):
    with pytest.raises(InvalidStatus) as refused:
        asyncio.run(spoken(server.socket_url, ["one", pack("Eos")], f"format=PcmMessagePack&seed={seed}"))
    assert refused.value.response.status_code in (400, 431)
    _, code = asyncio.run(
        spoken(server.socket_url, ["one", pack("Eos")], f"format=PcmMessagePack&voice=&seed={2**63 - 1}")
    )
    assert code == 1000


@pytest.mark.parametrize(
    "body,status",
    [
        (b'{"text": "one", "voice": "lucas", "x": "' + b"x" * 1_100_000 + b'"}', 413),
        (b"[" * 200_000, 400),
        (b"one", 400),
        (b"{}", 400),
        (b'{"text": 1, "voice": "lucas"}', 400),
        (b'{"text": "one", "voice": 1}', 400),
        (b'{"text": "one", "voice": "nobody"}', 400),
    ],
)
def test_a_posted_text_that_is_none_or_too_large_is_refused(server, body, status):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(server.url + TTS, body), timeout=60)
    with refused.value as answer:
        assert answer.code == status


def test_a_posted_text_that_is_not_said_to_its_end_is_refused_with_the_reason(server, monkeypatch):
    async def failing(*_):
        raise dsm_jax.SpeechError("the text cannot be said")
        yield

    monkeypatch.setattr(routes, "spoken", failing)
    assert post(server.url + TTS, b'{"text": "one", "voice": ""}') == (400, "the text cannot be said")


def test_a_client_that_wants_pauses_is_refused_by_a_model_without_them(server):
    async def run():
        async with connect(f"{server.socket_url}{ASR}?pauses=1") as socket:
            return await receive(socket), socket.close_code

    (error,), code = asyncio.run(run())
    assert error["type"] == "Error"
    assert error["message"].startswith("digits has no pause heads, which predict pauses; choose a model that has them")
    assert code == 1008


def test_an_end_without_text_ends_the_session(server):
    messages, code = asyncio.run(spoken(server.socket_url, [pack("Eos")]))
    assert (messages, code) == ([{"type": "Ready"}], 1000)


def test_opus_is_refused_by_a_server_without_its_package(server, monkeypatch):
    monkeypatch.setitem(sys.modules, "sphn", None)
    messages, code = asyncio.run(spoken(server.socket_url, [], "format=OggOpusMessagePack"))
    assert "Ogg Opus needs the package sphn" in messages[-1]["message"]
    assert code == 1008


def test_opus_is_heard_and_spoken(server):
    messages, code = asyncio.run(
        spoken(server.socket_url, ["one two", pack("Eos")], "format=OggOpusMessagePack&voice=lucas")
    )
    assert code == 1000
    pages = [m["data"] for m in messages if m["type"] == "OggOpus"]
    assert all(isinstance(page, list) and page for page in pages)
    reader = sphn.OpusStreamReader(24_000)
    pcm = [piece for page in pages if (piece := reader.append_bytes(bytes(page))) is not None]
    assert sum(np.size(piece) for piece in pcm) > 15 * FRAME

    # Without a format the pages come as they are.
    plain, code = asyncio.run(spoken(server.socket_url, ["one two", pack("Eos")], "voice=lucas"))
    assert code == 1000
    assert (plain[0][:4], plain[0][28:36]) == (b"OggS", b"OpusHead")
    same = sphn.OpusStreamReader(24_000)
    plain_pcm = [piece for page in plain if (piece := same.append_bytes(page)) is not None]
    assert sum(np.size(piece) for piece in plain_pcm) == sum(np.size(piece) for piece in pcm)

    async def heard():
        writer = sphn.OpusStreamWriter(24_000)
        async with connect(server.socket_url + ASR) as socket:
            clip = audio.read(AUDIO / "digits_jackson.flac")
            for first in range(0, clip.size - FRAME, FRAME):
                data = list(writer.append_pcm(clip[first : first + FRAME]))
                for part in (data[:50], data[50:]):  # a message may end within a page
                    await socket.send(pack("OggOpus", data=part))
            await socket.send(pack("Marker", id=1, flush=True))
            return await receive(socket, "Marker")

    assert [w[0] for w in words(asyncio.run(heard()))] == [
        "three",
        "one",
        "four",
        "one",
        "five",
        "nine",
        "two",
        "six",
        "five",
    ]


NOISE = st.one_of(
    st.binary(max_size=60),
    st.builds(
        lambda data, at, value: data[: at % len(data)] + bytes([value]) + data[at % len(data) + 1 :],
        st.sampled_from(
            [pack("Audio", pcm=[0.5] * 20), pack("Marker", id=3), pack("Init"), pack("OggOpus", data=[1, 2])]
        ),
        st.integers(0, 1_000),
        st.integers(0, 255),
    ),
    st.text(max_size=20),
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(messages=st.lists(NOISE, min_size=1, max_size=12))
def test_noise_costs_only_the_session_that_sends_it(server, caplog, messages):
    async def run():
        async with connect(server.socket_url + ASR) as socket:
            with contextlib.suppress(ConnectionClosed):
                for message in messages:
                    await socket.send(message)
                await socket.send(b"\xc1")  # so that each session is refused in the end
            return await receive(socket), socket.close_code

    server.wait_until_idle()  # or the four sessions before this one may hold all slots yet
    with caplog.at_level(logging.ERROR):
        found, code = asyncio.run(run())
    assert found[-1]["type"] == "Error"
    assert code in (1003, 1007)
    assert not caplog.records


def test_a_message_has_a_largest_size_and_is_not_compressed(server):
    async def run():
        async with connect(server.socket_url + ASR) as socket:
            assert "sec-websocket-extensions" not in socket.response.headers
            with contextlib.suppress(ConnectionClosed):  # while it is sent
                await socket.send(bytes(4 * 2**20 + 1))
            await receive(socket)
            return socket.close_code

    assert asyncio.run(run()) == 1009


def test_after_all_noise_words_are_as_before(server, clips, wanted):
    assert words(asyncio.run(transcribed(server.socket_url, clips[0]))) == expected(wanted[0])
    wait_for(lambda: server.server.models[0].engine.used == 0)


def test_modules_and_builds_are_listed_as_moshi_lists_them(server):
    with urllib.request.urlopen(server.url + "/api/modules_info") as answer:
        rows = json.load(answer)
    assert [row["type"] for row in rows] == ["batched_asr", "py"]
    assert [row["path"] for row in rows] == [ASR, TTS]
    assert (rows[0]["used_slots"], rows[0]["total_slots"]) == ("0", str(SLOTS))
    with urllib.request.urlopen(server.url + "/api/build_info") as answer:
        assert json.load(answer)["git_describe"].startswith("dsm-jax ")


def test_metrics_have_moshis_names_and_ours(server, clips):
    asyncio.run(transcribed(server.socket_url, clips[0]))
    with urllib.request.urlopen(server.url + "/metrics") as answer:
        assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
        text = answer.read().decode()
    for name in (
        'asr_connect{handler="all"}', 'asr_open_channels{handler="all"}', "asr_model_step_duration_bucket",
        'py_connect{handler="all"}', 'dsm_sessions_started_total{dialect="moshi",model="digits"}',
        'dsm_slots{model="digits"} 4.0', "dsm_compiles_total",
        'dsm_frame_latency_seconds_bucket{le="0.08",model="digits"}',
    ):  # fmt: skip
        assert name in text, name


# Parts.


def word(text: str) -> Word:
    return Word(text, 0.5, 0.9, 0.25)


def test_the_rest_of_a_word_is_told_with_its_end_and_details_replace_it():
    words = routes.WordMessages()
    assert words.started(WordStarted("hel", 0.5)) + words.started(WordStarted("wor", 0.5)) == [
        wire.Word("hel", 0.5),
        wire.Word("wor", 0.5),
    ]
    assert words.ended(WordEnded(word("hello"))) == [wire.Word("lo", 0.5), wire.EndWord(0.9)]
    assert words.ended(WordEnded(word("wor"))) == [wire.EndWord(0.9)]
    assert words.ended(WordEnded(word("again"))) == [wire.Word("again", 0.5), wire.EndWord(0.9)]
    assert routes.WordMessages(details=True).ended(WordEnded(word("one"))) == [wire.EndWord(0.9, "one", 0.5, 0.25)]


def test_a_word_that_was_begun_before_the_session_began_anew_is_forgotten():
    words = routes.WordMessages()
    for message in (WordStarted("two", 0.5), Started()):
        routes.heard_messages(None, words, message)
    told = [routes.heard_messages(None, words, one) for one in (WordStarted("seven", 0.5), WordEnded(word("seven")))]
    assert told == [[wire.Word("seven", 0.5)], [wire.EndWord(0.9)]]


def test_messages_reach_the_session_as_they_were_meant(monkeypatch):
    called = []
    session = SimpleNamespace(mark=lambda id, flush: called.append((id, flush)))
    engine = SimpleNamespace(restart=called.append, wake=lambda: None)
    monkeypatch.setattr(routes, "received", fed(pack("Marker", id=3), pack("Marker", id=4, flush=True), pack("Init")))
    ticket = SimpleNamespace(served=SimpleNamespace(engine=engine))
    asyncio.run(routes._hear(None, None, ticket, session))
    assert called == [(3, False), (4, True), session]
    monkeypatch.setattr(routes, "received", fed("text"))
    with pytest.raises(ClosedError, match="a text message was received; send MessagePack") as closed:
        asyncio.run(routes._hear(None, None, ticket, session))
    assert closed.value.code == 1003


def fed(*messages: str | bytes):
    """Return a reader of a client's messages that has these."""

    async def received(*_):
        for message in messages:
            yield message

    return received


def test_a_text_ends_once_and_takes_nothing_more(monkeypatch):
    called = []
    session = SimpleNamespace(can_start=True, say=called.append, finish=lambda: called.append("finish"))
    ticket = SimpleNamespace(
        start=lambda: called.append("start"), served=SimpleNamespace(engine=SimpleNamespace(wake=lambda: None))
    )
    monkeypatch.setattr(routes, "received", fed("one", pack("Eos"), pack("Text", text="two"), b"\0"))
    asyncio.run(routes._read_text(None, None, ticket, session))
    assert [call for call in called if call != "start"] == ["one", "finish"]


def test_a_voice_of_a_client_is_steps_by_width():
    values = np.arange(6.0).reshape(1, 3, 2)
    for voice in (values, values[0]):
        np.testing.assert_array_equal(routes._voice_XC(voice, voice.shape), [[0, 2, 4], [1, 3, 5]])


def test_sound_is_clipped_as_moshi_clips_it_and_words_are_told_in_messages_alone(monkeypatch):
    loud_T = np.array([2.0, -2.0, 0.5], np.float32)

    class Session:
        async def messages(self):
            for message in (Sound(loud_T), Said("one", 0.1, 0.4), Ended(1007, "why")):
                yield message

    async def run(packed: bool, writer: SimpleNamespace | None = None) -> list[bytes]:
        sent = []

        async def send(_, data: bytes) -> None:
            sent.append(data)

        monkeypatch.setattr(routes, "send", send)
        assert await routes._send_sound(None, Session(), packed, writer) == (1007, "why")
        return sent

    (plain,) = asyncio.run(run(packed=False))
    clipped_T = np.array([0.99, -0.99, 0.5], np.float32)
    np.testing.assert_array_equal(np.frombuffer(plain, "<f4"), clipped_T)
    waiting = SimpleNamespace(header=b"head", write=lambda pcm_T: b"")  # for more samples, to fill a page
    assert asyncio.run(run(packed=False, writer=waiting)) == [b"head"]
    ready, sound, text = map(msgpack.unpackb, asyncio.run(run(packed=True)))
    assert (ready, text) == ({"type": "Ready"}, {"type": "Text", "text": "one", "start_s": 0.1, "stop_s": 0.4})
    np.testing.assert_array_equal(np.array(sound["pcm"], np.float32), clipped_T)

    async def spoken(_server, _served, count: int, _dialect):
        for _ in range(count):
            yield Sound(loud_T)
            yield Said("one", 0.1, 0.4)

    async def wav(count: int) -> list[bytes]:
        model = SimpleNamespace(model=SimpleNamespace(sample_rate=24_000))
        return [data async for data in routes._wav(None, model, count)]

    monkeypatch.setattr(routes, "spoken", spoken)
    head, piece = wav_header(24_000), pcm16(clipped_T)
    assert [asyncio.run(wav(count)) for count in (2, 1, 0)] == [[head + piece, piece], [head + piece], [head]]

"""Clients of the server: words and speech equal the library's own, and every failure has a helpful sentence."""

import asyncio
import contextlib
import doctest
import json
import socket
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dsm_jax
from dsm_jax import audio
from dsm_jax.errors import ConfigError, ServerError, SpeechError, TextError, WireError
from dsm_jax.serving import client
from dsm_jax.serving.client import links
from dsm_jax.serving.client import wire as wire_client
from dsm_jax.serving.moshi import wire
from dsm_jax.stt.events import WordEnded
from tests.helpers.serving import answering, running, served

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("idle")]
AUDIO = Path(__file__).resolve().parents[1] / "examples/audio"
RECORDING = AUDIO / "digits_jackson.flac"


@pytest.fixture(scope="module")
def server():
    with running(served("stt", "digits"), served("tts", "digits-tts"), page=False) as found:
        yield found


@pytest.fixture(scope="module")
def clip():
    return audio.read(RECORDING)


@pytest.fixture(scope="module")
def wanted():
    return dsm_jax.transcribe(dsm_jax.load("digits"), RECORDING)


def heard(words) -> list:
    """Return words without the last digits of their probabilities, which depend on the size of a chunk."""
    return [(word.text, word.start, word.end, round(word.probability, 4)) for word in words]


def test_a_recording_is_transcribed_as_by_the_library(server, wanted):
    found = client.transcribe(server.url, RECORDING)
    assert found.to_dict() == wanted.to_dict()
    assert heard(found.words) == heard(wanted.words)


@pytest.mark.parametrize("size", [700, 1920, 50_000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int16])
def test_words_of_live_audio_are_those_of_the_library_for_chunks_of_any_size_and_type(
    server, clip, wanted, size, dtype
):
    samples = (clip * 32768).astype(np.int16) if dtype == np.int16 else clip.astype(dtype)

    async def run():
        async with client.AsyncTranscription(server.url) as session:
            for first in range(0, samples.size, size):
                await session.send(samples[first : first + size])
            await session.finish()
            events = [event async for event in session]
            return [event.word for event in events if isinstance(event, WordEnded)], session.transcript

    words, transcript = asyncio.run(run())
    assert tuple(words) == transcript.words
    assert [word.text for word in words] == [word.text for word in wanted.words]
    assert dtype == np.int16 or heard(transcript.words) == heard(wanted.words)
    assert transcript.duration == wanted.duration


def test_speech_is_that_of_the_library(server):
    speaker = dsm_jax.load("digits-tts")
    reference = dsm_jax.synthesize(speaker, "three one four", voice="lucas", options=dsm_jax.SynthesizeOptions(seed=4))
    found = client.synthesize(server.url, "three one four", voice="lucas", seed=4)
    np.testing.assert_allclose(found.pcm, np.clip(reference.pcm, -0.99, 0.99), atol=2e-6)
    assert found.words == reference.words
    assert (found.text, found.model) == (reference.text, reference.model)


def test_plain_sessions_give_the_same(server, clip, wanted):
    with client.Transcription(server.url) as session:
        session.send(clip)
        session.mark()
        begun = session.ready()
        session.finish()
        events = [*begun, *session]
        assert heard(session.transcript.words) == heard(wanted.words)
    words = [event.word for event in events if isinstance(event, WordEnded)]
    assert heard(words) == heard(wanted.words)
    with client.Speech(server.url, voice="lucas", seed=4) as speech:
        speech.say("three")
        speech.finish()
        sound = np.concatenate([item for item in speech if isinstance(item, np.ndarray)])
    np.testing.assert_allclose(sound, client.synthesize(server.url, "three", voice="lucas", seed=4).pcm, atol=2e-6)


def test_the_examples_of_the_docstrings_run(server, clip, wanted):
    from dsm_jax.serving.client import moshi_sessions

    for module in (client, links, moshi_sessions):
        for test in doctest.DocTestFinder().find(module):
            if test.examples:
                names: dict = {**vars(module)}
                test.globs = names
                assert doctest.DocTestRunner().run(test, clear_globs=False).failed == 0
                if "words_of" in names:
                    assert names["words_of"](server.url, clip) == [word.text for word in wanted.words]
                if "heard" in names:
                    assert asyncio.run(names["heard"](server.url, clip)) == [word.text for word in wanted.words]
                if "said" in names:
                    assert asyncio.run(names["said"](server.url, "one")).size > 0


def test_several_clients_share_a_server(server, wanted):
    async def run():
        return await asyncio.gather(*(client.transcribe_async(server.url, RECORDING) for _ in range(6)))

    assert all(found.to_dict() == wanted.to_dict() for found in asyncio.run(run()))


# Failures.


def plain_calls() -> list:
    transcription, speech = client.Transcription("host"), client.Speech("host")
    return [
        lambda: transcription.send(np.zeros(1920, np.float32)),
        transcription.mark,
        transcription.finish,
        transcription.ready,
        lambda: list(transcription),
        lambda: speech.say("one"),
        speech.finish,
        lambda: list(speech),
    ]


@pytest.mark.parametrize("number", range(8))
def test_a_plain_session_that_is_not_open_says_so(number):
    with pytest.raises(ConfigError, match="the session is not open; use it in `async with`, or in `with`"):
        plain_calls()[number]()


def test_an_async_session_that_is_not_open_says_so_and_is_not_waited_for():
    async def run():
        session = client.AsyncTranscription("host")
        for call in (session.send(np.zeros(1920, np.float32)), session.ready(), anext(aiter(session))):
            with pytest.raises(ConfigError, match="the session is not open"):
                await asyncio.wait_for(call, 5.0)

    asyncio.run(run())


def test_a_session_that_has_ended_is_not_open_and_is_not_opened_again(server, clip):
    with client.Transcription(server.url) as session:
        session.send(clip)
        with pytest.raises(ConfigError, match="the session was opened before"):
            session.__enter__()
        session.finish()
        assert list(session)
    with pytest.raises(ConfigError, match="the session is not open"):
        session.send(clip)
    with pytest.raises(ConfigError, match="the session was opened before, and one is opened once; make another one"):
        session.__enter__()


def test_a_session_that_was_refused_may_be_opened_later(clip, wanted):
    with running(served("stt", "digits", slots=1), page=False) as found:
        second = client.Transcription(found.url)
        with client.Transcription(found.url), pytest.raises(ServerError, match="has no free slot"):
            second.__enter__()
        found.wait_until_idle()
        with second:
            second.send(clip)
            second.finish()
            assert list(second)
            assert heard(second.transcript.words) == heard(wanted.words)


def fails(call, *words: str) -> None:
    with pytest.raises(ServerError) as refused:
        call()
    for word in words:
        assert word in str(refused.value), str(refused.value)


def transcribe(url: str, **options):
    return client.transcribe(url, np.zeros(1920, np.float32), **options)


def test_nobody_at_the_address_is_said():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fails(lambda: transcribe(f"127.0.0.1:{port}"), "cannot be reached (Connection refused)", "dsm-jax serve")


@pytest.mark.parametrize(
    "url",
    [
        "ftp://a",
        "http://",
        "http://user:secret@host",
        "http://a:b",
        "http://exa mple",
        "http://host/a b",
        "http://a..b",
        "http://\udcff",
    ],
)
def test_what_is_no_address_is_refused_and_not_repeated(url):
    with pytest.raises(ConfigError, match="this is no address of a server") as refused:
        client.AsyncTranscription(url)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    "status,kind,body,words",
    [
        (200, "text/html", b"<html>", "answered with a web page"),
        (404, "text/html", b"<html>", "answered with a web page"),
        (200, "text/plain", b"ok", "did not answer in JSON"),
        (200, "application/json", b"{}", "has no model that transcribes; those there are: none"),
        (200, "application/json", b"[1]", "does not list its models"),
        (302, "text/plain", b"", "answered with status 302"),
        (401, "text/plain", b"", "asks for a key"),
        (403, "text/plain", b"not this page", "refuses this client (403): not this page"),
        (404, "text/plain", b"Not Found", "has no /api/modules_info (404)"),
        (503, "text/plain", b"draining", "takes no more sessions now (503): draining; try again later"),
        (500, "application/json", b'{"error": {"message": "broken"}}', "refused the request (500): broken"),
    ],
)
def test_an_answer_that_is_no_servers_of_speech_is_told_in_a_sentence(status, kind, body, words):
    with answering(status, kind, body) as url:
        fails(lambda: transcribe(url), words)


@pytest.mark.parametrize("path", ["/api/asr-streaming", "/no"])
def test_refused_handshakes_are_told_too(server, path):
    async def run():
        async with links.socket(links.address(server.url), path, query={}, api_key=None) as opened:
            await opened.send(b"\xc1")
            while True:
                await opened.recv()

    words = {"/no": "refuses this client (403)", "/api/asr-streaming": "closed the connection midway (1007"}[path]
    fails(lambda: asyncio.run(run()), words)


def test_a_server_with_keys_needs_one_of_them(wanted):
    with running(served("stt", "digits", slots=1), page=False, keys=("right",)) as found:
        assert client.transcribe(found.url, RECORDING, api_key="right").to_dict() == wanted.to_dict()
        for key in (None, "wrong"):
            fails(lambda key=key: transcribe(found.url, api_key=key), "asks for a key")


def test_a_full_server_and_unknown_models_and_voices_are_named(server):
    async def full():
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(5):
                await stack.enter_async_context(client.AsyncTranscription(server.url))

    fails(lambda: asyncio.run(full()), "has no free slot; try again later")
    fails(
        lambda: transcribe(server.url, model="other"), "has no model 'other' that transcribes; those there are: digits"
    )
    fails(
        lambda: client.synthesize(server.url, "one", voice="nobody"), "ended the session: the voice 'nobody' is unknown"
    )
    with pytest.raises(TextError, match=r"half of a character at 4, the last of 'one \\udcff'"):
        client.synthesize(server.url, "one \udcff")
    with pytest.raises(TextError, match="half of a character at 0"):
        client.synthesize(server.url, "one", voice="\udcff")
    fails(lambda: client.synthesize(server.url, "one \U0001f600"), "ended the session:", "encodes as")


def test_aliases_name_models_and_voices_as_in_openais_dialect(wanted):
    aliases = {"whisper-1": "digits", "tts-1": "digits-tts", "alloy": "lucas"}
    with running(served("stt", "digits"), served("tts", "digits-tts"), page=False, aliases=aliases) as found:
        assert client.transcribe(found.url, RECORDING, model="whisper-1").to_dict() == wanted.to_dict()
        speech = client.synthesize(found.url, "three", model="tts-1", voice="alloy", seed=4)
        np.testing.assert_array_equal(speech.pcm, client.synthesize(found.url, "three", voice="lucas", seed=4).pcm)
        sounds = []
        for voice in ("alloy", "lucas"):
            body = json.dumps({"text": "three", "voice": voice}).encode()
            with urllib.request.urlopen(f"{found.url}/api/tts_streaming", body, timeout=60) as answer:
                sounds.append(answer.read())
        assert sounds[0] == sounds[1]
        fails(lambda: transcribe(found.url, model="tts-1"), "has no model 'tts-1' that transcribes", ": digits")


@pytest.mark.parametrize("text", ["", " ", '<break time="0.5s"/>'])
def test_a_text_without_words_is_refused_as_by_the_library(server, text):
    with pytest.raises(SpeechError) as here:
        dsm_jax.synthesize(dsm_jax.load("digits-tts"), text)
    with pytest.raises(SpeechError) as there:
        client.synthesize(server.url, text)
    assert str(there.value) == str(here.value)


# The wire.


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
real = st.floats(allow_nan=False, allow_infinity=False)
samples = st.lists(finite, max_size=40).map(lambda values: np.asarray(values, np.float32))
ids = st.integers(-(2**63), 2**63 - 1)
incoming = st.one_of(
    st.builds(wire.Init),
    st.builds(wire.Eos),
    st.builds(wire.Marker, ids, st.booleans(), st.booleans()),
    st.builds(wire.Audio, samples),
    st.builds(wire.OggOpus, st.binary()),
    st.builds(wire.Text, st.text(st.characters(codec="utf-8"))),
    samples.filter(len).map(lambda values: wire.Voice(values, (len(values),))),
)
outgoing = st.one_of(
    st.builds(wire.Ready),
    st.builds(wire.Word, st.text(st.characters(codec="utf-8")), real),
    st.builds(wire.EndWord, real),
    st.builds(wire.EndWord, real, st.text(st.characters(codec="utf-8")), real, real),
    st.builds(wire.Pause, real, real, real),
    st.builds(wire.Marker, ids),
    st.builds(wire.Step, st.integers(0, 2**40), st.lists(finite, max_size=5).map(tuple), st.integers(0, 2**40)),
    st.builds(wire.Error, st.text(st.characters(codec="utf-8"))),
    st.builds(wire.Text, st.text(st.characters(codec="utf-8")), real, real),
    st.builds(wire.Audio, samples),
    st.builds(wire.OggOpus, st.binary()),
)


def plain(message) -> tuple:
    return type(message), {k: v.tobytes() if isinstance(v, np.ndarray) else v for k, v in vars(message).items()}


@given(incoming)
def test_the_server_reads_what_the_client_writes(message):
    assert plain(wire.decode(wire_client.encode(message), [*wire.TO_TRANSCRIBE, *wire.TO_SPEAK])) == plain(message)


@given(outgoing)
def test_the_client_reads_what_the_server_writes_to_the_byte(message):
    data = wire.encode(message)
    found = wire_client.decode(data)
    assert plain(found) == plain(message)
    assert wire.encode(found) == data


@given(outgoing, st.data())
def test_a_message_that_is_cut_or_followed_by_another_is_refused(message, data):
    whole = wire.encode(message)
    cut = data.draw(st.integers(0, len(whole) - 1))
    for bad in (whole[:cut], whole + whole):
        with pytest.raises(WireError, match="the server's"):
            wire_client.decode(bad)


# Pauses.


def test_a_rule_of_pauses_that_cannot_be_is_refused():
    with pytest.raises(ConfigError, match=r"a horizon of \(0.5, 1.0, 2.0, 3.0\) s"):
        client.AsyncTranscription("host", horizon=4.0)

"""Our clients of OpenAI's dialect: words, turns and speech equal the library's own, and failures have sentences."""

import asyncio
import contextlib
import doctest
import io
import json
from pathlib import Path

import numpy as np
import pytest
import websockets.asyncio.server

import dsm_jax
from dsm_jax import audio
from dsm_jax.errors import AudioError, ConfigError, ServerError, TextError
from dsm_jax.serving import client
from dsm_jax.serving.client import openai, openai_sessions
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


# Whole recordings.


def test_a_file_is_transcribed_as_by_the_library(server, wanted):
    found = openai.transcribe(f"{server.url}/v1", RECORDING, model="digits")
    assert found.to_dict() == wanted.to_dict() | {"pauses": []}
    assert asyncio.run(openai.transcribe_async(server.url, RECORDING, model="digits")) == found


def test_samples_and_open_files_are_sent_as_they_sound(server, clip, wanted):
    for recording in (clip, io.BytesIO(RECORDING.read_bytes())):
        found = openai.transcribe(server.url, recording, model="digits")
        assert found.to_dict() == wanted.to_dict() | {"pauses": [], "audio": None}


def test_options_reach_the_server(server, clip):
    model = dsm_jax.load("digits")
    prompt = dsm_jax.Prompt(text="one two", exclude_from_output=True)
    options = dsm_jax.TranscribeOptions(prompt=prompt, temperature=0.9)
    reference = dsm_jax.transcribe(model, clip, options=options)
    found = openai.transcribe(server.url, clip, model="digits", prompt="one two", temperature=0.9, language="en")
    assert found.text == reference.text
    with pytest.raises(ServerError, match="temperature is '7'; expected a number from 0 to 1"):
        openai.transcribe(server.url, clip, model="digits", temperature=7)


def test_a_servers_words_without_probabilities_have_that_of_their_segment():
    told = {
        "text": "one two",
        "duration": 2.0,
        "words": [{"word": " one", "start": 0.0, "end": 0.5}, {"word": "two", "start": 1.0, "end": 1.5}],
        "segments": [{"start": 0.0, "avg_logprob": -0.5}, {"start": 1.0, "avg_logprob": 0.0}],
    }
    with answering(200, "application/json", json.dumps(told).encode()) as url:
        found = openai.transcribe(url, np.zeros(1920, np.float32), model="whisper-1")
        assert [(word.text, round(word.probability, 3)) for word in found.words] == [("one", 0.607), ("two", 1.0)]
    with answering(200, "application/json", json.dumps(told | {"segments": None}).encode()) as url:
        found = openai.transcribe(url, np.zeros(1920, np.float32), model="whisper-1")
        assert [word.probability for word in found.words] == [0.0, 0.0]


@pytest.mark.parametrize("body", [b"[]", b"{}", b'{"text": "one"}', b'{"text": "", "duration": 1, "words": [1]}'])
def test_an_answer_without_words_is_told(body):
    with answering(200, "application/json", body) as url, pytest.raises(ServerError, match="no word times"):
        openai.transcribe(url, np.zeros(1920, np.float32), model="whisper-1")


@pytest.mark.parametrize("name,said", [("none.wav", "No such file or directory"), (".", "Is a directory")])
def test_a_file_that_cannot_be_read_is_told_before_anything_is_sent(tmp_path, name, said):
    with pytest.raises(AudioError, match=f"cannot be read .{said}.; give a recording"):
        openai.transcribe("127.0.0.1:1", tmp_path / name, model="digits")


def test_refusals_are_sentences(server, clip, tmp_path):
    (tmp_path / "text.wav").write_text("no sound")
    for call, said in {
        lambda: openai.transcribe(server.url, clip, model="other"): "'other'",
        lambda: openai.transcribe(server.url, tmp_path / "text.wav", model="digits"): "refused the request (400): ",
        lambda: openai.synthesize(server.url, "one", model="digits-tts", voice="nobody"): "voice is 'nobody'",
        lambda: openai.synthesize(server.url, " ", model="digits-tts", voice="lucas"): "there is no text",
        lambda: openai.synthesize("http://127.0.0.1:1", "one", model="a", voice="b"): "cannot be reached",
    }.items():
        with pytest.raises(ServerError) as refused:
            call()
        assert said in str(refused.value), str(refused.value)


def test_a_server_with_keys_needs_one_of_them(clip, wanted):
    with running(served("stt", "digits", slots=1), page=False, keys=("right",)) as found:
        assert openai.transcribe(found.url, clip, model="digits", api_key="right").words
        assert listen(found.url, clip, api_key="right")[1] == wanted.text
        for call in (openai.transcribe, listen):
            for key in (None, "wrong"):
                with pytest.raises(ServerError, match="asks for a key"):
                    call(found.url, clip, model="digits", api_key=key)


# Speech.


def test_speech_is_that_of_the_library_in_16_bits(server):
    reference = client.synthesize(server.url, "three one four", voice="lucas")
    found = openai.synthesize(server.url, "three one four", model="digits-tts", voice="lucas")
    np.testing.assert_allclose(found.pcm, reference.pcm, atol=2 / 32768)
    assert (found.sample_rate, found.text) == (24_000, "three one four")
    again = asyncio.run(openai.synthesize_async(server.url, "three one four", model="digits-tts", voice="lucas"))
    np.testing.assert_array_equal(again.pcm, found.pcm)


def test_speech_is_heard_as_it_is_made(server):
    text = "one two three four five six seven eight nine"

    async def run() -> list[np.ndarray]:
        pieces = openai.synthesize_stream_async(server.url, text, model="digits-tts", voice="lucas")
        return [pcm_T async for pcm_T in pieces]

    pieces = asyncio.run(run())
    assert len(pieces) > 3
    whole = openai.synthesize(server.url, text, model="digits-tts", voice="lucas")
    np.testing.assert_array_equal(np.concatenate(pieces), whole.pcm)


# Live audio.


def listen(url: str, pcm_T: np.ndarray, *, size: int = 5_000, model: str = "digits", **options):
    """Return the events of a live session, and its text."""

    async def run():
        async with openai.AsyncTranscription(url, model=model, **options) as session:
            for first in range(0, pcm_T.size, size):
                await session.send(pcm_T[first : first + size])
            await session.finish()
            return [event async for event in session], session.text

    return asyncio.run(run())


@pytest.mark.parametrize("size", [700, 1920, 100_000])
def test_text_of_one_turn_is_that_of_the_library(server, clip, wanted, size):
    events, text = listen(server.url, clip, size=size, turn_detection=None)
    *deltas, last = events
    assert text == wanted.text == "".join(delta.text for delta in deltas) == last.text
    assert (last.start, last.end) == (None, None)
    assert {delta.turn for delta in deltas} == {last.turn}


def test_turns_that_the_server_ends_join_to_the_text_and_have_their_times(server, clip, wanted):
    quiet_T = np.zeros(3 * 24_000, np.float32)
    rule = {"type": "server_vad", "silence_duration_ms": 1500}

    async def run():
        async with openai.AsyncTranscription(server.url, model="digits", turn_detection=rule) as session:
            events = []
            for _ in range(2):
                await session.send(np.concatenate([clip, quiet_T]))
                events += [event async for event in _until_turn(session)]
            await session.finish()
            return events + [event async for event in session], session.text

    events, text = asyncio.run(run())
    turns = [event for event in events if isinstance(event, openai.TurnEnded)]
    assert text == " ".join(turn.text for turn in turns if turn.text) == f"{wanted.text} {wanted.text}"
    for turn in turns:
        deltas = [event.text for event in events if isinstance(event, openai.TurnDelta) and event.turn == turn.turn]
        assert "".join(deltas) == turn.text
    spoken = [turn for turn in turns if turn.text]
    times = [time for turn in spoken for time in (turn.start, turn.end)]
    assert times == sorted(times)
    assert abs(spoken[0].start - wanted.words[0].start) < 0.4


async def _until_turn(session):
    async for event in session:
        yield event
        if isinstance(event, openai.TurnEnded) and event.text:
            return


def test_a_client_ends_turns_where_it_wants(server, clip):
    async def run():
        async with openai.AsyncTranscription(server.url, model="digits", turn_detection=None) as session:
            await session.commit()  # of nothing
            await session.send(clip)
            await session.commit()
            first = await anext(event async for event in session if isinstance(event, openai.TurnEnded))
            await session.send(clip)
            await session.finish()
            return first, [event async for event in session if isinstance(event, openai.TurnEnded)]

    first, rest = asyncio.run(run())
    assert len(rest) == 1
    assert first.text == rest[0].text


def test_a_session_without_audio_ends(server):
    assert listen(server.url, np.zeros(0, np.float32)) == ([], "")


def test_plain_sessions_give_the_same(server, clip, wanted):
    with openai.Transcription(server.url, model="digits", turn_detection=None) as session:
        session.send((clip * 32768).astype(np.int16))
        session.commit()
        session.finish()
        events = list(session)
        assert session.ready() == []
        assert session.text == wanted.text
    assert events[-1].text == wanted.text


def test_what_a_session_cannot_do_is_told(server, clip):
    with pytest.raises(ServerError, match=r"ended the session: .*'other'"):
        listen(server.url, clip, model="other")
    with pytest.raises(ServerError, match=r"ended the session: .*turn_detection.type is 'magic'"):
        listen(server.url, clip, turn_detection={"type": "magic"})
    with pytest.raises(ConfigError, match="the session is not open"):
        asyncio.run(openai.AsyncTranscription(server.url, model="digits").commit())

    async def full():
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(5):
                session = openai.AsyncTranscription(server.url, model="digits")
                await stack.enter_async_context(session)
                await session.send(clip)
            await session.finish()
            async for _ in session:
                pass

    with pytest.raises(ServerError, match="has no free slot; try again later"):
        asyncio.run(full())


UPDATED = {"type": "session.updated"}
_FAILED = "conversation.item.input_audio_transcription.failed"


@pytest.mark.parametrize(
    "events,said",
    [
        (["no event"], "sent a message that is no event"),
        ([{"type": 1}], "sent a message that is no event"),
        ([{"type": "error", "error": {"message": "no such model"}}], "ended the session: no such model"),
        ([UPDATED, {"type": _FAILED, "error": {"message": "too loud"}}], "ended the session: too loud"),
        ([UPDATED, {"type": "error", "error": {}}], "ended the session: no reason was given"),
        ([UPDATED, {"type": "error"}], "sent an event 'error' without its fields"),
        ([UPDATED, {"type": "input_audio_buffer.committed"}], "sent an event 'input_audio_buffer.committed' without"),
        ([UPDATED], "closed the connection midway"),
    ],
)
def test_a_server_of_another_kind_is_told_in_a_sentence(events, said):
    async def serve(socket):
        for event in events:
            await socket.send(event if isinstance(event, str) else json.dumps(event))

    async def run():
        async with websockets.asyncio.server.serve(serve, "127.0.0.1", 0) as web:
            port = web.sockets[0].getsockname()[1]
            async with openai.AsyncTranscription(f"127.0.0.1:{port}", model="a") as session:
                async for _ in session:
                    pass

    with pytest.raises(ServerError) as refused:
        asyncio.run(run())
    assert said in str(refused.value)


def test_events_that_are_not_known_are_passed_over():
    async def serve(socket):
        for type in ("session.created", "rate_limits.updated", "session.updated", "news"):
            await socket.send(json.dumps({"type": type}))
        async for data in socket:
            event = json.loads(data)
            if event["type"] == "input_audio_buffer.commit":
                error = {"code": "input_audio_buffer_commit_empty", "event_id": event.get("event_id")}
                await socket.send(json.dumps({"type": "error", "error": error}))

    async def run():
        async with websockets.asyncio.server.serve(serve, "127.0.0.1", 0) as web:
            port = web.sockets[0].getsockname()[1]
            async with openai.AsyncTranscription(f"127.0.0.1:{port}", model="a") as session:
                await session.finish()
                return [event async for event in session]

    assert asyncio.run(run()) == []


def test_the_example_of_the_docstring_runs(server, clip, wanted):
    names: dict = {**vars(openai)}
    (test,) = [test for test in doctest.DocTestFinder().find(openai_sessions) if test.examples]
    test.globs = names
    assert doctest.DocTestRunner().run(test, clear_globs=False).failed == 0
    assert " ".join(asyncio.run(names["heard"](server.url, clip))) == wanted.text


def test_half_of_a_character_in_an_option_is_told_before_anything_is_sent():
    with pytest.raises(TextError, match="half of a character at 4"):
        openai.transcribe("127.0.0.1:1", np.zeros(1920, np.float32), model="digits", prompt="one \udcff")

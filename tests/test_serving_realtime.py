"""OpenAI's realtime dialect, as the official client and plain sockets see it."""

import asyncio
import base64
import contextlib
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import numpy as np
import openai
import pytest
import soxr
import websockets
from hypothesis import strategies as st
from starlette.websockets import WebSocketDisconnect
from websockets.exceptions import InvalidStatus

import dsm_jax
from dsm_jax import audio
from dsm_jax.serving import sockets
from dsm_jax.serving.access import Keys
from dsm_jax.serving.config import ServerConfig
from dsm_jax.serving.hearing import Heard
from dsm_jax.serving.openai import realtime
from dsm_jax.serving.openai.errors import ApiError
from dsm_jax.serving.openai.realtime import PcmReader
from dsm_jax.serving.openai.realtime_settings import Settings, TurnDetection
from dsm_jax.serving.openai.realtime_turns import Items
from dsm_jax.stt.events import Word, WordEnded, WordStarted
from tests.helpers.serving import Running, running, served, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("idle")]

AUDIO = Path(__file__).resolve().parents[1] / "examples/audio"
RATE = 24_000
PATIENCE_S = 30.0
COMPLETED = "conversation.item.input_audio_transcription.completed"
DELTA = "conversation.item.input_audio_transcription.delta"
LANGUAGE = "session.audio.input.transcription.language"

NAMES = (
    *("type", "audio", "input", "format", "rate", "transcription", "model", "prompt", "turn_detection", "eagerness"),
    *("threshold", "silence_duration_ms", "include", "noise_reduction", "input_audio_transcription"),
)


@pytest.fixture(scope="module")
def server():
    with running(served("stt", "digits"), page=False, aliases={"gpt-4o-transcribe": "digits"}) as found:
        yield found


def samples(name: str, rate: int = RATE) -> np.ndarray:
    """Return a recording as 16-bit samples."""
    return np.rint(np.clip(audio.read(AUDIO / f"{name}.flac", rate), -1, 1) * 32767).astype(np.int16)


def text_of(pcm_T: np.ndarray) -> str:
    return dsm_jax.transcribe(dsm_jax.load("digits"), pcm_T).text


def update(turns: dict | None = None, rate: int = RATE, **transcription) -> dict:
    given = {"turn_detection": turns, "format": {"type": "audio/pcm", "rate": rate}, "transcription": transcription}
    return {"type": "session.update", "session": {"type": "transcription", "audio": {"input": given}}}


def append(pcm_T: np.ndarray) -> dict:
    return {"type": "input_audio_buffer.append", "audio": base64.b64encode(pcm_T.tobytes()).decode()}


class Client:
    """A client that speaks the dialect by hand."""

    def __init__(self, socket):
        self.socket = socket

    async def say(self, *events: dict) -> None:
        for event in events:
            await self.socket.send(json.dumps(event))

    async def hear(self) -> dict:
        event = json.loads(await asyncio.wait_for(self.socket.recv(), PATIENCE_S))
        assert event["event_id"].startswith("event_")
        return event

    async def until(self, type: str) -> list[dict]:
        """Return the events up to the first of a type."""
        events = [await self.hear()]
        while events[-1]["type"] != type:
            assert events[-1]["type"] != "error", events[-1]
            events.append(await self.hear())
        return events


@contextlib.asynccontextmanager
async def connected(server: Running, query: str = "?intent=transcription", **options):
    async with websockets.connect(f"{server.socket_url}/v1/realtime{query}", **options) as socket:
        client = Client(socket)
        assert (await client.hear())["type"] == "session.created"
        yield client


def talk(server: Running, conversation, **options) -> None:
    async def run() -> None:
        async with connected(server, **options) as client:
            await conversation(client)

    asyncio.run(run())


# The official client.


def test_the_official_client_gets_the_words_of_transcribe(server):
    pcm_T = samples("digits_jackson")

    async def run() -> None:
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none")
        async with client, client.realtime.connect(extra_query={"intent": "transcription"}) as connection:
            created = await connection.recv()
            assert created.type == "session.created"
            assert created.session.type == "transcription"
            await connection.session.update(session=update(model="gpt-4o-transcribe", language="en")["session"])
            changed = await connection.recv()
            assert changed.type == "session.updated"
            assert changed.session.audio.input.turn_detection is None
            assert changed.session.audio.input.transcription.model == "gpt-4o-transcribe"
            for at in range(0, pcm_T.size, 2_000):
                await connection.input_audio_buffer.append(audio=append(pcm_T[at : at + 2_000])["audio"])
            await connection.input_audio_buffer.commit()
            events = []
            async for event in connection:
                events.append(event)
                if event.type == COMPLETED:
                    break
        committed = next(event for event in events if event.type == "input_audio_buffer.committed")
        assert committed.previous_item_id is None
        assert {event.item_id for event in events} == {committed.item_id}
        assert "".join(event.delta for event in events if event.type == DELTA) == events[-1].transcript
        assert events[-1].transcript == text_of(pcm_T) == "three one four one five nine two six five"
        assert events[-1].usage.seconds == pytest.approx(pcm_T.size / RATE, abs=1e-3)

    asyncio.run(run())


# Commits.


def test_items_of_a_client_that_is_ahead_are_those_of_one_that_waits(server):
    first_T, second_T = samples("digits_jackson"), samples("digits_lucas")
    wanted = [text_of(first_T), text_of(second_T)]

    async def ahead(client: Client) -> None:
        await client.say(update(), append(first_T), {"type": "input_audio_buffer.commit"}, append(second_T))
        await client.say({"type": "input_audio_buffer.commit"})
        events = [*await client.until(COMPLETED), *await client.until(COMPLETED)]
        assert [event["transcript"] for event in events if event["type"] == COMPLETED] == wanted
        committed = [event for event in events if event["type"] == "input_audio_buffer.committed"]
        assert committed[1]["previous_item_id"] == committed[0]["item_id"]
        for one, text in zip(committed, wanted, strict=True):
            deltas = [
                event["delta"] for event in events if event["type"] == DELTA and event["item_id"] == one["item_id"]
            ]
            assert "".join(deltas) == text

    async def waits(client: Client) -> None:
        await client.say(update())
        for pcm_T, text in zip((first_T, second_T), wanted, strict=True):
            await client.say(append(pcm_T), {"type": "input_audio_buffer.commit"})
            assert (await client.until(COMPLETED))[-1]["transcript"] == text

    talk(server, ahead)
    talk(server, waits)


def test_an_empty_commit_is_an_error_and_the_session_lives(server):
    pcm_T = samples("digits_lucas")

    async def conversation(client: Client) -> None:
        await client.say({"type": "input_audio_buffer.commit", "event_id": "mine"})
        error = await client.hear()
        assert error["error"]["code"] == "input_audio_buffer_commit_empty"
        assert error["error"]["event_id"] == "mine"
        await client.say(update(), append(pcm_T), {"type": "input_audio_buffer.commit"})
        assert (await client.until(COMPLETED))[-1]["transcript"] == text_of(pcm_T)
        await client.say({"type": "input_audio_buffer.commit"})
        assert (await client.hear())["error"]["message"] == (
            "the input audio buffer is empty: nothing was appended since the last commit; append audio first"
        )

    talk(server, conversation)


def test_what_is_cleared_is_not_told(server):
    pcm_T = samples("digits_jackson")

    async def conversation(client: Client) -> None:
        await client.say(update(), append(pcm_T), {"type": "input_audio_buffer.clear"})
        await client.say(append(samples("digits_lucas")), {"type": "input_audio_buffer.commit"})
        events = await client.until(COMPLETED)
        types = [event["type"] for event in events]
        cleared = types.index("input_audio_buffer.cleared")
        later = events[cleared + 1 :]
        assert "".join(event["delta"] for event in later if event["type"] == DELTA) == later[-1]["transcript"]
        assert later[-1]["transcript"] == text_of(samples("digits_lucas"))
        await client.say({"type": "input_audio_buffer.clear"})
        assert (await client.hear())["type"] == "input_audio_buffer.cleared"

    talk(server, conversation)


# Turns.


def test_the_server_ends_turns_at_silences(server):
    gap_T = np.zeros(3 * RATE, np.int16)
    parts = samples("digits_jackson"), samples("digits_lucas")
    pcm_T = np.concatenate([parts[0], gap_T, parts[1], gap_T])
    wanted = [text_of(part) for part in parts]

    async def conversation(client: Client) -> None:
        await client.say(update({"type": "server_vad", "silence_duration_ms": 1_200}))
        for at in range(0, pcm_T.size, 1_920):
            await client.say(append(pcm_T[at : at + 1_920]))
        await client.until("session.updated")
        first, second = await client.until(COMPLETED), await client.until(COMPLETED)
        for events, text in ((first, wanted[0]), (second, wanted[1])):
            types = [event["type"].removeprefix("input_audio_buffer.") for event in events if event["type"] != DELTA]
            assert types == ["speech_started", "speech_stopped", "committed", COMPLETED]
            assert events[0]["type"] == "input_audio_buffer.speech_started"
            assert events[-1]["transcript"] == text
            assert len({event["item_id"] for event in events}) == 1
        assert abs(first[0]["audio_start_ms"] - 100) <= 80  # 0.4 s less the padding of 0.3 s
        stopped = [event["audio_end_ms"] for event in first if "audio_end_ms" in event]
        assert abs(stopped[0] - (7_090 + 1_200)) <= 80
        begins = round(1_000 * (parts[0].size + gap_T.size) / RATE)
        assert abs(second[0]["audio_start_ms"] - (begins + 480 - 300)) <= 160

    talk(server, conversation)


def test_a_turn_is_complete_while_its_client_goes_on_sending(server):
    pcm_T = np.concatenate([samples("digits_lucas"), np.zeros(3 * RATE, np.int16)])

    async def conversation(client: Client) -> None:
        default = await asyncio.wait_for(_default(client), PATIENCE_S)
        assert default == {"type": "server_vad", "threshold": 0.5, "prefix_padding_ms": 300, "silence_duration_ms": 500}
        await client.say(update({"type": "semantic_vad", "eagerness": "high"}))
        for at in range(0, pcm_T.size, 1_920):
            await client.say(append(pcm_T[at : at + 1_920]))
        await client.until("session.updated")
        assert (await client.until(COMPLETED))[-1]["transcript"] == text_of(samples("digits_lucas"))

    talk(server, conversation)


async def _default(client: Client) -> dict:
    await client.say({"type": "session.update", "session": {"type": "transcription"}})
    return (await client.until("session.updated"))[-1]["session"]["audio"]["input"]["turn_detection"]


# Settings.


def test_the_older_shape_is_read_and_answered_in_kind(server):
    pcm_T = samples("digits_lucas")
    session = {"input_audio_format": "pcm16", "input_audio_transcription": {"model": "digits"}, "turn_detection": None,
               "include": ["item.input_audio_transcription.logprobs"]}  # fmt: skip

    async def conversation(client: Client) -> None:
        await client.say({"type": "transcription_session.update", "session": session})
        updated = (await client.until("transcription_session.updated"))[-1]["session"]
        assert {name: updated[name] for name in ("input_audio_format", "turn_detection", "include")} == {
            name: session[name] for name in ("input_audio_format", "turn_detection", "include")
        }
        await client.say(append(pcm_T), {"type": "input_audio_buffer.commit"})
        completed = (await client.until(COMPLETED))[-1]
        assert " ".join(one["token"] for one in completed["logprobs"]) == completed["transcript"] == text_of(pcm_T)

    talk(server, conversation)


def test_a_prompt_steers_from_the_first_event_on(server):
    pcm_T = samples("digits_lucas")
    prompt = dsm_jax.Prompt(text="seven eight", exclude_from_output=True)
    wanted = dsm_jax.transcribe(dsm_jax.load("digits"), pcm_T, options=dsm_jax.TranscribeOptions(prompt=prompt)).text

    async def conversation(client: Client) -> None:
        await client.say(update(prompt="seven eight"), append(pcm_T), {"type": "input_audio_buffer.commit"})
        assert (await client.until(COMPLETED))[-1]["transcript"] == wanted
        await client.say(update(prompt="one"))
        error = (await client.hear())["error"]
        assert error["param"] == "session.audio.input.transcription.prompt"
        assert error["message"] == "the prompt of a session cannot change once it has begun; connect again"

    talk(server, conversation)


def test_samples_of_another_rate_are_resampled(server):
    pcm_T = samples("digits_jackson", 16_000)

    async def conversation(client: Client) -> None:
        await client.say(update(rate=16_000), *(append(pcm_T[at : at + 777]) for at in range(0, pcm_T.size, 777)))
        await client.say({"type": "input_audio_buffer.commit"})
        completed = (await client.until(COMPLETED))[-1]
        assert completed["transcript"] == text_of(samples("digits_jackson"))
        assert completed["usage"]["seconds"] == pytest.approx(pcm_T.size / 16_000, abs=1e-3)

    talk(server, conversation)


# Messages that are refused.


@pytest.mark.parametrize(
    ("message", "param", "code", "said"),
    [
        ("{", None, "invalid_json", "the event is not JSON"),
        ("", None, "invalid_json", "the event is not JSON"),
        (b"", None, "invalid_json", "a binary message was received; send JSON in text messages"),
        ("[1]", None, "invalid_json", "the event is JSON and no object"),
        (b"\x00", None, "invalid_json", "a binary message was received; send JSON in text messages"),
        ("[" * 100_000, None, "invalid_json", "the event is not JSON"),
        ('{"type": "response.create", "event_id": 5}', "type", "invalid_value", "type is 'response.create'; expected"),
        ('{"type": ["x"]}', "type", "invalid_value", "the event's type is ['x']; expected one of"),
        ('{"type": "\\ud800"}', "type", "invalid_value", "the event's type is '\\ud800'"),
        ('{"type": "input_audio_buffer.append"}', "audio", "invalid_value", "audio is no base64"),
        ('{"type": "input_audio_buffer.append", "audio": "?"}', "audio", "invalid_value", "audio is no base64"),
        ('{"type": "input_audio_buffer.append", "audio": "AAAA"}', "audio", "invalid_value", "audio has 3 bytes"),
        (json.dumps(update(prompt="one \ud800")), "prompt", "invalid_value", "the text has half of a character at 4"),
        ('{"type": "session.update"}', "session", "invalid_value", "session is None; expected an object"),
        (json.dumps(update(language="English")), LANGUAGE, "invalid_value", "expected a code of ISO 639 such as en"),
    ],
)  # fmt: skip
def test_an_event_that_cannot_be_used_is_an_error_and_the_session_lives(server, message, param, code, said):
    async def conversation(client: Client) -> None:
        await client.socket.send(message)
        event = await client.hear()
        assert event["type"] == "error"
        assert set(event["error"]) == {"message", "type", "param", "code", "event_id"}
        assert (event["error"]["param"], event["error"]["code"], event["error"]["event_id"]) == (param, code, None)
        assert said in event["error"]["message"]
        await client.say({"type": "input_audio_buffer.clear"})
        assert (await client.hear())["type"] == "input_audio_buffer.cleared"

    talk(server, conversation)


def test_a_fault_of_ours_before_the_session_has_begun_ends_it_with_1011_and_is_logged(server, monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("planted")

    async def conversation(client: Client) -> None:
        monkeypatch.setattr(Settings, "updated", broken)
        await client.say(update())
        error = (await client.hear())["error"]
        assert (error["message"], error["type"]) == ("the server has failed", "server_error")
        with pytest.raises(websockets.ConnectionClosed):
            await client.hear()
        assert client.socket.close_code == 1011

    talk(server, conversation)
    assert "planted" in caplog.text


def test_a_model_that_is_not_there_is_an_error_and_the_session_lives(server):
    async def conversation(client: Client) -> None:
        await client.say(update(model="gpt-9"))
        error = (await client.hear())["error"]
        assert (error["code"], error["param"]) == ("model_not_found", "session.audio.input.transcription.model")
        # No session has begun with it, so that the prompt can still be chosen.
        await client.say(update(model="digits", prompt="one"))
        told = (await client.hear())["session"]["audio"]["input"]["transcription"]
        assert (told["model"], told["prompt"]) == ("digits", "one")

    talk(server, conversation)


def test_a_session_begins_with_the_first_update(server):
    async def conversation(client: Client) -> None:
        session = {"input_audio_transcription": {"prompt": "one"}}
        await client.say({"type": "transcription_session.update", "session": session})
        updated = await client.hear()
        assert updated["session"]["input_audio_transcription"]["prompt"] == "one"
        await asyncio.to_thread(wait_for, lambda: server.server.models[0].engine.used == 1)

    talk(server, conversation)


# Handshakes.


def refusal(server: Running, status: int, query: str = "?intent=transcription", **options) -> dict:
    async def run() -> dict:
        with pytest.raises(InvalidStatus) as caught:
            async with connected(server, query, **options):
                pass
        assert caught.value.response.status_code == status
        return json.loads(caught.value.response.body)["error"]

    return asyncio.run(run())


def test_a_handshake_is_refused_in_the_dialects_shape(server):
    assert refusal(server, 400, "?intent=conversation")["param"] == "intent"
    assert refusal(server, 404, "?model=gpt-realtime")["code"] == "model_not_found"
    assert refusal(server, 403, origin="http://elsewhere.example")["code"] == "origin_not_allowed"
    keys, server.server.keys = server.server.keys, Keys(["right"])
    try:
        assert refusal(server, 401)["code"] == "invalid_api_key"
        assert refusal(server, 401, subprotocols=["realtime", "openai-insecure-api-key.wrong"])["type"] == (
            "authentication_error"
        )

        async def browser(client: Client) -> None:
            assert client.socket.subprotocol == "realtime"

        talk(server, browser, subprotocols=["realtime", "openai-insecure-api-key.right"])
    finally:
        server.server.keys = keys


def test_a_client_without_a_protocol_gets_none(server):
    async def conversation(client: Client) -> None:
        assert client.socket.subprotocol is None

    talk(server, conversation, query="?model=digits")


def test_a_full_server_says_so_at_the_first_event(server):
    async def run() -> None:
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(server.server.models[0].engine.total):
                client = await stack.enter_async_context(connected(server))
                await client.say(update())
                await client.until("session.updated")
                await client.say({"type": "input_audio_buffer.clear"})
                await client.until("input_audio_buffer.cleared")
            extra = await stack.enter_async_context(connected(server))
            await extra.say({"type": "input_audio_buffer.clear"})
            error = (await extra.hear())["error"]
            assert (error["code"], error["type"]) == ("server_full", "server_error")
            with pytest.raises(websockets.ConnectionClosed) as caught:
                await extra.hear()
            assert caught.value.rcvd.code == 1013
        for _ in range(100):
            if not server.server.models[0].engine.used:
                return
            await asyncio.sleep(0.05)
        raise AssertionError("slots are still held")

    asyncio.run(run())


def test_a_client_that_asks_for_nothing_is_told_and_closed(server, monkeypatch):
    monkeypatch.setattr(server.server, "config", dataclasses.replace(server.server.config, idle_s=0.2))

    async def conversation(client: Client) -> None:
        error = (await client.hear())["error"]
        assert (error["message"], error["type"]) == ("nothing was received for 0 s", "invalid_request_error")
        with pytest.raises(websockets.ConnectionClosed) as caught:
            await client.hear()
        assert caught.value.rcvd.code == 1000

    talk(server, conversation)


def test_a_client_that_lags_is_told_and_closed(server, monkeypatch):
    monkeypatch.setattr(realtime, "OUTBOX", 1)  # a frame and its word are two messages

    async def conversation(client: Client) -> None:
        await client.say(append(samples("digits_lucas")))
        while (event := await client.hear())["type"] != "error":
            pass
        assert event["error"]["message"] == "the client reads too slowly"
        with pytest.raises(websockets.ConnectionClosed) as caught:
            await client.hear()
        assert caught.value.rcvd.code == 1008

    talk(server, conversation)


def test_neighbours_do_not_change_a_session(server):
    wanted = {name: text_of(samples(name)) for name in ("digits_jackson", "digits_lucas")}

    async def one(name: str) -> None:
        async with connected(server) as client:
            await client.say(update(), append(samples(name)), {"type": "input_audio_buffer.commit"})
            assert (await client.until(COMPLETED))[-1]["transcript"] == wanted[name]

    async def run() -> None:
        await asyncio.gather(*(one(name) for name in [*wanted, *wanted]))

    asyncio.run(run())


def test_a_session_that_the_server_ends_gets_its_last_words(server, monkeypatch):
    monkeypatch.setattr(sockets, "LAST_WORDS_S", PATIENCE_S)
    pcm_T = samples("digits_lucas")

    async def conversation(client: Client) -> None:
        await client.say(update(), append(pcm_T))
        # Wait for all of the audio: a drain loses the part that is still on its way.
        while [ticket.session.received for ticket in server.server._tickets] != [pcm_T.size]:
            await asyncio.sleep(0.01)
        (ticket,) = server.server._tickets
        server.server.loop.call_soon_threadsafe(ticket.hurry)
        events = await client.until(COMPLETED)
        assert "input_audio_buffer.committed" in [event["type"] for event in events]
        assert events[-1]["transcript"] == text_of(pcm_T)
        error = (await client.hear())["error"]
        assert (error["message"], error["type"]) == ("the server is shutting down", "server_error")
        with pytest.raises(websockets.ConnectionClosed) as caught:
            await client.hear()
        assert caught.value.rcvd.code == 1001

    talk(server, conversation)


# The rules of turns, without a server.


class Turns:
    """Items with a rule, fed by hand; the text is half a second late."""

    def __init__(self, turns: TurnDetection | None):
        self.marks: list[int] = []
        self.items = Items(self.marks.append, 0.5)
        self.items.turns = turns

    def word(self, text: str, start: float, end: float | None = None) -> list[str]:
        event = WordStarted(text, start) if end is None else WordEnded(Word(text, start, end, 0.9))
        return self.told(self.items.word(event))

    def heard(self, seconds: float, pauses: tuple[float, ...] = (), buffered_s: float = 0.0) -> list[str]:
        return self.told(self.items.heard(Heard(0, pauses, round(buffered_s * RATE), seconds), RATE))

    def told(self, events: list[dict]) -> list[str]:
        names = [event["type"].split(".")[-1] for event in events]
        values = [event.get("transcript", event.get("delta", "")) for event in events]
        return [f"{name} {value.strip()}".strip() for name, value in zip(names, values, strict=True)]


QUIET, TALK = (0.9, 0.9, 0.9, 0.9), (0.1, 0.1, 0.1, 0.1)


def test_a_predicted_pause_flushes_the_turn_and_later_words_are_the_next_ones():
    turns = Turns(TurnDetection(type="semantic_vad"))
    assert turns.heard(0.4, QUIET) == []  # nobody has spoken
    assert turns.word("one", 0.1) == ["speech_started", "delta one"]
    assert turns.heard(1.0, TALK) == []
    assert turns.heard(1.1, QUIET, buffered_s=0.1) == ["speech_stopped", "committed"]
    assert turns.marks == [1]
    assert turns.heard(1.2, QUIET) == []
    assert turns.word("one", 0.1, 0.4) == []
    assert turns.word("two", 0.6) + turns.word("two", 0.6, 0.9) == ["delta two"]
    assert turns.told(turns.items.marked()) == ["completed one two"]
    assert turns.heard(1.3, QUIET) == []  # the pause has ended one turn already
    assert turns.word("three", 2.0) == ["speech_started", "delta three"]


def test_the_head_follows_the_silence_that_is_asked_for():
    asked = {0: 0, 500: 0, 501: 1, 1_000: 1, 1_500: 2, 2_000: 2, 3_000: 3, 9_000: 3}
    assert {ms: TurnDetection(silence_duration_ms=ms).head for ms in asked} == asked
    eager = {
        name: TurnDetection(type="semantic_vad", eagerness=name).head for name in ("high", "auto", "medium", "low")
    }
    assert eager == {"high": 1, "auto": 2, "medium": 2, "low": 3}
    turns = Turns(TurnDetection(silence_duration_ms=1_000))
    turns.word("one", 0.1)
    assert turns.heard(1.0, (0.9, 0.1, 0.9, 0.9)) == []
    assert turns.heard(1.1, (0.1, 0.9, 0.1, 0.1)) == ["speech_stopped", "committed"]


def test_a_higher_threshold_of_speech_ends_turns_sooner():
    pauses = (0.3, 0.3, 0.3, 0.3)
    for threshold, ends in ((0.5, False), (0.8, True)):
        turns = Turns(TurnDetection(threshold=threshold, silence_duration_ms=2_000))
        turns.word("one", 0.1)
        assert bool(turns.heard(1.0, pauses)) == ends


def test_a_pause_in_audio_that_arrived_early_ends_the_turn_there():
    turns = Turns(TurnDetection(type="semantic_vad"))
    turns.word("one", 0.1)
    assert turns.heard(1.0, QUIET, buffered_s=20.0) == []
    turns.word("one", 0.1, 0.4)
    assert turns.heard(1.4, TALK, buffered_s=19.6) == []  # text of the audio up to 1.0 s may still come
    assert turns.heard(1.5, TALK, buffered_s=19.5) == ["speech_stopped", "committed", "completed one"]
    assert turns.marks == []


def test_silence_counts_from_the_last_word_and_only_where_the_text_is_known():
    turns = Turns(TurnDetection(silence_duration_ms=500))
    turns.word("one", 0.1)
    assert turns.heard(9.0) == []  # the word is open
    turns.word("one", 0.1, 0.4)
    assert turns.heard(1.35) == []  # a word at 0.87 s would not be known yet
    assert turns.heard(1.43) == ["speech_stopped", "committed", "completed one"]
    assert turns.marks == []
    assert turns.heard(5.0) == []


def test_a_pause_counts_from_its_first_frame_ends_no_word_and_is_of_its_own_turn():
    turns, early = Turns(TurnDetection(type="semantic_vad")), {"buffered_s": 20.0}
    turns.word("one", 0.1, 0.4)
    assert turns.heard(1.0, QUIET, **early) + turns.heard(1.08, QUIET, **early) == []
    assert turns.heard(1.5, TALK, **early) == ["speech_stopped", "committed", "completed one"]
    turns.word("two", 1.6, 2.3)
    assert turns.heard(3.0, TALK, **early) == [], "the pause before the word has ended a turn already"
    assert turns.heard(3.1, QUIET, **early) == []
    turns.word("three", 3.0, 3.5)  # across the pause
    assert turns.heard(3.9, TALK, **early) == []
    (stopped, *_) = turns.items.heard(Heard(0, TALK, 0, 4.0), RATE)
    assert stopped["audio_end_ms"] == 3500


def test_the_client_is_told_where_its_items_begin_and_end_and_in_what_order_they_are():
    items = Items(lambda number: None, 0.5)
    items.turns = TurnDetection(prefix_padding_ms=300, silence_duration_ms=500)
    (started, _) = items.word(WordStarted("one", 0.2))
    assert started["audio_start_ms"] == 0  # and not before the audio
    items.word(WordEnded(Word("one", 0.2, 0.4, 0.9)))
    stopped, committed, completed = items.heard(Heard(0, (), 0, 1.43), RATE)
    assert (stopped["audio_end_ms"], completed["usage"]["seconds"]) == (900, 0.9)
    assert (committed["previous_item_id"], committed["item_id"]) == (None, started["item_id"])
    (started, _) = items.word(WordStarted("two", 1.6))
    assert started["audio_start_ms"] == 1300
    stopped, second = items.heard(Heard(0, QUIET, RATE // 10, 2.0), RATE)
    assert (stopped["audio_end_ms"], second["previous_item_id"]) == (2100, committed["item_id"])
    (third,) = items.commit(5.0)
    assert third["previous_item_id"] == second["item_id"]
    told = [(event["item_id"], event["usage"]["seconds"]) for _ in range(2) for event in items.marked()]
    assert told == [(second["item_id"], 1.2), (third["item_id"], 2.9)]


def test_without_a_rule_only_the_client_ends_items():
    turns = Turns(None)
    assert turns.word("one", 0.1) + turns.word("one", 0.1, 0.4) == ["delta one"]
    assert turns.heard(60.0, QUIET) == []
    assert turns.told(turns.items.commit(60.0)) == ["committed"]
    with pytest.raises(ApiError, match="the input audio buffer is empty"):
        turns.items.commit(60.0)
    assert turns.told(turns.items.finish()) == ["completed one"]


def test_words_of_a_cleared_item_are_dropped_and_those_after_it_are_not():
    turns = Turns(None)
    turns.word("one", 0.1)
    assert turns.told(turns.items.clear(1.0)) == ["cleared"]
    assert turns.word("one", 0.1, 0.4) == []
    assert turns.told(turns.items.commit(2.0)) == ["committed"]
    assert turns.word("two", 0.8) == []  # before the answer to the first mark: of the cleared item
    assert turns.items.marked() == []
    assert turns.word("three", 1.2, 1.5) == ["delta three"]
    assert turns.told(turns.items.marked()) == ["completed three"]
    assert turns.told(turns.items.clear(2.0)) == ["cleared"]
    assert turns.marks == [1, 2]


def test_the_last_words_are_told_when_the_session_ends():
    turns = Turns(TurnDetection())
    turns.word("one", 0.1)
    turns.word("one", 0.1, 0.4)
    assert turns.told(turns.items.finish()) == ["committed", "completed one"]
    assert turns.items.finish() == []


# Settings and samples.


@pytest.mark.parametrize(
    ("session", "param", "said"),
    [
        ({"type": "realtime"}, "session.type", "this server does not converse"),
        ({"audio": []}, "session.audio", "expected an object"),
        ({"audio": {"input": {"format": {"type": "audio/pcmu"}}}}, "session.audio.input.format.type", "'audio/pcm'"),
        ({"audio": {"input": {"format": {"rate": 4_000}}}}, "session.audio.input.format.rate", "from 8000 to 48000"),
        ({"audio": {"input": {"format": {"rate": True}}}}, "session.audio.input.format.rate", "from 8000 to 48000"),
        ({"audio": {"input": {"transcription": {"model": 5}}}}, "session.audio.input.transcription.model", "a string"),
        ({"audio": {"input": {"turn_detection": {"type": "x"}}}}, "session.audio.input.turn_detection.type", "or null"),
        ({"turn_detection": {"threshold": 2}}, "session.turn_detection.threshold", "a probability from 0 to 1"),
        ({"turn_detection": {"silence_duration_ms": -1}}, "session.turn_detection.silence_duration_ms", "from 0 to"),
        ({"turn_detection": {"eagerness": ["x"]}}, "session.turn_detection.eagerness", "one of low, medium, auto"),
        ({"input_audio_format": "g711_ulaw"}, "session.input_audio_format", "expected 'pcm16'"),
        ({"include": ["x"]}, "session.include", "expected a list of"),
    ],
)  # fmt: skip
def test_a_setting_that_is_not_supported_is_named(session, param, said):
    with pytest.raises(ApiError) as caught:
        Settings().updated(session)
    assert caught.value.param == param
    assert said in str(caught.value)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["audio/pcm", "semantic_vad", "x", ""]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=3),
    max_leaves=12,
)


@hypothesis.given(VALUES)
@hypothesis.settings(max_examples=500, deadline=None)
def test_any_update_gives_settings_or_an_error_of_the_dialect(session):
    try:
        settings = Settings().updated(session)
    except ApiError:
        return
    assert 8_000 <= settings.rate <= 48_000
    assert settings.turns is None or 0 <= settings.turns.head <= 3
    json.dumps(settings.to_dict("x", "digits", flat=False))


def test_settings_that_an_update_leaves_out_stay():
    first = Settings().updated(update({"type": "semantic_vad"}, 16_000, model="digits", prompt="x")["session"])
    second = first.updated({"type": "transcription", "audio": {"input": {"transcription": {"language": "en"}}}})
    assert second == Settings(
        model="digits", prompt="x", language="en", rate=16_000, turns=TurnDetection(type="semantic_vad")
    )
    assert second.updated({"turn_detection": None}).turns is None


def test_pieces_are_resampled_as_one_stream():
    pcm_T = samples("digits_jackson", 16_000)
    reader = PcmReader(16_000, RATE)
    pieces = [reader.read(append(pcm_T[at : at + 333])["audio"]) for at in range(0, pcm_T.size, 333)]
    whole_T = soxr.resample(pcm_T.astype(np.float32) / 32768, 16_000, RATE, quality="HQ")
    np.testing.assert_allclose(np.concatenate([*pieces, reader.finish()]), whole_T, atol=1e-6)
    again = [reader.read(append(pcm_T)["audio"]), reader.finish()]
    np.testing.assert_allclose(np.concatenate(again), whole_T, atol=1e-6)


# A session without a server.


class Socket:
    """A socket whose client sends some events, leaves, and can then be told nothing any more."""

    query_params, scope = {}, {"subprotocols": []}

    def __init__(self, *events: dict):
        self.events, self.sent, self.denied = list(events), [], []

    async def accept(self, protocol: str | None) -> None:
        assert protocol is None

    async def receive(self) -> dict:
        if not self.events:
            return {"type": "websocket.disconnect"}
        return {"type": "websocket.receive", "text": json.dumps(self.events.pop(0))}

    async def send_text(self, data: str) -> None:
        if self.sent and not self.events:
            raise WebSocketDisconnect
        self.sent.append(json.loads(data))

    async def send_denial_response(self, response) -> None:
        self.denied.append(response.status_code)


class Models:
    """A server of models of some sample rates, named by them; no session can begin."""

    def __init__(self, *rates: int):
        self.config, self.woken, self.guests = ServerConfig(), [], []
        self.models = [
            SimpleNamespace(
                name=str(rate),
                kind="stt",
                model=SimpleNamespace(sample_rate=rate),
                engine=SimpleNamespace(wake=lambda rate=rate: self.woken.append(rate)),
            )
            for rate in rates
        ]

    def refusal(self, socket: Socket, *, begins: bool) -> None:
        assert begins

    def find(self, kind: str, name: str | None = None) -> SimpleNamespace | None:
        return next((model for model in self.models if name in (None, model.name)), None)

    @contextlib.contextmanager
    def guest(self):
        self.guests.append("here")
        yield
        self.guests.append("gone")

    async def until_draining(self) -> None:
        await asyncio.Event().wait()


def test_a_server_that_does_not_transcribe_refuses_the_handshake():
    socket = Socket()
    asyncio.run(realtime.transcribe_socket(socket, Models()))
    assert (socket.denied, socket.sent) == ([404], [])


@pytest.mark.parametrize("events", [(), (update(),)], ids=["without a word", "before its answer"])
def test_a_client_that_leaves_before_its_session_begins_is_no_fault(events, caplog):
    socket = Socket(*events)
    server = Models(RATE)
    asyncio.run(realtime.transcribe_socket(socket, server))
    assert [event["type"] for event in socket.sent] == ["session.created"]
    assert server.guests == ["here", "gone"], "a server that ends waits for its guests"
    assert caplog.records == []


def test_an_update_changes_the_model_and_what_the_samples_are_read_for():
    server, pushed = Models(24_000, 16_000), []

    async def conversation() -> None:
        session, hearing = realtime._Session(Socket({}), server, server.models[0]), SimpleNamespace(push=pushed.append)
        await session._update(update(model="16000"), "session.update")
        session._hearing = hearing
        for rate, size in ((24_000, 12_000), (8_000, 4_000)):
            session._push(hearing, session._samples.read(append(np.ones(size, np.int16))["audio"]))
            # Samples that are left of one rate come before those of the next.
            await session._update(update(model="16000", rate=8_000), "session.update")
            session._push(hearing, session._samples.finish())
            assert sum(pcm_T.size for pcm_T in pushed) == 8_000, rate
            pushed.clear()
        assert set(server.woken) == {16_000}

    asyncio.run(conversation())

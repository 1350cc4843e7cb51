"""A model with pause heads over the server: its predictions in each dialect, and the turns that they end."""

import asyncio
import base64
import json

import msgpack
import numpy as np
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

import dsm_jax
from dsm_jax.serving import client
from dsm_jax.stt.events import PAUSE_HORIZONS, Pause
from dsm_jax.stt.words import VadOptions
from tests.helpers import stt_model
from tests.helpers.serving import running, served

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("idle")]
FRAME = 1920
COMPLETED = "conversation.item.input_audio_transcription.completed"


@pytest.fixture(scope="module")
def server():
    with running(served("stt", str(stt_model.CHECKPOINT)), page=False) as found:
        yield found


@pytest.fixture(scope="module")
def clips():
    """Make four recordings of which no two predict the same."""
    clip_T = stt_model.recording()
    noise_T = 0.05 * np.random.default_rng(0).standard_normal(clip_T.size).astype(np.float32)
    return [clip_T, clip_T[::-1].copy(), np.roll(clip_T, clip_T.size // 2), clip_T + noise_T]


async def heard(server, pcm_T: np.ndarray, size: int, *, query: str = "", every_s: float = 0.0) -> list[dict]:
    """Return the messages for a recording that is sent in pieces of some samples."""
    async with connect(f"{server.socket_url}/api/asr-streaming{query}", max_size=None) as socket:
        for at in range(0, pcm_T.size, size):
            piece = {"type": "Audio", "pcm": pcm_T[at : at + size].tolist()}
            await socket.send(msgpack.packb(piece, use_single_float=True))
            await asyncio.sleep(every_s)
        await socket.send(msgpack.packb({"type": "Marker", "id": 1, "flush": True}))
        found = []
        while not found or found[-1]["type"] != "Marker":
            found.append(msgpack.unpackb(await asyncio.wait_for(socket.recv(), 60)))
        return found


def steps(messages: list[dict]) -> np.ndarray:
    return np.array([message["prs"] for message in messages if message["type"] == "Step"])


def words(messages: list[dict]) -> list[str]:
    return [message["text"] for message in messages if message["type"] == "Word"]


def test_predictions_are_those_of_the_model_and_no_other_streams(server, clips):
    """The pieces are of odd sizes, so that the streams are at other frames in each step."""
    sizes = (FRAME, 701, 5_003, 24_000)

    async def all_at_once() -> list[list[dict]]:
        return await asyncio.gather(*(heard(server, *one) for one in zip(clips, sizes, strict=True)))

    told = asyncio.run(all_at_once())
    for messages, clip_T, size in zip(told, clips, sizes, strict=True):
        wanted = np.array(dsm_jax.transcribe(stt_model.model(), clip_T, frames=True).frames.pause_probabilities)
        found = steps(messages)
        assert found.shape == (-(-clip_T.size // FRAME), len(PAUSE_HORIZONS))
        np.testing.assert_allclose(found, wanted[: len(found)], atol=1e-5)
        alone = asyncio.run(heard(server, clip_T, size))
        np.testing.assert_allclose(found, steps(alone), atol=1e-6)
        assert words(messages) == words(alone)
    for number, one in enumerate(told):
        for other in told[number + 1 :]:
            assert np.abs(steps(one) - steps(other)).max() > 0.1, "one stream's predictions could pass for another's"


def test_the_predictions_are_moshis(server, clips):
    found = steps(asyncio.run(heard(server, clips[0], FRAME)))
    wanted = stt_model.expected()["pauses_TH"]
    np.testing.assert_allclose(found, wanted[: len(found)], atol=1e-4)


@pytest.mark.parametrize("rule", [VadOptions(), VadOptions(horizon=0.5, threshold=0.3)])
def test_our_client_gets_the_words_and_pauses_of_transcribe(server, clips, rule):
    """A model that speaks on in silence, as this one does, has its last words there."""
    session_rule = {"horizon": rule.horizon, "threshold": rule.threshold}
    for clip_T in clips:
        local = dsm_jax.transcribe(stt_model.model(), clip_T, options=dsm_jax.TranscribeOptions(vad=rule))
        assert len(local.pauses) > 3
        with client.Transcription(server.url, needs_pauses=True, **session_rule) as session:
            session.send(clip_T)
            session.finish()
            events = list(session)
        stt_model.check_same(session.transcript.words, local.words)
        stt_model.check_same(session.transcript.pauses, local.pauses)
        stt_model.check_same([event for event in events if isinstance(event, Pause)], local.pauses)


def test_a_flush_waits_for_a_word_that_the_model_still_writes(server, clips):
    model, late, found = stt_model.model(), server.server.models[0].service.late, 0
    padding = model.config.lm.existing_text_padding_id
    for frames in range(20, 60):
        clip_T = clips[0][: frames * FRAME]
        tokens = dsm_jax.transcribe(model, clip_T, frames=True).frames.text_tokens
        last = frames + late  # of the silence that a flush adds
        if tokens[last - 1] <= padding:
            continue  # no word is written here
        while tokens[last - 1] > padding:
            last += 1
        written = model.tokenizer.decode([token for token in tokens[:last] if token > padding])
        told = asyncio.run(heard(server, clip_T, FRAME, query="?details=1"))
        assert "".join(message["text"] for message in told if message["type"] == "EndWord") == written.replace(" ", "")
        found += 1
        if found == 3:
            return
    raise AssertionError("the model writes no word where a flush would end: take other recordings")


def test_a_flush_tells_no_pause_of_its_own_silence(server, clips):
    for clip_T in clips:
        half_T = clip_T[: clip_T.size // 2 // FRAME * FRAME]
        told = asyncio.run(heard(server, half_T, FRAME, query="?details=1&threshold=0&horizon=3"))
        times = [message["time"] for message in told if message["type"] == "Pause"]
        assert len(times) > 3
        assert all(time <= half_T.size / 24_000 for time in times), times


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("horizon=4", "a pause of 4.0 s was asked for; the heads know (0.5, 1.0, 2.0, 3.0) s"),
        ("threshold=2", "the threshold of pauses is 2.0; expected a probability from 0 to 1"),
        ("horizon=x", "the rule of pauses is {'horizon': 'x'}; expected numbers"),
    ],
)
def test_a_rule_that_cannot_be_is_refused_before_the_handshake(server, query, words):
    async def run() -> tuple[int, str]:
        try:
            async with connect(f"{server.socket_url}/api/asr-streaming?{query}"):
                return 101, ""
        except InvalidStatus as refused:
            return refused.response.status_code, refused.response.body.decode()

    assert asyncio.run(run()) == (400, words)


def test_only_a_client_that_asks_for_details_is_told_pauses(server, clips):
    for query, told in (("?pauses=1", False), ("?details=1", True)):
        kinds = {message["type"] for message in asyncio.run(heard(server, clips[0], FRAME, query=query))}
        assert ("Pause" in kinds) == told


def turn_end_ms(messages: list[dict], head: int) -> int:
    """Return the end of the first frame at which a model predicts a pause after a word."""
    has_speech, frame = False, 0
    for message in messages:
        if message["type"] == "Step":
            frame += 1
            if has_speech and message["prs"][head] > 0.5:
                return frame * 80
        has_speech = has_speech or message["type"] == "Word"
    raise AssertionError("the model predicts no pause")


@pytest.mark.parametrize(("eagerness", "head"), [("high", 1), ("medium", 2), ("low", 3)])
def test_turns_end_where_a_head_of_the_model_predicts_a_pause(server, clips, eagerness, head):
    clip_T = clips[0]
    wanted_ms = {at: turn_end_ms(asyncio.run(heard(server, clip_T, FRAME)), at) for at in (1, 2, 3)}
    turns = {"type": "semantic_vad", "eagerness": eagerness}
    update = {"type": "session.update", "session": {"audio": {"input": {"turn_detection": turns}}}}

    async def run() -> list[dict]:
        async with connect(f"{server.socket_url}/v1/realtime?intent=transcription", max_queue=None) as socket:
            await socket.send(json.dumps(update))
            samples_T = np.rint(clip_T * 32767).astype("<i2")
            for at in range(0, samples_T.size, FRAME):
                audio = base64.b64encode(samples_T[at : at + FRAME].tobytes()).decode()
                await socket.send(json.dumps({"type": "input_audio_buffer.append", "audio": audio}))
                await asyncio.sleep(0.02)  # or the model would hear what its client has long gone on from
            events = []
            while not events or events[-1]["type"] != COMPLETED:
                events.append(json.loads(await asyncio.wait_for(socket.recv(), 60)))
            return events

    events = asyncio.run(run())
    (stopped,) = (event for event in events if event["type"].endswith("speech_stopped"))
    late_ms = {at: stopped["audio_end_ms"] - ms for at, ms in wanted_ms.items()}
    assert 0 <= late_ms[head] <= 400, late_ms  # of audio that waited when the frame was heard
    assert all(not 0 <= ms <= 400 for at, ms in late_ms.items() if at != head), "another head would do as well"
    assert events[-1]["transcript"]

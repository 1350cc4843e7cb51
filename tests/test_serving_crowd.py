"""Words over a server while eight other clients talk: in every dialect, for samples of any kind and size of message."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgpack
import numpy as np
import openai
import pytest
from websockets.asyncio.client import connect

import dsm_jax
from dsm_jax import audio
from dsm_jax.serving import client
from dsm_jax.serving.client import openai as openai_client
from tests.helpers.serving import post, running, served

pytestmark = pytest.mark.slow
AUDIO = Path(__file__).resolve().parents[1] / "examples/audio"
ASR = "/api/asr-streaming"
OTHERS = 8
PATHS = [AUDIO / f"{name}.flac" for name in ("digits_jackson", "digits_lucas")]


@pytest.fixture(scope="module")
def clips():
    return [audio.read(path) for path in PATHS]


@pytest.fixture(scope="module")
def wanted(clips):
    return dsm_jax.transcribe(dsm_jax.load("digits"), clips)


def spoken(url: str, clip_T: np.ndarray, size: int, dtype: type = np.float32) -> list[tuple[str, float]]:
    """Return the words and their starts for samples that are sent in messages of some size."""

    async def run() -> list[tuple[str, float]]:
        async with connect(f"{url.replace('http', 'ws', 1)}{ASR}?wait=1", max_size=None) as socket:
            for first in range(0, clip_T.size, size):
                piece = {"type": "Audio", "pcm": clip_T[first : first + size].astype(dtype).tolist()}
                await socket.send(msgpack.packb(piece, use_single_float=dtype == np.float32))
            await socket.send(msgpack.packb({"type": "Marker", "id": 1}))
            found = []
            async for data in socket:
                message = msgpack.unpackb(data)
                if message["type"] == "Word":
                    found.append((message["text"], message["start_time"]))
                if message["type"] == "Marker":
                    return found
            raise AssertionError("the server has closed the connection")

    return asyncio.run(run())


@pytest.fixture(scope="module")
def crowded(clips, wanted):
    """Run a server of which eight other clients take eight slots all the while, and get their own words."""
    expected = [[(word.text, word.start) for word in one.words] for one in wanted]
    with running(served("stt", "digits", slots=OTHERS + 1), page=False) as found:
        over, rounds = threading.Event(), [0] * OTHERS

        def talk(number: int) -> None:
            while not over.is_set():
                assert spoken(found.url, clips[number % 2], 900 + 517 * number) == expected[number % 2]
                rounds[number] += 1

        with ThreadPoolExecutor(OTHERS) as pool:
            others = [pool.submit(talk, number) for number in range(OTHERS)]
            yield found, rounds
            over.set()
            for other in others:
                other.result()
        assert all(rounds)


def beside_others(crowded, call: Callable):
    """Return what a call returns, made while others talk."""
    _, rounds = crowded
    before = sum(rounds)
    found = call()
    while sum(rounds) == before:
        found = call()
    return found


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1, 701, 1_920, 24_000, 1 << 20])
def test_words_are_those_of_transcribe_for_samples_in_messages_of_any_size(crowded, clips, wanted, size, dtype):
    clip_T = clips[1][: 2 * 24_000] if size == 1 else clips[1]
    local = dsm_jax.transcribe(dsm_jax.load("digits"), clip_T) if size == 1 else wanted[1]
    found = beside_others(crowded, lambda: spoken(crowded[0].url, clip_T, size, dtype))
    assert found == [(word.text, word.start) for word in local.words]


def test_words_are_those_of_transcribe_for_whole_numbers(crowded, clips):
    loud_T = np.sign(clips[0]) * (np.abs(clips[0]) > 0.05)  # -1, 0 and 1
    local = dsm_jax.transcribe(dsm_jax.load("digits"), loud_T.astype(np.float32))
    assert local.words
    found = beside_others(crowded, lambda: spoken(crowded[0].url, loud_T, 1_921, np.int64))
    assert found == [(word.text, word.start) for word in local.words]


def posted(url: str) -> str:
    code, answer = post(url + ASR, PATHS[0].read_bytes())
    assert code == 200
    return answer


def streamed(url: str) -> str:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none") as dialect, PATHS[0].open("rb") as file:
        events = list(dialect.audio.transcriptions.create(model="digits", file=file, stream=True))
    assert "".join(event.delta for event in events if event.type == "transcript.text.delta") == events[-1].text
    return events[-1].text


def in_turns(url: str) -> str:
    with openai_client.Transcription(f"{url}/v1", model="digits") as session:
        session.send(audio.read(PATHS[0]))
        session.finish()
        return " ".join(event.text for event in session if isinstance(event, openai_client.TurnEnded))


def test_words_are_those_of_transcribe_in_every_dialect(crowded, clips, wanted):
    url, local = crowded[0].url, wanted[0]
    ours = beside_others(crowded, lambda: client.transcribe(url, clips[0], patience_s=60.0))
    assert (ours.words, ours.text) == (local.words, local.text)
    theirs = beside_others(crowded, lambda: openai_client.transcribe(f"{url}/v1", PATHS[0], model="digits"))
    assert [(word.text, round(word.start, 3)) for word in theirs.words] == [
        (word.text, round(word.start, 3)) for word in local.words
    ]
    assert theirs.text == local.text
    told = beside_others(crowded, lambda: posted(url))
    assert [word for word in wanted[0].text.split() if f'"text":"{word}"' in told] == wanted[0].text.split()
    assert beside_others(crowded, lambda: streamed(url)) == local.text
    assert beside_others(crowded, lambda: in_turns(url)) == local.text

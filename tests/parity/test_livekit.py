"""LiveKit's plugin for Kyutai's server, unmodified, against ours: it reports the words of `transcribe`."""

import asyncio
import warnings
from pathlib import Path

import aiohttp
import numpy as np
import pytest
from lasuite.plugins import kyutai
from livekit import rtc
from livekit.agents import stt

import dsm_jax
from dsm_jax import audio
from tests.helpers.serving import running, served

CLIP = Path(__file__).resolve().parents[2] / "examples/audio/digits_jackson.flac"
KEY = "a-key-of-a-room"
SILENCE = 2 * 24_000  # in which the last word comes out: the plugin sends no marker


@pytest.fixture(scope="module")
def server():
    with running(served("stt", "digits", slots=2), page=False, keys=(KEY,)) as found:
        yield found


async def spoken_words(address: str, key: str, pcm_T: np.ndarray, count: int) -> list[str]:
    """Return the words that the plugin reports for samples, once there are `count`."""
    async with aiohttp.ClientSession() as session:
        plugin = kyutai.STT(api_key=key, base_url=f"ws://{address}/api/asr-streaming", http_session=session)
        stream, words = plugin.stream(), []
        samples = (np.concatenate([pcm_T, np.zeros(SILENCE, np.float32)]) * 32767).astype(np.int16)
        for first in range(0, samples.size, 480):  # 20 ms, as a room sends it
            piece = samples[first : first + 480]
            stream.push_frame(rtc.AudioFrame(piece.tobytes(), 24_000, 1, piece.size))
        async for event in stream:
            if event.type == stt.SpeechEventType.FINAL_TRANSCRIPT:
                words.append(event.alternatives[0].text)
                if len(words) == count:
                    break
        await stream.aclose()
        return words


def test_the_plugin_reports_the_words_of_transcribe(server):
    clip_T = audio.read(CLIP)
    wanted = [word.text for word in dsm_jax.transcribe(dsm_jax.load("digits"), clip_T).words]
    with warnings.catch_warnings():
        # The plugin passes an argument in a form that aiohttp has given up.
        warnings.filterwarnings("ignore", "parameter .timeout. of type", DeprecationWarning)
        found = asyncio.run(asyncio.wait_for(spoken_words(server.address, KEY, clip_T, len(wanted)), 120))
    assert found == wanted

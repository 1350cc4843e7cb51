"""Sessions of each kind whose server ends, or whose client leaves."""

import asyncio
import contextlib
import http.client
import json
import time
from pathlib import Path

import msgpack
import numpy as np
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from dsm_jax import audio, checkpoints
from dsm_jax.serving.config import ServerConfig
from dsm_jax.serving.encoding import pcm16, wav_header
from dsm_jax.serving.server import Server
from tests.benchmarks.mutations import form
from tests.helpers import csm_model
from tests.helpers.serving import post, running, served, wait_for

pytestmark = pytest.mark.slow
AUDIO = Path(__file__).resolve().parents[1] / "examples/audio"
ENDING = "the server is shutting down"
RATE = 24_000
TRANSCRIBE = "/api/asr-streaming"


def recording(seconds: float) -> bytes:
    """Return a recording of digits, as long as asked, as a WAV file without a length."""
    clip_T = audio.read(AUDIO / "digits_jackson.flac")
    return wav_header(RATE) + pcm16(np.resize(clip_T, int(seconds * RATE)))


async def until_closed(socket) -> list[str | bytes]:
    found = []
    with contextlib.suppress(ConnectionClosed):
        while True:
            found.append(await asyncio.wait_for(socket.recv(), 30))
    return found


@pytest.fixture(scope="module")
def endings(tmp_path_factory):
    """End a server at once while clients of three kinds are connected; return what each was told."""
    folder = tmp_path_factory.mktemp("csm")
    checkpoints.save(csm_model.random_model(folder), folder / "model")
    with running(served("stt", "digits"), served("tts", str(folder / "model")), page=False) as found:
        hearing, speaking = found.server.models

        async def all_clients():
            async with (
                connect(f"{found.socket_url}/v1/realtime?intent=transcription") as silent,
                connect(f"{found.socket_url}{speaking.settings.path}?format=PcmMessagePack") as unfinished,
            ):
                await silent.recv()
                await unfinished.recv()
                await unfinished.send(msgpack.packb({"type": "Text", "text": "abc def"}))
                upload = asyncio.ensure_future(asyncio.to_thread(post, found.url + TRANSCRIBE, recording(1200)))
                while not hearing.engine.used:
                    await asyncio.sleep(0.01)
                start = time.monotonic()
                asyncio.run_coroutine_threadsafe(found.server.drain(0.0), found.server.loop)
                told = await asyncio.gather(until_closed(silent), until_closed(unfinished), upload)
                return *told, (silent.close_code, unfinished.close_code), time.monotonic() - start

        yield asyncio.run(all_clients())


def test_a_client_without_a_session_is_told_that_the_server_ends(endings):
    silent, _, _, codes, _ = endings
    assert json.loads(silent[-1])["error"]["message"] == ENDING
    assert codes[0] == 1001


def test_a_turn_whose_text_has_not_ended_is_spoken_before_the_server_ends(endings):
    _, unfinished, _, codes, _ = endings
    messages = [msgpack.unpackb(message) for message in unfinished]
    assert "Audio" in {message["type"] for message in messages}
    assert messages[-1] == {"type": "Error", "message": ENDING}
    assert codes[1] == 1001


def test_a_recording_that_is_not_done_is_refused_whole(endings):
    _, _, (code, answer), _, seconds = endings
    assert (code, answer) == (503, f"{ENDING}; send the request again, or to another")
    assert seconds < 8


def test_a_server_without_sessions_ends_after_its_guests():
    async def scene() -> bool:
        server = Server(ServerConfig(), "0")
        with server.guest():
            draining = asyncio.ensure_future(server.drain(0.0))
            await server.until_draining()
            await asyncio.sleep(0.1)
            ended_early = draining.done()
        await asyncio.wait_for(draining, 2.0)
        return ended_early

    assert not asyncio.run(scene())


@pytest.fixture(scope="module")
def server():
    with running(served("stt", "digits", slots=1), served("tts", "digits-tts", slots=1), page=False) as found:
        yield found


@contextlib.contextmanager
def asking(found, path: str, kind: str, body: bytes):
    """Send a request and leave without an answer at the end of the block."""
    connection = http.client.HTTPConnection(found.address)
    connection.request("POST", path, body, {"content-type": kind})
    try:
        yield
    finally:
        connection.close()


WORDS = " ".join(["seven"] * 200)
SPEECH = {"model": "digits-tts", "input": WORDS, "voice": "jackson"}
REQUESTS = {
    "moshi, recording": ("stt", TRANSCRIBE, "audio/wav", recording(1200)),
    "OpenAI, recording": ("stt", "/v1/audio/transcriptions", *form({"model": "digits"}, recording(1200))),
    "OpenAI, events": (
        "stt",
        "/v1/audio/transcriptions",
        *form({"model": "digits", "stream": "true"}, recording(1200)),
    ),
    "moshi, text": ("tts", "/api/tts_streaming", "text/json", json.dumps({"text": WORDS, "voice": ""}).encode()),
    "OpenAI, text": ("tts", "/v1/audio/speech", "application/json", json.dumps(SPEECH).encode()),
}


@pytest.mark.parametrize(("kind", "path", "content_type", "body"), REQUESTS.values(), ids=REQUESTS.keys())
@pytest.mark.usefixtures("idle")
def test_a_client_that_leaves_gives_up_its_slot_or_its_place_in_the_queue(server, kind, path, content_type, body):
    engine = server.server.find(kind).engine
    with asking(server, path, content_type, body):
        wait_for(lambda: engine.used == 1)
        with asking(server, path, content_type, body):
            wait_for(lambda: engine.queued == 1)
        wait_for(lambda: engine.queued == 0)
        assert engine.used == 1, "the first request ended before the second was given up: make it longer"
    wait_for(lambda: engine.used == 0)

"""Send a server's dialects messages with random faults, and count what is not answered as a server should."""

import asyncio
import base64
import collections
import json
import random
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake

PATIENCE_S = 60.0
_AUDIO = (Path(__file__).resolve().parents[2] / "examples/audio/digits_jackson.flac").read_bytes()
_SAMPLES = [round(float(np.sin(t / 9)) * 0.1, 3) for t in range(1920)]
_BOUNDARY = "a-boundary"
# Numbers and names that parsers stumble over.
_NASTY = (
    *(b"\x00", b"\xff" * 4, b"1e999", b"-1", b"NaN", b"null", b"{", b"[" * 40, b'"', b"\xc1", b"\xdd\xff\xff\xff\xff"),
    *(b"\xcb\x7f\xf0\x00\x00\x00\x00\x00\x00", b"9" * 30, b"\xf0\x9f\x98\x80", b"\xed\xa0\x80"),
)


def _packed(**message: Any) -> bytes:
    return msgpack.packb(message, use_single_float=True)


def form(fields: Mapping[str, str], recording: bytes = _AUDIO) -> tuple[str, bytes]:
    """Return the content type and the body of a form with a recording."""
    parts = [f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n' for k, v in fields.items()]
    file = f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="a.flac"\r\n\r\n'
    body = "".join(parts).encode() + file.encode() + recording + f"\r\n--{_BOUNDARY}--\r\n".encode()
    return f"multipart/form-data; boundary={_BOUNDARY}", body


def _event(**event: Any) -> bytes:
    return json.dumps(event).encode()


# By path, messages that a well-behaved client sends; those of OpenAI's dialect are text.
SOCKETS: Mapping[str, tuple[bytes, ...]] = {
    "/api/asr-streaming": (
        _packed(type="Audio", pcm=_SAMPLES),
        _packed(type="Marker", id=3),
        _packed(type="Init"),
        _packed(type="OggOpus", data=b"OggS\0\2"),
    ),
    "/api/tts_streaming?format=PcmMessagePack": (
        _packed(type="Text", text="one two"),
        _packed(type="Voice", embeddings=_SAMPLES[:96], shape=[1, 32, 3]),
        _packed(type="Eos"),
    ),
    "/v1/realtime?intent=transcription": (
        _event(type="session.update", session={"audio": {"input": {"format": {"type": "audio/pcm", "rate": 16000}}}}),
        _event(type="input_audio_buffer.append", audio=base64.b64encode(bytes(960)).decode()),
        _event(type="input_audio_buffer.commit"),
        _event(type="input_audio_buffer.clear"),
    ),
}  # fmt: skip
POSTS: Mapping[str, tuple[str, bytes]] = {
    "/api/asr-streaming": ("application/octet-stream", _AUDIO),
    "/api/tts_streaming": ("application/json", _event(text="one", voice="")),
    "/v1/audio/speech": (
        "application/json",
        _event(model="digits-tts", input="one", voice="jackson", response_format="wav", speed=1.0),
    ),
    "/v1/audio/transcriptions": form({"model": "digits", "response_format": "verbose_json", "temperature": "0"}),
}


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Return a message with one to four faults: bytes changed, cut out, repeated, or replaced by nasty ones."""
    made = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        # Most faults go to the start, where a message's structure is.
        at = chance.randrange(min(len(made), chance.choice((16, 64, 1 << 20))) or 1)
        match chance.randrange(5):
            case 0 if made:
                made[at % len(made)] = chance.randrange(256)
            case 1:
                del made[at : at + chance.randint(1, 16)]
            case 2:
                made[at:at] = chance.choice(_NASTY)
            case 3:
                made[at:at] = made[at : at + chance.randint(1, 64)]
            case _:
                del made[at:]
    return bytes(made)


async def _converse(url: str, path: str, chance: random.Random, counts: collections.Counter[str]) -> None:
    """Send a websocket some messages, most of them mutated, and read until the server or the turn ends."""
    try:
        async with connect(url.replace("http", "ws", 1) + path, open_timeout=PATIENCE_S, max_size=None) as socket:
            reading, aborted = asyncio.ensure_future(_last_message(socket)), False
            try:
                for _ in range(chance.randint(1, 12)):
                    data = chance.choice(SOCKETS[path])
                    data = mutated(data, chance) if chance.random() < 0.8 else data
                    counts["messages"] += 1
                    await socket.send(data, text=path.startswith("/v1"))  # text that may be none
                await asyncio.sleep(chance.random() * 0.1)
            except ConnectionClosed:
                pass
            finally:
                aborted = not reading.done() and chance.random() < 0.5
                if aborted:
                    socket.transport.abort()
                await socket.close()
                last = await asyncio.wait_for(reading, PATIENCE_S)
        if not aborted:
            _judge(socket.protocol, last, counts)
    except TimeoutError:
        counts["unanswered"] += 1
    except InvalidHandshake as error:
        counts["faults"] += "500" in str(error)
    except ConnectionClosed:
        pass


def _judge(protocol: Any, last: str | bytes | None, counts: collections.Counter[str]) -> None:
    """Count an end by the server that is none of its own: without a close frame, by its fault, or without a word."""
    received = protocol.close_rcvd
    if received is None:
        counts["dropped"] += 1
    elif received.code == 1011:
        counts["faults"] += 1
    elif protocol.close_rcvd_then_sent and received.code != 1000:
        counts["refused"] += 1
        counts["silent"] += not _is_error(last)


def _is_error(message: str | bytes | None) -> bool:
    """Tell whether a message is an error of either dialect."""
    if isinstance(message, str):
        return json.loads(message)["type"] == "error"
    return message is not None and msgpack.unpackb(message)["type"] == "Error"


async def _last_message(socket: Any) -> str | bytes | None:
    """Read until the end; return the last message."""
    last = None
    try:
        async for message in socket:
            last = message
    except ConnectionClosed:
        pass
    return last


def _post(url: str, path: str, data: bytes) -> int:
    request = urllib.request.Request(url + path, data, {"content-type": POSTS[path][0]})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            answer.read()
            return answer.status
    except urllib.error.HTTPError as error:
        error.read()
        return error.code


async def _request(url: str, path: str, chance: random.Random, counts: collections.Counter[str]) -> None:
    counts["messages"] += 1
    try:
        status = await asyncio.to_thread(_post, url, path, mutated(POSTS[path][1], chance))
        counts[f"status_{status}"] += 1
        counts["faults"] += status == 500
    except (TimeoutError, OSError):
        counts["unanswered"] += 1


async def attack(url: str, messages: int, good: Callable[[], Any], *, seed: int = 0) -> dict[str, Any]:
    """Send mutated messages in every dialect while a good client works.

    Args:
      url: address of the server.
      messages: at least so many are sent.
      good: starts a coroutine that returns what a good client gets; called again and again.
      seed: of the faults.

    Returns:
      Figures: `messages`, `faults` (a status of 500, or a close code of 1011), `unanswered`, connections that were
      `dropped` without a close frame, refusals as `refused`, of which `silent` ones came without an error's message,
      and the good client's results as `good`, of which `differ` from the first.
    """
    chance, counts, wanted = random.Random(seed), collections.Counter[str](), await good()
    while counts["messages"] < messages:
        ways = [
            *(_converse(url, path, random.Random(chance.random()), counts) for path in SOCKETS),
            *(_request(url, path, random.Random(chance.random()), counts) for path in POSTS),
        ]
        heard, *_ = await asyncio.gather(good(), *ways)
        counts["good"] += 1
        counts["differ"] += heard != wanted
    return {name: counts[name] for name in ("faults", "unanswered", "dropped", "silent", "differ")} | dict(counts)

"""moshi-server's dialect: live transcription and speech over websockets, and whole files over POST.

Source: kyutai-labs/moshi@e6a55d27 rust/moshi-server (`main.rs`, `batched_asr.rs`, `py_module.rs`). The deliberate
differences are listed in docs/serving.md.
"""

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator
from typing import IO, Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.websockets import WebSocket

from dsm_jax.errors import AudioError, ConfigError, DsmError, FullError, SpeechError, WireError
from dsm_jax.serving.access import Refusal
from dsm_jax.serving.answers import begun
from dsm_jax.serving.encoding import pcm16, wav_header
from dsm_jax.serving.hearing import Heard, LiveHearing, Marked
from dsm_jax.serving.moshi import wire
from dsm_jax.serving.moshi.opus import OpusReader, OpusWriter
from dsm_jax.serving.outbox import Ended, Outbox, Started
from dsm_jax.serving.scripts import LiveSpeech
from dsm_jax.serving.server import OUTBOX, Server
from dsm_jax.serving.services import Served
from dsm_jax.serving.sockets import ClosedError, admitted, close, converse, received, send, send_last
from dsm_jax.serving.speaking import LiveVoice, Said, Sound
from dsm_jax.serving.tickets import Ticket
from dsm_jax.serving.uploads import TooLargeError, heard, sound_of, spoken, spooled
from dsm_jax.serving.waiting import client_leaves, unless
from dsm_jax.stt.events import Pause, WordEnded, WordStarted
from dsm_jax.stt.transcriber import Utterance
from dsm_jax.stt.words import VadOptions

FORMATS = ("Pcm", "PcmMessagePack", "OggOpus", "OggOpusMessagePack")
NO_PAUSES = (0.0, 0.0, 0.0, 0.0)  # of a model without pause heads: clients read four numbers
_TEXT_MB = 1.0  # of a body with a text
LOUDEST = 0.99  # as moshi-server clips


class WordMessages:
    """Make moshi's messages of words: the text when a word begins, and the end once it is known.

    A word's start may be told before all of its text is known. The rest is a further `Word` then, as moshi-server has
    it.

    Args:
      details: tell the end of a word with all that is known of it, in place of a further `Word`.
    """

    def __init__(self, *, details: bool = False) -> None:
        self._details = details
        self._told: list[tuple[str, float]] = []  # words that have begun and not ended

    def restarted(self) -> None:
        """Forget words that will never end, as the session has begun anew."""
        self._told.clear()

    def started(self, event: WordStarted) -> list[wire.Outgoing]:
        """Return the messages for a word that begins."""
        self._told.append((event.text, event.start))
        return [wire.Word(event.text, event.start)]

    def ended(self, event: WordEnded) -> list[wire.Outgoing]:
        """Return the messages for a word that has ended."""
        known = self._told.pop(0)[0] if self._told else ""
        word, messages = event.word, []
        if self._details:
            return [wire.EndWord(word.end, word.text, word.start, word.probability)]
        if word.text != known:
            rest = word.text.removeprefix(known)
            messages.append(wire.Word(rest, word.start))
        return [*messages, wire.EndWord(word.end)]

    def paused(self, event: Pause) -> list[wire.Outgoing]:
        """Return the messages for a pause, of which other clients read in the steps."""
        return [wire.Pause(event.time, event.horizon, event.probability)] if self._details else []


def heard_messages(session: LiveHearing, words: WordMessages, message: Any) -> list[wire.Outgoing]:
    """Return moshi's messages for a message of a session."""
    match message:
        case Started():
            words.restarted()
            return [wire.Ready()]
        case Heard():
            return [wire.Step(message.index, message.pauses or NO_PAUSES, message.buffered)]
        case Marked():
            return [wire.Marker(message.id)]
        case WordStarted():
            return words.started(message)
        case WordEnded():
            return words.ended(message)
        case Pause():
            return words.paused(message)
    return []


def has_pause_heads(served: Served) -> bool:
    """Tell whether a model predicts pauses."""
    lm = served.model.config.lm
    return bool(lm and lm.extra_heads_num_heads)


async def transcribe_socket(socket: WebSocket, server: Server, served: Served) -> None:
    """Transcribe a live stream."""
    if not await admitted(server, socket, refusal_response):
        return
    try:
        utterance = _utterance(served, socket)
    except ConfigError as error:
        await socket.send_denial_response(PlainTextResponse(str(error), 400))
        return
    await socket.accept()
    if socket.query_params.get("pauses") == "1" and not has_pause_heads(served):
        reason = f"{served.name} has no pause heads, which predict pauses; choose a model that has them, or do without"
        await send_last(socket, wire.encode(wire.Error(reason)))
        return await close(socket, 1008, reason)
    waits = socket.query_params.get("wait") == "1"
    session = LiveHearing(served.service, Outbox(OUTBOX), utterance, is_file=waits)
    try:
        async with server.session(served, session, "moshi") as ticket:
            ticket.start()
            await converse(
                socket,
                ticket,
                lambda: _hear(socket, server, ticket, session),
                lambda: _tell(socket, ticket, session),
                lambda reason: wire.encode(wire.Error(reason)),
            )
    except FullError as error:
        await send_last(socket, wire.encode(wire.Error(str(error))))
        await close(socket, 1013, "no free channels")


def _utterance(served: Served, socket: WebSocket) -> Utterance | None:
    """Read the rule of a client's pauses; None where it names none.

    Raises:
      ConfigError: a rule that cannot be.
    """
    given = {name: socket.query_params[name] for name in ("horizon", "threshold") if name in socket.query_params}
    try:
        rule = {name: float(value) for name, value in given.items()}
    except ValueError:
        raise ConfigError(f"the rule of pauses is {str(given)[:80]}; expected numbers") from None
    return served.service.with_pauses(VadOptions(**rule)) if rule else None


async def _hear(socket: WebSocket, server: Server, ticket: Ticket, session: LiveHearing) -> None:
    engine, opus = ticket.served.engine, None
    async for data in received(socket, server, ticket):
        if isinstance(data, str):
            raise ClosedError(1003, "a text message was received; send MessagePack in binary messages", "bad message")
        match wire.decode(data, wire.TO_TRANSCRIBE):
            case wire.Audio(pcm):
                session.push(pcm)
            case wire.OggOpus(pages):
                opus = opus or OpusReader(session.transcriber.model.sample_rate)
                for pcm in opus.read(pages):
                    session.push(pcm)
            case wire.Marker(id, flush, end):
                session.mark(id, flush=flush and not end)  # the end has more silence of its own
                if end:
                    session.finish()
            case wire.Init():
                engine.restart(session)
        engine.wake()


async def _tell(socket: WebSocket, ticket: Ticket, session: LiveHearing) -> tuple[int, str | None]:
    words = WordMessages(details=socket.query_params.get("details") == "1")
    async for message in ticket.messages():
        if isinstance(message, Ended):
            return message.code, message.reason
        for answer in heard_messages(session, words, message):
            await send(socket, wire.encode(answer))
    raise AssertionError("a session ends with Ended")


async def transcribe_file(request: Request, server: Server, served: Served) -> Response:
    """Transcribe a recording in the body; answer with its words as moshi-server does."""
    if (refusal := server.refusal(request)) is not None:
        return refusal_response(refusal)
    try:
        with await spooled(request.stream(), server.config.max_upload_mb) as file:
            told = await unless(_file_messages(server, served, file), client_leaves(request))
    except TooLargeError as error:
        return PlainTextResponse(str(error), 413)
    except AudioError as error:
        return PlainTextResponse(str(error), 400)
    except FullError as error:
        return PlainTextResponse(str(error), 503, {"retry-after": "1"})
    kept = [answer for answer in told if isinstance(answer, wire.Word | wire.EndWord)]
    # Details of words, None here, are sent to clients that ask for them alone.
    fields = [{name: value for name, value in vars(answer).items() if value is not None} for answer in kept]
    return JSONResponse([{"type": type(one).__name__, **each} for one, each in zip(kept, fields, strict=True)])


async def _file_messages(server: Server, served: Served, file: IO[bytes]) -> list[wire.Outgoing]:
    words, told = WordMessages(), list[wire.Outgoing]()
    async with contextlib.aclosing(heard(server, served, file, "moshi")) as messages:
        async for session, message in messages:
            told += heard_messages(session, words, message)
    return told


def refusal_response(refusal: Refusal) -> Response:
    """Return the answer to a client that is not let in; to one without a key it is empty, as moshi-server's is."""
    headers = {"retry-after": "1"} if refusal.status == 503 else None
    return PlainTextResponse("" if refusal.reason == "key" else refusal.sentence, refusal.status, headers)


async def speak_socket(socket: WebSocket, server: Server, served: Served) -> None:
    """Speak text as it arrives."""
    if not await admitted(server, socket, refusal_response):
        return
    form = socket.query_params.get("format", "OggOpus")
    if form not in FORMATS:
        await socket.send_denial_response(PlainTextResponse(f"the format is {form!r}; expected one of {FORMATS}", 400))
        return
    seed = socket.query_params.get("seed", "")
    number = int(seed[:20]) if seed.isdecimal() else None
    # A number that no generator takes would fail in the engine, and end it for everyone.
    if (seed and number is None) or (number is not None and number >= 2**63):
        said = f"the seed is {seed[:40]!r}; expected a whole number from 0, below 2**63"
        await socket.send_denial_response(PlainTextResponse(said, 400))
        return
    packed = form.endswith("MessagePack")

    def error(reason: str) -> bytes | None:
        return wire.encode(wire.Error(reason)) if packed else None

    await socket.accept()
    try:
        voice = server.own_name(socket.query_params.get("voice", ""))
        writer = OpusWriter(served.model.sample_rate) if form.startswith("OggOpus") else None
        session = await asyncio.to_thread(served.service.session, Outbox(), voice=voice or None, seed=number)
        async with server.session(served, session, "moshi") as ticket:
            await converse(
                socket,
                ticket,
                lambda: _read_text(socket, server, ticket, session),
                lambda: _send_sound(socket, ticket, packed, writer),
                error,
            )
    except FullError as full:
        await send_last(socket, error(str(full)))
        await close(socket, 1013, "no free channels")
    except DsmError as refused:
        await send_last(socket, error(str(refused)))
        await close(socket, 1008, str(refused))


async def _read_text(socket: WebSocket, server: Server, ticket: Ticket, session: LiveVoice) -> None:
    ended = False
    async for data in received(socket, server, ticket):
        message = wire.Text(data) if isinstance(data, str) else wire.Eos() if data == b"\0" else None
        if message is None:
            assert isinstance(data, bytes)
            message = wire.decode(data, wire.TO_SPEAK)
        match message:
            case wire.Text(text) if not ended:
                session.say(text)
            case wire.Voice(values, shape) if isinstance(session, LiveSpeech):
                session.use_voice(_voice_XC(values, shape))
            case wire.Eos() if not ended:
                ended = True
                if not session.can_start and isinstance(session, LiveSpeech):
                    raise ClosedError(1000, None, "finished")  # nothing was to be said
                session.finish()
        if session.can_start:
            ticket.start()
        ticket.served.engine.wake()


def _voice_XC(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return a client's voice, published as [1, C, X] or [C, X], as steps [X, C]."""
    if len(shape) == 3 and shape[0] == 1:
        values = values[0]
    if values.ndim != 2:
        raise WireError(f"the voice has the shape {list(shape)}; expected [1, width, steps] or [width, steps]")
    return values.T


async def _send_sound(
    socket: WebSocket, ticket: Ticket, packed: bool, writer: OpusWriter | None
) -> tuple[int, str | None]:
    if packed:
        await send(socket, wire.encode(wire.Ready()))
    if writer is not None:
        await send(socket, _pages(writer.header, packed))
    async for message in ticket.messages():
        match message:
            case Ended():
                return message.code, message.reason
            case Said() if packed:
                await send(socket, wire.encode(wire.Text(message.text, message.start, message.stop)))
            case Sound():
                pcm_T = _clipped(message.pcm_T)
                if writer is not None:
                    if pages := writer.write(pcm_T):
                        await send(socket, _pages(pages, packed))
                else:
                    await send(socket, wire.encode(wire.Audio(pcm_T)) if packed else pcm_T.astype("<f4").tobytes())
    raise AssertionError("a session ends with Ended")


def _pages(pages: bytes, packed: bool) -> bytes:
    return wire.encode(wire.OggOpus(pages)) if packed else pages


async def speak_file(request: Request, server: Server, served: Served) -> Response:
    """Speak a whole text; answer with a wav file as it is made."""
    if (refusal := server.refusal(request)) is not None:
        return refusal_response(refusal)
    try:
        with await spooled(request.stream(), _TEXT_MB) as file:
            body = json.load(file)
        text, voice = body["text"], body["voice"]
        if not isinstance(text, str) or not isinstance(voice, str):
            raise TypeError
        voice = server.own_name(voice)
    except TooLargeError:
        return PlainTextResponse(f"the body is larger than {_TEXT_MB:g} MB; send a shorter text", 413)
    except (ValueError, KeyError, TypeError, RecursionError):
        return PlainTextResponse('the body is no JSON of the form {"text": TEXT, "voice": VOICE}', 400)
    try:
        session = await asyncio.to_thread(_whole_speech, served, text, voice or None)
    except DsmError as error:
        return PlainTextResponse(str(error), 400)
    try:
        return await begun(request, _wav(server, served, session), "audio/wav")
    except FullError as error:
        return PlainTextResponse(str(error), 503, {"retry-after": "1"})
    except SpeechError as error:
        return PlainTextResponse(str(error), 400)


def _whole_speech(served: Served, text: str, voice: str | None) -> LiveVoice:
    """Make the session of a whole text, off the event loop: a voice may have to be fetched, and a text be long."""
    session = served.service.session(Outbox(), voice=voice, is_file=True)
    session.say(text)
    session.finish()
    return session


async def _wav(server: Server, served: Served, session: LiveVoice) -> AsyncGenerator[bytes, None]:
    """Yield a wav file as its sound is made; its header comes with the first sound."""
    head = wav_header(served.model.sample_rate)
    async with contextlib.aclosing(spoken(server, served, session, "moshi")) as messages:
        async for pcm_T in sound_of(messages):
            yield head + pcm16(_clipped(pcm_T))
            head = b""
    if head:
        yield head


def _clipped(pcm_T: np.ndarray) -> np.ndarray:
    return np.clip(pcm_T, -LOUDEST, LOUDEST)


def modules_info(server: Server) -> list[dict[str, str]]:
    """Return the models as moshi-server lists its modules; all numbers are strings."""
    rows = []
    for served in server.models:
        kind = {"type": "batched_asr", "lm": served.name, "audio_tokenizer": served.name}
        rows.append(
            {
                **(kind if served.kind == "stt" else {"type": "py", "script": served.name}),
                "path": served.settings.path,
                "used_slots": str(served.engine.used),
                "total_slots": str(served.engine.total),
            }
        )
    return rows


def build_info(server: Server) -> dict[str, Any]:
    """Return the version under the keys of moshi-server."""
    return {"build_timestamp": "", "build_date": "", "git_branch": "", "git_timestamp": "", "git_date": "",
            "git_hash": "", "git_describe": f"dsm-jax {server.version}", "rustc_host_triple": "", "rustc_version": "",
            "cargo_target_triple": ""}  # fmt: skip

"""The messages of moshi-server's clients: MessagePack maps with a `type`, to the byte.

Source: kyutai-labs/moshi@e6a55d27 rust/moshi-server (`batched_asr.rs`, `py_module.rs`, `tts.rs`), whose messages serde
writes by rmp-serde. Outgoing messages are the same bytes. Incoming ones are read as rmp-serde reads them: `type` in any
place, further fields, a list of the values in place of a map, and anything after the object. Read besides: samples and
Ogg data as binary.

Shape letters: T samples.
"""

import dataclasses
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import msgpack
import numpy as np

from dsm_jax.errors import WireError

_FLOAT32 = np.dtype([("tag", "u1"), ("value", ">f4")])  # an element of a list of float32
_FLOAT32_TAG = 0xCA
_ARRAY16, _ARRAY32 = 0xDC, 0xDD
_AUDIO = b"\x82\xa4type\xa5Audio\xa3pcm"  # how every client's message of samples begins
_MOST_INT = 2**63


@dataclasses.dataclass(frozen=True)
class Ready:
    """The session has a slot."""


@dataclasses.dataclass(frozen=True)
class Word:
    """A word has begun; `start_time` is in seconds."""

    text: str
    start_time: float


@dataclasses.dataclass(frozen=True)
class EndWord:
    """The first word that has begun and not ended has ended; `stop_time` is in seconds.

    Attributes:
      stop_time: end of the word.
      text: all of the word, for a client that asked for details; the other messages have it otherwise.
      start_time: start of the word, likewise.
      probability: probability that the model gave the word, likewise.
    """

    stop_time: float
    text: str | None = None
    start_time: float | None = None
    probability: float | None = None


@dataclasses.dataclass(frozen=True)
class Marker:
    """All audio before a client's marker has been transcribed.

    Attributes:
      id: the client's own number.
      flush: in a client's marker, whether to transcribe what is there without waiting for more audio.
      end: in a client's marker, whether no more audio comes: the session ends with the marker's answer.
    """

    id: int
    flush: bool = False
    end: bool = False


@dataclasses.dataclass(frozen=True)
class Pause:
    """The model predicts a pause, for a client that asked for details: the time and the horizon are in seconds."""

    time: float
    horizon: float
    probability: float


@dataclasses.dataclass(frozen=True)
class Step:
    """A frame of 80 ms has been transcribed.

    Attributes:
      step_idx: number of the frame.
      prs: probabilities of a pause to come, by horizon.
      buffered_pcm: samples that wait for their frame.
    """

    step_idx: int
    prs: Sequence[float]
    buffered_pcm: int


@dataclasses.dataclass(frozen=True)
class Error:
    """The reason for which the session ends."""

    message: str


@dataclasses.dataclass(frozen=True)
class Text:
    """A text to say; from the server, a word that is said, with its times in seconds."""

    text: str
    start_s: float = 0.0
    stop_s: float = 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class Audio:
    """Samples at 24 kHz, float32 [T]."""

    pcm: np.ndarray


@dataclasses.dataclass(frozen=True)
class OggOpus:
    """Pages of an Ogg Opus stream."""

    data: bytes


@dataclasses.dataclass(frozen=True)
class Init:
    """A client asks to begin anew."""


@dataclasses.dataclass(frozen=True, eq=False)
class Voice:
    """A voice to speak with: numbers and their shape, of 1 to 3 axes."""

    embeddings: np.ndarray
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Eos:
    """A client has sent all of its text."""


Outgoing = Ready | Word | EndWord | Pause | Marker | Step | Error | Text | Audio | OggOpus
Incoming = Init | Audio | OggOpus | Marker | Text | Voice | Eos
# Fields that a client's message must have, in the order of a list of its values.
_FIELDS: Mapping[str, tuple[str, ...]] = {
    "Init": (),
    "Audio": ("pcm",),
    "OggOpus": ("data",),
    "Marker": ("id",),
    "Text": ("text",),
    "Voice": ("embeddings", "shape"),
    "Eos": (),
}
TO_TRANSCRIBE = ("Init", "Audio", "OggOpus", "Marker")
TO_SPEAK = ("Text", "Voice", "Eos")


def encode(message: Outgoing) -> bytes:
    """Return the bytes of a message to a client."""
    name = type(message).__name__
    match message:
        case Marker():
            fields: list[tuple[str, bytes]] = [("id", _packed(message.id))]
        case Step():  # most messages are steps, and one call packs them as fast as can be
            prs = list(message.prs)
            step = {"type": name, "step_idx": message.step_idx, "prs": prs, "buffered_pcm": message.buffered_pcm}
            return _packed(step, use_single_float=True)
        case Audio():
            fields = [("pcm", floats(message.pcm))]
        case OggOpus():
            fields = [("data", _packed(list(message.data)))]  # serde writes Vec<u8> as a list of numbers
        case _:
            values = {field.name: getattr(message, field.name) for field in dataclasses.fields(message)}
            fields = [(key, _packed(value)) for key, value in values.items() if value is not None]
    return packed_map(name, fields)


def packed_map(name: str, fields: Sequence[tuple[str, bytes]]) -> bytes:
    """Return the bytes of a message of a type, from its fields, whose values are packed."""
    head = bytes([0x80 | (1 + len(fields))]) + _packed("type") + _packed(name)
    return head + b"".join(_packed(key) + value for key, value in fields)


def _packed(value: Any, *, use_single_float: bool = False) -> bytes:
    packed = msgpack.packb(value, use_single_float=use_single_float)
    assert packed is not None
    return packed


def floats(values_T: np.ndarray) -> bytes:
    """Return the bytes of a list of float32 numbers."""
    count = values_T.size
    if count < 16:
        head = bytes([0x90 | count])
    else:
        head = struct.pack(">BH", _ARRAY16, count) if count < 1 << 16 else struct.pack(">BI", _ARRAY32, count)
    elements = np.empty(count, _FLOAT32)
    elements["tag"], elements["value"] = _FLOAT32_TAG, values_T
    return head + elements.tobytes()


def decode(data: bytes, known: Sequence[str]) -> Incoming:
    """Read a message from a client.

    Args:
      data: the bytes of a binary frame.
      known: types that the session takes: `TO_TRANSCRIBE` or `TO_SPEAK`.

    Raises:
      WireError: the bytes are no message of these types.
    """
    if (pcm_T := plain_audio(data)) is not None and "Audio" in known:
        return Audio(_finite(pcm_T))
    unpacker = msgpack.Unpacker(raw=False, strict_map_key=True, max_buffer_size=len(data))
    unpacker.feed(data)
    try:
        value = unpacker.unpack()
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise WireError(f"the message is not MessagePack ({type(error).__name__}); send a map with a type") from None
    name, fields = _parts(value)
    if name not in known:
        raise WireError(f"the type is {name[:40]!r}; expected one of {', '.join(known)}")
    needed = _FIELDS[name]
    if isinstance(fields, list):
        fields = dict(zip(needed, fields, strict=False))
    if missing := [key for key in needed if key not in fields]:
        raise WireError(f"{name} lacks {', '.join(missing)}; send it")
    match name:
        case "Init":
            return Init()
        case "Eos":
            return Eos()
        case "Audio":
            return Audio(_finite(_numbers(fields["pcm"], "pcm")))
        case "OggOpus":
            return OggOpus(_bytes(fields["data"]))
        case "Marker":
            return Marker(_marker_id(fields["id"]), flush=fields.get("flush") is True, end=fields.get("end") is True)
        case "Text":
            if not isinstance(fields["text"], str):
                raise WireError(f"the text is {_kind(fields['text'])}; expected a string")
            return Text(fields["text"])
    return _voice(fields)


def _parts(value: Any) -> tuple[str, Any]:
    """Return the type of a message and its fields, by name or as a list of values."""
    if isinstance(value, Mapping):
        name, fields = value.get("type"), {key: item for key, item in value.items() if key != "type"}
    elif isinstance(value, list) and value:
        name, fields = value[0], value[1:]
    else:
        raise WireError(f"the message is {_kind(value)}; expected a map with a type")
    name = name.decode("utf-8", "replace") if isinstance(name, bytes) else name
    if not isinstance(name, str):
        raise WireError(f"the type is {_kind(name)}; expected a string such as 'Audio'")
    return name, fields


def plain_audio(data: bytes, *, exact: bool = False) -> np.ndarray | None:
    """Read samples in the layout that most clients send, without looking at each; None for any other layout.

    Args:
      data: the bytes of a message.
      exact: whether bytes after the samples are another layout.
    """
    if not data.startswith(_AUDIO) or len(data) < len(_AUDIO) + 3 or data[len(_AUDIO)] != _ARRAY16:
        return None
    start = len(_AUDIO) + 3
    (count,) = struct.unpack_from(">H", data, start - 2)
    end = start + count * _FLOAT32.itemsize
    if len(data) < end or (exact and len(data) > end):
        return None
    # The tags as bytes, as NumPy takes twice the time for them.
    if data[start : end : _FLOAT32.itemsize] != bytes([_FLOAT32_TAG]) * count:
        return None
    return np.frombuffer(data, _FLOAT32, count, start)["value"].astype(np.float32)


def _numbers(value: Any, name: str) -> np.ndarray:
    """Read a list of numbers, or little-endian float32 in binary, as float32 [T]."""
    if isinstance(value, bytes):
        if len(value) % 4:
            raise WireError(f"{name} has {len(value)} bytes; float32 in binary has a multiple of 4")
        return np.frombuffer(value, "<f4").astype(np.float32)
    if not isinstance(value, list):
        raise WireError(f"{name} is {_kind(value)}; expected a list of numbers")
    if any(type(item) not in (int, float) for item in value):
        wrong = next(item for item in value if type(item) not in (int, float))
        raise WireError(f"{name} holds {_kind(wrong)}; expected numbers alone")
    with np.errstate(over="ignore"):
        return np.asarray(value, np.float64).astype(np.float32)


def _finite(values_T: np.ndarray, name: str = "pcm") -> np.ndarray:
    """Refuse numbers that are not finite: one of them would spoil all that follow."""
    if not np.isfinite(values_T).all():
        raise WireError(f"{name} holds NaN or infinity; send finite numbers")
    return values_T


def _bytes(value: Any) -> bytes:
    """Read Ogg data, a list of numbers below 256 or binary."""
    if isinstance(value, bytes):
        return value
    if not isinstance(value, list) or any(type(item) is not int or not 0 <= item < 256 for item in value):
        raise WireError(f"data is {_kind(value)}; expected a list of numbers from 0 to 255, or binary")
    return bytes(value)


def _marker_id(value: Any) -> int:
    if type(value) is not int or not -_MOST_INT <= value < _MOST_INT:
        raise WireError(f"the id of the marker is {_kind(value)}; expected an integer of 64 bits")
    return value


def _voice(fields: Mapping[str, Any]) -> Voice:
    """Read a voice."""
    values, shape = _finite(_numbers(fields["embeddings"], "embeddings"), "embeddings"), fields["shape"]
    if not isinstance(shape, list) or not 1 <= len(shape) <= 3 or any(type(n) is not int or n < 1 for n in shape):
        raise WireError(f"the shape of the voice is {shape!r}; expected 1 to 3 numbers")
    if (size := math.prod(shape)) != values.size:
        raise WireError(f"the voice has {values.size} numbers; its shape {shape} is one of {size}")
    return Voice(values.reshape(shape), tuple(shape))


def _kind(value: Any) -> str:
    """Return the kind of a value for a message: nothing that a client sent is repeated."""
    return {type(None): "nil", dict: "a map", list: "a list", bytes: "binary", str: "a string"}.get(
        type(value), f"a value of type {type(value).__name__}"
    )

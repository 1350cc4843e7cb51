"""The client's side of moshi-server's messages: write what `wire.decode` reads, read what `wire.encode` writes.

Reading is strict: a message has exactly its fields, in any order, each of its kind.
"""

import math
from collections.abc import Mapping
from typing import Any

import msgpack
import numpy as np

from dsm_jax.errors import WireError
from dsm_jax.serving.moshi import wire

_REAL, _WHOLE, _TEXT = (float,), (int,), (str,)
# The kinds of the fields of a server's messages; lists are read apart.
_FIELDS: Mapping[str, Mapping[str, tuple[type, ...]]] = {
    "Ready": {},
    "Word": {"text": _TEXT, "start_time": _REAL},
    "EndWord": {"stop_time": _REAL, "text": _TEXT, "start_time": _REAL, "probability": _REAL},
    "Pause": {"time": _REAL, "horizon": _REAL, "probability": _REAL},
    "Marker": {"id": _WHOLE},
    "Step": {"step_idx": _WHOLE, "prs": (list,), "buffered_pcm": _WHOLE},
    "Error": {"message": _TEXT},
    "Text": {"text": _TEXT, "start_s": _REAL, "stop_s": _REAL},
    "Audio": {"pcm": (list,)},
    "OggOpus": {"data": (list,)},
}
_OPTIONAL = {"EndWord": {"text", "start_time", "probability"}}
_KINDS = {_REAL: "a real number", _WHOLE: "a whole number", _TEXT: "a string", (list,): "a list"}


def encode(message: wire.Incoming) -> bytes:
    """Return the bytes of a message to a server."""
    match message:
        case wire.Marker(id):
            asked = [name for name in ("flush", "end") if getattr(message, name)]
            return wire.packed_map("Marker", [("id", _packed(id)), *((name, _packed(True)) for name in asked)])
        case wire.Text(text):
            return wire.packed_map("Text", [("text", _packed(text))])
        case wire.Voice(values, shape):
            embeddings = wire.floats(np.asarray(values, np.float32).reshape(-1))
            return wire.packed_map("Voice", [("embeddings", embeddings), ("shape", _packed(list(shape)))])
        case wire.Init() | wire.Eos():
            return wire.packed_map(type(message).__name__, [])
    return wire.encode(message)


def _packed(value: Any) -> bytes:
    packed = msgpack.packb(value)
    assert packed is not None
    return packed


def decode(data: bytes) -> wire.Outgoing:
    """Read a message from a server.

    Args:
      data: the bytes of a binary frame.

    Raises:
      WireError: the bytes are no message of a server.
    """
    if (pcm_T := wire.plain_audio(data, exact=True)) is not None:
        return wire.Audio(pcm_T)
    try:
        value = msgpack.unpackb(data, raw=False, strict_map_key=True)
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise WireError(f"the server's message is not MessagePack ({type(error).__name__})") from None
    if not isinstance(value, dict) or not isinstance(name := value.pop("type", None), str):
        raise WireError("the server's message is no map with a type")
    if (kinds := _FIELDS.get(name)) is None:
        raise WireError(f"the server's message has the type {name[:40]!r}; expected one of {', '.join(_FIELDS)}")
    needed = kinds.keys() - _OPTIONAL.get(name, set())
    if not needed <= value.keys() <= kinds.keys():
        found = ", ".join(sorted(value)) or "none"
        raise WireError(f"the server's {name} has the fields {found}; expected {', '.join(kinds) or 'none'}")
    for key, item in value.items():
        if type(item) not in kinds[key]:
            raise WireError(f"the server's {name} has a {key} that is not {_KINDS[kinds[key]]}")
    return _message(name, value)


def _message(name: str, fields: dict[str, Any]) -> wire.Outgoing:
    """Return a message whose fields are checked but for the elements of lists."""
    match name:
        case "Ready":
            return wire.Ready()
        case "Word":
            return wire.Word(**_finite(name, fields))
        case "EndWord":
            return wire.EndWord(**_finite(name, fields))
        case "Pause":
            return wire.Pause(**_finite(name, fields))
        case "Marker":
            return wire.Marker(fields["id"])
        case "Step":
            prs = _elements(name, "prs", fields["prs"], float)
            return wire.Step(fields["step_idx"], tuple(prs), fields["buffered_pcm"])
        case "Error":
            return wire.Error(fields["message"])
        case "Text":
            return wire.Text(**_finite(name, fields))
        case "Audio":
            return wire.Audio(np.asarray(_elements(name, "pcm", fields["pcm"], float), np.float32))
    data = _elements(name, "data", fields["data"], int)
    if any(not 0 <= item < 256 for item in data):
        raise WireError("the server's OggOpus has data that is not of numbers from 0 to 255")
    return wire.OggOpus(bytes(data))


def _finite(name: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Refuse times that are not numbers."""
    for key, item in fields.items():
        if isinstance(item, float) and not math.isfinite(item):
            raise WireError(f"the server's {name} has a {key} that is not finite")
    return fields


def _elements(name: str, key: str, values: list[Any], kind: type) -> list[Any]:
    if any(type(item) is not kind for item in values):
        raise WireError(f"the server's {name} has {key} with an element that is not {_KINDS[(kind,)]}")
    return values

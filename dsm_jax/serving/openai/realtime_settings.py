"""Settings of a realtime session: read from a client's updates, and told to it.

OpenAI has had two shapes of a session: `{"audio": {"input": {...}}}`, and before that one flat object with the events
`transcription_session.update` and `.updated`. Both are read; each is answered in its own.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dsm_jax.serving.openai.errors import invalid_value
from dsm_jax.stt.events import PAUSE_HORIZONS

RATES_HZ = (8_000, 48_000)
NATIVE_RATE_HZ = 24_000  # of the dialect
WITH_LOGPROBS = "item.input_audio_transcription.logprobs"
# Seconds of silence after which a turn ends though the model does not predict its end, as OpenAI documents them.
_PATIENCE_S = {"low": 8.0, "medium": 4.0, "auto": 4.0, "high": 2.0}
# The place in PAUSE_HORIZONS of the prediction that ends a turn.
_EAGER_HEADS = {"low": 3, "medium": 2, "auto": 2, "high": 1}
_FLAT = {
    "input_audio_transcription": "transcription",
    "input_audio_noise_reduction": "noise_reduction",
    "turn_detection": "turn_detection",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TurnDetection:
    """The rule by which the server ends a turn.

    Attributes:
      type: "server_vad" or "semantic_vad".
      threshold: probability of speech below which there is a pause; of server_vad.
      prefix_padding_ms: audio that belongs to a turn before its first word; of server_vad.
      silence_duration_ms: silence that ends a turn; of server_vad.
      eagerness: "low", "medium", "high" or "auto"; of semantic_vad.
    """

    type: str = "server_vad"
    threshold: float = 0.5
    prefix_padding_ms: int = 300
    silence_duration_ms: int = 500
    eagerness: str = "auto"

    @property
    def is_semantic(self) -> bool:
        """True where the model alone decides, but for long silences."""
        return self.type == "semantic_vad"

    @property
    def silence_s(self) -> float:
        """Seconds without a word that end a turn, whatever the model predicts."""
        return _PATIENCE_S[self.eagerness] if self.is_semantic else self.silence_duration_ms / 1000

    @property
    def head(self) -> int:
        """The pause head that ends a turn."""
        if self.is_semantic:
            return _EAGER_HEADS[self.eagerness]
        return next((i for i, seconds in enumerate(PAUSE_HORIZONS) if self.silence_duration_ms <= seconds * 1000), 3)

    @property
    def pause_probability(self) -> float:
        """Probability of silence above which a turn ends."""
        return 0.5 if self.is_semantic else 1 - self.threshold

    def to_dict(self) -> dict[str, Any]:
        """Return the rule as clients read it."""
        names = ("eagerness",) if self.is_semantic else ("threshold", "prefix_padding_ms", "silence_duration_ms")
        return {"type": self.type} | {name: getattr(self, name) for name in names}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a session.

    Attributes:
      model: as the client has named it; None for the server's first.
      language: of the speech; None if nobody told it.
      prompt: text that steers the model; empty for none.
      rate: of the client's samples, Hz.
      turns: rule by which turns end; None where the client ends them.
      with_logprobs: whether probabilities are sent.
    """

    model: str | None = None
    language: str | None = None
    prompt: str = ""
    rate: int = NATIVE_RATE_HZ
    turns: TurnDetection | None = TurnDetection()
    with_logprobs: bool = False

    def updated(self, session: object) -> "Settings":
        """Return the settings with a client's changes; what it leaves out stays.

        Args:
          session: the object `session` of a client's event, in the API's nested shape or its older flat one.

        Raises:
          ApiError: a value that is not supported; its param is the value's path.
        """
        given = _object(session, "session")
        if (kind := given.get("type", "transcription")) != "transcription":
            raise invalid_value("session.type", kind, "'transcription': this server does not converse")
        where, changes = "session", {}
        if "audio" in given:
            where = "session.audio.input"
            given_input = _object(_object(given["audio"], "session.audio").get("input", {}), where)
        else:
            given_input = {new: given[old] for old, new in _FLAT.items() if old in given}
            if (format := given.get("input_audio_format", "pcm16")) != "pcm16":
                raise invalid_value("session.input_audio_format", format, "'pcm16'")
        if given_input.get("format") is not None:
            changes["rate"] = _rate(given_input["format"], f"{where}.format")
        if given_input.get("transcription") is not None:
            changes |= _transcription(given_input["transcription"], f"{where}.transcription")
        if "turn_detection" in given_input:
            changes["turns"] = _turns(given_input["turn_detection"], f"{where}.turn_detection")
        if given_input.get("noise_reduction") is not None:
            _object(given_input["noise_reduction"], f"{where}.noise_reduction")  # not done, and harmless to ask for
        if given.get("include") is not None:
            changes["with_logprobs"] = _include(given["include"])
        return dataclasses.replace(self, **changes)

    def to_dict(self, id: str, model: str | None, *, flat: bool) -> dict[str, Any]:
        """Return the session as clients read it.

        Args:
          id: of the session.
          model: name of the model that listens; None for none.
          flat: take the older shape.
        """
        told = {"model": model, "language": self.language, "prompt": self.prompt}
        transcription = None if model is None else told
        turns = None if self.turns is None else self.turns.to_dict()
        include = [WITH_LOGPROBS] if self.with_logprobs else None
        if flat:
            return {
                "id": id,
                "object": "realtime.transcription_session",
                "input_audio_format": "pcm16",
                "input_audio_transcription": transcription,
                "input_audio_noise_reduction": None,
                "turn_detection": turns,
                "include": include,
            }
        return {
            "id": id,
            "object": "realtime.transcription_session",
            "type": "transcription",
            "audio": {
                "input": {
                    "format": {"type": "audio/pcm", "rate": self.rate},
                    "transcription": transcription,
                    "noise_reduction": None,
                    "turn_detection": turns,
                }
            },
            "include": include,
        }


def _rate(format: object, where: str) -> int:
    given = _object(format, where)
    if (kind := given.get("type", "audio/pcm")) != "audio/pcm":
        raise invalid_value(f"{where}.type", kind, "'audio/pcm'")
    rate = given.get("rate", NATIVE_RATE_HZ)
    if not _is_whole(rate) or not RATES_HZ[0] <= rate <= RATES_HZ[1]:
        raise invalid_value(f"{where}.rate", rate, f"a rate from {RATES_HZ[0]} to {RATES_HZ[1]} Hz")
    return rate


def _transcription(transcription: object, where: str) -> dict[str, Any]:
    given = _object(transcription, where)
    changes: dict[str, Any] = {}
    for name in ("model", "language", "prompt"):
        if (value := given.get(name)) is not None:
            if not isinstance(value, str):
                raise invalid_value(f"{where}.{name}", value, "a string")
            changes[name] = value.strip() if name == "prompt" else value or None
    return changes


def _turns(turns: object, where: str) -> TurnDetection | None:
    if turns is None:
        return None
    given = _object(turns, where)
    type = given.get("type", "server_vad")
    if type not in ("server_vad", "semantic_vad"):
        raise invalid_value(f"{where}.type", type, "'server_vad', 'semantic_vad', or null in place of the object")
    changes: dict[str, Any] = {}
    if (threshold := given.get("threshold")) is not None:
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
            raise invalid_value(f"{where}.threshold", threshold, "a probability from 0 to 1")
        changes["threshold"] = float(threshold)
    for name, longest in (("prefix_padding_ms", 10_000), ("silence_duration_ms", 60_000)):
        if (value := given.get(name)) is not None:
            if not _is_whole(value) or not 0 <= value <= longest:
                raise invalid_value(f"{where}.{name}", value, f"milliseconds from 0 to {longest}")
            changes[name] = value
    if (eagerness := given.get("eagerness")) is not None:
        if eagerness not in list(_PATIENCE_S):
            raise invalid_value(f"{where}.eagerness", eagerness, f"one of {', '.join(_PATIENCE_S)}")
        changes["eagerness"] = eagerness
    return TurnDetection(type=type, **changes)


def _include(include: object) -> bool:
    if not isinstance(include, list) or any(value != WITH_LOGPROBS for value in include):
        raise invalid_value("session.include", include, f"a list of {WITH_LOGPROBS!r} or of nothing")
    return bool(include)


def _object(value: object, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise invalid_value(where, value, "an object")
    return value


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

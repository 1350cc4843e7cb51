"""Load the models that a configuration names, make their services, and tell whether these keep up."""

import dataclasses
from typing import Any, TypeVar

from dsm_jax.checkpoints import Model, load
from dsm_jax.csm.options import CsmOptions
from dsm_jax.errors import ConfigError
from dsm_jax.models.family import require
from dsm_jax.serving.config import ServedModel
from dsm_jax.serving.engine import Engine
from dsm_jax.serving.hearing import HearingService
from dsm_jax.serving.scripts import ScriptService
from dsm_jax.serving.speaking import SpeakingService
from dsm_jax.serving.turns import TurnService
from dsm_jax.stt.options import TranscribeOptions
from dsm_jax.tts.speech import SynthesizeOptions

FRAME_S = 0.080  # between live frames, within which a step must be over
# The most of a frame's time that a step may take: with 71 of 80 ms, stt-1b in one slot lags behind one stream.
_STEPS_SHARE = 0.8
Options = TypeVar("Options", CsmOptions, SynthesizeOptions, TranscribeOptions)
_OF_OPTIONS = ("temperature", "guidance_scale", "padding_between", "padding_bonus", "codebooks")
_OF_VOICES = ("voice_folder", "default_voice")
_OF_DELAY = ("asr_delay_in_tokens",)


@dataclasses.dataclass(frozen=True, eq=False)
class Served:
    """A model that is served: its name, its service and its engine."""

    settings: ServedModel
    name: str
    kind: str
    service: Any
    engine: Engine

    @property
    def model(self) -> Model:
        """The model."""
        return self.service.model

    @property
    def keeps_up(self) -> bool:
        """Tell whether all slots together are served in real time, with time left for the connections."""
        frames, seconds = self._step
        return seconds < _STEPS_SHARE * frames * FRAME_S

    @property
    def _step(self) -> tuple[int, float]:
        """The frames and the seconds of the shortest step of all slots."""
        frames, seconds = min(self.service.step_seconds.items())
        return frames, seconds * self.engine.group_count

    def capacity(self) -> str:
        """Return a sentence on the slots and the time of a step."""
        frames, seconds = self._step
        verdict = "keeps up"
        if not self.keeps_up:
            remedy = "use fewer" if self.engine.total > 1 else "use a smaller model or a faster device"
            if self.model.quantize is None and self.model.devices[0].platform == "cpu":
                remedy += ", or int8 weights (--quantize int8)"
            verdict = f"does not keep up with {FRAME_S * 1000:.0f} ms a frame: {remedy}"
        if self.kind == "tts":
            verdict += f", {self.engine.total * frames * FRAME_S / seconds:.1f} times real time in all"
        steps = "a step" if frames == 1 else f"for {frames} steps"
        slots = f"{self.engine.total} slot" + "s" * (self.engine.total != 1)
        return f"{self.name}: {slots} at {seconds * 1000:.0f} ms {steps}; {verdict}"


def load_settings(settings: ServedModel) -> Model:
    """Load a model as the settings say.

    Raises:
      ConfigError: its folder of voices does not exist.
      ModelKindError: the model is of another kind than the settings.
      As `load`.
    """
    if (folder := settings.voice_folder) is not None and not folder.is_dir():  # before weights are fetched
        raise ConfigError(f"the folder of voices {folder} does not exist; name one that does")
    model = load(
        settings.model,
        dtype=settings.dtype,
        quantize=settings.quantize,
        stt_only=settings.kind == "stt",
        revision=settings.revision,
    )
    has_turns = settings.kind == "tts" and model.config.model_type == "csm"
    require(model, "csm" if has_turns else settings.kind)
    return model


def service_of(settings: ServedModel, model: Model) -> HearingService | SpeakingService:
    """Make and warm up a model's service, by its kind and its family.

    Raises:
      ConfigError: settings that the model's family does not have.
      As the services.
    """
    slots = settings.slots or (8 if model.devices[0].platform == "cpu" else 64)
    if settings.kind == "stt":
        options = _asked_of(TranscribeOptions, settings, model, _OF_DELAY)
        if (asked := settings.asr_delay_in_tokens) is not None:
            delay = model.config.stt.audio_delay_seconds * model.config.mimi.frame_rate
            if not asked - 1 < delay <= asked + 1:
                raise ConfigError(
                    f"asr_delay_in_tokens is {asked}; the text of {model.name} is {delay:.1f} frames late: remove it"
                )
        return HearingService(model, slots, options=options)
    voices: dict[str, Any] = {"folder": settings.voice_folder, "default_voice": settings.default_voice}
    if model.config.model_type == "csm":
        return TurnService(model, slots, options=_asked_of(CsmOptions, settings, model, _OF_VOICES), **voices)
    return ScriptService(model, slots, options=_asked_of(SynthesizeOptions, settings, model, _OF_VOICES), **voices)


def _asked_of(options: type[Options], settings: ServedModel, model: Model, others: tuple[str, ...]) -> Options:
    """Return a family's options as the settings ask for them; others are the family's defaults.

    Args:
      options: class of the options.
      settings: of the model.
      model: for the error.
      others: settings that the family has besides its options.

    Raises:
      ConfigError: settings that the family does not have.
    """
    asked = {
        name: value
        for name in (*_OF_OPTIONS, *_OF_VOICES, *_OF_DELAY)
        if name not in others and (value := getattr(settings, name)) is not None
    }
    if unknown := sorted(asked.keys() - {field.name for field in dataclasses.fields(options)}):
        raise ConfigError(f"{', '.join(unknown)} was set for {model.name}, which does not have it; remove it")
    return options(**asked)

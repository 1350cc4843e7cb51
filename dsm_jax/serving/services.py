"""Load the models that a configuration names, and make their services."""

import dataclasses
from typing import Any, TypeVar

from dsm_jax.checkpoints import Model, load
from dsm_jax.csm.options import CsmOptions
from dsm_jax.errors import ConfigError
from dsm_jax.models.family import require
from dsm_jax.serving.config import ServedModel
from dsm_jax.serving.hearing import HearingService
from dsm_jax.serving.scripts import ScriptService
from dsm_jax.serving.speaking import SpeakingService
from dsm_jax.serving.turns import TurnService
from dsm_jax.stt.options import TranscribeOptions
from dsm_jax.tts.speech import SynthesizeOptions

Options = TypeVar("Options", CsmOptions, SynthesizeOptions, TranscribeOptions)
_OF_OPTIONS = ("temperature", "guidance_scale", "padding_between", "padding_bonus", "codebooks")
_OF_VOICES = ("voice_folder", "default_voice")
_OF_DELAY = ("asr_delay_in_tokens",)


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

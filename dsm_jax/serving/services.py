"""Load the models that a configuration names, and make their services."""

import dataclasses
from pathlib import Path

from dsm_jax.checkpoints import Model, load
from dsm_jax.csm.options import CsmOptions
from dsm_jax.errors import ConfigError
from dsm_jax.serving.config import ServedModel
from dsm_jax.serving.hearing import HearingService
from dsm_jax.serving.scripts import ScriptService
from dsm_jax.serving.speaking import SpeakingService
from dsm_jax.serving.turns import TurnService
from dsm_jax.stt.options import TranscribeOptions
from dsm_jax.tts.speech import SynthesizeOptions


def load_settings(settings: ServedModel) -> Model:
    """Load a model as the settings say."""
    return load(settings.model, dtype=settings.dtype, stt_only=settings.kind == "stt")


def service_of(settings: ServedModel, model: Model) -> HearingService | SpeakingService:
    """Make and warm up a model's service."""
    slots = settings.slots or (8 if model.devices[0].platform == "cpu" else 64)
    if settings.kind == "stt":
        if (asked := settings.asr_delay_in_tokens) is not None:
            delay = model.config.stt.audio_delay_seconds * model.config.mimi.frame_rate
            if not asked - 1 < delay <= asked + 1:
                raise ConfigError(
                    f"asr_delay_in_tokens is {asked}; the text of {model.name} is {delay:.1f} frames late: remove it"
                )
        return HearingService(model, slots, options=TranscribeOptions(temperature=settings.temperature))
    asked = {
        name: value
        for name in ("temperature", "guidance_scale", "padding_between", "padding_bonus", "codebooks")
        if (value := getattr(settings, name)) is not None
    }
    options = CsmOptions if model.config.model_type == "csm" else SynthesizeOptions
    if unknown := sorted(asked.keys() - {field.name for field in dataclasses.fields(options)}):
        raise ConfigError(f"{', '.join(unknown)} was set for {model.name}, which does not have it; remove it")
    own, voice = options(**asked), settings.default_voice
    return service_for(model, slots, options=own, folder=settings.voice_folder, default_voice=voice)


def service_for(
    model: Model,
    slots: int,
    *,
    options: SynthesizeOptions | CsmOptions | None = None,
    folder: Path | None = None,
    default_voice: str | None = None,
) -> SpeakingService:
    """Make the service of a model that speaks, by its family.

    Args:
      model: a text-to-speech or a conversational speech model.
      slots: sessions at a time.
      options: of the synthesis; None takes the family's defaults.
      folder: of more voices; None for none.
      default_voice: name of the voice of clients that name none; None takes the first.

    Raises:
      As `ScriptService` and `TurnService`.
    """
    if model.config.model_type == "csm":
        own = options if isinstance(options, CsmOptions) else CsmOptions()
        return TurnService(model, slots, options=own, folder=folder, default_voice=default_voice)
    spoken = options if isinstance(options, SynthesizeOptions) else SynthesizeOptions()
    return ScriptService(model, slots, options=spoken, folder=folder, default_voice=default_voice)

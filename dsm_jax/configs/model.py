"""The config of a whole model: its family, and one config for each of its parts."""

import dataclasses

from dsm_jax.configs.check import require_seconds
from dsm_jax.configs.csm import CsmConfig
from dsm_jax.configs.delayed_lm import LMConfig
from dsm_jax.configs.mimi import MimiConfig
from dsm_jax.configs.tts import SamplingDefaults, TtsConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class SttConfig:
    """Settings that a speech-to-text model was trained with.

    Attributes:
      audio_delay_seconds: delay of the text stream after the audio, in seconds.
      audio_silence_prefix_seconds: silence that the model needs before the recording, in seconds.
    """

    audio_delay_seconds: float = 0.0
    audio_silence_prefix_seconds: float = 0.0

    def __post_init__(self) -> None:
        require_seconds(self, "audio_delay_seconds", "audio_silence_prefix_seconds")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelId:
    """The training run that a checkpoint comes from, part of the file names of its voices.

    Attributes:
      sig: signature of the run.
      epoch: epoch of the checkpoint.
    """

    sig: str
    epoch: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The config of a checkpoint: everything except weights and tokenizer.

    Attributes:
      model_type: the family, a key of `dsm_jax.models.family.FAMILIES`, on which the required parts depend.
      lm: the delayed-streams language model; None for other models.
      csm: the language model of a conversational speech model; None for other models.
      mimi: the codec.
      stt: settings of speech-to-text models; the defaults for others.
      tts: settings of text-to-speech models; None for others.
      sampling: the checkpoint's defaults of sampling.
      model_id: the training run; None if the checkpoint names none.
    """

    model_type: str
    lm: LMConfig | None = None
    csm: CsmConfig | None = None
    mimi: MimiConfig = MimiConfig()
    stt: SttConfig = SttConfig()
    tts: TtsConfig | None = None
    sampling: SamplingDefaults = SamplingDefaults()
    model_id: ModelId | None = None

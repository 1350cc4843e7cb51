"""The config of a whole model: its kind, and one config for each part that it has."""

import dataclasses

from dsm_jax.configs.delayed_lm import LMConfig
from dsm_jax.configs.mimi import MimiConfig
from dsm_jax.configs.tts import SamplingDefaults, TtsConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class SttConfig:
    """Settings that a speech-to-text model was trained with.

    Attributes:
      audio_delay_seconds: seconds by which the text stream is behind the audio.
      audio_silence_prefix_seconds: silence that the model needs before the first sample.
    """

    audio_delay_seconds: float = 0.0
    audio_silence_prefix_seconds: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelId:
    """The training run that a checkpoint comes from; the files of its voices bear both.

    Attributes:
      sig: signature of the run.
      epoch: of the run.
    """

    sig: str
    epoch: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """All that a checkpoint says about itself, weights and tokenizer apart.

    Attributes:
      model_type: the family, a key of `dsm_jax.models.family.FAMILIES`, which says which parts it has.
      lm: the language model; None for a codec alone.
      mimi: the codec.
      stt: of speech-to-text models.
      tts: of text-to-speech models; None for others.
      sampling: the defaults of sampling.
      model_id: None where the checkpoint has none.
    """

    model_type: str
    lm: LMConfig | None = None
    mimi: MimiConfig = MimiConfig()
    stt: SttConfig = SttConfig()
    tts: TtsConfig | None = None
    sampling: SamplingDefaults = SamplingDefaults()
    model_id: ModelId | None = None

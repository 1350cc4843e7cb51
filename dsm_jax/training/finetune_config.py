"""Settings of fine-tuning, and their checks: alone, and against the model that is to be trained."""

import dataclasses
import math
from collections.abc import Mapping

from dsm_jax import hub
from dsm_jax.checkpoints import Model
from dsm_jax.errors import ConfigError
from dsm_jax.models.family import FAMILIES
from dsm_jax.options import check_numbers
from dsm_jax.training.loop import RunConfig
from dsm_jax.training.lora import LoraConfig
from dsm_jax.training.losses.csm import CsmObjective
from dsm_jax.training.losses.stt import SttObjective
from dsm_jax.training.losses.tts import TtsObjective
from dsm_jax.training.step import OptimizerConfig
from dsm_jax.tts.voices import guidance_values, has_speakers

LONGEST_ROW_S = 3600  # all rows are as long as the longest may be
# The fields of `FinetuneConfig` that not all families have, by the families that have them.
SETTINGS: Mapping[str, tuple[str, ...]] = {
    "stt": ("stt", "seconds"),
    "tts": ("tts", "seconds", "voice", "guidance", "prefix_seconds"),
    "csm": ("csm", "positions"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Settings of fine-tuning.

    Attributes:
      data: a JSON Lines file or a folder; see `dsm_jax.training.data`, for conversational speech
        `dsm_jax.training.conversations`.
      output: the run's folder; the model is written to its subfolder `model`.
      run: length of the training.
      model: the model to start from, as for `dsm_jax.load`.
      revision: branch, tag or commit of the model on the hub; None is its newest.
      validation: data that is not trained on; its loss is computed at each checkpoint.
      skip_bad: whether to leave out faulty recordings instead of refusing the data.
      seconds: longest part of a recording in a row, in seconds, up to an hour; not for conversational speech.
      positions: for conversational speech, positions of a row, which is a whole conversation: tokens of text, frames of
        audio, and one for the end of each recording. None is the number of the longest conversation's.
      batch_size: rows in a batch.
      accumulate: number of parts of a batch that run one after another, to save memory. All parts weigh the same in the
        gradient, also those with fewer tokens that count.
      encode_batch: rows that the codec encodes at a time.
      compute_dtype: dtype of the model in the loss; trained parameters are always float32.
      optimizer: settings of the optimizer.
      stt: weights and dropouts of the loss of a speech-to-text model.
      tts: weights and dropouts of the loss of a text-to-speech model.
      csm: weights of the loss of a conversational speech model, and the frames that count.
      voice: for text-to-speech with speaker conditioning, the voice of speakers without a voice in the data.
      guidance: for text-to-speech with distilled guidance, the guidance value of all rows; None draws one of the
        model's values for each row.
      prefix_seconds: for text-to-speech without speaker conditioning, the longest prefix, in seconds: each row starts
        with the beginning of another recording of the same speaker; up to an hour.
      lora: adapters to train in place of the whole model.
      strength: share of what the adapters have learnt that the written model has: less keeps more of what the model
        could do before. A finished run may be resumed with another one, its model moved away, and only writes it anew.
    """

    data: str
    output: str
    run: RunConfig
    model: str = hub.DEFAULT
    revision: str | None = None
    validation: str | None = None
    skip_bad: bool = False
    seconds: float = 20.0
    positions: int | None = None
    batch_size: int = 8
    accumulate: int = 1
    encode_batch: int = 8
    compute_dtype: str = "float32"
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=5e-5)
    stt: SttObjective = SttObjective()
    tts: TtsObjective = TtsObjective()
    csm: CsmObjective = CsmObjective()
    voice: str | None = None
    guidance: float | None = None
    prefix_seconds: float = 10.0
    lora: LoraConfig | None = None
    strength: float = 1.0

    def __post_init__(self) -> None:
        check_numbers(self)
        for what, seconds in (("a row has", self.seconds), ("a prefix has", self.prefix_seconds)):
            if not 1 <= seconds <= LONGEST_ROW_S:
                raise ConfigError(f"{what} {seconds} seconds of a recording; give 1 to {LONGEST_ROW_S}")
        if self.positions is not None and self.positions < 1:
            raise ConfigError(f"positions is {self.positions}; give at least 1, or null for the longest conversation's")
        if min(self.batch_size, self.accumulate, self.encode_batch) < 1 or self.batch_size % self.accumulate:
            raise ConfigError(
                f"batch_size is {self.batch_size}, accumulate {self.accumulate} and encode_batch {self.encode_batch}; "
                "give at least 1, and a batch_size that is a multiple of accumulate"
            )
        if not 0 < self.strength < math.inf:
            raise ConfigError(f"the strength of the adapters is {self.strength}; give a number above 0")
        if self.lora is None and self.strength != 1:
            raise ConfigError(
                f"strength is {self.strength}, and the whole model is trained; leave it out, or give lora"
            )


def check_fits(config: FinetuneConfig, model: Model) -> None:
    """Refuse settings that the model would ignore.

    Args:
      config: settings of a run.
      model: a model of a family in `SETTINGS`.

    Raises:
      ConfigError: a setting is not at its default and belongs to other models, or is a guidance value that the model
        does not know.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for name in sorted({name for names in SETTINGS.values() for name in names} - {*SETTINGS[model.config.model_type]}):
        if (found := getattr(config, name)) != defaults[name]:
            family = FAMILIES[model.config.model_type].description
            raise ConfigError(
                f"{name} is {found!r}, and {model.name} is {family}, which has no such setting; leave it out"
            )
    lm = model.config.lm
    if lm is None or model.config.model_type != "tts":
        return
    if config.voice is not None and not has_speakers(lm):
        raise ConfigError(f"voice is {config.voice!r}, and {model.name} takes no voices; leave it out")
    if config.prefix_seconds != defaults["prefix_seconds"] and has_speakers(lm):
        raise ConfigError(
            f"prefix_seconds is {config.prefix_seconds}, and {model.name} takes voices, no prefixes; leave it out"
        )
    known = guidance_values(lm)
    if config.guidance is not None and config.guidance not in known:
        one_of = f"knows {', '.join(map(str, known))}; give one of these"
        remedy = one_of if known else "has no distilled guidance; leave it out"
        raise ConfigError(f"guidance is {config.guidance}, and {model.name} {remedy}")

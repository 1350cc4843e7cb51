"""Options of a transcription: prompt, sampling, pauses and the times of words."""

import dataclasses
from typing import Literal

from dsm_jax.audio import Source
from dsm_jax.configs import ModelConfig
from dsm_jax.errors import ConfigError
from dsm_jax.options import check_kind, check_numbers, check_sampling
from dsm_jax.stt.words import VadOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """Context that comes before a recording.

    A text alone is said over silence before the recording; with an audio prompt, the model is made to write what it
    hears there as the text spells it. Either way all of the text is out before the recording's own words.

    Attributes:
      text: words that the model is made to produce first, in this spelling.
      audio: a recording that comes before: a path, or samples at the model's rate.
      exclude_from_output: leave the text that belongs to the prompt out of the transcript.

    Raises:
      ConfigError: the text is none.
    """

    text: str | None = None
    audio: Source | None = None
    exclude_from_output: bool = False

    def __post_init__(self) -> None:
        if self.text is not None:
            check_kind("the text of the prompt", self.text, str)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TranscribeOptions:
    """Options of a transcription.

    Attributes:
      prompt: words or a recording that steer the model.
      temperature: temperature of the sampling; 0 is greedy; None takes the checkpoint's, 0 in the published ones.
      top_k: sample among this many tokens, 0 for all; None takes the checkpoint's.
      seed: seed of the sampling. A recording's noise depends on its own progress only, never on the rest of its batch.
      vad: rule by which pauses are reported, for models with pause heads.
      word_times: "sound" ends a word where its sound ends; "reference" takes the published script's times, by which a
        word lasts until the next one begins, and may end after the recording.

    Raises:
      ConfigError: a value out of its range, or of another class.
    """

    prompt: Prompt = Prompt()
    temperature: float | None = None
    top_k: int | None = None
    seed: int = 0
    vad: VadOptions = VadOptions()
    word_times: Literal["sound", "reference"] = "sound"

    def __post_init__(self) -> None:
        check_kind("prompt", self.prompt, Prompt)
        check_kind("vad", self.vad, VadOptions)
        check_numbers(self)
        check_sampling(temperature=self.temperature, top_k=self.top_k, seed=self.seed)
        if self.word_times not in ("sound", "reference"):
            raise ConfigError(f"word_times is {self.word_times!r}; expected 'sound' or 'reference'")

    def sampling(self, config: ModelConfig) -> tuple[float, int]:
        """Return temperature and top-k; those that are None come from the checkpoint's `sampling`."""
        defaults = config.sampling
        temperature = (defaults.temp_text or 0.0) if self.temperature is None else self.temperature
        return temperature, (defaults.top_k_text or 0) if self.top_k is None else self.top_k

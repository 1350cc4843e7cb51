"""How to transcribe: prompts, sampling and pauses."""

import dataclasses

from dsm_jax.audio import Source
from dsm_jax.configs import ModelConfig
from dsm_jax.errors import ConfigError
from dsm_jax.stt.words import PauseRule


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Context that comes before a recording.

    Attributes:
      text: words that the model is made to produce first, in this spelling.
      audio: a recording that comes before: a path, or samples at the model's rate.
      cut: leave out of the transcript what belongs to the prompt.
    """

    text: str | None = None
    audio: Source | None = None
    cut: bool = False


@dataclasses.dataclass(frozen=True)
class Options:
    """How to transcribe a recording.

    Attributes:
      prompt: words or a recording that steer the model.
      temperature: 0 is greedy; None takes the checkpoint's, which is 0 in the published ones.
      top_k: sample among this many tokens; None takes the checkpoint's.
      seed: of the sampling. A recording's noise depends on its own progress only, never on recordings beside it.
      pauses: when a pause is reported, for models with pause heads.
    """

    prompt: Prompt = Prompt()
    temperature: float | None = None
    top_k: int | None = None
    seed: int = 0
    pauses: PauseRule = PauseRule()

    def sampling(self, config: ModelConfig) -> tuple[float, int]:
        """Returns temperature and top-k; what is None comes from the checkpoint's `sampling`.

        Raises:
          ConfigError: a temperature or a top-k below 0.
        """
        defaults = config.sampling
        temperature = (defaults.temp_text or 0.0) if self.temperature is None else self.temperature
        top_k = (defaults.top_k_text or 0) if self.top_k is None else self.top_k
        if temperature < 0 or top_k < 0:
            raise ConfigError(f"temperature is {temperature} and top_k {top_k}; neither can be below 0")
        return temperature, top_k

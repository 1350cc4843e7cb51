"""Options of conversational speech."""

from dataclasses import dataclass

from dsm_jax.errors import ConfigError
from dsm_jax.options import check_numbers, check_sampling, check_temperature


@dataclass(frozen=True, kw_only=True)
class CsmOptions:
    """Options of speech from a conversational speech model.

    Attributes:
      temperature: of the sampling of the first codebook, which holds most of the content; 0 takes the most probable
        codes.
      top_k: sample the first codebook among so many of the most probable codes; 0 is all.
      depth_temperature, depth_top_k: the same of the other codebooks; None takes `temperature` and `top_k`.
      seed: of the sampling.
      max_frames: frames of 80 ms after which to give up. The conversation, prompt and answer together, has to fit the
        model's context too.

    Raises:
      ConfigError: a value out of its range.
    """

    temperature: float = 0.9
    top_k: int = 50
    depth_temperature: float | None = None
    depth_top_k: int | None = None
    seed: int = 0
    max_frames: int = 1125

    def __post_init__(self) -> None:
        check_numbers(self)
        check_sampling(temperature=self.temperature, top_k=self.top_k, depth_top_k=self.depth_top_k, seed=self.seed)
        check_temperature("depth_temperature", self.depth_temperature)
        if self.max_frames < 1:
            raise ConfigError(f"max_frames is {self.max_frames}; expected 1 or more")

    @property
    def depth_sampling(self) -> tuple[float, int]:
        """Temperature and top-k of all codebooks but the first."""
        temperature = self.temperature if self.depth_temperature is None else self.depth_temperature
        return temperature, self.top_k if self.depth_top_k is None else self.depth_top_k

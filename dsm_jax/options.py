"""Check the options that transcription and synthesis share."""

import math

from dsm_jax.errors import ConfigError


def check_sampling(*, temperature: float | None, seed: int, **top_k: int | None) -> None:
    """Check the options that transcription and synthesis share.

    Raises:
      ConfigError: a temperature or a top-k that is below 0 or no number, or a seed of more than 64 bits.
    """
    if temperature is not None and not 0 <= temperature < math.inf:
        raise ConfigError(f"temperature is {temperature}; expected a number from 0, which is greedy")
    for name, value in top_k.items():
        if value is not None and value < 0:
            raise ConfigError(f"{name} is {value}; expected 0, which keeps all tokens, or more")
    if not -(2**63) <= seed < 2**63:
        raise ConfigError(f"the seed is {seed}; expected a number of 64 bits")

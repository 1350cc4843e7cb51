"""Check the settings of losses, with errors that say what to do."""

import math
from typing import Any

from jax.core import Tracer

from dsm_jax.errors import ConfigError


def check_shares(objective: Any, *names: str) -> None:
    """Check fields that are shares.

    Raises:
      ConfigError: a field is not from 0 to 1.
    """
    for name in names:
        if not _is_traced(share := getattr(objective, name)) and not 0 <= share <= 1:
            raise ConfigError(f"{name} is {share}; give a share, from 0 to 1")


def check_weights(objective: Any, *names: str) -> None:
    """Check fields that are weights of a part of a loss.

    Raises:
      ConfigError: a field is below 0 or no number.
    """
    for name in names:
        if not _is_traced(weight := getattr(objective, name)) and not 0 <= weight < math.inf:
            raise ConfigError(f"{name} is {weight}; give a weight of 0, which leaves that part out, or more")


def _is_traced(value: Any) -> bool:
    """Tell whether a value is an argument of a function under compilation, which has no value yet."""
    return isinstance(value, Tracer)

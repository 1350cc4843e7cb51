"""The check of config values, with errors that say what to do."""

import math
from typing import Any

from dsm_jax.errors import ConfigError


def require(ok: bool, found: str, remedy: str) -> None:
    """Raise unless `ok`.

    Args:
      ok: whether the library supports the setting.
      found: the faulty setting and its value.
      remedy: the value to set instead.

    Raises:
      ConfigError: `ok` is false.
    """
    if not ok:
        raise ConfigError(f"{found}; {remedy}")


def require_positive(config: Any, *names: str) -> None:
    """Raise unless these fields of a config are above 0 and finite.

    Raises:
      ConfigError: one is not.
    """
    for name in names:
        value = getattr(config, name)
        require(0 < value < math.inf, f"{name} is {value}", "expected a number above 0")


def require_seconds(config: Any, *names: str) -> None:
    """Raise unless these fields of a config are times: finite, and 0 or more.

    Raises:
      ConfigError: one is not.
    """
    for name in names:
        value = getattr(config, name)
        require(0 <= value < math.inf, f"{name} is {value}", "expected seconds from 0")

"""The check of config values, with errors that say what to do."""

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

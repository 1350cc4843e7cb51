"""Checks of config values, with errors that say what to do."""

from dsm_jax.errors import ConfigError


def require(ok: bool, found: str, remedy: str) -> None:
    """Raises unless `ok`.

    Args:
      ok: whether the config is one that the library can honour.
      found: the faulty setting and its value.
      remedy: what to set instead.

    Raises:
      ConfigError: it is not.
    """
    if not ok:
        raise ConfigError(f"{found}; {remedy}")

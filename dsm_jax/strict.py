"""Configs from JSON and back, strictly: what the library does not understand is an error.

A setting silently ignored is a wrong model.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from dsm_jax.configs import Table
from dsm_jax.errors import ConfigError

Config = TypeVar("Config")


def from_dict(kind: type[Config], values: Mapping[str, Any], where: str, *, like: Any = None) -> Config:
    """Builds a config from decoded JSON.

    Args:
      kind: a config class of `dsm_jax.configs`.
      values: field names to values; nested configs as nested mappings.
      where: what the values were read from, for the error.
      like: nested configs that are given in part are for the rest as they are here: in a config of this kind, or in the
        defaults of the kind itself. None means as in their own class, which may need what is not given.

    Returns:
      The config.

    Raises:
      ConfigError: unknown or missing keys, a value of the wrong type, or one that the library cannot honour.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected an object with the fields of {kind.__name__}, got {values!r}")
    fields = {f.name: f for f in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    if unknown := sorted(values.keys() - fields.keys()):
        raise ConfigError(f"{where}: unknown keys {unknown}; remove them, or use one of {sorted(fields)}")
    needed = {n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING}
    base = like if isinstance(like, kind) else None
    if base is None and (missing := sorted(needed - values.keys())):
        raise ConfigError(f"{where}: the keys {missing} are missing; {kind.__name__} needs them")
    read = {
        name: _read_value(fields[name].type, value, f"{where}: {name}", getattr(like, name, None))
        for name, value in values.items()
    }
    try:
        return kind(**read) if base is None else dataclasses.replace(base, **read)  # pyright: ignore[reportArgumentType]
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _read_value(kind: Any, value: Any, where: str, like: Any) -> Any:
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    for option in options:
        origin: Any = typing.get_origin(option) or option
        if isinstance(origin, type) and dataclasses.is_dataclass(origin) and value is not None:
            return from_dict(origin, value, where, like=like)  # pyright: ignore[reportArgumentType]  it checks its values
        if origin is tuple and isinstance(value, (list, tuple)):
            return tuple(_read_value(typing.get_args(option)[0], v, where, None) for v in value)
        if origin is Table and isinstance(value, Mapping):
            return Table(value)
        if origin is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if isinstance(origin, type) and isinstance(value, origin) and isinstance(value, bool) == (origin is bool):
            return value
    raise ConfigError(f"{where} is {value!r}; expected {getattr(kind, '__name__', kind)}")


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON values; `from_dict` reads it back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))

"""Reads configs from JSON and writes them back, strictly: an unknown key is an error.

A setting silently ignored is a wrong model.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from dsm_jax.errors import ConfigError

Config = TypeVar("Config")


def from_dict(kind: type[Config], values: Mapping[str, Any], where: str, *, like: Any = None) -> Config:
    """Builds a config from decoded JSON.

    Args:
      kind: a config class: a dataclass whose fields are numbers, texts, tuples, mappings and further configs.
      values: field names to values; nested configs as nested mappings, or built already. A field that may hold one of
        several configs takes the one whose `type` is given.
      where: what the values were read from, for the error.
      like: a config of that kind, or the kind itself for its defaults, from which nested configs take the fields that
        `values` leave out. None takes these from the class of the nested config, where each may be required.

    Returns:
      The config.

    Raises:
      ConfigError: unknown or missing keys, a value of the wrong type, or a value that the library cannot honour.
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
    configs: list[Any] = [option for option in options if dataclasses.is_dataclass(option)]
    if configs and value is not None:
        if isinstance(value, tuple(configs)):
            return value
        config = configs[0] if len(configs) == 1 else _of_type(configs, value, where)
        return from_dict(config, value, where, like=like)
    for option in options:
        origin: Any = typing.get_origin(option) or option
        if origin is tuple and isinstance(value, (list, tuple)):
            return tuple(_read_value(typing.get_args(option)[0], v, where, None) for v in value)
        if origin is Mapping and isinstance(value, Mapping):
            return {
                key: _read_value(typing.get_args(option)[1], v, f"{where}: {key}", None) for key, v in value.items()
            }
        if origin is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if isinstance(origin, type) and isinstance(value, origin) and isinstance(value, bool) == (origin is bool):
            return value
    raise ConfigError(f"{where} is {value!r}; expected {getattr(kind, '__name__', kind)}")


def _of_type(configs: Sequence[Any], value: Any, where: str) -> Any:
    """Chooses among configs by their field `type`, whose default is each class's own."""
    by_type = {config.type: config for config in configs}
    found = value.get("type") if isinstance(value, Mapping) else value
    if found not in by_type:
        raise ConfigError(f"{where}: the type is {found!r}; choose one of {sorted(by_type)}")
    return by_type[found]


def to_dict(config: Any) -> dict[str, Any]:
    """Returns a config as plain JSON values, which `from_dict` reads back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))

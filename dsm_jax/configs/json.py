"""Read configs from JSON and write them back, strictly: an unknown key is an error.

A setting that is ignored silently would give a wrong model.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from dsm_jax.errors import ConfigError

Config = TypeVar("Config")
Entry = TypeVar("Entry")


def from_dict(kind: type[Config], values: Mapping[str, Any], where: str, *, like: Any = None) -> Config:
    """Build a config from decoded JSON.

    Args:
      kind: a config class: a dataclass whose fields are numbers, strings, literals, paths, tuples, mappings and
        further configs.
      values: values by field name; a nested config is a mapping or an instance. A mapping for a field with several
        config classes names its class in the key `type`.
      where: name of the values' source, for the error.
      like: defaults for fields that are missing from nested configs: an instance of `kind`, or `kind` itself. None uses
        the defaults of each nested config's own class.

    Returns:
      The config.

    Raises:
      ConfigError: unknown or missing keys, a value of the wrong type, or a value that the library does not support.
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
    unions = types.UnionType, typing.Union  # with a Literal, `|` makes the latter
    options = typing.get_args(kind) if typing.get_origin(kind) in unions else (kind,)
    configs: list[Any] = [option for option in options if dataclasses.is_dataclass(option)]
    if configs and value is not None:
        if isinstance(value, tuple(configs)):
            return value
        config = configs[0] if len(configs) == 1 else _of_type(configs, value, where)
        return from_dict(config, value, where, like=like)
    for option in options:
        origin: Any = typing.get_origin(option) or option
        if origin is Literal and isinstance(value, str) and value in typing.get_args(option):
            return value
        if origin is tuple and isinstance(value, (list, tuple)):
            return tuple(_read_value(typing.get_args(option)[0], v, where, None) for v in value)
        if origin is Mapping and isinstance(value, Mapping):
            return {
                key: _read_value(typing.get_args(option)[1], v, f"{where}: {key}", None) for key, v in value.items()
            }
        if origin is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            try:
                return float(value)
            except OverflowError:
                raise ConfigError(f"{where} is too large a number; expected float") from None
        if origin is Path and isinstance(value, str):
            return Path(value)
        if isinstance(origin, type) and isinstance(value, origin) and isinstance(value, bool) == (origin is bool):
            return value
    texts = [text for option in options if typing.get_origin(option) is Literal for text in typing.get_args(option)]
    expected = " or ".join(map(repr, texts)) or getattr(kind, "__name__", kind)
    raise ConfigError(f"{where} is {value!r}; expected {expected}")


def _of_type(configs: Sequence[Any], value: Any, where: str) -> Any:
    """Choose the config class whose default of the field `type` is the value's."""
    found = value.get("type") if isinstance(value, Mapping) else value
    return look_up({config.type: config for config in configs}, found, f"{where}: the type")


def look_up(table: Mapping[Any, Entry], value: Any, what: str) -> Entry:
    """Return the entry of a table for a value from JSON.

    Args:
      table: entries by the values that are known.
      value: any value, of a kind that no table holds too.
      what: noun for the value, for the error.

    Raises:
      ConfigError: the table has no such entry.
    """
    if value not in tuple(table):  # a table itself cannot be asked for a list
        raise ConfigError(f"{what} is {value!r}; choose one of {sorted(table)}")
    return table[value]


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a config to plain JSON values, which `from_dict` reads back.

    From Python, a number may be one of numpy's, and a text a path or a dtype.
    """
    return json.loads(json.dumps(dataclasses.asdict(config), default=_plain))


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else str(value)

"""Check the options and the batches that transcription and synthesis share."""

import dataclasses
import math
import numbers
import operator
from collections.abc import Iterable, Sequence
from typing import Any

from dsm_jax.errors import ConfigError, plural


def check_sampling(*, temperature: float | None, seed: int, **top_k: int | None) -> None:
    """Check the options that transcription and synthesis share.

    Raises:
      ConfigError: a temperature or a top-k that is below 0 or no number, or a seed of more than 64 bits.
    """
    check_temperature("temperature", temperature)
    for name, value in top_k.items():
        if value is not None and value < 0:
            raise ConfigError(f"{name} is {value}; expected 0, which keeps all tokens, or more")
    if not -(2**63) <= seed < 2**63:
        raise ConfigError(f"the seed is {seed}; expected a number of 64 bits")


def whole_number(name: str, value: Any) -> int:
    """Return a whole number as Python's integer.

    Raises:
      ConfigError: the value is another kind of number, or none.
    """
    try:
        return operator.index(value)
    except TypeError:
        raise ConfigError(f"{name} is {value!r}; expected a whole number") from None


def check_numbers(options: Any) -> None:
    """Check the fields of a frozen dataclass that are numbers, and make Python's integers of numpy's.

    Args:
      options: an instance of the dataclass. A `seed` may have 64 bits, the other fields have less than 32.

    Raises:
      ConfigError: a field is no number, is no whole number where one is expected, or is too large.
    """
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if value is None and field.type in (int | None, float | None):
            continue
        # An array stands for a number for each row.
        if field.type in (float, float | None) and not isinstance(value, numbers.Real) and not hasattr(value, "dtype"):
            raise ConfigError(f"{field.name} is {value!r}; expected a number")
        if field.type not in (int, int | None):
            continue
        whole = whole_number(field.name, value)
        if field.name != "seed" and abs(whole) >= 2**31:
            raise ConfigError(f"{field.name} is {whole}; expected a number of less than 32 bits")
        object.__setattr__(options, field.name, whole)


def check_kind(name: str, value: Any, kind: type) -> None:
    """Check the class of one value.

    Raises:
      ConfigError: it is of another.
    """
    if not isinstance(value, kind):
        raise ConfigError(f"{name} is {value!r}; expected {kind.__name__}")


def check_functions(**functions: Any) -> None:
    """Check functions that the caller gave by name, each of which may be None.

    Raises:
      ConfigError: one cannot be called.
    """
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise ConfigError(f"{name} is {function!r}; give a function, or None")


def check_options(model: str, options: Iterable[Any], kind: type) -> None:
    """Check the class of options for a model.

    Raises:
      ConfigError: some are of another, such as those of another family.
    """
    for one in options:
        if not isinstance(one, kind):
            raise ConfigError(f"options are {type(one).__name__}; {model} takes {kind.__name__}")


def check_temperature(name: str, temperature: float | None) -> None:
    """Check the temperature of a sampling; None passes.

    Raises:
      ConfigError: it is below 0 or no number.
    """
    if temperature is not None and not 0 <= temperature < math.inf:
        raise ConfigError(f"{name} is {temperature}; expected a number from 0, which is greedy")


def check_batch_size(batch_size: int) -> None:
    """Check the number of inputs at a time.

    Raises:
      ConfigError: it is no whole number, or below 1.
    """
    if whole_number("batch_size", batch_size) < 1:
        raise ConfigError(f"batch_size is {batch_size}; expected 1 or more")


def slots_for(count: int, batch_size: int) -> int:
    """Return the number of slots for so many inputs: few take a power of two, so that they share a compilation."""
    return max(1, min(batch_size, 1 << max(0, count - 1).bit_length()))


def check_one_each(count: int, inputs: str, **given: Sequence[object]) -> None:
    """Check that there is one of everything for each input.

    Args:
      count: number of the inputs.
      inputs: the inputs' name, for the error; a plural with s.
      **given: what was given, by its name; a plural too.

    Raises:
      ConfigError: there are more or fewer.
    """
    for name, values in given.items():
        if len(values) != count:
            have = f"{plural(count, inputs[:-1])} {'has' if count == 1 else 'have'} {plural(len(values), name[:-1])}"
            raise ConfigError(f"{have}; give one for all, or one each")

"""The precision and dtype that networks compute in: float32 products are never rounded to TF32 or bfloat16.

Codes and greedy tokens are decisions, and products of lower precision change a visible share of them. Products of
bfloat16 arrays are not affected.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

Args = ParamSpec("Args")
Result = TypeVar("Result")


def full_precision(function: Callable[Args, Result]) -> Callable[Args, Result]:
    """Wrap a function so that its matrix products and convolutions keep the precision of their operands."""

    @functools.wraps(function)
    def traced(*args: Args.args, **kwargs: Args.kwargs) -> Result:
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return traced


def set_compute_dtype(module: nnx.Module, dtype: Any) -> None:
    """Set the dtype of the activations and caches of a module and its parts, except conditioning (always float32).

    Args:
      module: changed in place; its parameters stay the same.
      dtype: dtype of activations and caches.
    """
    for path, part in nnx.iter_modules(module):
        if hasattr(part, "dtype") and "conditioning" not in path:
            setattr(part, "dtype", jnp.dtype(dtype))  # noqa: B010  not every module has one

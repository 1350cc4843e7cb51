"""float32 means float32: products are not rounded to TF32 or bfloat16 on the way, whatever the backend likes best.

Codes and greedy tokens are decisions; a product in less takes a visible share of them differently. Weights in bfloat16
are multiplied as such either way.
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
    """Traces a function with every matrix product and convolution at the precision of its operands."""

    @functools.wraps(function)
    def traced(*args: Args.args, **kwargs: Args.kwargs) -> Result:
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return traced


def set_compute_dtype(module: nnx.Module, dtype: Any) -> None:
    """Makes a module, parts included, compute in `dtype`; conditioning, which is float32 always, stays as it is.

    Args:
      module: its structure changes, its parameters do not.
      dtype: of activations and caches from now on.
    """
    for path, part in nnx.iter_modules(module):
        if hasattr(part, "dtype") and "conditioning" not in path:
            setattr(part, "dtype", jnp.dtype(dtype))  # noqa: B010  not every module has one

"""float32 means float32: products are not rounded to TF32 or bfloat16 on the way, whatever the backend likes best.

Codes and greedy tokens are decisions; a product in less takes a visible share of them differently. Weights in bfloat16
are multiplied as such either way.
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

Args = ParamSpec("Args")
Result = TypeVar("Result")


def full_precision(function: Callable[Args, Result]) -> Callable[Args, Result]:
    """Traces a function with every matrix product and convolution at the precision of its operands."""

    @functools.wraps(function)
    def traced(*args: Args.args, **kwargs: Args.kwargs) -> Result:
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return traced

"""Compiles pure functions over networks: the one way in which the library makes a jitted program.

A function takes networks first, then arrays, and settings last; compiled, it takes the networks' parameters in their
place. Graph definitions and settings are closed over and not arguments: an argument is hashed at every call.
"""

import functools
import logging
import time
from collections.abc import Callable, Hashable
from typing import Any

import jax
from flax import nnx

from dsm_jax.process import check_process

_log = logging.getLogger("dsm_jax")
_compilations = 0


def compilations() -> int:
    """Counts what `compiled` functions have compiled since the library was imported.

    The difference of two counts tells how many programs were compiled in between: none after warm-up.
    """
    return _compilations


class Compiled:
    """A jitted function over parameters. `compiled` makes one, or returns the one made before."""

    def __init__(
        self, function: Callable, graphs: tuple[nnx.GraphDef, ...], settings: Hashable | None, donate: tuple[int, ...]
    ):
        self.name = f"{function.__module__}.{function.__qualname__}"

        def traced(params: tuple[nnx.State, ...], *args: Any) -> Any:
            # JAX traces a function once for each of its compilations.
            global _compilations
            _compilations += 1
            networks = [nnx.merge(graph, part) for graph, part in zip(graphs, params, strict=True)]
            made = function(*networks, *args) if settings is None else function(*networks, *args, settings)
            sharding = getattr(networks[0], "sharding", None)
            return made if sharding is None else sharding.constrain(made)

        self._jitted = jax.jit(traced, donate_argnums=tuple(1 + index for index in donate))

    def __call__(self, params: tuple[nnx.State, ...], *args: Any) -> Any:
        """Run the function; compile it first for shapes that are new."""
        check_process()
        return self._jitted(params, *args)

    def compile(self, params: tuple[nnx.State, ...], *args: Any) -> jax.stages.Compiled:
        """Compiles ahead of the first call, for arrays that need not exist yet.

        Compiling before a state is allocated keeps the two peaks of memory from adding up.

        Args:
          params: of the networks, arrays or their shapes.
          *args: the arguments, or their shapes as `jax.ShapeDtypeStruct`.

        Returns:
          The compiled program, for its memory and cost analyses; calls find it by themselves.
        """
        before, start = _compilations, time.perf_counter()
        program = self._jitted.lower(params, *args).compile()
        if _compilations != before:
            _log.info("compiled %s in %.1f s", self.name, time.perf_counter() - start)
        return program

    def shapes(self, params: tuple[nnx.State, ...], *args: Any) -> Any:
        """Returns the shapes and dtypes of the function's results, without computing them."""
        return jax.eval_shape(self._jitted, params, *args)


@functools.lru_cache(maxsize=64)
def compiled(
    function: Callable,
    graphs: tuple[nnx.GraphDef, ...],
    settings: Hashable | None = None,
    donate: tuple[int, ...] = (),
) -> Compiled:
    """Makes a compiled function, once for each function, networks and settings.

    Args:
      function: maps networks, arrays and, where there are any, settings to arrays; defined at the top of a module, so
        that it is the same object at every call.
      graphs: the structure of each network, as `nnx.split` gives it.
      settings: everything that is fixed at compilation, hashable; None calls the function without.
      donate: which arrays, counted without parameters, the call takes over: the state.
    """
    return Compiled(function, graphs, settings, donate)

"""Compile pure functions over networks: every program with which the library listens, speaks and encodes.

A function takes networks, then arrays, then settings. The compiled function takes the networks' parameters in place of
the networks. Graph definitions and settings are closed over, as JAX hashes static arguments at every call.
"""

import functools
import logging
import time
from collections.abc import Callable, Hashable
from typing import Any

import jax
from flax import nnx

from dsm_jax.garbage import no_collections
from dsm_jax.malloc import return_freed
from dsm_jax.process import check_process

# A network's parameters: its state, or nested dicts, see `plain`.
Params = nnx.State | dict[str, Any]

_log = logging.getLogger("dsm_jax")
_compilations = 0
_LARGE = 1 << 26  # bytes; less is not worth the 4 ms that returning freed memory takes


def plain(*params: Params) -> tuple[dict[str, Any], ...]:
    """Return networks' parameters as nested dicts of arrays, which JAX looks through in C++ at each call.

    Whoever calls a compiled function often keeps them: a call with states takes 2 ms longer for the embedded `digits`
    (4.0 in place of 1.8 ms, of a step of 13 ms with 8 slots on two CPU cores).
    """
    return tuple(part if isinstance(part, dict) else nnx.to_pure_dict(part) for part in params)


def compilations() -> int:
    """Return the number of programs that `compiled` functions have compiled since the library was imported.

    The number does not change after warm-up, so a difference between two calls shows an unwanted compilation.
    """
    return _compilations


class Compiled:
    """A jitted function over parameters, made by `compiled`."""

    def __init__(
        self, function: Callable, graphs: tuple[nnx.GraphDef, ...], settings: Hashable | None, donate: tuple[int, ...]
    ):
        self.name = f"{function.__module__}.{function.__qualname__}"

        def traced(params: tuple[dict[str, Any], ...], *args: Any) -> Any:
            # JAX traces a function once for each of its compilations.
            global _compilations
            _compilations += 1
            networks = [nnx.merge(graph, part) for graph, part in zip(graphs, params, strict=True)]
            made = function(*networks, *args) if settings is None else function(*networks, *args, settings)
            sharding = getattr(networks[0], "sharding", None)
            return made if sharding is None else sharding.constrain(made)

        self._jitted = jax.jit(traced, donate_argnums=tuple(1 + index for index in donate))

    def __call__(self, params: tuple[Params, ...], *args: Any) -> Any:
        """Run the function; compile it first for shapes that are new."""
        check_process()
        return self._jitted(plain(*params), *args)

    @no_collections()
    def compile(self, params: tuple[Params, ...], *args: Any) -> jax.stages.Compiled:
        """Compile before the first call, for arrays or their shapes.

        Compile before allocating a state, so that the two memory peaks do not add up. Freed memory is returned to the
        system after a compilation, and before a large state takes the place of a former one: threads do not reuse each
        other's freed memory.

        Args:
          params: parameters of the networks, or their shapes.
          *args: the other arguments, or their shapes as `jax.ShapeDtypeStruct`.

        Returns:
          The compiled program, for its memory and cost analyses; later calls reuse it by themselves.
        """
        check_process()
        before, start = _compilations, time.perf_counter()
        program = self._jitted.lower(plain(*params), *args).compile()
        if _compilations != before:
            _log.info("compiled %s in %.1f s", self.name, time.perf_counter() - start)
        if _compilations != before or sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(args)) > _LARGE:
            return_freed()
        return program

    def shapes(self, params: tuple[Params, ...], *args: Any) -> Any:
        """Return the shapes and dtypes of the function's results, without computing them."""
        return jax.eval_shape(self._jitted, plain(*params), *args)


@functools.lru_cache(maxsize=64)
def compiled(
    function: Callable,
    graphs: tuple[nnx.GraphDef, ...],
    settings: Hashable | None = None,
    donate: tuple[int, ...] = (),
) -> Compiled:
    """Make a compiled function, or return the one made before for the same arguments.

    Args:
      function: maps networks, arrays and settings to arrays; defined at the top of a module, so that it is the same
        object at every call.
      graphs: the structure of each network, from `nnx.split`.
      settings: static settings, hashable; None for a function without settings.
      donate: indices of the donated arguments, such as the state, counted without the parameters.
    """
    check_process()
    return Compiled(function, graphs, settings, donate)


def compiled_over_state(
    graphs: tuple[nnx.GraphDef, ...], settings: Hashable, init: Callable, *changes: Callable
) -> tuple[Compiled, ...]:
    """Make the compiled functions of a program over a state.

    Args:
      graphs: the structure of each network.
      settings: static settings.
      init: makes the state.
      *changes: take a state as their first array, which they are donated.
    """
    return compiled(init, graphs, settings), *(compiled(change, graphs, settings, (0,)) for change in changes)

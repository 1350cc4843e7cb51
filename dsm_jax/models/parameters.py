"""A network's parameters by dotted name: their shapes without weights, and states built from arrays."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsm_jax.errors import ConfigError
from dsm_jax.nn.quant import PackedBfloat16, QuantizedArray
from dsm_jax.sharding import Sharding, set_sharding

# Float32 in models of any dtype, as in the reference: it is computed once per stream.
ALWAYS_FLOAT32 = "conditioning."
LM_DTYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True)
class AbstractNetwork:
    """A network without weights.

    Attributes:
      graph: the structure, for `nnx.merge`.
      parameters: shape of every parameter, float32, by its dotted path.
      state: the same shapes as a state of the network.
    """

    graph: nnx.GraphDef
    parameters: dict[str, jax.ShapeDtypeStruct]
    state: nnx.State

    def unflatten(self, arrays: Mapping[str, Any]) -> nnx.State:
        """Make a state of arrays, one for each of `parameters`."""
        flat = nnx.to_flat_state(self.state)
        return nnx.from_flat_state([(path, variable.replace(arrays[_dotted(path)])) for path, variable in flat])


def abstract(make: Callable[[], nnx.Module], sharding: Sharding | None = None) -> AbstractNetwork:
    """Build a network without weights, by tracing its constructor; nothing is allocated.

    Args:
      make: constructor of the network.
      sharding: split of parameters and states over devices; None for no split.
    """
    network = nnx.eval_shape(make)
    set_sharding(network, sharding)
    graph, state = nnx.split(network)
    return AbstractNetwork(graph, flatten(state), state)


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path))


def flatten(state: nnx.State) -> dict[str, Any]:
    """List the arrays of a state by dotted path."""
    return {_dotted(path): variable.get_value() for path, variable in nnx.to_flat_state(state)}


def read_dtype(dtype: Any) -> np.dtype:
    """Parse a dtype for a language model, given by name or as a jax or numpy dtype.

    Raises:
      ConfigError: the dtype is not one of `LM_DTYPES`.
    """
    try:
        read = jnp.dtype(dtype)
    except TypeError:
        read = None
    if read is None or read.name not in LM_DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; choose one of {', '.join(LM_DTYPES)}")
    return read


def with_dtype(part: str, parameters: Mapping[str, Any], dtype: np.dtype) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the dtypes that a network's parameters have in a model of some dtype.

    Args:
      part: "mimi" or "lm"; the codec stays float32.
      parameters: arrays or their shapes, by name.
      dtype: dtype of the language model.

    Returns:
      Shapes and dtypes by name.
    """
    keep = part == "mimi"
    return {
        name: jax.ShapeDtypeStruct(p.shape, jnp.float32 if keep or name.startswith(ALWAYS_FLOAT32) else dtype)
        for name, p in parameters.items()
    }


def dtype_of(parameters: Mapping[str, Any]) -> str:
    """Return the name of the dtype of a network's parameters, by the first one.

    Conditioning, which is always float32, and weights stored in another form (`nn.quant`) do not count; "float32" if
    there is no other parameter.
    """
    dtypes = (
        np.dtype(parameter.dtype).name
        for name, parameter in parameters.items()
        if not name.startswith(ALWAYS_FLOAT32) and not isinstance(parameter, PackedBfloat16 | QuantizedArray)
    )
    return next(dtypes, "float32")

"""A model's two networks as structure without weights: what a checkpoint has to fill."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsm_jax.configs import ModelConfig
from dsm_jax.errors import CheckpointError
from dsm_jax.models.lm import DelayedStreamsLM
from dsm_jax.models.mimi import Mimi

# Kept in float32 whatever the model's dtype, as the reference does: it is computed once per stream.
ALWAYS_FLOAT32 = "conditioning."
LM_DTYPES = ("bfloat16", "float16", "float32")


@dataclasses.dataclass(frozen=True)
class Network:
    """A module without weights.

    Attributes:
      graph: the structure, for `nnx.merge`.
      parameters: shape of every parameter, float32, by its dotted path.
    """

    graph: nnx.GraphDef
    parameters: dict[str, jax.ShapeDtypeStruct]
    _state: nnx.State

    def fill(self, arrays: Mapping[str, Any]) -> nnx.State:
        """The state that holds these arrays, one for each of `parameters`."""
        flat = nnx.to_flat_state(self._state)
        return nnx.from_flat_state([(path, variable.replace(arrays[_dotted(path)])) for path, variable in flat])


def _dotted(path: tuple) -> str:
    return ".".join(map(str, path))


def flatten(state: nnx.State) -> dict[str, Any]:
    """The arrays of a state by dotted path."""
    return {_dotted(path): variable.get_value() for path, variable in nnx.to_flat_state(state)}


def networks(config: ModelConfig, *, decoder: bool = True) -> dict[str, Network]:
    """The networks that a config describes: "mimi", and "lm" where it has one. Nothing is allocated."""
    makers: dict[str, Callable[[], nnx.Module]] = {"mimi": lambda: Mimi(config.mimi, decoder=decoder, rngs=nnx.Rngs(0))}
    if config.lm is not None:
        lm = config.lm
        makers["lm"] = lambda: DelayedStreamsLM(lm, rngs=nnx.Rngs(0))
    made = {}
    for part, make in makers.items():
        graph, state = nnx.split(nnx.eval_shape(make))
        made[part] = Network(graph, flatten(state), state)
    return made


def read_dtype(dtype: Any) -> np.dtype:
    """The dtype that a caller asked for, by name or as jax and numpy have it.

    Raises:
      CheckpointError: it is none that a language model can have.
    """
    try:
        read = jnp.dtype(dtype)
    except TypeError:
        read = None
    if read is None or read.name not in LM_DTYPES:
        raise CheckpointError(f"dtype is {dtype!r}; choose one of {', '.join(LM_DTYPES)}")
    return read


def with_dtype(part: str, parameters: Mapping[str, Any], dtype: np.dtype) -> dict[str, jax.ShapeDtypeStruct]:
    """The parameters of a network in the dtypes that they have when the language model's is `dtype`."""
    keep = part == "mimi"
    return {
        name: jax.ShapeDtypeStruct(p.shape, jnp.float32 if keep or name.startswith(ALWAYS_FLOAT32) else dtype)
        for name, p in parameters.items()
    }

"""The modules through which models multiply by weights and look up embeddings: `Linear` and `Embedding` above all.

A parameter's name ends in the letters of its axes (docs/axes.md), outputs before inputs. Axes with a meaning of their
own, such as heads, are not flattened, so that a split over devices never cuts across queries, keys and values, or gate
and up.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dsm_jax.nn.quant import Weight, matmul, take
from dsm_jax.sharding import Sharding

Initializer = Callable[..., jax.Array]


def fan_in(parameter: nnx.Variable) -> int:
    """Count the inputs that one output of a weight sums over, or the rows of a table; 1 for vectors."""
    shape = parameter.get_value().shape
    inputs = parameter.get_metadata().get("inputs")
    return math.prod(shape[-inputs:] if inputs is not None else shape[-2:-1])


class Linear(nnx.Module):
    """A linear layer over the last axes of its input.

    The parameters are `weight_<outputs><inputs>`, with the number of input axes in its variable's metadata, and
    `bias_<outputs>` if there is a bias. Weight and bias are cast to the input's dtype.

    Args:
      inputs: size of each axis that is summed over, by letter.
      outputs: size of each output axis, by letter.
      bias: whether to add a bias, initially zero.
      init: initializer of the weight, called with the shape (product of inputs, product of outputs).
      rngs: random streams for the initial weights.
    """

    def __init__(
        self,
        inputs: Mapping[str, int],
        outputs: Mapping[str, int],
        *,
        bias: bool = False,
        init: Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        self.inputs, self.outputs = "".join(inputs), "".join(outputs)
        self.sharding: Sharding | None = None  # written by `set_sharding`
        matrix = math.prod(inputs.values()), math.prod(outputs.values())
        drawn = (init or nnx.initializers.lecun_normal())(rngs.params(), matrix)
        weight = drawn.T.reshape(*outputs.values(), *inputs.values())
        setattr(self, f"weight_{self.outputs}{self.inputs}", nnx.Param(weight, inputs=len(inputs)))
        self.bias = bias
        if bias:
            setattr(self, f"bias_{self.outputs}", nnx.Param(jnp.zeros(tuple(outputs.values()))))

    @property
    def weight(self) -> nnx.Param:
        """The weight under one name for all axes."""
        return getattr(self, f"weight_{self.outputs}{self.inputs}")

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [..., *inputs] to [..., *outputs]."""
        split = self.sharding is not None and self.sharding.splits(self.inputs + self.outputs)
        y = matmul(x, self.weight.get_value(), inputs=len(self.inputs), split=split)
        return y + getattr(self, f"bias_{self.outputs}")[...].astype(y.dtype) if self.bias else y


class LinearPerStream(nnx.Module):
    """One linear layer without bias for each stream, so that a loop over streams can choose its layer by index.

    Args:
      streams: number of layers.
      inputs: width of the input.
      outputs: number of scores.
      rngs: random streams for the initial weights.
    """

    def __init__(self, streams: int, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        init = nnx.initializers.normal(inputs**-0.5)
        drawn = init(rngs.params(), (streams, inputs, outputs))
        self.weight_QVD = nnx.Param(drawn.swapaxes(1, 2), inputs=1, stacked=1)

    def __call__(self, x_NQD: jax.Array) -> jax.Array:
        """Map [N, Q, D] to [N, Q, V], each stream by its own layer."""
        return jnp.einsum("NQD,QVD->NQV", x_NQD, self.weight_QVD[...].astype(x_NQD.dtype))

    def of_stream(self, stream: jax.Array | int, x_ND: jax.Array) -> jax.Array:
        """Map [N, D] to [N, V] by the layer of one stream."""
        return matmul(x_ND, self.weight_QVD[stream])


class Embedding(nnx.Module):
    """A table of embeddings, or one table per stream; token -1 gives exactly zero.

    Args:
      entries: rows of a table.
      width: width of a row.
      streams: number of tables; None for one table and tokens of any shape.
      dtype: dtype of the resulting vectors, whatever the table is stored in.
      init: initializer of the tables.
      rngs: random streams for the initial weights.
    """

    table_LW: nnx.Param
    table_QLW: nnx.Param

    def __init__(
        self,
        entries: int,
        width: int,
        *,
        streams: int | None = None,
        dtype: Any = jnp.float32,
        init: Initializer | None = None,
        rngs: nnx.Rngs,
    ):
        self.entries, self.streams, self.dtype = entries, streams, jnp.dtype(dtype)
        init = init or nnx.initializers.normal(width**-0.5)
        if streams is None:
            self.table_LW = nnx.Param(init(rngs.params(), (entries, width)))
        else:
            self.table_QLW = nnx.Param(init(rngs.params(), (streams, entries, width)))

    @property
    def table(self) -> Weight:
        """The table, or the tables of all streams."""
        return (self.table_LW if self.streams is None else self.table_QLW).get_value()

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Look up tokens.

        Args:
          tokens: int32 of any shape; with `streams`, [..., Q] with one token of each stream.

        Returns:
          Vectors [..., W] in the module's dtype.
        """
        index: Any = jnp.maximum(tokens, 0)
        index = index if self.streams is None else (jnp.arange(self.streams), index)
        return self._rows(tokens, index)

    def of_stream(self, stream: jax.Array | int, tokens: jax.Array) -> jax.Array:
        """Look up tokens of any shape [...] in the table of one stream: [..., W]."""
        return self._rows(tokens, (stream, jnp.maximum(tokens, 0)))

    def _rows(self, tokens: jax.Array, index: Any) -> jax.Array:
        rows = take(self.table, index).astype(self.dtype)
        return jnp.where((tokens < 0)[..., None], jnp.zeros((), rows.dtype), rows)

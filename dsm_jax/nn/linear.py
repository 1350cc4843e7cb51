"""Products with weights and look-ups in tables: every one of a model goes through `Linear` or `Embedding`.

A parameter's name ends in the letters of its axes (docs/axes.md), inputs before outputs. Weights keep axes that mean
something, such as heads, apart: a split over devices then never cuts across queries, keys and values, or gate and up.
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
    """Counts the values that one output of a parameter sums over, or the rows of a table; 1 for vectors."""
    shape = parameter.get_value().shape
    inputs = parameter.get_metadata().get("inputs")
    return math.prod(shape[:inputs] if inputs is not None else shape[-2:-1])


class Linear(nnx.Module):
    """Multiplies the last axes of its input by a weight.

    The parameters are `weight_<inputs><outputs>`, whose variable says in its metadata how many axes are inputs, and
    `bias_<outputs>` where there is a bias. Weights and bias are used in the input's dtype.

    Args:
      inputs: size of each axis that is summed over, by letter.
      outputs: size of each axis that is made, by letter.
      bias: add a bias, zero at first.
      init: of the weight, as a matrix [all inputs, all outputs].
      rngs: random streams.
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
        self.sharding: Sharding | None = None  # of the weight: see `set_sharding`
        matrix = math.prod(inputs.values()), math.prod(outputs.values())
        drawn = (init or nnx.initializers.lecun_normal())(rngs.params(), matrix)
        weight = drawn.reshape(*inputs.values(), *outputs.values())
        setattr(self, f"weight_{self.inputs}{self.outputs}", nnx.Param(weight, inputs=len(inputs)))
        self.bias = bias
        if bias:
            setattr(self, f"bias_{self.outputs}", nnx.Param(jnp.zeros(tuple(outputs.values()))))

    @property
    def weight(self) -> nnx.Param:
        """The weight, whose own name ends in its axes."""
        return getattr(self, f"weight_{self.inputs}{self.outputs}")

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., *inputs] to [..., *outputs]."""
        split = self.sharding is not None and self.sharding.splits(self.inputs + self.outputs)
        y = matmul(x, self.weight.get_value(), inputs=len(self.inputs), split=split)
        return y + getattr(self, f"bias_{self.outputs}")[...].astype(y.dtype) if self.bias else y


class Embedding(nnx.Module):
    """Looks tokens up in a table, or in one table per stream; -1 gives exactly zero.

    Args:
      entries: of a table.
      width: of a row.
      streams: number of tables; None is one table for any shape of tokens.
      dtype: of the vectors, whatever the table is stored in.
      init: of the tables.
      rngs: random streams.
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
        """Looks tokens up.

        Args:
          tokens: int32, of any shape; with streams [..., Q], one token of each.

        Returns:
          [..., W] in the module's dtype.
        """
        index: Any = jnp.maximum(tokens, 0)
        index = index if self.streams is None else (jnp.arange(self.streams), index)
        rows = take(self.table, index).astype(self.dtype)
        return jnp.where((tokens < 0)[..., None], jnp.zeros((), rows.dtype), rows)

"""Weights in fewer bits: pytree leaves that take a float array's place, and the product and look-up that accept both.

`matmul` and `take` are the only readers of a weight, so the rest of a model does not know which kind a weight is.

Source: the figures behind int8's layout, padding and barriers are in docs/decisions/0003-int8-products.md.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

# Every product of the backbone's and the depformer's layers, which are nearly all bytes that a step reads.
LAYERS = (r"^transformer\.layers\.", r"^depformer\.(inputs|layers|linears)\.")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """An int8 weight with one scale per output; a value is `values * scale`.

    Attributes:
      values: int8 [*outputs, *inputs]: XLA's int8 product on CPU is up to 1.7 times slower the other way round. A
        table of embeddings [entries, width] is its own order: each entry is an output.
      scale: float32 [*outputs].
    """

    values: jax.Array
    scale: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedBfloat16:
    """A bfloat16 table whose rows are read as float32.

    To read one row of a bfloat16 array into a float32 program, XLA on CPU widens the whole array first; of an array of
    integers it reads the row.

    Attributes:
      bits: uint16, of the shape of the table: the bits of its bfloat16 numbers.
    """

    bits: jax.Array


Weight = jax.Array | QuantizedArray | PackedBfloat16


def matmul(x: jax.Array, weight: Weight, *, inputs: int = 1, split: bool = False) -> jax.Array:
    """Multiplies the last axes of `x` with the first axes of a weight.

    Args:
      x: [..., *inputs], floating; the product has its dtype.
      weight: [*inputs, *outputs] as an array of any floating dtype, or a `QuantizedArray`.
      inputs: how many axes are summed over.
      split: whether the weight is split over devices along one of its axes.

    Returns:
      [..., *outputs].
    """
    if isinstance(weight, QuantizedArray):
        return _int8_matmul(x, weight, inputs, split)
    if isinstance(weight, PackedBfloat16):
        weight = _widen(weight.bits)
    weight, batch = weight.astype(x.dtype), x.shape[: x.ndim - inputs]
    if split:  # as a matrix, a weight that is split by heads would be gathered first
        return jax.lax.dot_general(x, weight, ((tuple(range(len(batch), x.ndim)), tuple(range(inputs))), ((), ())))
    # As a matrix, its gradient is one too: over several axes it would come out transposed, and be copied.
    summed, outputs = math.prod(weight.shape[:inputs]), weight.shape[inputs:]
    return (x.reshape(*batch, summed) @ weight.reshape(summed, math.prod(outputs))).reshape(*batch, *outputs)


def take(weight: Weight, index: Any) -> jax.Array:
    """Looks rows of a table up.

    Args:
      weight: a table, its rows along the last axis.
      index: int32 indices, or a tuple of them for the first axes.

    Returns:
      Rows [..., width], float32 unless the table is an array of another dtype.
    """
    if isinstance(weight, QuantizedArray):
        return weight.values[index].astype(jnp.float32) * weight.scale[index][..., None]
    if isinstance(weight, PackedBfloat16):
        return _widen(weight.bits[index])
    return weight[index]


def _widen(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32)


def _int8_matmul(x: jax.Array, weight: QuantizedArray, inputs: int, split: bool) -> jax.Array:
    """Quantises each row of activations, multiplies integers, and scales the sums back in float32."""
    batch, summed = x.shape[: x.ndim - inputs], x.shape[x.ndim - inputs :]
    rows = x.reshape(math.prod(batch), *summed).astype(jnp.float32)
    axes = tuple(range(1, rows.ndim))
    scale = jnp.maximum(jnp.abs(rows).max(axes, keepdims=True) / 127, jnp.finfo(jnp.float32).tiny)
    values = jnp.round(rows / scale).astype(jnp.int8)
    if values.shape[0] == 1:  # a product of one row of int8 is scalar code on CPU: 24 ms where two rows take 1
        values = jnp.concatenate([values, jnp.zeros_like(values)])
    # XLA would move the padding, or the cut below, through the product, and scalar code with it.
    values = jax.lax.optimization_barrier(values)
    outputs = weight.scale.shape
    if split:  # the weight comes first, and whole: on the other side its axes would be transposed, and so copied
        dimensions = (tuple(range(len(outputs), weight.values.ndim)), axes), ((), ())
        sums = jax.lax.dot_general(weight.values, values, dimensions, preferred_element_type=jnp.int32)
        sums = jnp.moveaxis(sums, -1, 0)
    else:
        matrix, values = weight.values.reshape(math.prod(outputs), -1), values.reshape(values.shape[0], -1)
        sums = jax.lax.dot_general(values, matrix, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
        sums = sums.reshape(-1, *outputs)
    sums = jax.lax.optimization_barrier(sums)[: rows.shape[0]].astype(jnp.float32)
    y = sums * scale.reshape(-1, *(1,) * len(outputs)) * weight.scale
    return y.reshape(*batch, *outputs).astype(x.dtype)


@functools.partial(jax.jit, static_argnames="inputs")
def quantize_array(weight: jax.Array, *, inputs: int) -> QuantizedArray:
    """Rounds a weight [*inputs, *outputs] to int8, each output by a scale of its own."""
    outputs_first = jnp.transpose(weight, (*range(inputs, weight.ndim), *range(inputs))).astype(jnp.float32)
    summed = tuple(range(weight.ndim - inputs, weight.ndim))
    scale = jnp.abs(outputs_first).max(summed, keepdims=True) / 127
    scale = jnp.where(scale == 0, 1.0, scale)
    values = jnp.round(outputs_first / scale).astype(jnp.int8)
    return QuantizedArray(values, scale.reshape(scale.shape[: weight.ndim - inputs]))


def quantize(params: nnx.State, policy: Sequence[str] = LAYERS) -> nnx.State:
    """Replaces the weights of `Linear` modules by int8 ones; every other parameter stays as it is.

    Args:
      params: of a module; its arrays are not changed.
      policy: regular expressions; a weight is quantised where one is found in its dotted path, such as
        "transformer.layers.0.self_attn.in_proj.weight_DPKH".

    Returns:
      Parameters for the same module, which computes in the same dtype as before.
    """
    flat = []
    for path, variable in nnx.to_flat_state(params):
        name, inputs = ".".join(map(str, path)), variable.get_metadata().get("inputs")
        if inputs is not None and any(re.search(pattern, name) for pattern in policy):
            variable = variable.replace(quantize_array(variable.get_value(), inputs=inputs))
        flat.append((path, variable))
    return nnx.from_flat_state(flat)


def pack_bfloat16(table: jax.Array) -> PackedBfloat16:
    """Stores a bfloat16 table by its bits."""
    return PackedBfloat16(jax.lax.bitcast_convert_type(table, jnp.uint16))

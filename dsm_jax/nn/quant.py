"""Quantised weights: pytree leaves that replace float arrays, and the product and look-up that accept both.

Only `matmul` and `take` read weights, so the rest of a model is independent of how they are stored.

Source: docs/decisions/0003-int8-products.md has the measurements behind int8's layout, padding and barriers.
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

# All products of the layers of backbone, depformer and depth decoder: nearly all of the bytes that a step reads.
LAYERS = (r"^(transformer|backbone|depth)\.layers\.", r"^depformer\.(inputs|layers|linears)\.")
# Up to so many rows, products on CPU have the weight as their left operand: docs/decisions/0005-float-weights.md.
_FEW_ROWS = 64
_LAST_AXES = ((1,), (1,)), ((), ())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """An int8 weight with one scale per output; a value is `values * scale`.

    Attributes:
      values: int8 [*outputs, *inputs]. A table of embeddings is [entries, width]: each entry is an output.
      scale: float32 [*outputs].
    """

    values: jax.Array
    scale: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedBfloat16:
    """A bfloat16 table whose rows are read as float32.

    XLA on CPU would convert a whole bfloat16 array to float32 to look up one row; of an array of integers it reads
    just the row.

    Attributes:
      bits: uint16, in the table's shape: the bits of its bfloat16 numbers.
    """

    bits: jax.Array


Weight = jax.Array | QuantizedArray | PackedBfloat16


def matmul(x: jax.Array, weight: Weight, *, inputs: int = 1, split: bool = False) -> jax.Array:
    """Multiply the last axes of `x` with the last axes of a weight.

    Args:
      x: [..., *inputs], of any floating dtype; the product has the same.
      weight: [*outputs, *inputs], an array of any floating dtype or a `QuantizedArray`.
      inputs: number of axes that are summed over.
      split: whether the weight is split over devices along one of its axes.

    Returns:
      [..., *outputs].
    """
    if isinstance(weight, QuantizedArray):
        return _int8_matmul(x, weight, inputs, split)
    if isinstance(weight, PackedBfloat16):
        weight = _widen(weight.bits)
    weight, batch, outputs = weight.astype(x.dtype), x.shape[: x.ndim - inputs], weight.shape[: weight.ndim - inputs]
    if split:  # XLA would gather a weight that is split by heads to make a matrix, and copy one as the right operand
        axes = tuple(range(len(outputs), weight.ndim)), tuple(range(len(batch), x.ndim))
        y = jax.lax.dot_general(weight, x, (axes, ((), ())))
        return jnp.moveaxis(y, tuple(range(len(outputs))), tuple(range(-len(outputs), 0)))
    # With a matrix as the weight, the gradient is a matrix too; with several axes XLA would transpose and copy it.
    summed = math.prod(weight.shape[len(outputs) :])
    return _product(x.reshape(-1, summed), weight.reshape(-1, summed)).reshape(*batch, *outputs)


def _product(x_NC: jax.Array, weight_DC: jax.Array, dtype: Any = None) -> jax.Array:
    """Multiply rows with a matrix, with the operands in the faster order.

    Args:
      x_NC: the rows.
      weight_DC: the matrix, of the same dtype.
      dtype: dtype of the sums; None for the operands' own.

    Returns:
      [N, D].
    """
    rows_first, weight_first = (functools.partial(order, dtype=dtype) for order in (_rows_first, _weight_first))
    if 1 < x_NC.shape[0] <= _FEW_ROWS:
        return jax.lax.platform_dependent(x_NC, weight_DC, cpu=weight_first, default=rows_first)
    return rows_first(x_NC, weight_DC)


def _rows_first(x_NC: jax.Array, weight_DC: jax.Array, *, dtype: Any) -> jax.Array:
    return jax.lax.dot_general(x_NC, weight_DC, _LAST_AXES, preferred_element_type=dtype)


def _weight_first(x_NC: jax.Array, weight_DC: jax.Array, *, dtype: Any) -> jax.Array:
    """Multiply with the weight as the left operand, as XLA on CPU packs the right one anew at every call."""
    y_DN = jax.lax.dot_general(weight_DC, x_NC, _LAST_AXES, preferred_element_type=dtype)
    # Without the barrier XLA would fold the transposition into the product, which swaps its operands.
    return jax.lax.optimization_barrier(y_DN).T


def take(weight: Weight, index: Any) -> jax.Array:
    """Look up rows of a table.

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
    """Quantise each row of activations, multiply in int8, and scale the sums back in float32."""
    batch, summed = x.shape[: x.ndim - inputs], x.shape[x.ndim - inputs :]
    rows = x.reshape(math.prod(batch), *summed).astype(jnp.float32)
    axes = tuple(range(1, rows.ndim))
    scale = jnp.maximum(jnp.abs(rows).max(axes, keepdims=True) / 127, jnp.finfo(jnp.float32).tiny)
    values = jnp.round(rows / scale).astype(jnp.int8)
    if values.shape[0] == 1:  # XLA on CPU multiplies a single int8 row by scalar code: 24 ms, where two rows take 1 ms
        values = jnp.concatenate([values, jnp.zeros_like(values)])
    # The barriers keep XLA from moving the padding, or the slice below, through the product back to a single row.
    values = jax.lax.optimization_barrier(values)
    outputs = weight.scale.shape
    if split:  # the weight is the left operand and not reshaped: as the right one it would be transposed and copied
        dimensions = (tuple(range(len(outputs), weight.values.ndim)), axes), ((), ())
        sums = jax.lax.dot_general(weight.values, values, dimensions, preferred_element_type=jnp.int32)
        sums = jnp.moveaxis(sums, -1, 0)
    else:
        matrix, values = weight.values.reshape(math.prod(outputs), -1), values.reshape(values.shape[0], -1)
        sums = _product(values, matrix, jnp.int32).reshape(-1, *outputs)
    sums = jax.lax.optimization_barrier(sums)[: rows.shape[0]].astype(jnp.float32)
    y = sums * scale.reshape(-1, *(1,) * len(outputs)) * weight.scale
    return y.reshape(*batch, *outputs).astype(x.dtype)


@functools.partial(jax.jit, static_argnames="inputs")
def quantize_array(weight: jax.Array, *, inputs: int) -> QuantizedArray:
    """Round a weight [*outputs, *inputs] to int8 with one scale per output."""
    weight, summed = weight.astype(jnp.float32), tuple(range(weight.ndim - inputs, weight.ndim))
    scale = jnp.abs(weight).max(summed, keepdims=True) / 127
    scale = jnp.where(scale == 0, 1.0, scale)
    values = jnp.round(weight / scale).astype(jnp.int8)
    return QuantizedArray(values, scale.reshape(scale.shape[: weight.ndim - inputs]))


def chosen(params: nnx.State, policy: Sequence[str] = LAYERS) -> dict[str, int]:
    """List the weights of `Linear` modules that a policy quantises, with the number of input axes of each.

    Args:
      params: parameters of a module, or their shapes.
      policy: regular expressions; a weight is quantised if any of them matches in its dotted path, such as
        "transformer.layers.0.self_attn.in_proj.weight_PKHD".
    """
    inputs = {
        ".".join(map(str, path)): variable.get_metadata().get("inputs") for path, variable in nnx.to_flat_state(params)
    }
    return {
        name: count
        for name, count in inputs.items()
        if count is not None and any(re.search(pattern, name) for pattern in policy)
    }


def quantize(params: nnx.State, policy: Sequence[str] = LAYERS) -> nnx.State:
    """Replace the weights of `Linear` modules by int8 ones; every other parameter stays as it is.

    `dsm_jax.load` does it with `quantize="int8"`, without ever holding all of the float weights.

    Args:
      params: parameters of a module; the arrays are not changed.
      policy: as for `chosen`.

    Returns:
      Parameters for the same module, which computes in the same dtype as before.
    """
    inputs, flat = chosen(params, policy), []
    for path, variable in nnx.to_flat_state(params):
        if (name := ".".join(map(str, path))) in inputs:
            variable = variable.replace(quantize_array(variable.get_value(), inputs=inputs[name]))
        flat.append((path, variable))
    return nnx.from_flat_state(flat)


def pack_bfloat16(table: jax.Array) -> PackedBfloat16:
    """Store a bfloat16 table as the bits of its numbers."""
    return PackedBfloat16(jax.lax.bitcast_convert_type(table, jnp.uint16))

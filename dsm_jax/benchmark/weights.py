"""Models of random weights, so that a size can be timed whose weights are not there."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from dsm_jax.checkpoints import Model
from dsm_jax.configs import ModelConfig
from dsm_jax.models.family import abstract_model
from dsm_jax.models.parameters import AbstractNetwork, with_dtype
from dsm_jax.nn import quant
from dsm_jax.nn.linear import fan_in


def random_model(config: ModelConfig, dtype: jnp.dtype, quantize: str | None = None) -> Model:
    """Make a model of a config with weights of a trained model's scale, without a tokenizer.

    Args:
      config: sizes of the networks.
      dtype: dtype of the language model; the codec is float32.
      quantize: "int8" rounds the weights of the language model's layers; None keeps them.
    """
    networks = abstract_model(config, dtype=dtype)
    params = {part: _drawn(part, network, dtype) for part, network in networks.items()}
    lm, lm_params = networks.get("lm"), params.get("lm")
    if lm_params is not None and quantize is not None:
        lm_params = quant.quantize(lm_params)
    return Model(config, lm and lm.graph, lm_params, networks["mimi"].graph, params["mimi"], None, "random weights")


def _drawn(part: str, network: AbstractNetwork, dtype: jnp.dtype) -> nnx.State:
    """Draw a network's parameters on the device, one by one."""
    wanted = with_dtype(part, network.parameters, dtype)
    keys = jax.random.split(jax.random.key(0), len(wanted))
    variables = [variable for _, variable in nnx.to_flat_state(network.state)]  # in the order of `parameters`
    each = zip(keys, wanted.items(), variables, strict=True)
    return network.unflatten(
        {name: _draw(key, p.shape, p.dtype, fan_in(variable)) for key, (name, p), variable in each}
    )


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _draw(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype, rows: int) -> jax.Array:
    return (jax.random.normal(key, shape) * rows**-0.5).astype(dtype)

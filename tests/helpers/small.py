"""Configs of the published models in miniature: all features, a few thousand parameters each.

The windows are a few steps long, so that a test of a few dozen steps runs well past them.
"""

import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsm_jax.configs import (
    DepformerConfig,
    Fuser,
    LMConfig,
    LutConditioner,
    MimiConfig,
    QuantizerConfig,
    SeanetConfig,
    TensorConditioner,
    TransformerConfig,
)

Module = TypeVar("Module", bound=nnx.Module)

# 16 samples per frame, 8 per latent, two latents per frame; published: 1920, 960 and two.
MIMI = MimiConfig(
    sample_rate=400,
    frame_rate=25.0,
    seanet=SeanetConfig(dimension=16, n_filters=2, ratios=(4, 2)),
    quantizer=QuantizerConfig(dimension=8, n_q=4, bins=16, input_dimension=16, output_dimension=16),
    transformer=TransformerConfig(
        d_model=16,
        num_heads=2,
        num_layers=2,
        dim_feedforward=24,
        context=5,
        layer_scale=0.3,
        input_dimension=16,
        output_dimensions=(16,),
    ),
)

# Speech to text with pause heads: stt-1b-en_fr and its `-candle` twin. A bias, delays and a text head of another width
# are in the config format, though no published speech-to-text model uses them.
STT = LMConfig(
    card=12,
    n_q=3,
    dep_q=0,
    delays=(2, 0, 1, 0),
    dim=16,
    text_card=20,
    text_card_out=18,
    num_heads=4,
    num_layers=2,
    hidden_scale=4.125,
    context=5,
    max_period=100_000.0,
    bias_proj=True,
    extra_heads_num_heads=4,
)

# Text to speech with a voice, a guidance value and two text streams: tts-1.6b-en_fr. Has input audio streams as moshi.
TTS = LMConfig(
    card=12,
    n_q=6,
    dep_q=4,
    delays=(0, 0, 2, 2, 2, 0, 1),
    dim=16,
    text_card=20,
    num_heads=4,
    num_layers=2,
    hidden_scale=4.0,
    context=5,
    demux_second_stream=True,
    cross_attention=True,
    conditioners=(
        TensorConditioner(name="speaker_wavs", dim=10),
        LutConditioner(name="cfg", n_bins=3, dim=6, possible_values=("1", "2", "3")),
        LutConditioner(name="control", n_bins=1, dim=16, possible_values=("ok",)),
    ),
    fuser=Fuser(sum=("control", "cfg"), cross=("speaker_wavs",), cross_attention_pos_emb=True),
    depformer=DepformerConfig(
        dim=8,
        num_heads=2,
        num_layers=2,
        dim_feedforward=24,
        weights_per_step_schedule=(0, 1, 2, 2),
        low_rank_embeddings=4,
    ),
)


def build(make: Callable[[nnx.Rngs], Module], seed: int = 0) -> Module:
    """Build a module with random weights, none of them 0 or 1, without compiling its initialisers.

    Args:
      make: builds the module from random streams.
      seed: seed of the weights.

    Returns:
      The module; outputs are about as large as inputs.
    """
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    random = np.random.default_rng(seed)

    def draw(variable: nnx.Variable) -> nnx.Variable:
        shape, about = variable.get_value().shape, variable.get_metadata()
        inputs, stacked = about.get("inputs", 0), about.get("stacked", 0)
        if inputs:  # the input axes are drawn before the output axes, and stored after them
            shape = shape[:stacked] + shape[-inputs:] + shape[stacked:-inputs]
        noise = random.normal(size=shape)
        summed = math.prod(shape[: stacked + inputs] if inputs else shape[:-1])
        value = noise / np.sqrt(summed) if len(shape) > 1 else 1 + 0.3 * noise
        value = np.moveaxis(value, range(stacked, stacked + inputs), range(-inputs, 0))
        return variable.replace(jnp.asarray(value.astype(np.float32)))

    return nnx.merge(graphdef, jax.tree.map(draw, state, is_leaf=lambda node: isinstance(node, nnx.Variable)))

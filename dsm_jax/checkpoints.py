"""Finds a model, recognises its layout, and places its weights on devices."""

import dataclasses

from flax import nnx

from dsm_jax.configs import ModelConfig
from dsm_jax.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class Model:
    """A loaded model: `nnx.merge(lm_def, lm_params)` is its `DelayedStreamsLM`, likewise its `Mimi`.

    A codec alone has no language model (`lm_def`, `lm_params` and `tokenizer` are None), and `config.lm` is None.
    """

    config: ModelConfig
    lm_def: nnx.GraphDef | None
    lm_params: nnx.State | None
    mimi_def: nnx.GraphDef
    mimi_params: nnx.State
    tokenizer: Tokenizer | None
    name: str

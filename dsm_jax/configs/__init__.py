"""Configs of models as frozen dataclasses, with the field names of Kyutai's published files; no arrays, no JAX.

`json` reads and writes any config strictly, `presets` holds the published models.
"""

from dsm_jax.configs.csm import CsmConfig
from dsm_jax.configs.delayed_lm import DepformerConfig, LMConfig
from dsm_jax.configs.mimi import MimiConfig, QuantizerConfig, SeanetConfig
from dsm_jax.configs.model import ModelConfig, ModelId, SttConfig
from dsm_jax.configs.transformer import NORMS, POSITIONS, RopeScaling, TransformerConfig, gating_dim, llama
from dsm_jax.configs.tts import Conditioner, Fuser, LutConditioner, SamplingDefaults, TensorConditioner, TtsConfig

__all__ = [
    "NORMS",
    "POSITIONS",
    "Conditioner",
    "CsmConfig",
    "DepformerConfig",
    "Fuser",
    "LMConfig",
    "LutConditioner",
    "MimiConfig",
    "ModelConfig",
    "ModelId",
    "QuantizerConfig",
    "RopeScaling",
    "SamplingDefaults",
    "SeanetConfig",
    "SttConfig",
    "TensorConditioner",
    "TransformerConfig",
    "TtsConfig",
    "gating_dim",
    "llama",
]

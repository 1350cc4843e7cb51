"""CSM in miniature: its config, a model with random weights, and a plain loop over its networks."""

import functools
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from dsm_jax import checkpoints
from dsm_jax.configs import CsmConfig, ModelConfig, RopeScaling, llama
from dsm_jax.models.csm import CsmLM
from dsm_jax.models.streams import ZERO_TOKEN
from dsm_jax.tokenizers import load_tokenizer
from tests.helpers import small
from tests.helpers.tts_model import MIMI, build_mimi

_LETTERS = "abcdefghijklmnopqrstuvwxyz 0123[].?!"
_MARKERS = ("<|begin_of_text|>", "<|end_of_text|>", "<|AUDIO|>", "<|audio_eos|>")

# Grouped heads, and scaled rates in both decoders; 3 entries of each table are codes that the codec does not have.
CSM = CsmConfig(
    backbone=llama(
        width=16,
        inner=24,
        layers=2,
        heads=4,
        kv_heads=2,
        context=512,
        scaling=RopeScaling(factor=32.0, low_frequency=0.125, high_frequency=0.5, original_context=32),
    ),
    depth=llama(
        width=8,
        inner=20,
        layers=2,
        heads=2,
        kv_heads=1,
        context=5,
        scaling=RopeScaling(factor=32.0, low_frequency=0.002, high_frequency=0.008, original_context=16),
    ),
    n_q=4,
    card=19,
    text_card=40,
    begin_id=36,
    end_id=37,
    audio_id=38,
    audio_end_id=39,
)


def make_tokenizer(path: Path) -> Path:
    """Write a `tokenizer.json` with a piece for each letter and four markers; return its path."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(_LETTERS)}, unk_token="?"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.add_special_tokens(list(_MARKERS))
    tokenizer.save(str(path))
    return path


def random_model(folder: Path, config: CsmConfig = CSM, seed: int = 7) -> checkpoints.Model:
    """Make a model with random weights that ends most turns by itself; writes its tokenizer to a folder."""
    lm = small.build(lambda rngs: CsmLM(config, rngs=rngs), seed)
    # Codes of 0 are likely, so that frames of zeros come up; and codes that the codec does not have are likelier still.
    for weight in (lm.first_linear.weight_VD, lm.depth_linears.weight_QVD):
        weight[...] = weight[...].at[..., 0, :].mul(6.0).at[..., MIMI.quantizer.bins :, :].mul(3.0)
    lm_def, lm_params = nnx.split(lm)
    mimi_def, mimi_params = nnx.split(build_mimi(MIMI))
    tokenizer = load_tokenizer(make_tokenizer(folder / "tokenizer.json"))
    model_config = ModelConfig(model_type="csm", csm=config, mimi=MIMI)
    return checkpoints.Model(model_config, lm_def, lm_params, mimi_def, mimi_params, tokenizer, "random")


def greedy_codes(model: checkpoints.Model, prompt_MT: np.ndarray, frames: int) -> np.ndarray:
    """Generate codes [Q, T] greedily by teacher-forced passes: every code from a pass over all that is before it."""
    bins, codebooks, room = model.config.mimi.quantizer.bins, model.lm.config.n_q, model.lm.config.backbone.context
    network = functools.partial(nnx.merge, model.lm_def, model.lm_params)

    @jax.jit
    def score_first(tokens_MT: jax.Array, length: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden_D = network().hidden(tokens_MT[None])[0, length - 1]  # causal, so what follows does not count
        return hidden_D, network().first_logits(hidden_D)

    @jax.jit
    def score_others(hidden_D: jax.Array, codes_Q: jax.Array) -> jax.Array:
        return network().depth_logits(hidden_D[None], codes_Q[None])[0]

    tokens_MT, generated = prompt_MT, []
    while len(generated) < frames:
        length = tokens_MT.shape[1]
        padded_MT = np.pad(tokens_MT, ((0, 0), (0, room - length)), constant_values=ZERO_TOKEN)
        hidden_D, logits_V = score_first(padded_MT, length)
        codes_Q = np.zeros(codebooks, np.int32)
        codes_Q[0] = logits_V[:bins].argmax()
        for q in range(1, codebooks):
            codes_Q[q] = score_others(hidden_D, codes_Q)[q - 1, :bins].argmax()
        if not codes_Q.any():
            break
        generated.append(codes_Q)
        tokens_MT = np.concatenate([tokens_MT, [[ZERO_TOKEN], *codes_Q[:, None]]], axis=1)
    return np.array(generated, np.int32).reshape(-1, codebooks).T


def score_shortfall(model: checkpoints.Model, prompt_MT: np.ndarray, codes_QT: np.ndarray) -> float:
    """Return how far generated codes [Q, T] are from the likeliest ones, by a teacher-forced pass over all of them.

    Returns:
      The largest difference between the highest score and a code's, as a share of the spread of the scores.
    """
    lm, bins, length = nnx.merge(model.lm_def, model.lm_params), model.config.mimi.quantizer.bins, prompt_MT.shape[1]
    frames_MT = np.concatenate([np.full((1, codes_QT.shape[1]), ZERO_TOKEN), codes_QT])
    hidden_TD = lm.hidden(np.concatenate([prompt_MT, frames_MT], axis=1)[None])[0, length - 1 : -1]
    first_TV, depth_TQV = lm.first_logits(hidden_TD), lm.depth_logits(hidden_TD, codes_QT.T)
    scores_TQV = np.concatenate([first_TV[:, None], depth_TQV], axis=1, dtype=np.float32)[..., :bins]
    chosen_TQ = np.take_along_axis(scores_TQV, codes_QT.T[..., None], axis=-1)[..., 0]
    return float(((scores_TQV.max(-1) - chosen_TQ) / np.ptp(scores_TQV, axis=-1)).max())

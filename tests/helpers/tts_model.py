"""Two miniature text-to-speech models, with voices and files of requests.

Shape letters: X steps of a voice, C its width.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from dsm_jax import checkpoints
from dsm_jax.configs import Fuser, LMConfig, MimiConfig, ModelConfig, ModelId, TtsConfig
from dsm_jax.models.lm import DelayedStreamsLM
from dsm_jax.models.mimi import Mimi
from dsm_jax.tokenizers import load_tokenizer
from dsm_jax.tts.script import NEW_WORD, PAD
from tests.helpers import small
from tests.helpers.tokenizer_maker import make_tokenizer

CODEBOOKS = 2
DELAY_STEPS, LAST_DELAY = 5, 2  # delay of the audio after the text, and of the last codebooks after the first
FRAME = 128  # samples
WIDTH = 10  # width of a voice

# One layer each, to compile fast; a sample rate that sound files can have.
MIMI = dataclasses.replace(
    small.MIMI,
    sample_rate=1600,
    frame_rate=12.5,
    seanet=dataclasses.replace(small.MIMI.seanet, ratios=(64,)),
    transformer=dataclasses.replace(small.MIMI.transformer, num_layers=1),
)
# With voices, guidance values and two words of lookahead: tts-1.6b-en_fr.
SPEAKERS = dataclasses.replace(
    small.TTS,
    card=16,
    n_q=CODEBOOKS,
    dep_q=CODEBOOKS,
    delays=(0, 0, LAST_DELAY),
    text_card=64,
    num_layers=1,
    context=50,
    depformer=dataclasses.replace(small.TTS.depformer, num_layers=1, weights_per_step_schedule=(0, 1)),
)
# Continues a recording, with classifier-free guidance: tts-0.75b-en-public.
PREFIX = dataclasses.replace(
    SPEAKERS,
    text_card_out=5,
    cross_attention=False,
    conditioners=small.TTS.conditioners[2:],  # control alone
    fuser=Fuser(sum=("control",)),
)


def random_model(folder: Path, lm_config: LMConfig = SPEAKERS) -> checkpoints.Model:
    """Make a model with random weights that often starts words and often pauses; writes its tokenizer to a folder."""
    config = ModelConfig(
        model_type="tts",
        lm=lm_config,
        mimi=MIMI,
        tts=TtsConfig(audio_delay=(DELAY_STEPS + 0.5) / MIMI.frame_rate, second_stream_ahead=2),
        model_id=ModelId(sig="0a1b2c3d", epoch=7),
    )
    lm_def, lm_params = nnx.split(_lm(lm_config))
    mimi_def, mimi_params = nnx.split(build_mimi(MIMI))
    tokenizer = load_tokenizer(make_tokenizer(folder / "words.model", lm_config.text_card))
    return checkpoints.Model(config, lm_def, lm_params, mimi_def, mimi_params, tokenizer, "random")


def make_checkpoint(folder: Path, lm_config: LMConfig = SPEAKERS) -> Path:
    """Write a model, by default one that takes voices, in the library's own layout; return its folder."""
    checkpoints.save(random_model(folder, lm_config), folder / "speaker")
    return folder / "speaker"


def _lm(config: LMConfig) -> DelayedStreamsLM:
    lm = small.build(lambda rngs: DelayedStreamsLM(config, rngs=rngs))
    lm.text_linear.weight[...] = lm.text_linear.weight[...].at[np.array([NEW_WORD, PAD])].mul(3.0)
    # Large weights, so that earlier tokens decide the next one; greedy speech would be a single code otherwise.
    lm.audio_emb.table_QLW[...] = 10 * lm.audio_emb.table_QLW[...]
    lm.text_emb.table_LW[...] = 10 * lm.text_emb.table_LW[...]
    assert lm.depformer is not None
    for linear in lm.depformer.inputs:
        linear.weight[...] = 3 * linear.weight[...]
    return lm


def build_mimi(config: MimiConfig) -> Mimi:
    """Build a codec with random weights, so quiet that few samples are clipped."""
    mimi = small.build(lambda rngs: Mimi(config, rngs=rngs), seed=1)
    assert mimi.decoder is not None
    last = mimi.decoder.seanet.layers[-1]
    last.kernel_RCO[...], last.bias_O[...] = 0.1 * last.kernel_RCO[...], 0.1 * last.bias_O[...]
    return mimi


def voice(seed: int, steps: int = 2, width: int = WIDTH) -> np.ndarray:
    """Draw the steps [X, C] of a voice."""
    return np.random.default_rng(seed).normal(size=(steps, width)).astype(np.float32)


def write_voice(path: Path, steps_XC: np.ndarray) -> Path:
    """Write a voice in Kyutai's format; return its path."""
    save_file({"speaker_wavs": np.ascontiguousarray(steps_XC.T[None])}, path)
    return path


def write_requests(folder: Path, *rows: dict | str) -> Path:
    """Write a file of requests, strings unchanged and others as JSON; return its path."""
    path = folder / "requests.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path

"""The reference packages on random weights: checkpoint makers, drivers, and one shared folder per kind and session."""

import atexit
import functools
import tempfile
from pathlib import Path

import torch

from tests.parity.references.csm import make_transformers_csm
from tests.parity.references.drivers import (
    TextRun,
    inference,
    load_lm,
    load_mimi,
    moshi_codes,
    moshi_decode,
    moshi_latent,
    moshi_pad,
    moshi_tokens,
    read_config,
    read_mimi_config,
    rusty_codes,
)
from tests.parity.references.kyutai import (
    PUBLISHED,
    SEED,
    Size,
    Spelling,
    make_kyutai_stt,
    make_mimi,
    make_weight_normed_mimi,
    stt_config,
)
from tests.parity.references.recordings import speech
from tests.parity.references.timestamps import moshi_timestamped
from tests.parity.references.transformers_layout import (
    make_transformers_mimi,
    make_transformers_stt,
    transformers_codes,
    transformers_tokens,
)
from tests.parity.references.tts import How, Kind, Spoken, load_tts, make_kyutai_tts, make_voice, moshi_speech

__all__ = [
    "PUBLISHED",
    "SEED",
    "How",
    "Spoken",
    "TextRun",
    "inference",
    "kyutai_stt",
    "kyutai_tts",
    "load_lm",
    "load_mimi",
    "load_tts",
    "make_kyutai_stt",
    "make_kyutai_tts",
    "make_mimi",
    "make_transformers_csm",
    "make_transformers_mimi",
    "make_transformers_stt",
    "make_voice",
    "make_weight_normed_mimi",
    "moshi_codes",
    "moshi_decode",
    "moshi_latent",
    "moshi_pad",
    "moshi_speech",
    "moshi_timestamped",
    "moshi_tokens",
    "read_config",
    "read_mimi_config",
    "rusty_codes",
    "speech",
    "stt_config",
    "transformers_codes",
    "transformers_csm",
    "transformers_stt",
    "transformers_tokens",
    "voice",
]


@functools.cache
def kyutai_stt(
    *,
    size: Size = "small",
    seed: int = SEED,
    extra_heads: bool = False,
    spelling: Spelling = "in_proj_weight",
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Return what `make_kyutai_stt` writes, made once per process and deleted at its end; nobody may change it."""
    folder = _session_folder() / f"{size}-{seed}-{extra_heads}-{spelling}-{str(dtype).removeprefix('torch.')}"
    return make_kyutai_stt(folder, size=size, seed=seed, extra_heads=extra_heads, spelling=spelling, dtype=dtype)


@functools.cache
def kyutai_tts(kind: Kind = "speakers") -> Path:
    """Return what `make_kyutai_tts` writes, made once per process and deleted at its end; nobody may change it."""
    return make_kyutai_tts(_session_folder() / f"tts-{kind}", kind=kind)


@functools.cache
def voice(seed: int) -> Path:
    """Return what `make_voice` writes, once per process; nobody may change it."""
    return make_voice(_session_folder() / f"voice-{seed}.safetensors", seed)


@functools.cache
def transformers_stt(*, max_shard_size: str = "50GB") -> Path:
    """Return what `make_transformers_stt` makes of `kyutai_stt()`, once per process; nobody may change it."""
    return make_transformers_stt(
        kyutai_stt(), _session_folder() / f"transformers-{max_shard_size}", max_shard_size=max_shard_size
    )


@functools.cache
def transformers_csm(seed: int = 0) -> Path:
    """Return what `make_transformers_csm` writes, once per process, deleted at its end; nobody may change it."""
    return make_transformers_csm(_session_folder() / f"csm-{seed}", seed=seed)


@functools.cache
def _session_folder() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="references-")
    atexit.register(folder.cleanup)
    return Path(folder.name)

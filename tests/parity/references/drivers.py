"""Runs the reference packages on a checkpoint folder and hands back what they compute, as numpy arrays.

Dimensions: S samples, Q codebooks, T frames, D latent width, V text tokens, H pause heads.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rustymimi
import torch
from moshi.models import LMGen, LMModel, MimiModel, loaders
from moshi.utils.compile import no_compile

from tests.parity.references.kyutai import lm_config, mimi_config


@dataclass(frozen=True)
class TextRun:
    """The outputs of the reference's greedy language model, frame by frame.

    Attributes:
        first_token: Output of the very first step, which sees initial tokens only; `run_inference` drops it.
        first_logits_V: Its logits.
        tokens_T: The token of each frame, as `run_inference` yields them.
        logits_TV: Their logits, float32.
        pauses_TH: Probability of class 0 of each pause head; no columns when the model has no such heads.
    """

    first_token: int
    first_logits_V: np.ndarray
    tokens_T: np.ndarray
    logits_TV: np.ndarray
    pauses_TH: np.ndarray


def moshi_pad(pcm_S: np.ndarray, stt_config: dict[str, Any]) -> np.ndarray:
    """Silence that `moshi.run_inference` adds: the prefix before, the delay and one second after."""
    left = int(stt_config.get("audio_silence_prefix_seconds", 0.0) * 24_000)
    right = int((stt_config.get("audio_delay_seconds", 0.0) + 1.0) * 24_000)
    return np.pad(pcm_S, (left, right))


def moshi_codes(folder: Path, pcm_S: np.ndarray, streaming: bool = False) -> np.ndarray:
    """Return codes [Q, T], int32: of the whole clip, padded to full frames, or by frames, a partial one dropped."""
    mimi = load_mimi(folder)
    pcm = _batch(pcm_S)
    with inference():
        if not streaming:
            return _int32(mimi.encode(pcm)[0])
        whole = pcm[..., : pcm.shape[-1] // mimi.frame_size * mimi.frame_size]
        with mimi.streaming(1):
            return _int32(torch.cat([mimi.encode(frame)[0] for frame in whole.split(mimi.frame_size, -1)], -1))


def moshi_latent(folder: Path, pcm_S: np.ndarray) -> np.ndarray:
    """Return what the quantiser is given, [D, T] float32, for the whole clip at once."""
    with inference():
        return load_mimi(folder).encode_to_latent(_batch(pcm_S), quantize=False)[0].numpy()


def moshi_decode(folder: Path, codes_QT: np.ndarray, streaming: bool = False) -> np.ndarray:
    """Audio [S], float32, of codes: all frames at once, or one by one."""
    mimi = load_mimi(folder)
    codes = torch.from_numpy(codes_QT.astype(np.int64))[None]
    with inference():
        if not streaming:
            return mimi.decode(codes)[0, 0].numpy()
        with mimi.streaming(1):
            return torch.cat([mimi.decode(frame)[0, 0] for frame in codes.split(1, -1)]).numpy()


def moshi_tokens(folder: Path, codes_QT: np.ndarray) -> TextRun:
    """Greedy text of a stream of codes, in float32, fed as `moshi.run_inference` does: the first frame twice."""
    lm = load_lm(folder)
    logits: list[torch.Tensor] = []
    generator = LMGen(
        lm, use_sampling=False, temp=0.0, temp_text=0.0, on_text_logits_hook=lambda x: logits.append(x[0, 0, 0].clone())
    )
    frames = torch.from_numpy(codes_QT.astype(np.int64))[None].split(1, -1)
    tokens, pauses = [], []
    with inference(), generator.streaming(1):
        for frame in (frames[0], *frames):
            output = generator.step_with_extra_heads(frame)
            assert output is not None, "a model without delays answers every step"
            tokens.append(output[0][0, 0, 0])
            pauses.append([float(head[0, 0, 0]) for head in output[1]])
    tokens_T = _int32(torch.stack(tokens))
    logits_TV = torch.stack(logits).numpy()
    return TextRun(int(tokens_T[0]), logits_TV[0], tokens_T[1:], logits_TV[1:], np.array(pauses, np.float32)[1:])


def rusty_codes(folder: Path, pcm_S: np.ndarray) -> np.ndarray:
    """Return codes [Q, T], int32, of the whole clip by the Rust codec, which reads the published shape only."""
    tokenizer = rustymimi.Tokenizer(str(_mimi_path(folder)))
    return tokenizer.encode(pcm_S[None, None])[0].astype(np.int32)


def load_mimi(folder: Path) -> MimiModel:
    """Return the reference's codec with a folder's weights, float32 on the CPU."""
    num_codebooks = read_config(folder)["n_q"]
    return loaders.get_mimi(_mimi_path(folder), read_mimi_config(folder), num_codebooks=num_codebooks)


def load_lm(folder: Path, dtype: torch.dtype = torch.float32) -> LMModel:
    """Return the reference's language model with a folder's weights, on the CPU."""
    return loaders.get_moshi_lm(folder / "model.safetensors", lm_config(read_config(folder)), dtype=dtype)


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a checkpoint folder."""
    return json.loads((folder / "config.json").read_text())


def read_mimi_config(folder: Path) -> dict[str, Any]:
    """Return the codec's configuration: the file that `config.json` names, or the published one."""
    name = read_config(folder).get("mimi_config_name")
    return mimi_config(published=True) if name is None else json.loads((folder / name).read_text())


@contextmanager
def inference() -> Iterator[None]:
    """No gradients, and no compiler: the reference would call one for a few small functions."""
    with torch.no_grad(), no_compile():
        yield


def _mimi_path(folder: Path) -> Path:
    return folder / read_config(folder)["mimi_name"]


def _batch(pcm_S: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(pcm_S, np.float32))[None, None]


def _int32(tensor: torch.Tensor) -> np.ndarray:
    return tensor.numpy().astype(np.int32)

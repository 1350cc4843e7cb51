"""The timed steps of Kyutai's PyTorch package: its own streaming steps and `run_inference`, eager on the CPU.

Shape letters: B batch rows, Q codebooks, S samples.
"""

import io
from pathlib import Path

import numpy as np
import torch
from moshi.client_utils import RawPrinter
from moshi.models import LMGen
from moshi.models.loaders import CheckpointInfo
from moshi.run_inference import InferenceState

from tests.benchmarks.worker import Step


def make(task: str, folder: Path, threads: int, tiny: bool) -> Step:
    """Make the step of `task`, with the checkpoint in `folder`."""
    torch.set_num_threads(threads)
    if task.startswith("train_"):
        from tests.benchmarks import (
            moshi_training,
        )  # late: its imports would count as memory of other tasks

        return moshi_training.make(task, tiny)
    torch.set_grad_enabled(False)
    if task.startswith("tts_"):
        from tests.benchmarks import moshi_speech, ours  # as above

        return moshi_speech.make(*ours.speech_case(task, tiny))
    info = checkpoint(folder / "kyutai")
    if task == "transcribe_45s":
        return _transcribe(info, torch.from_numpy(np.load(folder / "pcm.npy"))[None, None])
    if task.startswith("lm_step_b"):
        return _lm_step(info, int(task.removeprefix("lm_step_b")))
    mimi = info.get_mimi()
    if task == "mimi_encode_10s":
        pcm_B1S = 0.1 * torch.randn(1, 1, 10 * mimi.sample_rate)
        return lambda: mimi.encode(pcm_B1S)
    mimi.streaming_forever(1)
    if task == "mimi_encode_frame":
        frame_B1S = 0.1 * torch.randn(1, 1, mimi.frame_size)
        return lambda: mimi.encode(frame_B1S)
    codes_BQ1 = torch.randint(mimi.cardinality, (1, mimi.num_codebooks, 1))
    return lambda: mimi.decode(codes_BQ1)


def checkpoint(folder: Path) -> CheckpointInfo:
    """Read a folder in Kyutai's layout with the package's own loader, without network."""
    return CheckpointInfo.from_hf_repo(
        "local",
        moshi_weights=folder / "model.safetensors",
        mimi_weights=next(folder.glob("mimi*.safetensors")),
        tokenizer=next(folder.glob("*.model")),
        config_path=folder / "config.json",
        mimi_config_path=next(folder.glob("mimi*.json"), None),
    )


def _lm_step(info: CheckpointInfo, batch: int) -> Step:
    lm = info.get_moshi(dtype=torch.float32)
    generator = LMGen(lm, use_sampling=False)
    generator.streaming_forever(batch)
    codes_BQ1 = torch.randint(lm.card, (batch, lm.n_q, 1))
    return lambda: generator.step(codes_BQ1)


def _transcribe(info: CheckpointInfo, pcm_B1S: torch.Tensor) -> Step:
    mimi, lm, tokenizer = info.get_mimi(), info.get_moshi(dtype=torch.float32), info.get_text_tokenizer()
    state = InferenceState(info, mimi, tokenizer, lm, 1, 1.0, "cpu", **info.lm_gen_config)

    def run(pcm_B1S: torch.Tensor) -> str:
        state.printer = RawPrinter(io.StringIO(), io.StringIO())
        mimi.reset_streaming()
        state.lm_gen.reset_streaming()
        state.run(pcm_B1S)
        return state.printer.stream.getvalue()

    run(pcm_B1S[..., :48_000])
    return lambda: run(pcm_B1S)

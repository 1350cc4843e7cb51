"""The timed steps of the transformers package: one column of tokens, one frame, ten seconds, and `generate`.

Shape letters: B batch rows, M streams, S samples, T steps.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import (
    KyutaiSpeechToTextForConditionalGeneration,
    KyutaiSpeechToTextProcessor,
    MimiModel,
    StaticCache,
)

from tests.benchmarks.worker import Step


def make(task: str, folder: Path, threads: int, tiny: bool) -> Step:
    """Make the step of `task`, with the checkpoint in `folder`."""
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    if task == "transcribe_45s":
        return _transcribe(folder / "transformers", np.load(folder / "pcm.npy"))
    if task.startswith("lm_step_b"):
        return _lm_step(folder / "transformers", int(task.removeprefix("lm_step_b")))
    mimi = MimiModel.from_pretrained(folder / "transformers_mimi", dtype=torch.float32)
    if task == "mimi_encode_10s":
        pcm_B1S = 0.1 * torch.randn(1, 1, 240_000)
        return lambda: mimi.encode(pcm_B1S).audio_codes
    return _encode_frame(mimi)


def _lm_step(folder: Path, batch: int) -> Step:
    model = KyutaiSpeechToTextForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    # The cache that the released `generate` uses. It attends over all of the window from the first step on, and moves
    # what it holds only once it is full, which the timed steps never make it.
    cache = StaticCache(config=model.config, max_cache_len=model.config.sliding_window)
    codes_BTM = torch.randint(model.config.codebook_vocab_size - 1, (batch, 1, model.config.num_codebooks))
    token_BT1 = torch.full((batch, 1, 1), model.config.bos_token_id)

    def run() -> None:
        nonlocal token_BT1
        columns_BTM = torch.cat([token_BT1, codes_BTM], dim=2)
        logits_BTV = model(input_ids=columns_BTM, cache=cache, use_cache=True).logits
        token_BT1 = logits_BTV.argmax(-1, keepdim=True)

    return run


def _encode_frame(mimi: MimiModel) -> Step:
    frame_B1S = 0.1 * torch.randn(1, 1, mimi.config.frame_size)
    cache, padding = None, None

    def run() -> torch.Tensor:
        nonlocal cache, padding
        output = mimi.encode(frame_B1S, encoder_cache=cache, padding_cache=padding, use_streaming=True)
        cache, padding = output.encoder_cache, output.padding_cache
        return output.audio_codes

    return run


def _transcribe(folder: Path, pcm_S: np.ndarray) -> Step:
    processor = KyutaiSpeechToTextProcessor.from_pretrained(folder)
    model = KyutaiSpeechToTextForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)

    def run(pcm_S: np.ndarray) -> str:
        inputs = processor(audio=pcm_S, sampling_rate=24_000)
        tokens_BT = model.generate(**inputs, do_sample=False)
        return processor.batch_decode(tokens_BT, skip_special_tokens=True)[0]

    run(pcm_S[:48_000])
    return lambda: run(pcm_S)

"""The timed steps of the transformers package: one column of tokens, one frame, ten seconds, and `generate`.

Shape letters: B batch rows, M streams, S samples, T steps.
"""

import queue
import threading
from pathlib import Path

import numpy as np
import torch
from transformers import (
    CsmConfig,
    CsmForConditionalGeneration,
    KyutaiSpeechToTextForConditionalGeneration,
    KyutaiSpeechToTextProcessor,
    MimiModel,
    StaticCache,
)

from tests.benchmarks.worker import Step
from tests.parity.references.kyutai import PUBLISHED


def make(task: str, folder: Path, threads: int, tiny: bool) -> Step:
    """Make the step of `task`, with the checkpoint in `folder`."""
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    if task == "transcribe_45s":
        return _transcribe(folder / "transformers", np.load(folder / "pcm.npy"))
    if task.startswith("lm_step_b"):
        return _lm_step(folder / "transformers", int(task.removeprefix("lm_step_b")))
    if task.startswith("csm_"):
        model = csm(tiny)
        return (csm_frame if "frame" in task else csm_prefill)(model, int(task.partition("_b")[2]))
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


def csm(tiny: bool) -> CsmForConditionalGeneration:
    """Build a conversational speech model of the published sizes with random weights."""
    config = CsmConfig.from_pretrained(PUBLISHED / "csm-1b.config.json")
    if tiny:
        layers = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 64}
        sizes = {**layers, "num_key_value_heads": 1, "head_dim": 32}
        config = CsmConfig(**sizes, text_vocab_size=1000, depth_decoder_config={**sizes, "backbone_hidden_size": 64})
    return CsmForConditionalGeneration(config).eval()


def csm_frame(model: CsmForConditionalGeneration, batch: int) -> Step:
    """Make the step from one frame of `generate` to the next, which waits in the streamer until it is asked for."""
    asked, made = threading.Semaphore(0), queue.SimpleQueue()

    class Streamer:
        def put(self, codes_BQ: torch.Tensor) -> None:
            made.put(codes_BQ)
            asked.acquire()

        def end(self) -> None:
            made.put(None)

    def generate() -> None:
        asked.acquire()
        ids_BT = torch.arange(64, device=model.device).repeat(batch, 1)
        greedy = {"do_sample": False, "depth_decoder_do_sample": False}
        with torch.no_grad():
            model.generate(
                ids_BT, attention_mask=torch.ones_like(ids_BT), max_new_tokens=100, streamer=Streamer(), **greedy
            )

    threading.Thread(target=generate, daemon=True).start()

    def step() -> None:
        asked.release()
        if made.get() is None:
            raise RuntimeError("the speech ended before the frames were timed")

    return step


def csm_prefill(model: CsmForConditionalGeneration, batch: int) -> Step:
    ids_BT = torch.arange(64, device=model.device).repeat(batch, 1)
    return lambda: (
        model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT), use_cache=True, logits_to_keep=1).logits
    )

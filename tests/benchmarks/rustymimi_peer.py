"""The timed steps of Kyutai's Rust codec, through its Python package, which reads the published size only.

Shape letters: B batch rows, Q codebooks, S samples.
"""

from pathlib import Path

import numpy as np
import rustymimi

from tests.benchmarks.worker import Step


def make(task: str, folder: Path, threads: int, tiny: bool) -> Step:
    """Make the step of `task`; rayon takes the number of threads from the environment."""
    path = next((folder / "kyutai").glob("mimi*.safetensors"))
    codec = rustymimi.Tokenizer(str(path), num_codebooks=32)
    random = np.random.default_rng(0)
    if task == "mimi_encode_10s":
        pcm_B1S = 0.1 * random.standard_normal((1, 1, 240_000), np.float32)
        return lambda: codec.encode(pcm_B1S)
    if task == "mimi_encode_frame":
        frame_B1S = 0.1 * random.standard_normal((1, 1, 1920), np.float32)
        return lambda: codec.encode_step(frame_B1S)
    codes_BQ1 = random.integers(2048, size=(1, 32, 1)).astype(np.uint32)
    return lambda: codec.decode_step(codes_BQ1)

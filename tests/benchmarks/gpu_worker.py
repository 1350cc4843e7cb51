"""The worker processes of `tests.benchmarks.gpu`: frames that are heard and spoken, and GPU against CPU.

Each printed line that starts with a brace is a row.

Shape letters: B batch rows, T samples or frames, C audio channels, Q codebooks, S samples.
"""

import argparse
import dataclasses
import gc
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.worker import time_steps

FRAME_S = 0.08
PUBLISHED = Path(__file__).resolve().parents[1] / "published"
CONFIGS = {"stt-1b": "stt-1b-en_fr.config.json", "stt-2.6b": "stt-2.6b-en.config.json"}
SIZES = (*CONFIGS, "tts-1.6b", "csm-1b")
_CHECK_FRAMES = 40  # the miniature windows are 5 steps long, so most frames are past them
# Named, so that a missing GPU is an error; the check compares with the CPU.
_PLATFORMS = {"cuda": "cuda,cpu", "cpu": "cpu"}
_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory", "Out of memory")


def emit(row: dict[str, Any]) -> None:
    """Print a row and flush."""
    print(json.dumps(row), flush=True)


def timing(seconds: Sequence[float], batch: int) -> dict[str, Any]:
    """Summarise a batch's frames: median, tail, and the number of streams in real time, all or none."""
    p50_s, p99_s = np.quantile(seconds, (0.5, 0.99)).tolist()
    return {
        "p50_ms": round(1e3 * p50_s, 3),
        "p99_ms": round(1e3 * p99_s, 3),
        "steps": len(seconds),
        "streams": batch if p99_s < FRAME_S else 0,
    }


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception of JAX or torch is about lack of device memory."""
    return any(sign in str(error) for sign in _OUT_OF_MEMORY)


def each_batch(head: dict[str, Any], batches: Sequence[int], run: Callable[[int], dict[str, Any]]) -> None:
    """Emit a row per batch size, and stop at the first size that does not fit."""
    for batch in batches:
        try:
            emit(head | {"batch": batch} | run(batch))
        except Exception as error:
            full = is_out_of_memory(error)
            emit(
                head | {"batch": batch, "error": "out of memory" if full else f"{type(error).__name__}: {error}"[:500]}
            )
            break
        gc.collect()


def ours(args: argparse.Namespace) -> None:
    """Time the library's steps of a model."""
    (_ours_heard if args.size in CONFIGS else _ours_spoken)(args)


def _ours_spoken(args: argparse.Namespace) -> None:
    """Time a frame of speech, and of conversations the prefill too."""
    import jax.numpy as jnp

    from dsm_jax.benchmark import run
    from tests.benchmarks import ours as of_cpu

    kind, tiny = args.size.partition("-")[0], {"tts-1.6b": of_cpu.TINY_TTS, "csm-1b": of_cpu.TINY_CSM}
    config, dtype = (tiny if args.tiny else run.SIZES)[args.size], jnp.dtype("float32" if args.tiny else "bfloat16")
    for name, timed in run.STEPS[kind][1].items():

        def measure(batch: int, timed: run.Timed = timed) -> dict[str, Any]:
            seconds = run.time_steps(*timed.make(config, batch, dtype, None), args.steps, timed.warm_up)
            return timing(seconds, batch) | _device_of_jax()

        head = {"bench": name, "who": "ours", "size": args.size, "dtype": dtype.name}
        each_batch(head, args.batches, measure)


def _ours_heard(args: argparse.Namespace) -> None:
    """Time `stt_step`, and compare it with the bandwidth of a plain copy on the same device."""
    import jax.numpy as jnp

    from dsm_jax.benchmark import run as bench
    from dsm_jax.benchmark.listening import stt_step

    config = tiny_config() if args.tiny else bench.SIZES[args.size]
    dtype = jnp.dtype("float32" if args.tiny else "bfloat16")
    bandwidth = copy_bandwidth(2**20 if args.tiny else 2**28)

    def run(batch: int) -> dict[str, Any]:
        seconds = bench.time_steps(*stt_step(config, batch, dtype), args.steps)
        limit_s = bytes_per_step(config, batch, dtype.itemsize) / bandwidth
        limits = {
            "bandwidth_gb_s": round(bandwidth / 1e9, 1),
            "limit_ms": round(1e3 * limit_s, 3),
            "share_of_limit": round(limit_s / statistics.median(seconds), 3),
        }
        return timing(seconds, batch) | limits | _device_of_jax()

    each_batch({"bench": "stt_step", "who": "ours", "size": args.size, "dtype": dtype.name}, args.batches, run)


def _device_of_jax() -> dict[str, Any]:
    """Return the name of JAX's device, and the most memory of it that was in use."""
    import jax

    device = jax.devices()[0]
    return {
        "peak_gb": round((device.memory_stats() or {}).get("peak_bytes_in_use", 0) / 1e9, 2),
        "device": device.device_kind,
    }


def copy_bandwidth(size: int) -> float:
    """Measure the bytes per second, read and written, of copying `size` float32 numbers; median of five."""
    import jax
    import jax.numpy as jnp

    copies = 20  # in one dispatch, whose overhead is then negligible
    # The count is an argument and the values change, so that XLA cannot drop a copy.
    copy = jax.jit(lambda x, n: jax.lax.fori_loop(0, n, lambda i, x: -x, x), donate_argnums=0)
    x = copy(jnp.ones((size,), jnp.float32), copies)
    seconds = []
    for _ in range(5):
        x.block_until_ready()
        start = time.perf_counter()
        x = copy(x, copies)
        x.block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * copies * x.nbytes / statistics.median(seconds)


def bytes_per_step(config: Any, batch: int, itemsize: int) -> int:
    """Count the fewest bytes that a frame must move: each used weight once, and each row's keys and values once.

    Not counted: embedding tables, of which a step reads a few rows, Mimi's decoder, and Mimi's states.
    """
    import jax
    from flax import nnx

    from dsm_jax.models.lm import DelayedStreamsLM
    from dsm_jax.models.mimi import Mimi

    def numbers(make: Callable[[], nnx.Module], unused: Sequence[str]) -> int:
        leaves = jax.tree.leaves_with_path(nnx.split(nnx.eval_shape(make))[1])
        used = [leaf for path, leaf in leaves if not any(part in jax.tree_util.keystr(path) for part in unused)]
        return sum(math.prod(leaf.shape) for leaf in used)

    lm = numbers(lambda: DelayedStreamsLM(config.lm, rngs=nnx.Rngs(0)), ("_emb",))
    mimi = numbers(lambda: Mimi(config.mimi, rngs=nnx.Rngs(0)), ("decoder",))
    keys_values = batch * config.lm.context * config.lm.num_layers * 2 * config.lm.dim
    return (lm + keys_values) * itemsize + 4 * mimi


def serve(args: argparse.Namespace) -> None:
    """Measure servers with a model's slots full of live streams."""
    from dsm_jax.benchmark.run import SIZES
    from dsm_jax.checkpoints import load
    from tests.benchmarks import gpu_serving

    # A miniature of 24 kHz, as clients send.
    config, dtype = (load("digits").config, "float32") if args.tiny else (SIZES[args.size], "bfloat16")
    head = {"bench": "serve", "who": "ours", "size": args.size, "dtype": dtype}
    asked = {"dtype": dtype, "platforms": _PLATFORMS[args.device], "seconds": args.steps / 2}
    for row in gpu_serving.served(config, args.batches, **asked):
        emit(head | row)


def moshi(args: argparse.Namespace) -> None:
    """Time Kyutai's reference on the same work, with its CUDA graphs."""
    (_moshi_heard if args.size in CONFIGS else _moshi_spoken)(args)


def _moshi_spoken(args: argparse.Namespace) -> None:
    """Time a frame of `tests.benchmarks.moshi_speech`."""
    import torch

    from dsm_jax.benchmark.run import STEPS
    from tests.benchmarks import moshi_speech, ours

    torch.set_grad_enabled(False)
    config, _ = ours.speech_case("tts_frame_b1", args.tiny)
    dtype = torch.float32 if args.tiny else torch.bfloat16

    def run(batch: int) -> dict[str, Any]:
        step = moshi_speech.make(config, batch, device=args.device, dtype=dtype)
        return _timed_torch(step, args, batch, STEPS["tts"][1]["tts_frame"].warm_up)

    each_batch(_torch_head("tts_frame", "moshi", args, dtype), args.batches, run)


def transformers(args: argparse.Namespace) -> None:
    """Time the prefill and a frame of CSM by the transformers package."""
    import torch

    from tests.benchmarks import transformers_peer

    torch.set_grad_enabled(False)
    dtype = torch.float32 if args.tiny else torch.bfloat16
    model = transformers_peer.csm(args.tiny).to(args.device, dtype)
    steps = {"csm_prefill": transformers_peer.csm_prefill, "csm_frame": transformers_peer.csm_frame}
    for name, make in steps.items():

        def run(batch: int, make: Callable[..., Callable[[], object]] = make) -> dict[str, Any]:
            return _timed_torch(make(model, batch), args, batch, 3)

        each_batch(_torch_head(name, "transformers", args, dtype), args.batches, run)


def _torch_head(bench: str, who: str, args: argparse.Namespace, dtype: Any) -> dict[str, Any]:
    return {"bench": bench, "who": who, "size": args.size, "dtype": str(dtype).removeprefix("torch.")}


def _timed_torch(step: Callable[[], object], args: argparse.Namespace, batch: int, warm_up: int) -> dict[str, Any]:
    """Time a step of torch, each to its end on the device."""
    import torch

    cuda = args.device == "cuda"

    def to_its_end() -> None:
        step()
        if cuda:
            torch.cuda.synchronize()

    return timing(time_steps(to_its_end, warm_up, args.steps), batch) | {
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if cuda else 0.0,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
    }


def _moshi_heard(args: argparse.Namespace) -> None:
    """Time streaming `mimi.encode` and `LMGen.step`."""
    import torch
    from moshi.models import LMGen
    from moshi.models.loaders import CheckpointInfo, get_mimi

    torch.set_grad_enabled(False)
    device, dtype = args.device, torch.float32 if args.tiny else torch.bfloat16
    anywhere = PUBLISHED / CONFIGS[args.size]  # the weights stay random, and nothing is read but the config
    info = CheckpointInfo.from_hf_repo("local", anywhere, anywhere, anywhere, anywhere)
    if args.tiny:
        info.lm_config |= {"dim": 64, "num_heads": 4, "num_layers": 2, "context": 40, "text_card": 64}
    lm = info.get_moshi(device=device, dtype=dtype, load_weight=False)
    # The reference initialises codebooks with zeros.
    mimi = get_mimi(None, device=device, num_codebooks=lm.n_q)

    cuda = device == "cuda"

    def run(batch: int) -> dict[str, Any]:
        if cuda:
            torch.cuda.empty_cache()
        generator, frame_B1S = (
            LMGen(lm, use_sampling=False),
            0.1 * torch.randn(batch, 1, mimi.frame_size, device=device),
        )
        with mimi.streaming(batch), generator.streaming(batch):
            return _timed_torch(lambda: generator.step(mimi.encode(frame_B1S)).cpu(), args, batch, 5)

    each_batch(_torch_head("stt_step", "moshi", args, dtype), args.batches, run)


def check(args: argparse.Namespace) -> None:
    """Compare codes, tokens and decoded audio of the same float32 weights on this device and on the CPU."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from dsm_jax.benchmark.weights import random_model
    from dsm_jax.configs import MimiConfig, ModelConfig

    places = {"cpu": jax.devices("cpu")[0], "device": jax.devices()[0]}
    tiny, float32 = tiny_config(), jnp.dtype("float32")
    for name, config in {"miniature": tiny.mimi, **({} if args.tiny else {"published": MimiConfig()})}.items():
        with jax.default_device(places["cpu"]):
            codec = random_model(ModelConfig(model_type="mimi", mimi=config), float32)
        graph, params = codec.mimi_def, codec.mimi_params
        pcm_BTC = 0.3 * np.random.default_rng(0).standard_normal((1, _CHECK_FRAMES * config.frame_size, 1), np.float32)
        encode = jax.jit(lambda params, pcm_BTC, graph=graph: nnx.merge(graph, params).encode(pcm_BTC))
        decode = jax.jit(lambda params, codes_BQT, graph=graph: nnx.merge(graph, params).decode(codes_BQT))
        codes = {at: np.asarray(encode(*jax.device_put((params, pcm_BTC), place))) for at, place in places.items()}
        pcm = {at: np.asarray(decode(*jax.device_put((params, codes["cpu"]), p))) for at, p in places.items()}
        emit(codec_row(name, codes, pcm))
    tokens = {at: _tokens(tiny, place) for at, place in places.items()}
    emit(lm_row(tokens) | {"device": places["device"].device_kind})


def codec_row(name: str, codes: dict[str, np.ndarray], pcm: dict[str, np.ndarray]) -> dict[str, Any]:
    """Compare a codec on the device with the same codec on the CPU."""
    same = float((codes["cpu"] == codes["device"]).mean())
    error = float(np.abs(pcm["cpu"] - pcm["device"]).max() / np.abs(pcm["cpu"]).max())
    # At the published size, a near tie among thousands of distances may be decided differently.
    passed = same >= (1.0 if name == "miniature" else 0.99) and error <= 1e-4
    row = {"same_codes": same, "different_codes": np.unique(codes["cpu"]).size, "decode_error": error}
    return {"bench": "check", "codec": name} | row | {"passed": passed}


def lm_row(tokens: dict[str, np.ndarray]) -> dict[str, Any]:
    """Compare a language model on the device with the same language model on the CPU."""
    same = float((tokens["cpu"] == tokens["device"]).mean())
    row = {"same_tokens": same, "different_tokens": np.unique(tokens["cpu"]).size, "passed": same == 1.0}
    return {"bench": "check", "lm": "miniature"} | row


def _tokens(config: Any, place: Any) -> np.ndarray:
    """Compute greedy tokens of the miniature language model from random codes, on one device."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from dsm_jax.benchmark.weights import random_model
    from tests.helpers.greedy import greedy_tokens

    with jax.default_device(jax.devices("cpu")[0]):
        model = random_model(config, jnp.dtype("float32"))
    shape = 1, config.lm.n_q, _CHECK_FRAMES
    codes_BQT = np.random.default_rng(0).integers(config.lm.card, size=shape, dtype=np.int32)

    @jax.jit
    def run(params: nnx.State, codes_BQT: jax.Array) -> jax.Array:
        return greedy_tokens(nnx.merge(model.lm_def, params), codes_BQT)

    # No precision is set here, as the library itself must keep float32 from being rounded to TF32.
    return np.asarray(run(*jax.device_put((model.lm_params, codes_BQT), place)))


def tiny_config() -> Any:
    """Return the config of a miniature speech-to-text model."""
    from dsm_jax.configs import ModelConfig
    from tests.helpers import small

    # The language model has as many codes as the codec, so that none is out of range.
    return ModelConfig(model_type="stt", lm=dataclasses.replace(small.STT, card=16), mimi=small.MIMI)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    what = {"ours": ours, "moshi": moshi, "transformers": transformers, "serve": serve, "check": check}
    parser.add_argument("what", choices=what)
    parser.add_argument("--size", choices=SIZES, default="stt-1b")
    parser.add_argument("--batches", type=lambda text: [int(batch) for batch in text.split(",")], default=[1])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    # A server has the GPU to itself.
    os.environ["JAX_PLATFORMS"] = "cpu" if args.what == "serve" else _PLATFORMS[args.device]
    what[args.what](args)


if __name__ == "__main__":
    main()

"""The tasks to measure: contenders, steps, and the target ratio to the best of the other contenders."""

import dataclasses
import importlib.util

OURS, INT8 = "ours", "ours-int8"  # the latter with the layers' weights in int8, where the peers' are in float32 too
PACKAGES = {OURS: "jax", INT8: "jax", "moshi": "moshi", "transformers": "transformers", "rustymimi": "rustymimi"}

PEERS = tuple(name for name in PACKAGES if name not in (OURS, INT8))


@dataclasses.dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        contenders: names in `PACKAGES`, in the order of their turns.
        steps: timed steps of each round.
        warm_up: steps before the timed ones; after them, every attention window is full or costs as much.
        target: largest ratio of our time, in float32, to the best of the peers.
        memory_target: largest ratio of the processes' peak memory; None if it is not compared.
        rounds: number of turns of each contender; None for the number on the command line.
        checkpoint: whether the other contenders read the checkpoint of `checkpoints`.
    """

    contenders: tuple[str, ...]
    steps: int
    warm_up: int
    target: float
    memory_target: float | None = None
    rounds: int | None = None
    checkpoint: bool = True


# Mimi attends over 125 frames. transformers has no streaming decoder, and rustymimi no language model. The reference's
# eight codebooks, when it trains them, start one step after the other.
TASKS = {
    "lm_step_b1": Task((OURS, INT8, "moshi", "transformers"), steps=50, warm_up=10, target=0.65),
    "lm_step_b8": Task((OURS, INT8, "moshi", "transformers"), steps=50, warm_up=10, target=0.70),
    "mimi_encode_frame": Task((OURS, *PEERS), steps=100, warm_up=130, target=0.70),
    "mimi_decode_frame": Task((OURS, "moshi", "rustymimi"), steps=100, warm_up=130, target=0.70),
    "mimi_encode_10s": Task((OURS, *PEERS), steps=7, warm_up=2, target=0.50),
    "transcribe_45s": Task(
        (OURS, INT8, "moshi", "transformers"), steps=1, warm_up=0, target=0.60, memory_target=1.0, rounds=1
    ),
    # The audio is 16 steps behind the text, and 2 more for the last codebooks: only then is a frame a whole one.
    "tts_frame_b1": Task((OURS, INT8, "moshi"), steps=15, warm_up=20, target=0.60, rounds=1, checkpoint=False),
    "tts_frame_b8": Task((OURS, INT8, "moshi"), steps=10, warm_up=20, target=0.50, rounds=1, checkpoint=False),
    "tts_warm_up_b1": Task((OURS, INT8, "moshi"), steps=12, warm_up=2, target=0.60, rounds=1, checkpoint=False),
    # After a prompt of 64; ours with the frame's samples, transformers' without.
    "csm_frame_b1": Task((OURS, INT8, "transformers"), steps=8, warm_up=3, target=0.55, rounds=1, checkpoint=False),
    "csm_frame_b4": Task((OURS, INT8, "transformers"), steps=8, warm_up=3, target=0.40, rounds=1, checkpoint=False),
    "csm_prefill_b1": Task((OURS, "transformers"), steps=5, warm_up=2, target=0.60, checkpoint=False),
    "csm_prefill_b4": Task((OURS, "transformers"), steps=5, warm_up=2, target=0.60, checkpoint=False),
    "train_lm_step": Task((OURS, "moshi"), steps=10, warm_up=3, target=0.80, checkpoint=False),
    "train_codec_step": Task((OURS, "moshi"), steps=10, warm_up=8, target=0.80, checkpoint=False),
}


def missing(contender: str) -> str | None:
    """Return the reason for which a contender cannot take part on this machine, or None."""
    package = PACKAGES[contender]
    return None if importlib.util.find_spec(package) else f"{package} is not installed"

"""What is measured, by whom, how often, and the ratio to the best of the others that is aimed at."""

import dataclasses
import importlib.util

OURS = "ours"
PACKAGES = {OURS: "jax", "moshi": "moshi", "transformers": "transformers", "rustymimi": "rustymimi"}


@dataclasses.dataclass(frozen=True)
class Task:
    """One thing to measure.

    Attributes:
        contenders: of `PACKAGES`, in the order in which they take turns.
        steps: timed in each round.
        warm_up: steps before those; every window of attention is full after them, or costs as much as a full one.
        target: ours / best of the others, in time, at most.
        memory_target: the same for the peak memory of the process, where it is compared.
        rounds: how often the contenders take turns; None for as often as was asked.
        checkpoint: whether the others read what `checkpoints` made.
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
    "lm_step_b1": Task((OURS, "moshi", "transformers"), steps=50, warm_up=10, target=0.65),
    "lm_step_b8": Task((OURS, "moshi", "transformers"), steps=50, warm_up=10, target=0.70),
    "mimi_encode_frame": Task(tuple(PACKAGES), steps=100, warm_up=130, target=0.70),
    "mimi_decode_frame": Task((OURS, "moshi", "rustymimi"), steps=100, warm_up=130, target=0.70),
    "mimi_encode_10s": Task(tuple(PACKAGES), steps=7, warm_up=2, target=0.50),
    "transcribe_45s": Task(
        (OURS, "moshi", "transformers"), steps=1, warm_up=0, target=0.60, memory_target=1.0, rounds=1
    ),
    # The audio is 16 steps behind the text, and 2 more for the last codebooks: only then is a frame a whole one.
    "tts_frame_b1": Task((OURS, "moshi"), steps=15, warm_up=20, target=0.60, rounds=1, checkpoint=False),
    "tts_frame_b8": Task((OURS, "moshi"), steps=10, warm_up=20, target=0.50, rounds=1, checkpoint=False),
    "tts_warm_up_b1": Task((OURS, "moshi"), steps=12, warm_up=2, target=0.60, rounds=1, checkpoint=False),
    "train_lm_step": Task((OURS, "moshi"), steps=10, warm_up=3, target=0.80, checkpoint=False),
    "train_codec_step": Task((OURS, "moshi"), steps=10, warm_up=8, target=0.80, checkpoint=False),
}


def missing(contender: str) -> str | None:
    """Why a contender cannot take part on this machine, or None."""
    package = PACKAGES[contender]
    return None if importlib.util.find_spec(package) else f"{package} is not installed"

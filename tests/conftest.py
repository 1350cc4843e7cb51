"""Fixes what every test runs under, in the environment, before JAX is imported and for child processes too."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=2",  # so that a test can shard
        # Without optimisations, as below, XLA's older emitters compile in half the time: docs/decisions/0016.
        "--xla_cpu_use_fusion_emitters=false",
    )
)
os.environ.update(
    # A silent cast is a wrong answer with the right shape.
    JAX_NUMPY_DTYPE_PROMOTION="strict",
    # A test measures what this run compiles, and leaves nothing behind.
    JAX_ENABLE_COMPILATION_CACHE="false",
    # Nearly all of a test's time is compiling, and what it compiles runs for a moment.
    JAX_DISABLE_MOST_OPTIMIZATIONS="true",
    HF_HUB_OFFLINE="1",
    # The PyTorch reference compiles and captures graphs unless told not to.
    NO_TORCH_COMPILE="1",
    NO_CUDA_GRAPH="1",
)

# Handed out first, or one process would be busy with them when the other has nothing left to do.
LONGEST = (
    *("test_readme.py", "test_mixed_slots.py", "test_tts_program.py", "test_synthesize.py", "test_stt.py"),
    *("test_finetune.py", "test_finetune_csm.py", "test_sharding.py"),
)


def pytest_collection_modifyitems(items: list) -> None:
    """Put the files that take longest first."""
    items.sort(key=lambda item: item.path.name not in LONGEST)

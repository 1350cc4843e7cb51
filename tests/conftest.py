"""Fixes what every test runs under, in the environment, before JAX is imported and for child processes too."""

import gc
import importlib.metadata
import os
from pathlib import Path

import pytest

from tests.helpers import durations
from tests.helpers.environment import OLDER_EMITTERS

# Kept between runs, and shared by the processes of one: most of a test's time is compiling.
CACHE = Path(__file__).resolve().parents[1] / ".cache"
# Without optimisations, as below, XLA's older emitters compile in half the time: docs/decisions/0016. Later versions of
# XLA do not have them, and end a process that asks for them.
HAS_OLDER_EMITTERS = importlib.metadata.version("jaxlib").startswith("0.10.")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=2",  # so that a test can shard
        OLDER_EMITTERS if HAS_OLDER_EMITTERS else "",
    )
)
os.environ.update(
    # A silent cast is a wrong answer with the right shape.
    JAX_NUMPY_DTYPE_PROMOTION="strict",
    XDG_CACHE_HOME=str(CACHE),  # of the commands
    JAX_COMPILATION_CACHE_DIR=str(CACHE / "jax"),
    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0.1",
    # With a limit, JAX locks the cache, so that processes that run at once cannot damage its entries.
    JAX_COMPILATION_CACHE_MAX_SIZE=str(2 * 2**30),
    # Optimising takes longer than a test's program runs; tests/helpers/optimized.py compiles as users do.
    JAX_DISABLE_MOST_OPTIMIZATIONS="true",
    HF_HUB_OFFLINE="1",
    # The PyTorch reference compiles and captures graphs unless told not to.
    NO_TORCH_COMPILE="1",
    NO_CUDA_GRAPH="1",
)

# Tracing makes and drops objects by the million: with Python's own threshold collections take a tenth of a run.
gc.set_threshold(100_000, 50, 10)


def pytest_configure(config: pytest.Config) -> None:
    """Remove entries of the compile cache that a killed run left unfinished, before any process reads the cache."""
    from dsm_jax.cli.setup import remove_unfinished_entries

    if not hasattr(config, "workerinput"):
        remove_unfinished_entries(CACHE / "jax")
        remove_unfinished_entries(CACHE / "dsm_jax/compiled")


@pytest.hookimpl(tryfirst=True)  # before items are left out by their markers
def pytest_collection_modifyitems(items: list) -> None:
    """Mark the tests that take long, and put them and other slow tests first, those of the longest files before others.

    One process would be busy with them otherwise when the other has nothing left to do.
    """
    known = durations.read_list()
    files = durations.of_files(known)
    for item in items:
        if durations.name_of(item) in known:
            item.add_marker("long")

    def order(item: pytest.Item) -> tuple[bool, float]:
        file = durations.name_of(item).partition("::")[0]
        return item.get_closest_marker("slow") is None, -files.get(file, 0.0)

    items.sort(key=order)


@pytest.fixture
def idle(server) -> None:
    """Begin a test with all slots of its module's server free."""
    server.wait_until_idle()

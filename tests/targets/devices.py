"""Devices that XLA compiles for though they are not there: a host of four TPU v5e, and an NVIDIA H200."""

import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.helpers.environment import compile_as_users_do
from tests.targets.plugins import requirements

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ROOT / ".venv/targets"  # apart from the other packages: an installed plugin changes what JAX does at import
DEVICES = ("h200", "v5e")


def prepare() -> None:
    """Set the environment of a process that compiles for these devices; call it before JAX is imported.

    Raises:
      FileNotFoundError: the compilers of the installed jax are not there.
    """
    cuda, listed = next(PLUGINS.glob("nvidia/cu*"), None), PLUGINS.with_suffix(".txt")
    if cuda is None or not listed.is_file() or listed.read_text(encoding="utf-8").split() != requirements():
        made = PLUGINS.with_name(".targets")
        raise FileNotFoundError(
            f"{PLUGINS} does not hold the compilers that the installed jax names; remove {made} and run "
            "`make test-targets`, which fetches them"
        )
    sys.path.insert(0, str(PLUGINS))
    compile_as_users_do()
    # Without autotuning, which would time kernels on the device.
    flags = os.environ["XLA_FLAGS"], f"--xla_gpu_cuda_data_dir={cuda}", "--xla_gpu_autotune_level=0"
    os.environ.update(
        JAX_PLATFORMS="cpu",
        JAX_ENABLE_COMPILATION_CACHE="false",  # a program for a device that is not there can be written, and not read
        PATH=f"{cuda / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}",
        XLA_FLAGS=" ".join(flags),
        # libtpu would ask the metadata server of a cloud, and would refuse to be in two processes at once.
        TPU_SKIP_MDS_QUERY="1",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        TPU_ACCELERATOR_TYPE="v5litepod-4",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_WORKER_ID="0",
    )


@functools.cache
def devices(name: str) -> Sequence[Any]:
    """Return the devices of that name, for shardings of the arguments of a function to compile."""
    from jax.experimental import topologies

    if name == "v5e":
        return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    target = Path(__file__).with_name("h200.txtpb").read_text(encoding="utf-8")
    return topologies.get_topology_desc("h200", platform="cuda", topology="1x1x1", target_config=target).devices

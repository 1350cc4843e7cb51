"""Print what compiles for the devices of `tests.targets`, as requirements for `pip install --no-deps`.

The versions are those that the installed jax names in its extras. A compiler needs neither cuDNN nor cuBLAS, which are
gigabytes.
"""

from importlib.metadata import requires

from packaging.requirements import Requirement


def extra(package: str, name: str) -> list[Requirement]:
    """Return the requirements that an extra adds to a package."""
    read = map(Requirement, requires(package) or [])
    return [one for one in read if one.marker and one.marker.evaluate({"extra": name}) and "extra" in str(one.marker)]


def requirements() -> list[str]:
    """Return the requirements: libtpu, jax's plugin for the CUDA of this library's extra, and NVIDIA's assembler."""
    (libtpu,) = [one for one in extra("jax", "tpu") if one.name == "libtpu"]
    (jax,) = extra("dsm-jax", "cuda")
    (cuda,) = jax.extras  # cuda13
    (plugin,) = [one for one in extra("jax", cuda) if one.name.startswith("jax-cuda")]
    version, release = plugin.specifier, cuda.removeprefix("cuda")
    nvidia = [f"{name}=={release}.*" for name in ("nvidia-cuda-nvcc", "nvidia-nvvm")]  # ptxas, and libdevice
    return [f"libtpu{libtpu.specifier}", f"jax-{cuda}-plugin{version}", f"jax-{cuda}-pjrt{version}", *nvidia]


if __name__ == "__main__":
    print(*requirements(), sep="\n")

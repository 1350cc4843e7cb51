"""Prepare a recipe's model for release: its folder and its dtype."""

from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from dsm_jax.errors import TrainingError


def to_bfloat16(params: nnx.State) -> nnx.State:
    """Round parameters to bfloat16, which halves their size; the codec converts them to float32 exactly."""
    return jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)


def model_dir(output: Path, name: str) -> Path:
    """Return the folder of a recipe's model.

    Raises:
      TrainingError: the folder exists.
    """
    if (folder := output / name).exists():
        raise TrainingError(f"{folder} exists, so this recipe is done; choose another output, or move it away")
    return folder

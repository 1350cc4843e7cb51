"""Writes what was learnt as a folder that others read too."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsm_jax import checkpoints
from dsm_jax.checkpoints import Model
from dsm_jax.convert import convert
from dsm_jax.errors import CheckpointError, TrainingError
from dsm_jax.tts.voices import write_voices


def in_16_bits(params: nnx.State) -> nnx.State:
    """Parameters as they are shipped: half the size, and exact again in float32, in which the codec always runs."""
    return jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)


def new_model(output: Path, name: str) -> Path:
    """Where a recipe is to write its model.

    Raises:
      TrainingError: there is one already.
    """
    if (folder := output / name).exists():
        raise TrainingError(f"{folder} exists, so this recipe is done; choose another output, or move it away")
    return folder


def write_model(model: Model, folder: Path, voices: Mapping[str, np.ndarray] | None = None) -> None:
    """Writes a model in Kyutai's layout, in the dtypes that it has, whole or not at all.

    Args:
      model: whole, codec and tokenizer too.
      folder: one that does not exist yet, in a folder that does.
      voices: that come with it, their steps [X, C] by their names.

    Raises:
      TrainingError: it exists, or cannot be written; what was learnt is in the run's last checkpoint either way.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".model.", dir=folder.parent) as scratch:
            checkpoints.save(model, Path(scratch) / "native")
            made = folder if voices is None else Path(scratch) / "made"
            convert(Path(scratch) / "native", made, to="kyutai", progress=False)
            if voices is not None:
                write_voices(made / "voices", voices)
                made.rename(folder)
    except (CheckpointError, OSError) as error:
        raise TrainingError(
            f"the model could not be written ({error}); what it learnt is in the run's last checkpoint. Put that "
            "right, then go on with --resume"
        ) from error

"""Writes a trained model as a folder in Kyutai's layout, which other implementations read."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dsm_jax import checkpoints
from dsm_jax.checkpoints import Model
from dsm_jax.convert.command import convert
from dsm_jax.errors import CheckpointError, TrainingError
from dsm_jax.tts.voices import write_voices


def write_model(model: Model, folder: Path, voices: Mapping[str, np.ndarray] | None = None) -> None:
    """Writes a model in Kyutai's layout, in the dtypes that it has, whole or not at all.

    Args:
      model: a language model with its codec and tokenizer.
      folder: a new folder in one that exists.
      voices: voices to write with the model: steps [X, C] by name.

    Raises:
      TrainingError: the folder exists, or cannot be written; the run's last checkpoint is still there.
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
            f"the model could not be written ({error}); its parameters are in the run's last checkpoint. Put that "
            "right, then go on with --resume"
        ) from error

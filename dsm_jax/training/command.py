"""What `dsm-jax train` runs: a JSON file that names a task and holds the fields of its config."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsm_jax.checkpoints import Model
from dsm_jax.configs.json import from_dict
from dsm_jax.errors import ConfigError


def _tasks() -> dict[str, tuple[type, Callable[..., Model]]]:
    from dsm_jax.training.finetune import FinetuneConfig, finetune
    from dsm_jax.training.recipe import DigitsConfig, train_digits
    from dsm_jax.training.speaking import SpeakingConfig, train_speaking

    return {
        "finetune": (FinetuneConfig, finetune),
        "digits": (DigitsConfig, train_digits),
        "digits-tts": (SpeakingConfig, train_speaking),
    }


def read_config(path: Path) -> tuple[Any, Callable[..., Model]]:
    """A task's config, and the function that runs it.

    Folders in it may be relative to the file.

    Raises:
      ConfigError: the file cannot be read, names no task, or has fields that the task has not.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); give a JSON file") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); mend it") from None
    tasks = _tasks()
    if not isinstance(values, dict) or values.get("task") not in tasks:
        found = values.get("task") if isinstance(values, dict) else values
        raise ConfigError(f"{path}: the task is {found!r}; choose one of {sorted(tasks)}")
    kind, run = tasks[values.pop("task")]
    config = from_dict(kind, values, str(path), like=kind)
    folders = {
        name: str(path.parent / values[name])
        for name in ("data", "output", "validation")
        if values.get(name) is not None
    }
    return dataclasses.replace(config, **folders), run


def train(path: Path, *, resume: bool = False) -> Model:
    """Runs what a config file describes.

    Args:
      path: a JSON file: `task` ("finetune", "digits" or "digits-tts") and the fields of `FinetuneConfig`,
        `DigitsConfig` or `SpeakingConfig`. What is not given, in nested configs too, is as it is in these.
      resume: go on from the last checkpoint.

    Returns:
      The trained model.

    Raises:
      DsmError: of the config, the data or the training; what was saved is still there.
    """
    config, run = read_config(path)
    return run(config, resume=resume)

"""Read the JSON file of a training command, which holds the name of a task and the fields of the task's config."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dsm_jax import files
from dsm_jax.checkpoints import Model
from dsm_jax.configs.json import from_dict
from dsm_jax.errors import ConfigError
from dsm_jax.hub import expanded

# Name of a task -> its config class, and the function that runs it: (config, *, resume, progress) -> the trained model.
Tasks = Mapping[str, tuple[type, Callable[..., Model]]]
PATHS = ("data", "output", "validation")  # fields with paths relative to the file's folder


def library_tasks() -> Tasks:
    """List the tasks of `dsm-jax train`."""
    from dsm_jax.training.finetune import FinetuneConfig, finetune

    return {"finetune": (FinetuneConfig, finetune)}


def read_config(path: Path, tasks: Tasks) -> tuple[Any, Callable[..., Model]]:
    """Read a config file.

    Args:
      path: a JSON file with `task` and fields of the task's config. Missing fields, in nested configs too, take the
        defaults of the task's config class. Folders may be relative to the file's folder.
      tasks: the tasks to choose from.

    Returns:
      The config, and the function that runs it.

    Raises:
      ConfigError: the file cannot be read, names no known task, or has fields that the task's config lacks.
    """
    try:
        values = files.parse_json(path.read_bytes(), '{"task": TASK, ...}', line=False)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); give a JSON file") from None
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    found = values.get("task") if isinstance(values, dict) else values
    if not isinstance(found, str) or found not in tasks:
        raise ConfigError(f"{path}: the task is {found!r}; choose one of {sorted(tasks)}")
    kind, run = tasks[values.pop("task")]
    config = from_dict(kind, values, str(path), like=kind)
    folders = {name: str(path.parent / expanded(values[name])) for name in PATHS if values.get(name) is not None}
    return dataclasses.replace(config, **folders), run

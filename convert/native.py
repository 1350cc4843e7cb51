"""This library's own layout: a folder with `dsm_jax.json`, Orbax checkpoints under `params`, and the tokenizer.

Orbax copies what it saves (measured: 2.4 GB of memory for 0.75 GB), so parameters are saved in groups, each
an Orbax checkpoint of its own, and memory is bounded by the largest group.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsm_jax.configs import ModelConfig
from dsm_jax.configs.json import from_dict, to_dict
from dsm_jax.convert import files, pieces
from dsm_jax.convert.checkpoint import Checkpoint, LeftOut
from dsm_jax.convert.pieces import Outgoing
from dsm_jax.errors import CheckpointError
from dsm_jax.models import family
from dsm_jax.models.parameters import dtype_of
from dsm_jax.tokenizers import copy_tokenizer

NAME = "orbax"
CONFIG_NAME = "dsm_jax.json"
FORMAT = 2  # 1 had packed matrices in place of axes for heads and parts, and a flat config
GROUP_BYTES = 128 << 20


@dataclasses.dataclass(frozen=True)
class NativeCheckpoint:
    """A folder's config, and each parameter ("lm.…" or "mimi.…") with the group that it is in."""

    path: Path
    config: ModelConfig
    tokenizer: Path | None
    parameters: dict[str, jax.ShapeDtypeStruct]
    group_of: dict[str, str]


def recognises(path: Path) -> bool:
    """Tell whether a path is a folder of this layout."""
    return (path / CONFIG_NAME).is_file()


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a folder.

    Raises:
      CheckpointError: it was written by a later version, is damaged, or its parameters are not those of the config.
      ConfigError: the config is not understood.
    """
    folder = open_folder(path)
    networks = family.abstract_model(folder.config)
    parameters = {part: network.parameters for part, network in networks.items()}
    if found := faults(folder, parameters):
        raise pieces.fit_error(str(path), found)
    stored = {part: {name: folder.parameters[f"{part}.{name}"] for name in parameters[part]} for part in parameters}
    place = functools.partial(restore, folder)
    return Checkpoint(path.name, NAME, folder.config, folder.tokenizer, networks, stored, reader(folder), place)


def write(checkpoint: Checkpoint, folder: Path) -> Iterator[Outgoing | LeftOut]:
    """Write a checkpoint to a folder.

    Args:
      checkpoint: to write.
      folder: one that exists and is empty.

    Yields:
      Each parameter, once it is written; nothing is left out.
    """
    write_about(
        folder,
        checkpoint.config,
        dtype_of(checkpoint.stored.get("lm", {})),
        f"{checkpoint.name} ({checkpoint.layout})",
        checkpoint.tokenizer,
    )
    tensors = {
        f"{part}.{name}": Outgoing(f"{part}.{name}", p.shape, p.dtype, functools.partial(checkpoint.read, part, name))
        for part, parameters in checkpoint.stored.items()
        for name, p in parameters.items()
    }
    for name in write_params(folder, ((name, tensor.make()) for name, tensor in tensors.items())):
        yield tensors[name]


def write_about(folder: Path, config: ModelConfig, dtype: str, converted_from: str, tokenizer: Path | None) -> None:
    """Write `dsm_jax.json` and a copy of the tokenizer.

    Args:
      folder: to write to.
      config: of the model.
      dtype: of the language model, for the reader's information.
      converted_from: the same.
      tokenizer: its file.
    """
    if tokenizer is not None:
        copy_tokenizer(tokenizer, folder)
    values = {
        "format": FORMAT,
        "dtype": dtype,
        "converted_from": converted_from,
        "tokenizer": None if tokenizer is None else tokenizer.name,
        "config": to_dict(config),
    }
    files.write_json(folder / CONFIG_NAME, values)


def read_config(values: Mapping[str, Any], where: str) -> ModelConfig:
    """Read the config in the content of `dsm_jax.json`.

    Raises:
      CheckpointError: it was written in another format.
      ConfigError: the config is not understood.
    """
    if (found := values.get("format")) != FORMAT:
        older = isinstance(found, int) and found < FORMAT
        remedy = "convert the published model again, or with the version that wrote it" if older else "upgrade dsm_jax"
        raise CheckpointError(f"{where} is of format {found}; this version reads {FORMAT}; {remedy}")
    config = from_dict(ModelConfig, values.get("config", {}), where)
    family.check(config, where)
    return config


def write_params(folder: Path, arrays: Iterable[tuple[str, Any]]) -> Iterator[str]:
    """Save parameters, group by group.

    Args:
      folder: the checkpoint's.
      arrays: names, beginning with "lm." or "mimi.", and their arrays; drawn only as they are saved.

    Yields:
      Each name, once it is on disk.
    """
    import orbax.checkpoint

    group: dict[str, Any] = {}
    count = 0

    def save() -> None:
        nonlocal count
        try:
            with orbax.checkpoint.StandardCheckpointer() as checkpointer:
                checkpointer.save((folder / "params" / f"{count:04}").absolute(), group)
        except ValueError as error:  # how tensorstore passes on what the file system says
            raise OSError(str(error).rpartition(": ")[2]) from error
        count += 1

    for name, array in arrays:
        if group and sum(a.nbytes for a in group.values()) + array.nbytes > GROUP_BYTES:
            save()
            yield from group
            group = {}
        group[name] = array
    save()
    yield from group


def open_folder(path: Path) -> NativeCheckpoint:
    """Read the config of a folder and list its parameters, without weights.

    Raises:
      CheckpointError: it was written by a later version, or is damaged.
      ConfigError: the config is not understood.
    """
    import orbax.checkpoint

    where = path / CONFIG_NAME
    values = files.read_json(where)
    config = read_config(values, str(where))
    parameters, group_of = {}, {}
    for group in sorted(p for p in (path / "params").glob("*") if p.is_dir()):
        try:
            with orbax.checkpoint.StandardCheckpointer() as checkpointer:
                tree = checkpointer.metadata(group.absolute()).item_metadata.tree
        except Exception as error:  # Orbax raises many kinds
            raise CheckpointError(f"{group} cannot be read ({type(error).__name__}); convert the model again") from None
        for name, found in tree.items():
            parameters[name] = jax.ShapeDtypeStruct(found.shape, found.dtype)
            group_of[name] = group.name
    tokenizer = path / values["tokenizer"] if values.get("tokenizer") else None
    return NativeCheckpoint(path, config, tokenizer, parameters, group_of)


def faults(opened: NativeCheckpoint, expected: Mapping[str, Mapping[str, jax.ShapeDtypeStruct]]) -> list[str]:
    """Hold a folder against the networks that its config describes; one line per fault."""
    wanted = {f"{part}.{name}": p for part, parameters in expected.items() for name, p in parameters.items()}
    lines = [
        f"missing: {name}, expected {list(p.shape)}" for name, p in wanted.items() if name not in opened.parameters
    ]
    for name, found in opened.parameters.items():
        if name not in wanted:
            lines.append(f"unknown: {name}, {list(found.shape)}; the model has no place for it")
        elif found.shape != wanted[name].shape:
            lines.append(f"shape: {name} is {list(found.shape)}, expected {list(wanted[name].shape)}")
    return lines


def restore(opened: NativeCheckpoint, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[tuple[str, jax.Array]]:
    """Restore parameters, group by group, straight to their devices.

    Args:
      opened: the opened folder.
      wanted: shape, dtype and sharding of the parameters to restore; a sharding of None is the default device.

    Yields:
      Names and arrays.
    """
    for group in sorted({opened.group_of[name] for name in wanted}):
        # Orbax restores a group whole; what is not wanted of it is dropped at once.
        members = {name: wanted.get(name, p) for name, p in opened.parameters.items() if opened.group_of[name] == group}
        targets = {name: np.empty(p.shape, p.dtype) if p.sharding is None else p for name, p in members.items()}
        for name, array in _restore_group(opened, group, targets).items():
            if name in wanted:
                yield name, jax.device_put(array, wanted[name].sharding)


def reader(opened: NativeCheckpoint) -> Callable[[str, str], np.ndarray]:
    """Return a function that reads parameters as numpy arrays, by network and name; the groups last read are kept."""

    @functools.lru_cache(maxsize=3)
    def group(name: str) -> dict[str, np.ndarray]:
        members = [(member, opened.parameters[member]) for member, where in opened.group_of.items() if where == name]
        return _restore_group(opened, name, {member: np.empty(p.shape, p.dtype) for member, p in members})

    return lambda part, name: group(opened.group_of[f"{part}.{name}"])[f"{part}.{name}"]


def _restore_group(opened: NativeCheckpoint, group: str, targets: dict[str, Any]) -> dict[str, Any]:
    import orbax.checkpoint

    try:
        with orbax.checkpoint.StandardCheckpointer() as checkpointer:
            return checkpointer.restore((opened.path / "params" / group).absolute(), targets)
    except Exception as error:  # Orbax raises many kinds
        raise CheckpointError(
            f"{opened.path}/params/{group} cannot be read ({type(error).__name__}); fetch it again"
        ) from None


@contextlib.contextmanager
def new_folder(destination: Path, size: int) -> Iterator[Path]:
    """A temporary sibling of `destination`, renamed to it at the end; on an error nothing is left behind.

    Args:
      destination: a folder that does not exist yet.
      size: bytes that are going to be written.

    Yields:
      The folder to write to.

    Raises:
      CheckpointError: the destination exists, or the disk cannot hold it.
    """
    import shutil
    import tempfile

    if destination.exists():
        raise CheckpointError(f"{destination} exists; remove it, or give another destination")
    folder = None
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(destination.parent).free
        if free < size:
            raise CheckpointError(
                f"{destination} needs {size / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB free; make room, or "
                "give another destination"
            )
        folder = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
        yield folder
        folder.chmod(0o755)  # temporary folders are private
        folder.rename(destination)
    except OSError as error:
        raise CheckpointError(
            f"{destination} could not be written ({error.strerror or error}); make room, or give another destination"
        ) from error
    finally:
        if folder is not None and folder.exists():
            shutil.rmtree(folder, ignore_errors=True)

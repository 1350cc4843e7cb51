"""This library's own layout: a folder with `dsm_jax.json`, Orbax checkpoints under `params`, and the tokenizer.

Orbax copies the arrays that it saves (measured: 2.4 GB of memory for 0.75 GB). Parameters are therefore saved in
groups, each an Orbax checkpoint of its own, so that the largest group bounds the memory.
"""

import contextlib
import dataclasses
import functools
import logging
import os
import threading
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
from dsm_jax.process import check_process
from dsm_jax.tokenizers import copy_tokenizer

NAME = "orbax"
CONFIG_NAME = "dsm_jax.json"
FORMAT = 3  # 2 had inputs before outputs; 1 had packed matrices in place of axes for heads and parts
GROUP_BYTES = 128 << 20
_SAVING = threading.Lock()  # Orbax's saves in two threads wait for each other, for minutes, and then fail


@dataclasses.dataclass(frozen=True)
class NativeCheckpoint:
    """A folder's config, and the shape and group of each parameter ("lm.…" or "mimi.…")."""

    path: Path
    config: ModelConfig
    tokenizer: Path | None
    parameters: dict[str, jax.ShapeDtypeStruct]
    group_of: dict[str, str]


def recognises(path: Path) -> bool:
    """Return whether a path is a folder of this layout."""
    return (path / CONFIG_NAME).is_file()


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a folder.

    Raises:
      CheckpointError: the folder has another format or is damaged, or its parameters do not fit the config.
      ConfigError: a key or a value in the config is unknown.
    """
    folder = open_folder(path)
    networks = family.abstract_model(folder.config)
    parameters = {part: network.parameters for part, network in networks.items()}
    if found := faults(folder, parameters):
        raise pieces.fit_error(str(path), found, "fetch or convert the model again")
    stored = {part: {name: folder.parameters[f"{part}.{name}"] for name in parameters[part]} for part in parameters}
    place = functools.partial(restore, folder)
    return Checkpoint(path.name, NAME, folder.config, folder.tokenizer, networks, stored, reader(folder), place)


def write(checkpoint: Checkpoint, folder: Path) -> Iterator[Outgoing | LeftOut]:
    """Write a checkpoint to a folder.

    Args:
      checkpoint: the checkpoint to write.
      folder: an empty folder.

    Yields:
      Each parameter after it is written; this layout leaves nothing out.
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
    """Write `dsm_jax.json`, and copies of the tokenizer and of the voices of a text-to-speech model.

    Args:
      folder: the folder to write to.
      config: config of the model.
      dtype: dtype of the language model; for information only.
      converted_from: name of the source; for information only.
      tokenizer: path of the tokenizer.
    """
    if tokenizer is not None:
        copy_tokenizer(tokenizer, folder)
    if config.tts is not None:
        files.copy_voices(tokenizer, folder)
    values = {
        "format": FORMAT,
        "dtype": dtype,
        "converted_from": converted_from,
        "tokenizer": None if tokenizer is None else tokenizer.name,
        "config": to_dict(config),
    }
    files.write_json(folder / CONFIG_NAME, values)


def read_config(values: Mapping[str, Any], where: str) -> ModelConfig:
    """Parse the config in the content of `dsm_jax.json`.

    Raises:
      CheckpointError: the format is another one.
      ConfigError: a key or a value in the config is unknown.
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
      folder: the checkpoint's folder.
      arrays: pairs of a name, "lm.…" or "mimi.…", and an array; consumed one group at a time.

    Yields:
      Each name after its array is on disk.
    """
    check_process()
    group: dict[str, Any] = {}
    count = 0

    def save() -> None:
        nonlocal count
        save_tree(folder / "params" / f"{count:04}", group)
        count += 1

    for name, array in arrays:
        if group and sum(a.nbytes for a in group.values()) + array.nbytes > GROUP_BYTES:
            save()
            yield from group
            group = {}
        group[name] = array
    save()
    yield from group


def save_tree(path: Path, tree: Any) -> None:
    """Save a tree of arrays as an Orbax checkpoint, in a folder of any name and in any thread.

    Args:
      path: a folder that does not exist yet.
      tree: the arrays.

    Raises:
      OSError: it cannot be written.
    """
    import orbax.checkpoint

    path.parent.mkdir(parents=True, exist_ok=True)
    with _SAVING, without_log(), plain_path(path) as target:
        try:
            with orbax.checkpoint.StandardCheckpointer() as checkpointer:
                checkpointer.save(target, tree)
        except ValueError as error:  # tensorstore raises it for errors of the file system
            raise OSError(str(error).rpartition(": ")[2].partition(" [")[0]) from error


@contextlib.contextmanager
def plain_path(path: Path) -> Iterator[Path]:
    """Yield a path that Orbax understands and that leads to a folder of any name.

    Orbax takes "[" for a pattern, and writes a checkpoint that it cannot read; tensorstore takes UTF-8 alone.

    Args:
      path: a folder in a folder that exists; the last part of its path is plain.
    """
    import tempfile

    target = path.absolute()
    with contextlib.ExitStack() as held:
        if "[" in str(target) or str(target).encode(errors="replace") != os.fsencode(target):
            link = Path(held.enter_context(tempfile.TemporaryDirectory())) / "params"
            link.symlink_to(target.parent)
            target = link / path.name
        yield target


@contextlib.contextmanager
def without_log() -> Iterator[None]:
    """Keep Orbax from logging the tracebacks of its threads; errors are still raised."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        log.setLevel(level)


def open_folder(path: Path) -> NativeCheckpoint:
    """Read the config of a folder and list its parameters, without weights.

    Raises:
      CheckpointError: the folder has another format or is damaged.
      ConfigError: a key or a value in the config is unknown.
    """
    import orbax.checkpoint

    check_process()
    where = path / CONFIG_NAME
    values = files.read_json(where)
    config = read_config(values, str(where))
    parameters, group_of = {}, {}
    for group in sorted(p for p in (path / "params").glob("*") if p.is_dir()):
        try:
            with plain_path(group) as target, orbax.checkpoint.StandardCheckpointer() as checkpointer:
                tree = checkpointer.metadata(target).item_metadata.tree
        except Exception as error:  # Orbax raises many kinds
            raise CheckpointError(f"{group} cannot be read ({type(error).__name__}); convert the model again") from None
        for name, found in tree.items():
            parameters[name] = jax.ShapeDtypeStruct(found.shape, found.dtype)
            group_of[name] = group.name
    tokenizer = path / str(values["tokenizer"]) if values.get("tokenizer") else None
    return NativeCheckpoint(path, config, tokenizer, parameters, group_of)


def faults(opened: NativeCheckpoint, expected: Mapping[str, Mapping[str, jax.ShapeDtypeStruct]]) -> list[str]:
    """Compare a folder's parameters with the expected ones; return one line per fault."""
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
    """Restore parameters, group by group, directly to their devices.

    Args:
      opened: the opened folder.
      wanted: shape, dtype and sharding of the parameters to restore; a sharding of None means the default device.

    Yields:
      Names and arrays.
    """
    for group in sorted({opened.group_of[name] for name in wanted}):
        # Orbax restores whole groups; parameters that are not wanted are dropped at once.
        members = {name: wanted.get(name, p) for name, p in opened.parameters.items() if opened.group_of[name] == group}
        targets = {name: np.empty(p.shape, p.dtype) if p.sharding is None else p for name, p in members.items()}
        for name, array in _restore_group(opened, group, targets).items():
            if name in wanted:
                yield name, jax.device_put(array, wanted[name].sharding)


def reader(opened: NativeCheckpoint) -> Callable[[str, str], np.ndarray]:
    """Make a function that reads a parameter as a numpy array, given network and name; it caches three groups."""

    @functools.lru_cache(maxsize=3)
    def group(name: str) -> dict[str, np.ndarray]:
        members = [(member, opened.parameters[member]) for member, where in opened.group_of.items() if where == name]
        return _restore_group(opened, name, {member: np.empty(p.shape, p.dtype) for member, p in members})

    return lambda part, name: group(opened.group_of[f"{part}.{name}"])[f"{part}.{name}"]


def _restore_group(opened: NativeCheckpoint, group: str, targets: dict[str, Any]) -> dict[str, Any]:
    import orbax.checkpoint

    try:
        with (
            plain_path(opened.path / "params" / group) as path,
            orbax.checkpoint.StandardCheckpointer() as checkpointer,
        ):
            return checkpointer.restore(path, targets)
    except Exception as error:  # Orbax raises many kinds
        raise CheckpointError(
            f"{opened.path}/params/{group} cannot be read ({type(error).__name__}); fetch it again"
        ) from None


def check_new(destination: Path) -> None:
    """Refuse a destination that exists, if only as a link to nothing.

    Raises:
      CheckpointError: it does.
    """
    if os.path.lexists(destination):
        raise CheckpointError(f"{destination} exists; remove it, or give another destination")


@contextlib.contextmanager
def new_folder(destination: Path, size: int) -> Iterator[Path]:
    """Make a temporary folder next to `destination` and rename it at the end; an error leaves nothing behind.

    Args:
      destination: a folder that does not exist yet.
      size: number of bytes that will be written.

    Yields:
      The folder to write to.

    Raises:
      CheckpointError: the destination exists, or the disk cannot hold it.
    """
    import shutil
    import tempfile

    check_new(destination)
    folder = None
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(destination.parent).free
        if free < size:
            raise CheckpointError(
                f"{destination} needs {size / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB free; make room, or "
                "give another destination"
            )
        folder = Path(tempfile.mkdtemp(prefix=f".{destination.name[:50]}.", dir=destination.parent))
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

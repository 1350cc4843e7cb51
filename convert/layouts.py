"""The layouts of checkpoints: each is a module that recognises, opens and writes its own folders."""

import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, cast

from dsm_jax.convert import files, native
from dsm_jax.convert.checkpoint import Checkpoint, LeftOut
from dsm_jax.convert.pieces import Outgoing
from dsm_jax.errors import CheckpointError, ConfigError
from dsm_jax.models.family import FAMILIES, family_of

_CONFIGS = ("config.json", native.CONFIG_NAME)
# Places of models in the folders of a training, of the hub's cache and of moshi-finetune, given in place of a model.
_LEVELS = ("*", "*/*", "checkpoints/*/consolidated")


class Layout(Protocol):
    """The functions of a layout's module; modules of several families can share the layout's name, `NAME`."""

    NAME: str

    def recognises(self, path: Path) -> bool:
        """Return whether a folder or file looks like this layout, without checking its content."""
        ...

    def open_checkpoint(self, path: Path) -> Checkpoint:
        """Open a folder or file of this layout."""
        ...

    def write(self, checkpoint: Checkpoint, folder: Path) -> Iterator[Outgoing | LeftOut]:
        """Write a checkpoint of one of the layout's families; yield each tensor written and each one left out."""
        ...


def layouts() -> list[Layout]:
    """List the modules of all layouts: the native one, then the published ones of every family."""
    paths = dict.fromkeys(path for family in FAMILIES.values() for path in family.layouts.values())
    return [cast(Layout, native), *(pkgutil.resolve_name(path) for path in paths)]


def layout_names() -> list[str]:
    """List the names of all layouts."""
    return list(dict.fromkeys(layout.NAME for layout in layouts()))


def layout_for(checkpoint: Checkpoint, name: str) -> Layout:
    """Return the module that writes a checkpoint in the layout of that name, one of `layout_names`.

    Raises:
      ConfigError: the layout does not support the checkpoint's family.
    """
    family = family_of(checkpoint.config)
    if name == native.NAME:
        return cast(Layout, native)
    if name not in family.layouts:
        known = ", ".join([native.NAME, *family.layouts])
        raise ConfigError(
            f"{checkpoint.name} is {family.description}, which the layout {name!r} does not support; choose one of "
            f"{known}"
        )
    return pkgutil.resolve_name(family.layouts[name])


def model_types(path: Path) -> tuple[str, ...]:
    """Return the model types that a folder or file may be of, by its layout alone; empty for an unknown layout."""
    found = _layout_of(path)
    if found is native:
        return (native.read_config(files.read_json(path / native.CONFIG_NAME), str(path)).model_type,)
    return tuple(
        family.model_type
        for family in FAMILIES.values()
        if any(pkgutil.resolve_name(module) is found for module in family.layouts.values())
    )


def _layout_of(path: Path) -> Layout | None:
    """Return the first layout that recognises a folder or file."""
    try:
        return next((layout for layout in layouts() if layout.recognises(path)), None)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); check its permissions") from None


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint in any layout, which is recognised by the files' content.

    Opening reads only headers and configs, and checks every tensor's name and shape against the config's networks.

    Args:
      path: a folder in one of the layouts, or a file with a Mimi codec.

    Returns:
      The opened checkpoint.

    Raises:
      CheckpointError: the layout is unknown, or the tensors do not fit the config; lists all faults.
      ConfigError: a key or a value in a config is unknown.
    """
    if layout := _layout_of(path):
        return layout.open_checkpoint(path)
    config_path = path / "config.json"
    if config_path.is_file():
        raise CheckpointError(
            f"{config_path} is of model_type {files.read_json(config_path).get('model_type')!r}; expected Kyutai's own "
            "format, transformers' 'kyutai_speech_to_text', 'mimi' or 'csm', or Sesame's own csm"
        )
    inside = [p.parent for level in _LEVELS for name in _CONFIGS for p in path.glob(f"{level}/{name}")]
    instead = f": give {max(inside)}" if inside else ""
    if not inside and (path / "checkpoints").is_dir() and (path / "settings.json").is_file():
        instead = "; a training writes its model at its end: continue it with --resume"
    raise CheckpointError(
        f"{path} has no config.json, no {native.CONFIG_NAME} and {len(list(path.glob('*.safetensors')))} safetensors "
        "files; expected a checkpoint folder of Kyutai, transformers, Sesame or this library, or one Mimi file"
        f"{instead}"
    )

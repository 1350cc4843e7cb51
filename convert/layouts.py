"""The layouts of checkpoints: each is a module that recognises, opens and writes folders of its own."""

import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, cast

from dsm_jax.convert import files, native
from dsm_jax.convert.checkpoint import Checkpoint, LeftOut
from dsm_jax.convert.pieces import Outgoing
from dsm_jax.errors import CheckpointError, ConfigError
from dsm_jax.models.family import FAMILIES, family_of


class Layout(Protocol):
    """The functions of a layout's module; `NAME` is the layout's, which modules of several families can share."""

    NAME: str

    def recognises(self, path: Path) -> bool:
        """Tell whether a folder or file is of this layout, without a check."""
        ...

    def open_checkpoint(self, path: Path) -> Checkpoint:
        """Open a folder or file that the layout recognises."""
        ...

    def write(self, checkpoint: Checkpoint, folder: Path) -> Iterator[Outgoing | LeftOut]:
        """Write a checkpoint of one of the layout's families; yield what is written and what has no place."""
        ...


def layouts() -> list[Layout]:
    """List the modules of all layouts: the library's own, then the published ones of every family."""
    paths = dict.fromkeys(path for family in FAMILIES.values() for path in family.layouts.values())
    return [cast(Layout, native), *(pkgutil.resolve_name(path) for path in paths)]


def layout_names() -> list[str]:
    """List the names that `convert` can be given."""
    return list(dict.fromkeys(layout.NAME for layout in layouts()))


def layout_for(checkpoint: Checkpoint, name: str) -> Layout:
    """Return the module that writes a checkpoint in the layout of that name.

    Raises:
      CheckpointError: an unknown name.
      ConfigError: the layout has no place for models of this family.
    """
    if name not in (names := layout_names()):
        raise CheckpointError(f"the layout {name!r} is unknown; choose one of {', '.join(names)}")
    family = family_of(checkpoint.config)
    if name == native.NAME:
        return cast(Layout, native)
    if name not in family.layouts:
        known = ", ".join([native.NAME, *family.layouts])
        raise ConfigError(
            f"{checkpoint.name} is {family.description}, which the layout {name!r} has no place for; choose one of "
            f"{known}"
        )
    return pkgutil.resolve_name(family.layouts[name])


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint, whose layout is recognised by content.

    Opening reads headers and configs only, and holds all of them against the networks that the config describes.

    Args:
      path: a folder in one of the layouts, or a file with a Mimi codec.

    Returns:
      The opened checkpoint.

    Raises:
      CheckpointError: the layout is not recognised, or the tensors are not those of the config; all faults at once.
      ConfigError: a config holds what the library does not understand.
    """
    for layout in layouts():
        if layout.recognises(path):
            return layout.open_checkpoint(path)
    config_path = path / "config.json"
    if config_path.is_file():
        raise CheckpointError(
            f"{config_path} is of model_type {files.read_json(config_path).get('model_type')!r}; expected Kyutai's own "
            "format, or transformers' 'kyutai_speech_to_text' or 'mimi'"
        )
    raise CheckpointError(
        f"{path} has no config.json, no {native.CONFIG_NAME} and {len(list(path.glob('*.safetensors')))} safetensors "
        "files; expected a checkpoint folder of Kyutai, transformers or this library, or one Mimi file"
    )

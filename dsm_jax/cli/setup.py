"""Choose the device and the compile cache, and load models, for commands."""

import argparse
import os
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsm_jax import files
from dsm_jax.cli import terminal
from dsm_jax.cli.parser import PLATFORMS, cache_folder
from dsm_jax.errors import DsmError
from dsm_jax.garbage import no_collections

if TYPE_CHECKING:
    from dsm_jax.checkpoints import Model

CACHE_BYTES = 4 * 2**30
_UNREADABLE = "Error reading persistent compilation cache entry"


class UsageError(DsmError):
    """Arguments that do not go together."""


def check_folder_of(path: Path) -> None:
    """Refuse an output that could not be written, before the work for it is done.

    Raises:
      UsageError: its folder does not exist, or it is a folder itself.
    """
    files.check_folder_of(path, UsageError)
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name a file in it")


def check_recordings(names: Sequence[str]) -> None:
    """Refuse recordings of which none can be opened, before a model is loaded for them.

    Args:
      names: of files, or "-" for standard input; one that cannot be opened beside others costs only itself, later.

    Raises:
      UsageError: all are folders, or do not exist.
    """
    faults = [
        f"{name} is a folder; name the files in it" if os.path.isdir(name) else f"{name} does not exist; check the path"
        for name in names
        if name != "-" and (os.path.isdir(name) or not os.path.exists(name))
    ]
    if names and len(faults) == len(names):
        among = f"none of the {len(names)} recordings can be opened: " if names[1:] else ""
        raise UsageError(f"{among}{faults[0]}")


def set_up_jax(args: argparse.Namespace) -> None:
    """Choose the device and the compile cache, before JAX starts."""
    with no_collections():
        import jax

    if args.device:
        jax.config.update("jax_platforms", PLATFORMS[args.device])
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter where jax has no such backend at all
        reason = (str(error) or "JAX knows of none").splitlines()[0]
        asked = f"--device {args.device}" if args.device else "a device"
        raise UsageError(f"{asked} is not available here ({reason}); try --device cpu") from None
    if not args.no_cache:
        folder = Path(args.compile_cache or cache_folder())
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        # With a limit, JAX locks the cache, so that commands that run at once cannot damage its entries.
        jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
        remove_unfinished_entries(folder)
        _replace_damaged_entries(folder)


def remove_unfinished_entries(folder: Path) -> None:
    """Remove entries without a time of use, at which JAX fails.

    A process that is killed leaves such an entry, and so does a cache without a limit.

    Args:
      folder: folder of the cache; one that does not exist has no entries.
    """
    for entry in folder.glob("*-cache"):
        if not entry.with_name(entry.name.removesuffix("-cache") + "-atime").exists():
            entry.unlink(missing_ok=True)


def _replace_damaged_entries(folder: Path) -> None:
    """Make JAX's warning about an entry that it cannot read remove the entry, so that it is written anew."""
    shown = warnings.showwarning

    def show(message: Any, *args: Any, **kwargs: Any) -> None:
        text = str(message)
        if not text.startswith(_UNREADABLE):
            shown(message, *args, **kwargs)
        elif removed := remove_damaged(folder, text.removeprefix(_UNREADABLE + " for ").split("'")[1]):
            terminal.say(f"damaged entries of the compile cache in {folder} are replaced: {removed}", style="yellow")

    warnings.showwarning = show


def remove_damaged(folder: Path, module: str) -> int:
    """Remove those of a module's cache entries that cannot be decompressed, or all of them where each can.

    Args:
      folder: folder of the cache.
      module: name of the compiled module, with which the names of its entries begin.

    Returns:
      The number of entries that were removed.
    """
    entries = list(folder.glob(f"{module}-*-cache"))
    damaged = [entry for entry in entries if not _decompresses(entry)]
    for entry in damaged or entries:
        entry.unlink(missing_ok=True)
    return len(damaged or entries)


def _decompresses(entry: Path) -> bool:
    """Tell whether an entry holds whole compressed data, of zstandard or zlib."""
    try:
        content = entry.read_bytes()
    except OSError:
        return False
    try:
        import zstandard  # pyright: ignore[reportMissingImports]  JAX uses it where it is there
    except ImportError:
        zstandard = None
    try:
        if content[:4] == b"\x28\xb5\x2f\xfd" and zstandard is not None:
            zstandard.ZstdDecompressor().decompress(content)
        elif content[:4] != b"\x28\xb5\x2f\xfd":
            zlib.decompress(content)
    except Exception:  # each library has errors of its own
        return False
    return True


def load(args: argparse.Namespace, *, stt_only: bool) -> "Model":
    """Load the model that the arguments name, after `set_up_jax`."""
    from dsm_jax import checkpoints

    with terminal.loading_bar(f"loading {args.model}", quiet=args.quiet) as progress:
        return checkpoints.load(
            args.model,
            dtype=args.dtype,
            quantize=args.quantize,
            stt_only=stt_only,
            revision=args.revision,
            progress=progress,
        )

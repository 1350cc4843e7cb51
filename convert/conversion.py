"""Convert a checkpoint from any supported layout to any other, one parameter in memory at a time."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from dsm_jax import hub
from dsm_jax.convert import native, report
from dsm_jax.convert.checkpoint import LeftOut
from dsm_jax.convert.layouts import layout_for, layout_names, open_checkpoint
from dsm_jax.convert.report import Report
from dsm_jax.errors import CheckpointError
from dsm_jax.models.parameters import read_dtype
from dsm_jax.progress import Progress, ProgressCallback


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    to: str = "orbax",
    dtype: Any = None,
    revision: str | None = None,
    progress: ProgressCallback | None = None,
) -> Report:
    """Rewrite a checkpoint in another layout, strictly: every tensor is accounted for, or nothing is written.

    Args:
      source: a folder or file in any supported layout, or a name on the hub.
      destination: a folder that does not exist yet.
      to: "orbax" (this library's own), "kyutai", "transformers" or "sesame".
      dtype: dtype of the language model's weights, "bfloat16", "float16" or "float32"; None keeps the stored one. The
        codec is always float32.
      revision: branch, tag or commit on the hub; None is its newest.
      progress: called with the bytes that were written so far.

    Returns:
      A report of every tensor that was read, written or left out.

    Raises:
      CheckpointError: the source is incomplete or damaged, the layout is unknown, or the destination exists or cannot
        be written.
      ConfigError: the library or the destination's layout does not support the config, or the dtype is unknown.
      ForkError: the process was forked from one that uses JAX, and this library's own layout is read or written.
    """
    if to not in (names := layout_names()):
        raise CheckpointError(f"the layout {to!r} is unknown; choose one of {', '.join(names)}")
    destination = hub.expanded(destination)
    native.check_new(destination)
    found = hub.find(source, hub.HubOptions(revision))
    checkpoint = dataclasses.replace(open_checkpoint(found), name=hub.title(source, found))
    checkpoint.load_tokenizer()  # raises if the tokenizer does not fit the model
    layout = layout_for(checkpoint, to)
    cast = checkpoint if dtype is None else checkpoint.in_dtype(read_dtype(dtype))
    total = sum(p.size * p.dtype.itemsize for parameters in cast.stored.values() for p in parameters.values())
    written, dropped = [], []
    done = 0
    with native.new_folder(destination, total) as folder:
        for item in layout.write(cast, folder):
            if isinstance(item, LeftOut):
                dropped.append(item)
                continue
            written.append(report.written_as(item))
            done += int(np.prod(item.shape)) * np.dtype(item.dtype).itemsize
            if progress is not None:
                progress(Progress(done, total))
    return Report(
        checkpoint.name,
        checkpoint.layout,
        destination.name,
        to,
        tuple(report.moved_by(checkpoint)),
        tuple(written),
        tuple(report.unused_by(checkpoint)),
        tuple(dropped),
        checkpoint.notes,
    )

"""The conversion: any supported layout to any other, one parameter in memory at a time."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsm_jax import checkpoints
from dsm_jax.configs import MimiConfig
from dsm_jax.convert import files, kyutai, native, pieces, report, tokenizer, transformers_mimi, transformers_stt
from dsm_jax.convert.networks import read_dtype, with_dtype
from dsm_jax.convert.pieces import Outgoing, Piece, Table
from dsm_jax.convert.progress import byte_bar
from dsm_jax.convert.report import LeftOut, Report
from dsm_jax.convert.sources import Source, open_source
from dsm_jax.errors import CheckpointError
from dsm_jax.tokenizers import copy_tokenizer, load_tokenizer

LAYOUTS = ("orbax", "kyutai", "transformers")
Written = Iterator[tuple[str, tuple[int, ...], str]]


def convert(
    source: str | Path, destination: str | Path, *, to: str = "orbax", dtype: Any = None, progress: bool = True
) -> Report:
    """Rewrites a checkpoint in another layout, strictly: every tensor is accounted for, or nothing is written.

    Args:
      source: a folder or file in any supported layout, or a name on the hub.
      destination: a folder that does not exist yet.
      to: "orbax" (this library's own), "kyutai" or "transformers".
      dtype: of the language model's weights, "bfloat16", "float16" or "float32"; None keeps the stored one. The codec
        is always float32.
      progress: shows a bar where standard error is a terminal.

    Returns:
      What went where.

    Raises:
      CheckpointError: the source is not complete and right, or the destination exists or cannot be written.
      ConfigError: a config that the library, or the destination's layout, cannot express.
    """
    if to not in LAYOUTS:
        raise CheckpointError(f"the layout {to!r} is unknown; choose one of {', '.join(LAYOUTS)}")
    destination = Path(destination)
    if destination.exists():
        raise CheckpointError(f"{destination} exists; remove it, or give another destination")
    opened = open_source(checkpoints.find(source))
    if opened.tokenizer is not None and opened.config.lm is not None:
        load_tokenizer(opened.tokenizer, expected_size=opened.config.lm.text_card)
    stored = opened.stored
    if dtype is not None:
        stored = {part: with_dtype(part, stored[part], read_dtype(dtype)) for part in stored}
    writer = {"orbax": _write_orbax, "kyutai": _write_kyutai, "transformers": _write_transformers}[to]
    total = sum(_bytes(p) for parameters in stored.values() for p in parameters.values())
    with (
        byte_bar(f"converting {opened.name}", total, progress) as advance,
        native.new_folder(destination, total) as folder,
    ):
        written = []
        for name, shape, kind in writer(opened, stored, folder):
            written.append((name, shape, kind))
            advance(int(np.prod(shape)) * np.dtype(kind).itemsize)
    return Report(
        opened.name,
        opened.layout,
        destination.name,
        to,
        tuple(report.moved_by(opened)),
        tuple(written),
        tuple(report.unused_by(opened)),
        tuple(_dropped(opened, to)),
        opened.notes,
    )


Stored = dict[str, dict[str, jax.ShapeDtypeStruct]]


def _bytes(parameter: jax.ShapeDtypeStruct) -> int:
    return parameter.size * parameter.dtype.itemsize


def _getter(source: Source, stored: Stored, part: str) -> Callable[[str], np.ndarray]:
    """Reads parameters of a network, in the dtypes wanted; the last is kept, as tables ask for its blocks in a row."""
    last: dict[str, np.ndarray] = {}

    def get(name: str) -> np.ndarray:
        if name not in last:
            last.clear()
            last[name] = source.read(part, name).astype(stored[part][name].dtype, copy=False)
        return last[name]

    return get


def _lm_dtype(stored: Stored) -> str:
    return stored["lm"]["text_linear_DV"].dtype.name if "lm" in stored else "float32"


def _write_orbax(source: Source, stored: Stored, folder: Path) -> Written:
    name = None
    if source.tokenizer is not None:
        name = source.tokenizer.name
        copy_tokenizer(source.tokenizer, folder)
    native.write_config(folder, source.config, _lm_dtype(stored), f"{source.name} ({source.layout})", name)
    names = {f"{part}.{name}": (part, name) for part in stored for name in stored[part]}
    arrays = (
        (full, source.read(part, name).astype(stored[part][name].dtype, copy=False))
        for full, (part, name) in names.items()
    )
    for full in native.write_params(folder, arrays):
        part, name = names[full]
        yield full, stored[part][name].shape, stored[part][name].dtype.name


def _outgoing(source: Source, stored: Stored, part: str, table: Table) -> list[Outgoing]:
    return list(pieces.save(table, stored[part], _getter(source, stored, part)))


def _write_kyutai(source: Source, stored: Stored, folder: Path) -> Written:
    config, lm = source.config, source.config.lm
    mimi_config = None if config.mimi == MimiConfig() else kyutai.MIMI_CONFIG_NAME
    if mimi_config:
        files.write_json(folder / mimi_config, kyutai.write_mimi_config(config.mimi))
    if lm is not None:
        pieces_file = None
        if source.tokenizer is not None and source.tokenizer.suffix == ".json":
            pieces_file = "tokenizer.model"
            tokenizer.to_sentencepiece(source.tokenizer, folder / pieces_file)
        elif source.tokenizer is not None:
            pieces_file = source.tokenizer.name
            shutil.copyfile(source.tokenizer, folder / pieces_file)
        names = kyutai.Files(kyutai.LM_NAME, kyutai.MIMI_NAME, mimi_config, pieces_file)
        files.write_json(folder / "config.json", kyutai.write_config(config, lm, names))
        tensors = _outgoing(source, stored, "lm", kyutai.lm_table(lm))
        yield from map(report.written_as, files.write_safetensors(folder / kyutai.LM_NAME, tensors))
    tensors = _outgoing(source, stored, "mimi", kyutai.mimi_table(config.mimi))
    yield from map(report.written_as, files.write_safetensors(folder / kyutai.MIMI_NAME, tensors))


def _write_transformers(source: Source, stored: Stored, folder: Path) -> Written:
    config, lm = source.config, source.config.lm
    if lm is None:
        contents = transformers_mimi.write_files(config.mimi)
        tensors = _outgoing(source, stored, "mimi", transformers_mimi.table(config.mimi))
    else:
        contents = transformers_stt.write_files(config, lm, _lm_dtype(stored))
        tensors = _outgoing(source, stored, "lm", transformers_stt.table(lm))
        codec = transformers_mimi.table(config.mimi, transformers_stt.CODEC_PREFIX)
        tensors += _outgoing(source, stored, "mimi", codec)
        _write_json_tokenizer(source, folder)
    for name, values in contents.items():
        files.write_json(folder / name, values)
    yield from map(report.written_as, files.write_sharded(folder, tensors))


def _write_json_tokenizer(source: Source, folder: Path) -> None:
    if source.tokenizer is None:
        raise CheckpointError(f"{source.name} names no tokenizer, which transformers' processor needs; add it")
    if source.tokenizer.suffix != ".json":
        tokenizer.to_json(source.tokenizer, folder)
        return
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source.tokenizer.with_name(name), folder / name)


def _dropped(source: Source, to: str) -> Iterator[LeftOut]:
    if to == "transformers" and source.config.lm is not None:
        table = transformers_stt.table(source.config.lm)
        placed = {item.target for item in table if isinstance(item, Piece)}
        for name in source.stored["lm"]:
            if name not in placed:
                yield LeftOut("lm", name, transformers_stt.NO_PAUSE_HEADS)

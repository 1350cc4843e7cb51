"""The rule engine: a layout is a table of rules, called pieces, and one table serves both directions.

A piece states that a block of a published tensor, after a transform such as a transposition, is a block of one of this
library's parameters. `plan` checks a table against the tensors of a file and the parameters of a model: each tensor
must be used exactly once and completely, each parameter filled exactly once and completely; it collects all faults.
`load` and `save` then move one parameter or tensor at a time.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import ml_dtypes
import numpy as np

from dsm_jax.convert.transforms import IDENTITY, Transform
from dsm_jax.errors import CheckpointError

DTYPES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64}
Spellings = tuple[str, ...]  # alternative names of one tensor, of which the first is written
Rows = tuple[int, int]  # a range of a tensor's first axis
Ranges = tuple[tuple[int, int], ...]  # a range of every axis


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a file: shape and dtype from the header, and a function that reads rows (None: all rows)."""

    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it
    read: Callable[[Rows | None], np.ndarray]
    made_of: Spellings = ()  # names of the file's tensors from which this one is computed, if it is not stored itself


Tensors = Mapping[str, Tensor]
Parameters = Mapping[str, jax.ShapeDtypeStruct]


@dataclasses.dataclass(frozen=True)
class Piece:
    """A rule: `rows` of the tensors in `sources`, transformed, are the block `at` of the parameter `target`.

    A `tied` source may be in a file under several of its spellings, as copies with equal values.
    """

    sources: tuple[Spellings, ...]
    target: str
    transform: Transform = IDENTITY
    rows: Rows | None = None
    at: tuple[int | slice, ...] = ()
    tied: bool = False


@dataclasses.dataclass(frozen=True)
class Constant:
    """A tensor, or rows of one, without a parameter: written with `value`, and ignored on reading.

    A whole tensor may be missing. A file with another value leads to a note.
    """

    source: Spellings
    shape: tuple[int, ...]  # shape of the whole tensor, or of the rows
    value: float
    why: str
    rows: Rows | None = None


Table = Sequence[Piece | Constant]


def piece(
    source: str | Spellings,
    target: str,
    transform: Transform = IDENTITY,
    *,
    rows: Rows | None = None,
    at: tuple[int | slice, ...] = (),
    tied: bool = False,
) -> Piece:
    """Make a piece with one source."""
    return Piece(((source,) if isinstance(source, str) else source,), target, transform, rows, at, tied)


def ranges(shape: tuple[int, ...], at: tuple[int | slice, ...]) -> Ranges:
    """Return the range of every axis that an index covers."""
    full = at + (slice(None),) * (len(shape) - len(at))
    return tuple((i, i + 1) if isinstance(i, int) else i.indices(n)[:2] for i, n in zip(full, shape, strict=True))


def saved_shapes(item: Piece, parameters: Parameters) -> list[tuple[int, ...]]:
    """Return the shapes of a piece's published blocks, without computing the blocks."""
    block = np.broadcast_to(np.zeros((), np.int8), parameters[item.target].shape)[item.at]
    return [a.shape for a in item.transform.save(block)]


def load(item: Piece, names: Spellings, tensors: Tensors) -> np.ndarray:
    """Read the block with which a piece fills its parameter."""
    return item.transform.load(*(tensors[name].read(item.rows) for name in names))


@dataclasses.dataclass(frozen=True)
class Outgoing:
    """A tensor to write; `make` computes it."""

    name: str
    shape: tuple[int, ...]
    dtype: Any
    make: Callable[[], np.ndarray]


def save(table: Table, parameters: Parameters, get: Callable[[str], np.ndarray]) -> Iterator[Outgoing]:
    """List the published tensors of a table, each computed only when it is written.

    Args:
      table: pieces and constants of the layout.
      parameters: parameters of the model.
      get: reads a parameter, given its name.

    Yields:
      The tensors in the order of the table.
    """
    blocks: dict[str, list[_Block]] = {}
    for item in table:
        for names, block in _blocks(item, parameters, get):
            blocks.setdefault(names[0], []).append(block)
    for name, parts in blocks.items():
        dtype = next((part.dtype for part in parts if part.dtype is not None), np.dtype(np.float32))
        shape = _whole_shape([(part.rows, part.shape) for part in parts])

        def make(parts: list[_Block] = parts, shape: tuple[int, ...] = shape, dtype: Any = dtype) -> np.ndarray:
            if len(parts) == 1:
                return parts[0].make().astype(dtype, copy=False)
            whole = np.empty(shape, dtype)
            for part in parts:
                whole[slice(*(part.rows or (0, None)))] = part.make()
            return whole

        yield Outgoing(name, shape, dtype, make)


@dataclasses.dataclass(frozen=True)
class _Block:
    """Rows of a tensor to write, or the whole tensor; None for a constant's dtype, which follows the other rows."""

    rows: Rows | None
    shape: tuple[int, ...]
    dtype: Any
    make: Callable[[], np.ndarray]


def _blocks(
    item: Piece | Constant, parameters: Parameters, get: Callable[[str], np.ndarray]
) -> Iterator[tuple[Spellings, _Block]]:
    if isinstance(item, Constant):
        constant = functools.partial(np.full, item.shape, item.value, np.float32)
        yield item.source, _Block(item.rows, item.shape, None, constant)
        return

    def made(i: int) -> np.ndarray:
        return item.transform.save(get(item.target)[item.at])[i]

    for i, (names, shape) in enumerate(zip(item.sources, saved_shapes(item, parameters), strict=True)):
        yield names, _Block(item.rows, shape, parameters[item.target].dtype, functools.partial(made, i))


def _whole_shape(parts: Sequence[tuple[Rows | None, tuple[int, ...]]]) -> tuple[int, ...]:
    """Return the shape of a tensor from its parts, given as (rows of the first axis or None, shape)."""
    return (max(rows[1] if rows else shape[0] for rows, shape in parts), *parts[0][1][1:])


def shown(shape: Sequence[int]) -> str:
    """Format a shape as in the listings: 4x2x1."""
    return "x".join(map(str, shape)) or "scalar"


@dataclasses.dataclass(frozen=True)
class Claim:
    """An item of a table, with the file's spelling of each of its sources, and further spellings of tied ones."""

    item: Piece | Constant
    names: Spellings
    copies: Spellings = ()


def plan(table: Table, tensors: Tensors, parameters: Parameters) -> tuple[list[Claim], list[str]]:
    """Check a table against the tensors of a file and the parameters of a model.

    Args:
      table: pieces and constants of the layout.
      tensors: tensors of the file.
      parameters: all parameters of the model.

    Returns:
      claims: the items of the table with their sources in the file; complete only if there is no fault.
      faults: one line per fault; empty if the file fits the model exactly.
    """
    faults: list[str] = []
    claims: list[Claim] = []
    needed: dict[str, list[tuple[Rows | None, tuple[int, ...], bool]]] = {}
    missing: dict[str, list[tuple[Rows | None, tuple[int, ...]]]] = {}
    for item in table:
        if isinstance(item, Piece) and item.target not in parameters:
            faults.append(f"the table fills {item.target}, which the model does not have")
            continue
        sources = item.sources if isinstance(item, Piece) else (item.source,)
        shapes = saved_shapes(item, parameters) if isinstance(item, Piece) else [item.shape]
        names, copies = [], []
        for spellings, shape in zip(sources, shapes, strict=True):
            present = [name for name in spellings if name in tensors]
            tied = present[1:] if isinstance(item, Piece) and item.tied else []
            if len(present) > 1 and not tied:
                faults.append(f"twice: {' and '.join(present)} are spellings of one tensor")
            if present:
                loose = isinstance(item, Piece) and item.transform.any_leading_ones
                for name in (present[0], *tied):
                    needed.setdefault(name, []).append((item.rows, shape, loose))
                names.append(present[0])
                copies += tied
            elif isinstance(item, Piece) or item.rows:
                missing.setdefault(spellings[0], []).append((item.rows, shape))
        if len(names) == len(sources):
            claims.append(Claim(item, tuple(names), tuple(copies)))
    faults += [f"missing: {name}, expected {shown(_whole_shape(parts))}" for name, parts in missing.items()]
    for name, tensor in tensors.items():
        if name not in needed:
            faults.append(f"unknown: {name}, {shown(tensor.shape)}; the model has no place for it")
        else:
            faults += _source_faults(name, tensor, needed[name])
    faults += _target_faults(table, parameters)
    return claims, list(dict.fromkeys(faults))


def copy_faults(claims: Sequence[Claim], tensors: Tensors) -> list[str]:
    """Compare the values of tied tensors, the only values that are read before a parameter is.

    Args:
      claims: from `plan`.
      tensors: tensors of the file.

    Returns:
      One line for each tensor that differs from the one that it should be a copy of.
    """
    unequal = {
        f"unequal: {copy} and {claim.names[0]} are one table of the model, but their values differ"
        for claim in claims
        for copy in claim.copies
        if not _equal(tensors[claim.names[0]], tensors[copy], claim.item.rows)
    }
    return sorted(unequal)


def _equal(one: Tensor, other: Tensor, rows: Rows | None) -> bool:
    """Return whether rows of two tensors have equal values; tensors of other shapes are a fault of their own."""
    if one.shape != other.shape or not {one.dtype, other.dtype} <= DTYPES.keys():
        return True
    return np.array_equal(one.read(rows).astype(np.float32), other.read(rows).astype(np.float32), equal_nan=True)


def _source_faults(name: str, tensor: Tensor, needed: list[tuple[Rows | None, tuple[int, ...], bool]]) -> list[str]:
    if tensor.dtype not in DTYPES:
        return [f"dtype: {name} is {tensor.dtype}, expected one of {', '.join(DTYPES)}"]
    rows = sorted(r for r, _, _ in needed if r is not None)
    if not rows:
        if len(needed) > 1:
            return [f"twice: {name} is claimed by {len(needed)} pieces of the table"]
    elif len(rows) < len(needed) or rows[0][0] or any(a[1] != b[0] for a, b in itertools.pairwise(rows)):
        return [f"twice: the rows of {name} that the table claims overlap, or leave a gap: {rows}"]
    found, expected = tensor.shape, _whole_shape([(part, shape) for part, shape, _ in needed])
    if needed[0][2] and found[-1:] == expected[-1:] and math.prod(found) == math.prod(expected):
        return []
    return [] if found == expected else [f"shape: {name} is {shown(found)}, expected {shown(expected)}"]


def _target_faults(table: Table, parameters: Parameters) -> list[str]:
    filled_by: dict[str, list[Ranges]] = {name: [] for name in parameters}
    for item in table:
        if isinstance(item, Piece) and item.target in filled_by:
            filled_by[item.target].append(ranges(parameters[item.target].shape, item.at))
    faults = []
    for name, filled in filled_by.items():
        size = sum(math.prod(stop - start for start, stop in b) for b in filled)
        if size != math.prod(parameters[name].shape) or any(
            all(a[0] < b[1] and b[0] < a[1] for a, b in zip(one, other, strict=True))
            for i, one in enumerate(filled)
            for other in filled[:i]
        ):
            faults.append(
                f"unfilled: the table fills {size} of the {math.prod(parameters[name].shape)} values of {name}"
            )
    return faults


def fit_error(
    where: str, faults: Sequence[str], remedy: str = "use the config.json that was published with them"
) -> CheckpointError:
    """Make one error that lists all faults."""
    lines = "".join(f"\n  {fault}" for fault in faults)
    return CheckpointError(
        f"{where}: the weights are not those of the model that the config describes; {remedy}. "
        f"Faults ({len(faults)}):{lines}"
    )

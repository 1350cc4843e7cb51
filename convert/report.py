"""The report of a conversion, tensor by tensor."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from dsm_jax.convert.checkpoint import Checkpoint, LeftOut
from dsm_jax.convert.pieces import Constant, Outgoing, Piece, shown


@dataclasses.dataclass(frozen=True)
class Moved:
    """A tensor of a file, or rows of a tensor, and the parameter that it fills or is part of."""

    network: str
    tensor: str
    shape: tuple[int, ...]
    dtype: str
    parameter: str


@dataclasses.dataclass(frozen=True)
class Report:
    """The report of a conversion.

    Attributes:
      source: name of the source.
      source_layout: name of the source's layout.
      destination: name of the folder that was written.
      destination_layout: name of the layout that was written.
      moved: every tensor that was read, and the parameter that it filled.
      written: name, shape and dtype of each tensor or parameter that was written.
      unused: tensors that the tables deliberately ignore.
      dropped: parameters that the destination's layout cannot hold.
      notes: remarks for the user.
    """

    source: str
    source_layout: str
    destination: str
    destination_layout: str
    moved: tuple[Moved, ...]
    written: tuple[tuple[str, tuple[int, ...], str], ...]
    unused: tuple[LeftOut, ...]
    dropped: tuple[LeftOut, ...]
    notes: tuple[str, ...]

    def text(self) -> str:
        """Format the report as text."""
        lines = [f"{self.source} ({self.source_layout}) -> {self.destination} ({self.destination_layout})"]
        lines += [f"  {m.tensor}  {shown(m.shape)} {m.dtype} -> {m.network}: {m.parameter}" for m in self.moved]
        tensors = len({(m.network, m.tensor) for m in self.moved})
        parameters = len({(m.network, m.parameter) for m in self.moved})
        lines.append(f"read {tensors} tensors into {parameters} parameters; wrote {len(self.written)} tensors")
        for heading, left in (("not used", self.unused), ("not written", self.dropped)):
            lines += [f"{heading}: {one.name} ({one.why})" for one in left]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain JSON values."""
        return dataclasses.asdict(self)


def moved_by(source: Checkpoint) -> Iterator[Moved]:
    """Yield every tensor of a source with the parameter that it fills."""
    for part, parameters in source.stored.items():
        if part not in source.claims:
            yield from (Moved(part, name, p.shape, p.dtype.name, name) for name, p in parameters.items())
            continue
        for claim in source.claims[part]:
            if isinstance(claim.item, Piece):
                for name in claim.names:
                    tensor = source.tensors[part][name]
                    for file_name in tensor.made_of or (name,):
                        yield Moved(part, file_name, tensor.shape, tensor.dtype, claim.item.target)


def unused_by(source: Checkpoint) -> Iterator[LeftOut]:
    """Yield every tensor, or rows of a tensor, that the tables deliberately ignore."""
    for part, claims in source.claims.items():
        copies = {copy: claim.names[0] for claim in claims for copy in claim.copies}
        yield from (LeftOut(part, copy, f"a copy of {name}") for copy, name in copies.items())
        for claim in claims:
            if isinstance(claim.item, Constant):
                rows = f"[{claim.item.rows[0]}:{claim.item.rows[1]}]" if claim.item.rows else ""
                yield LeftOut(part, claim.names[0] + rows, claim.item.why)


def written_as(tensor: Outgoing) -> tuple[str, tuple[int, ...], str]:
    """Return name, shape and dtype of a written tensor for the report."""
    return tensor.name, tensor.shape, str(tensor.dtype)

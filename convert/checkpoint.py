"""An opened checkpoint of any layout: its config, and its parameters, read one by one when they are asked for."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from dsm_jax.configs import ModelConfig
from dsm_jax.convert import pieces
from dsm_jax.convert.pieces import Claim, Constant, Outgoing, Piece, Tensor
from dsm_jax.convert.transforms import contiguous
from dsm_jax.models.family import abstract_model, family_of
from dsm_jax.models.parameters import ALWAYS_FLOAT32, AbstractNetwork, with_dtype
from dsm_jax.tokenizers import Tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Attributes:
      name: of the folder or file.
      layout: "kyutai", "transformers" or "orbax".
      config: what the checkpoint says about itself.
      tokenizer: its file; None for a codec alone.
      networks: to fill, "mimi" and "lm".
      stored: by network and parameter, the shape, and the dtype in which `read` returns it.
      read: reads one parameter to the host, by network and name.
      place: maps shape, dtype and sharding (None for the default device) of parameters, named "lm.…" or "mimi.…", to
        the arrays on their devices, in turn.
      claims: by network, which tensors make up which parameters; empty for the native layout.
      tensors: by network, the tensors of the files; empty for the native layout.
      notes: remarks for the user on how the checkpoint was read.
    """

    name: str
    layout: str
    config: ModelConfig
    tokenizer: Path | None
    networks: dict[str, AbstractNetwork]
    stored: dict[str, dict[str, jax.ShapeDtypeStruct]]
    read: Callable[[str, str], np.ndarray]
    place: Callable[[Mapping[str, jax.ShapeDtypeStruct]], Iterator[tuple[str, jax.Array]]]
    claims: Mapping[str, list[Claim]] = dataclasses.field(default_factory=dict)
    tensors: Mapping[str, dict[str, Tensor]] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def load_tokenizer(self) -> Tokenizer | None:
        """Load the tokenizer; None without one.

        Raises:
          CheckpointError: it cannot be read, or its size is not that of the model's vocabulary.
        """
        vocabulary = family_of(self.config).vocabulary
        if self.tokenizer is None or vocabulary is None:
            return None
        return load_tokenizer(self.tokenizer, expected_size=vocabulary(self.config))

    def in_dtype(self, dtype: np.dtype) -> "Checkpoint":
        """Return the checkpoint with the language model's parameters read in another dtype."""
        stored = {part: with_dtype(part, parameters, dtype) for part, parameters in self.stored.items()}

        def read(part: str, name: str) -> np.ndarray:
            return self.read(part, name).astype(stored[part][name].dtype, copy=False)

        return dataclasses.replace(self, stored=stored, read=read)


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """A tensor or a parameter that has no counterpart, and why."""

    network: str
    name: str
    why: str


def outgoing(checkpoint: Checkpoint, part: str, table: pieces.Table) -> list[Outgoing]:
    """List the published tensors of a network, each computed only when it is written."""
    last: dict[str, np.ndarray] = {}

    def get(name: str) -> np.ndarray:
        if name not in last:  # the last parameter is kept, as tables ask for its blocks in a row
            last.clear()
            last[name] = checkpoint.read(part, name)
        return last[name]

    return list(pieces.save(table, checkpoint.stored[part], get))


def from_tensors(
    path: Path,
    layout: str,
    config: ModelConfig,
    tables: Mapping[str, pieces.Table],
    tensors: Mapping[str, dict[str, Tensor]],
    *,
    tokenizer: Path | None = None,
    faults: list[str] | None = None,
    notes: tuple[str, ...] = (),
) -> Checkpoint:
    """Make a checkpoint of published tensors, holding them against the networks that the config describes.

    Args:
      path: of the folder or file.
      layout: its name.
      config: of the model.
      tables: by network, which tensors make up which parameters.
      tensors: by network, those of the files.
      tokenizer: its file.
      faults: found while the files were opened, one line each.
      notes: remarks on how the config was read.

    Returns:
      The opened checkpoint.

    Raises:
      CheckpointError: the tensors are not those of the config; all faults at once.
      ConfigError: the config is not one of its family.
    """
    # Weight norm is folded by now, so what is written from here has none.
    plain = dataclasses.replace(config.mimi.seanet, norm="none")
    config = dataclasses.replace(config, mimi=dataclasses.replace(config.mimi, seanet=plain))
    networks, faults = abstract_model(config), list(faults or ())
    claims: dict[str, list[Claim]] = {}
    stored: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}
    for part, table in tables.items():
        claims[part], found = pieces.plan(table, tensors[part], networks[part].parameters)
        faults += found
    if faults:
        raise pieces.fit_error(str(path), faults)
    by_target: dict[tuple[str, str], list[tuple[Piece, pieces.Spellings]]] = {}
    for part in tables:
        for claim in claims[part]:
            if isinstance(claim.item, Piece):
                by_target.setdefault((part, claim.item.target), []).append((claim.item, claim.names))
        stored[part] = with_dtype(part, networks[part].parameters, _dtype_of(claims[part], tensors[part]))

    def read(part: str, name: str) -> np.ndarray:
        wanted, blocks = stored[part][name], by_target[part, name]
        if len(blocks) == 1:
            return contiguous(pieces.load(*blocks[0], tensors[part])).astype(wanted.dtype, copy=False)
        whole = np.empty(wanted.shape, wanted.dtype)
        for item, names in blocks:
            whole[item.at] = contiguous(pieces.load(item, names, tensors[part]))
        return whole

    def place(wanted: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[tuple[str, jax.Array]]:
        for full, p in wanted.items():
            part, _, name = full.partition(".")
            yield full, jax.device_put(read(part, name).astype(p.dtype, copy=False), p.sharding)

    notes += tuple(note for part in tables for note in _constant_notes(claims[part], tensors[part]))
    return Checkpoint(path.name, layout, config, tokenizer, networks, stored, read, place, claims, tensors, notes)


def _dtype_of(claims: list[Claim], tensors: dict[str, Tensor]) -> np.dtype:
    """The narrowest dtype that holds every tensor of a network, conditioning apart."""
    own = [c for c in claims if isinstance(c.item, Piece) and not c.item.target.startswith(ALWAYS_FLOAT32)]
    dtypes = {np.dtype(pieces.DTYPES[tensors[name].dtype]) for claim in own for name in claim.names}
    return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)


def _constant_notes(claims: list[Claim], tensors: dict[str, Tensor]) -> list[str]:
    notes = []
    for claim in claims:
        if isinstance(claim.item, Constant):
            found = tensors[claim.names[0]].read(claim.item.rows).astype(np.float32)
            if (found != claim.item.value).any():
                rows = f" rows {claim.item.rows}" if claim.item.rows else ""
                notes.append(
                    f"{claim.names[0]}{rows} is not {claim.item.value} as expected, and is lost: {claim.item.why}"
                )
    return notes

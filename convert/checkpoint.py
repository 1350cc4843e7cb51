"""An opened checkpoint of any layout: its config, and its parameters, which are read one by one on demand."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from dsm_jax.configs import ModelConfig
from dsm_jax.convert import files, pieces
from dsm_jax.convert.pieces import Claim, Constant, Outgoing, Piece, Tensor
from dsm_jax.errors import CheckpointError
from dsm_jax.models.family import abstract_model, family_of
from dsm_jax.models.parameters import ALWAYS_FLOAT32, AbstractNetwork, with_dtype
from dsm_jax.tokenizers import Tokenizer, load_tokenizer

# Ends of names of tensors beside quantised weights: in MLX, in moshi, in bitsandbytes, in GPTQ and AWQ.
_QUANTISED = (".scales", "weight_scb", ".absmax", ".SCB", ".qweight")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Attributes:
      name: name of the folder or file.
      layout: name of the layout, one of `layouts.layout_names()`.
      config: the model's config.
      tokenizer: path of the tokenizer; None for a codec alone.
      networks: the networks to fill, "mimi" and "lm", without weights.
      stored: shape of each parameter and the dtype in which `read` returns it, by network and parameter.
      read: reads one parameter to the host, given its network and name.
      place: yields parameters on their devices, given shape, dtype and sharding (None for the default device) of each
        by its name "lm.…" or "mimi.…".
      claims: the tensors of each parameter, by network; empty for the native layout.
      tensors: the tensors of the files, by network; empty for the native layout.
      notes: remarks for the user on the reading of the checkpoint.
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
        """Load the tokenizer; None if the checkpoint has none.

        Raises:
          CheckpointError: the file cannot be read, or has another number of pieces than the model's vocabulary.
        """
        vocabulary = family_of(self.config).vocabulary
        if self.tokenizer is None or vocabulary is None:
            return None
        return load_tokenizer(self.tokenizer, expected_size=vocabulary(self.config))

    def in_dtype(self, dtype: np.dtype) -> "Checkpoint":
        """Return the checkpoint with the language model's parameters read in another dtype."""
        stored = {part: with_dtype(part, parameters, dtype) for part, parameters in self.stored.items()}

        def read(part: str, name: str) -> np.ndarray:
            return _cast(self.read(part, name), stored[part][name].dtype, f"{part}.{name}")

        return dataclasses.replace(self, stored=stored, read=read)


def _cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Return an array in another dtype.

    Raises:
      CheckpointError: a finite value is infinite in the dtype, as values from 65,520 are in float16.
    """
    with np.errstate(over="ignore"):
        cast = array.astype(dtype, copy=False)
    if cast.dtype == np.float16 and array.dtype != np.float16 and (np.isinf(cast) & np.isfinite(array)).any():
        raise CheckpointError(f"{name} has values that float16 cannot hold; choose bfloat16 or float32")
    return cast


@dataclasses.dataclass(frozen=True)
class LeftOut:
    """A tensor or a parameter that is left out, with the reason."""

    network: str
    name: str
    why: str


def outgoing(checkpoint: Checkpoint, part: str, table: pieces.Table) -> list[Outgoing]:
    """List the published tensors of a network, each computed only when it is written."""
    last: dict[str, np.ndarray] = {}

    def get(name: str) -> np.ndarray:
        if name not in last:  # tables need the blocks of a parameter one after another, so the last one is kept
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
    """Make a checkpoint from published tensors, after checking them against the config's networks.

    Args:
      path: path of the folder or file.
      layout: name of the layout.
      config: config of the model.
      tables: the layout's table of each network.
      tensors: the tensors of the files, by network.
      tokenizer: path of the tokenizer.
      faults: faults found while the files were opened, one line each.
      notes: remarks on the reading of the config.

    Returns:
      The opened checkpoint.

    Raises:
      CheckpointError: the tensors do not fit the config; lists all faults.
      ConfigError: the config does not fit its family.
    """
    # The callers have folded the weight norm, so the config must not ask for it any more.
    plain = dataclasses.replace(config.mimi.seanet, norm="none")
    config = dataclasses.replace(config, mimi=dataclasses.replace(config.mimi, seanet=plain))
    networks, faults = abstract_model(config), list(faults or ())
    if rounded := [name for found in tensors.values() for name in found if name.endswith(_QUANTISED)]:
        raise CheckpointError(
            f"{path} has weights that another package has rounded to fewer bits ({rounded[0]}), which are not read; "
            f"{files.NOT_ROUNDED}"
        )
    claims: dict[str, list[Claim]] = {}
    stored: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}
    for part, table in tables.items():
        claims[part], found = pieces.plan(table, tensors[part], networks[part].parameters)
        faults += found + pieces.copy_faults(claims[part], tensors[part])
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
            return np.ascontiguousarray(pieces.load(*blocks[0], tensors[part])).astype(wanted.dtype, copy=False)
        whole = np.empty(wanted.shape, wanted.dtype)
        for item, names in blocks:
            whole[item.at] = pieces.load(item, names, tensors[part])
        return whole

    def place(wanted: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[tuple[str, jax.Array]]:
        for full, p in wanted.items():
            part, _, name = full.partition(".")
            yield full, jax.device_put(_cast(read(part, name), p.dtype, full), p.sharding)

    notes += tuple(note for part in tables for note in _constant_notes(claims[part], tensors[part]))
    return Checkpoint(path.name, layout, config, tokenizer, networks, stored, read, place, claims, tensors, notes)


def _dtype_of(claims: list[Claim], tensors: dict[str, Tensor]) -> np.dtype:
    """Return the dtype of a network's tensors outside conditioning if they share one, else float32."""
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

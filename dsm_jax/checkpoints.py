"""Loads models, placing their weights on devices, and saves them."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsm_jax.configs import ModelConfig
from dsm_jax.convert import native
from dsm_jax.convert.checkpoint import Checkpoint
from dsm_jax.convert.layouts import open_checkpoint
from dsm_jax.errors import CheckpointError
from dsm_jax.hub import DEFAULT, find
from dsm_jax.models.family import abstract_model, family_of
from dsm_jax.models.parameters import dtype_of, flatten, read_dtype, with_dtype
from dsm_jax.nn.quant import PackedBfloat16
from dsm_jax.progress import byte_bar
from dsm_jax.sharding import Sharding
from dsm_jax.tokenizers import Tokenizer

_TABLES = ("audio_emb.table_QLW", "text_emb.table_LW")


@dataclasses.dataclass(frozen=True, repr=False)
class Model:
    """A loaded model: `nnx.merge(lm_def, lm_params)` is its `DelayedStreamsLM`, likewise its `Mimi`.

    A codec alone has no language model (`lm_def`, `lm_params` and `tokenizer` are None), and `config.lm` is None.
    """

    config: ModelConfig
    lm_def: nnx.GraphDef | None
    lm_params: nnx.State | None
    mimi_def: nnx.GraphDef
    mimi_params: nnx.State
    tokenizer: Tokenizer | None
    name: str

    @property
    def sample_rate(self) -> int:
        """Hz of the samples that the model takes and makes: 24,000 in the published ones."""
        return self.config.mimi.sample_rate

    def __repr__(self) -> str:
        kind = family_of(self.config).description
        return f"Model({self.name!r}: {kind}, {self.sample_rate} Hz, {self.config.mimi.frame_rate} frames a second)"


def load(
    source: str | Path = DEFAULT,
    *,
    dtype: Any = None,
    sharding: Sharding | None = None,
    listen_only: bool = False,
) -> Model:
    """Loads a model for use.

    Args:
      source: a local folder, a codec's file, "digits" or "digits-tts" (small models inside the package), or a name on
        the hub ("organisation/name", fetched on first use); in Kyutai's, transformers' or this library's own layout.
      dtype: of the language model, by name or as jax has it; None is bfloat16 on GPU and TPU, float32 on CPU. The codec
        and the conditioning are always float32.
      sharding: the devices to spread the language model over, and how; None uses the default device. The codec is on
        all of them.
      listen_only: leave out what a model that only hears does without: the codec's decoder, and in float32 on CPU half
        of the embedding tables, if they are stored in bfloat16 (rows are widened as they are read, to the same values).
        Such a model cannot be saved or trained.

    Returns:
      The model, each parameter placed straight on its devices.

    Raises:
      CheckpointError: nothing of that name, a layout that is not known, or weights that are not those of the config.
      ConfigError: a config that the library does not understand.
    """
    path = find(source)
    opened = open_checkpoint(path)
    tokenizer = opened.load_tokenizer()
    if dtype is None:
        platform = jax.default_backend() if sharding is None else sharding.mesh.devices.flat[0].platform
        dtype = "float32" if platform == "cpu" else "bfloat16"
    dtype = read_dtype(dtype)
    used = abstract_model(opened.config, decoder=not listen_only, dtype=dtype, sharding=sharding)
    wanted = {
        f"{part}.{name}": jax.ShapeDtypeStruct(
            p.shape, p.dtype, sharding=sharding and sharding.named(name if part == "lm" else "", p.shape)
        )
        for part, network in used.items()
        for name, p in with_dtype(part, network.parameters, dtype).items()
    }
    packed = (
        _tables_to_pack(opened, wanted)
        if listen_only and sharding is None and jax.default_backend() == "cpu"
        else set()
    )
    for name in packed:
        wanted[name] = jax.ShapeDtypeStruct(wanted[name].shape, jnp.bfloat16, sharding=wanted[name].sharding)
    arrays = {}
    total = sum(p.size * p.dtype.itemsize for p in wanted.values())
    with byte_bar(f"loading {opened.name}", total, show=True) as advance:
        for name, array in opened.place(wanted):
            arrays[name] = PackedBfloat16(jnp.asarray(np.asarray(array).view(np.uint16))) if name in packed else array
            advance(array.nbytes)
    states = {
        part: network.unflatten({name: arrays[f"{part}.{name}"] for name in network.parameters})
        for part, network in used.items()
    }
    lm, mimi = used.get("lm"), used["mimi"]
    return Model(
        config=opened.config,
        lm_def=lm and lm.graph,
        lm_params=states.get("lm"),
        mimi_def=mimi.graph,
        mimi_params=states["mimi"],
        tokenizer=tokenizer,
        name=path.resolve().name if Path(source).expanduser().exists() else str(source),
    )


def save(model: Model, destination: str | Path) -> None:
    """Writes a model in the library's own layout, which `load` reads.

    Args:
      model: any model.
      destination: a folder that does not exist yet.

    Raises:
      CheckpointError: it exists, or cannot be written, or the model was loaded with `listen_only`.
    """
    if nnx.merge(model.mimi_def, model.mimi_params).decoder is None:
        raise CheckpointError(f"{model.name} was loaded with listen_only=True; load it without to save it")
    lm, mimi = flatten(model.lm_params or nnx.State({})), flatten(model.mimi_params)
    arrays = {f"lm.{name}": array for name, array in lm.items()} | {f"mimi.{name}": a for name, a in mimi.items()}
    if any(not isinstance(array, jax.Array) for array in arrays.values()):
        raise CheckpointError(f"{model.name} has quantised weights; save the model before it is quantised")
    tokenizer = model.tokenizer.path if model.tokenizer else None
    with native.new_folder(Path(destination), sum(array.nbytes for array in arrays.values())) as folder:
        native.write_about(folder, model.config, dtype_of(lm), model.name, tokenizer)
        for _ in native.write_params(folder, arrays.items()):
            pass


def _tables_to_pack(opened: Checkpoint, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> set[str]:
    """The embedding tables that lose nothing by staying in 16 bits, though the model computes in 32."""
    tables = {f"lm.{name}" for name in _TABLES} & wanted.keys()
    return {
        name
        for name in tables
        if wanted[name].dtype == jnp.float32 and opened.stored["lm"][name.removeprefix("lm.")].dtype == jnp.bfloat16
    }

"""Finds a model, recognises its layout, and places its weights on devices."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsm_jax.configs import ModelConfig
from dsm_jax.errors import CheckpointError
from dsm_jax.tokenizers import Tokenizer, copy_tokenizer, load_tokenizer

if TYPE_CHECKING:
    from dsm_jax.convert.sources import Source

DEFAULT = "kyutai/stt-1b-en_fr"
# The mesh axis over which an axis of a parameter is split, by its letter: projections and vocabularies, so that a
# layer's two matrices are split along the axis they share and one sum joins the parts.
RULES = {"E": "model", "F": "model", "G": "model", "V": "model"}
_ASSETS = Path(__file__).with_name("assets")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_INSTEAD = "give a local folder, or use the model that came with the library: --model digits"
_TABLES = ("audio_emb_QLD", "text_emb.table_LW")
_PATTERNS = ("*.json", "*.safetensors", "*.model", "params/*")


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
        kind = "a codec" if self.config.lm is None else self.config.model_type
        return f"Model({self.name!r}: {kind}, {self.sample_rate} Hz, {self.config.mimi.frame_rate} frames a second)"


def load(
    source: str | Path = DEFAULT,
    *,
    dtype: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    rules: Mapping[str, str] | None = None,
    listen_only: bool = False,
) -> Model:
    """Loads a model for use.

    Args:
      source: a local folder, a codec's file, "digits" or "digits-tts" (small models inside the package), or a name on
        the hub ("organisation/name", fetched on first use); in Kyutai's, transformers' or this library's own layout.
      dtype: of the language model, by name or as jax has it; None is bfloat16 on GPU and TPU, float32 on CPU. The codec
        and the conditioning are always float32.
      mesh: the devices to spread the language model over; None uses the default device. The codec is on all of them.
      rules: which mesh axis splits the axes of parameters that have a letter in their name; None is `RULES` as far as
        the mesh has its axis. An axis that does not divide stays whole.
      listen_only: leave out what a model that only hears does without: the codec's decoder, and in float32 on CPU half
        of the embedding tables, if they are stored in bfloat16 (rows are widened as they are read, to the same values).
        Such a model cannot be saved or trained.

    Returns:
      The model, each parameter placed straight on its devices.

    Raises:
      CheckpointError: nothing of that name, a layout that is not known, or weights that are not those of the config.
      ConfigError: a config that the library does not understand.
    """
    from dsm_jax.convert.networks import networks, read_dtype, with_dtype
    from dsm_jax.convert.progress import byte_bar
    from dsm_jax.convert.sources import open_source

    path = find(source)
    opened = open_source(path)
    lm_config = opened.config.lm
    tokenizer = None
    if lm_config is not None and opened.tokenizer is not None:
        tokenizer = load_tokenizer(opened.tokenizer, expected_size=lm_config.text_card)
    if dtype is None:
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
        dtype = "float32" if platform == "cpu" else "bfloat16"
    dtype = read_dtype(dtype)
    rules = _rules_for(mesh, rules)
    used = networks(opened.config, decoder=not listen_only)
    wanted = {
        f"{part}.{name}": jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=_sharding(part, name, p.shape, mesh, rules))
        for part, network in used.items()
        for name, p in with_dtype(part, network.parameters, dtype).items()
    }
    packed = (
        _tables_to_pack(opened, wanted) if listen_only and mesh is None and jax.default_backend() == "cpu" else set()
    )
    for name in packed:
        wanted[name] = jax.ShapeDtypeStruct(wanted[name].shape, jnp.bfloat16, sharding=wanted[name].sharding)
    arrays = {}
    total = sum(p.size * p.dtype.itemsize for p in wanted.values())
    with byte_bar(f"loading {opened.name}", total, show=True) as advance:
        for name, array in opened.place(wanted):
            arrays[name] = jnp.asarray(np.asarray(array).view(np.uint16)) if name in packed else array
            advance(array.nbytes)
    states = {
        part: network.fill({name: arrays[f"{part}.{name}"] for name in network.parameters})
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
    from dsm_jax.convert import native
    from dsm_jax.convert.networks import flatten

    if nnx.merge(model.mimi_def, model.mimi_params).decoder is None:
        raise CheckpointError(f"{model.name} was loaded with listen_only=True; load it without to save it")
    states = {"lm": model.lm_params, "mimi": model.mimi_params}
    arrays = {
        f"{part}.{name}": array
        for part, state in states.items()
        if state is not None
        for name, array in flatten(state).items()
    }
    dtype = arrays["lm.text_linear_DV"].dtype.name if model.lm_params is not None else "float32"
    tokenizer = model.tokenizer.path if model.tokenizer else None
    with native.new_folder(Path(destination), sum(array.nbytes for array in arrays.values())) as folder:
        if tokenizer is not None:
            copy_tokenizer(tokenizer, folder)
        native.write_config(folder, model.config, dtype, model.name, tokenizer and tokenizer.name)
        for _ in native.write_params(folder, arrays.items()):
            pass


def _tables_to_pack(opened: "Source", wanted: Mapping[str, jax.ShapeDtypeStruct]) -> set[str]:
    """The embedding tables that lose nothing by staying in 16 bits, though the model computes in 32."""
    tables = {f"lm.{name}" for name in _TABLES} & wanted.keys()
    return {
        name
        for name in tables
        if wanted[name].dtype == jnp.float32 and opened.stored["lm"][name.removeprefix("lm.")].dtype == jnp.bfloat16
    }


def _rules_for(mesh: jax.sharding.Mesh | None, rules: Mapping[str, str] | None) -> Mapping[str, str]:
    axes = () if mesh is None else mesh.axis_names
    if rules is None:
        return {letter: axis for letter, axis in RULES.items() if axis in axes}
    if wrong := sorted(set(rules.values()) - set(axes)):
        raise CheckpointError(f"the rules name the mesh axes {wrong}; the mesh has {list(axes)}")
    return rules


def _sharding(
    part: str, name: str, shape: tuple[int, ...], mesh: jax.sharding.Mesh | None, rules: Mapping[str, str]
) -> jax.sharding.Sharding | None:
    """Where a parameter goes; None is the default device. Its axes are the letters that its name ends in."""
    if mesh is None:
        return None
    spec: list[str | None] = [None] * len(shape)
    letters = name.rpartition("_")[2]
    for axis, letter in enumerate(letters if part == "lm" else ""):
        over = rules.get(letter)
        if over is not None and over not in spec and shape[axis] % mesh.shape[over] == 0:
            spec[axis] = over
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))


def find(source: str | Path) -> Path:
    """Where a model is: a local path, a model inside the package, or a name on the hub, which is fetched.

    Args:
      source: as for `load`.

    Returns:
      A folder or file that exists.

    Raises:
      CheckpointError: there is nothing of that name, or it cannot be fetched.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    name = str(source)
    if (_ASSETS / name).is_dir() and "/" not in name:
        return _ASSETS / name
    if _HUB_NAME.fullmatch(name) and not name.endswith((".safetensors", ".json")):
        return _fetch(name)
    raise CheckpointError(
        f"{source} is no file or folder, and no name on the hub, which has one slash, as {DEFAULT} has; check the path"
    )


def fetch_file(repository: str, name: str) -> Path:
    """One file of a repository on the hub, fetched on first use.

    Raises:
      CheckpointError: it is not there, or cannot be fetched.
    """
    import huggingface_hub

    return _fetched(
        f"{repository}/{name}", lambda: huggingface_hub.hf_hub_download(repository, name), "give a local file"
    )


def _fetch(name: str) -> Path:
    import huggingface_hub

    patterns: list[str] = list(_PATTERNS)
    return _fetched(name, lambda: huggingface_hub.snapshot_download(name, allow_patterns=patterns), _INSTEAD)


def _fetched(name: str, fetch: Callable[[], str], instead: str) -> Path:
    from huggingface_hub import errors

    try:
        return Path(fetch())
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{name} is on the hub but gated; ask for access there, then run `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"there is no folder {name} here, and no repository of that name on the hub (or it is private: run "
            "`hf auth login`); check the spelling"
        ) from None
    except errors.LocalEntryNotFoundError:
        raise CheckpointError(
            f"{name} is not in the local cache and could not be fetched: there is no network, or HF_HUB_OFFLINE is "
            f"set; {instead}"
        ) from None
    except errors.EntryNotFoundError:
        raise CheckpointError(f"there is no {name} on the hub; check the spelling, or {instead}") from None
    except Exception as error:  # of the network, the disk, or the hub
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{name} could not be fetched ({reason}); try again, or {instead}") from error

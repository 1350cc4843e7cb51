"""Load models, placing their weights on devices, and save them."""

import dataclasses
import functools
import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import SingleDeviceSharding

from dsm_jax.configs import ModelConfig
from dsm_jax.convert import native
from dsm_jax.convert.checkpoint import Checkpoint
from dsm_jax.convert.layouts import open_checkpoint
from dsm_jax.errors import CheckpointError, ConfigError
from dsm_jax.garbage import no_collections
from dsm_jax.hub import DEFAULT, HubOptions, expanded, find, title
from dsm_jax.malloc import return_freed
from dsm_jax.models.csm import CsmLM
from dsm_jax.models.family import abstract_model, family_of
from dsm_jax.models.lm import DelayedStreamsLM
from dsm_jax.models.mimi import Mimi
from dsm_jax.models.parameters import AbstractNetwork, dtype_of, flatten, read_dtype, with_dtype
from dsm_jax.nn import quant
from dsm_jax.nn.quant import PackedBfloat16, QuantizedArray
from dsm_jax.options import check_functions
from dsm_jax.process import check_process
from dsm_jax.progress import Progress, ProgressCallback
from dsm_jax.sharding import Sharding
from dsm_jax.tokenizers import Tokenizer

_log = logging.getLogger("dsm_jax")
_TABLES = ("audio_emb.table_QLW", "text_emb.table_LW")
_Form = tuple[Any, Callable[[Any], Any]]  # the dtype that a weight is read in, and what is made of the array


@dataclasses.dataclass(frozen=True, repr=False)
class Model:
    """A loaded model: the structure of its networks, their parameters, and its tokenizer.

    A codec alone has no language model: `lm_def`, `lm_params`, `tokenizer` and `lm` are None.

    Attributes:
      config: sizes of the networks, delays and sampling.
      lm_def, lm_params: structure and parameters of the language model, as `nnx.split` returns them.
      mimi_def, mimi_params: those of the codec.
      tokenizer: of the model's text.
      name: what was loaded; of a local folder, the folder's name.
    """

    config: ModelConfig
    lm_def: nnx.GraphDef | None
    lm_params: nnx.State | None
    mimi_def: nnx.GraphDef
    mimi_params: nnx.State
    tokenizer: Tokenizer | None
    name: str

    @functools.cached_property
    def lm(self) -> DelayedStreamsLM | CsmLM | None:
        """The language model as a Flax module that holds the parameters; None for a codec."""
        return None if self.lm_def is None else nnx.merge(self.lm_def, self.lm_params)

    @functools.cached_property
    def codec(self) -> Mimi:
        """The codec as a Flax module that holds the parameters."""
        return nnx.merge(self.mimi_def, self.mimi_params)

    @property
    def sample_rate(self) -> int:
        """Hz of the samples that the model takes and makes: 24,000 in the published ones."""
        return self.config.mimi.sample_rate

    @functools.cached_property
    def num_parameters(self) -> int:
        """Numbers in the weights of the language model and the codec; the scales of int8 weights do not count."""
        return sum(leaf.values.size if isinstance(leaf, QuantizedArray) else leaf.size for leaf in self._weights)

    @functools.cached_property
    def dtype(self) -> str:
        """Name of the type of the language model's weights; float32 for a codec."""
        return "float32" if self.lm_params is None else str(dtype_of(flatten(self.lm_params)))

    @functools.cached_property
    def quantize(self) -> str | None:
        """Form of the weights of the language model's layers where it is not that of `dtype`: "int8", or None."""
        return "int8" if any(isinstance(leaf, QuantizedArray) for leaf in self._weights) else None

    @functools.cached_property
    def fingerprint(self) -> str:
        """Digest of the first row of each weight, as it was loaded: it tells a model from a later training of it."""
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(self.mimi_params if self.lm_params is None else self.lm_params):
            digest.update(np.asarray(leaf[(0,) * (leaf.ndim - 1)]).tobytes())  # a whole weight may be on many devices
        return digest.hexdigest()[:16]

    @functools.cached_property
    def devices(self) -> tuple[Any, ...]:
        """The devices that hold the parameters, in order of their number."""
        leaves = jax.tree.leaves(self._weights)
        held = {device for leaf in leaves if isinstance(leaf, jax.Array) for device in leaf.devices()}
        return tuple(sorted(held, key=lambda device: device.id))

    @property
    def _weights(self) -> list[Any]:
        return jax.tree.leaves(
            (self.lm_params, self.mimi_params), is_leaf=lambda node: isinstance(node, QuantizedArray)
        )

    def __repr__(self) -> str:
        kind = family_of(self.config).description
        where = ", ".join(str(device) for device in self.devices)
        size = f"{self.num_parameters / 1e6:.1f} M parameters"
        kept = f"{self.dtype} with {self.quantize} layers" if self.quantize else self.dtype
        return f"Model({self.name!r}: {kind}, {size}, {kept}, on {where}, {self.sample_rate} Hz)"


@no_collections()
def load(
    source: str | Path = DEFAULT,
    *,
    dtype: Any = None,
    quantize: str | None = None,
    device: Any = None,
    sharding: Sharding | None = None,
    stt_only: bool = False,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    progress: ProgressCallback | None = None,
) -> Model:
    """Load a model for use.

    Args:
      source: a local folder, a codec's file, "digits" or "digits-tts" (small models inside the package), or a name on
        the hub ("organisation/name", fetched on first use); in Kyutai's, transformers', Sesame's or this library's own
        layout.
      dtype: dtype of the language model, by name or as jax has it; None is bfloat16 on GPU and TPU, float32 on CPU.
        The codec and the conditioning are always float32.
      quantize: "int8" rounds the weights of the language model's layers, and the activations that they are multiplied
        with, to 8 bits; the layers take a quarter of the memory, and a step on a CPU with AVX-512 about half of the
        time (docs/decisions/0003-int8-products.md has times and measured errors). None keeps them. Such a model cannot
        be saved.
      device: one of `jax.devices()`, or "cpu", "gpu" or "tpu" for the first of its kind; None is JAX's default.
      sharding: the devices to spread the language model over, and how, in place of `device`. The codec is on all of
        them.
      stt_only: leave out what transcription does without: the codec's decoder, and in float32 on CPU half of the
        embedding tables, if they are stored in bfloat16 (rows are widened as they are read, to the same values). Such a
        model cannot be saved or trained.
      revision: branch, tag or commit on the hub; None is its newest.
      cache_dir: folder of fetched models; None is the hub's own.
      token: access token of the hub, for models behind a login; None takes the one of `hf auth login`.
      local_files_only: never ask the hub; the model has to be in `cache_dir`.
      progress: called with the bytes of weights that were loaded so far.

    Returns:
      The model, each parameter placed straight on its devices.

    Raises:
      CheckpointError: nothing of that name, a layout that is not known, or weights that are not those of the config.
      ConfigError: a config that the library does not understand, a device that is not there, another dtype than a
        language model may have, a form of weights that `quantize` does not know or the model does not have, or a
        `progress` that is no function.
      ForkError: the process was forked from one that uses JAX.
    """
    check_process()
    check_functions(progress=progress)
    if quantize not in (None, "int8"):
        raise ConfigError(f"quantize is {quantize!r}; choose 'int8', or None for weights that are not rounded")
    place = _placement(device, sharding)
    hub_options = HubOptions(revision, cache_dir, token, local_files_only)
    path = find(source, hub_options)
    named, opened = title(source, path), open_checkpoint(path)
    for note in opened.notes:
        _log.info("%s: %s", named, note)
    tokenizer = opened.load_tokenizer()
    if dtype is None:
        dtype = "float32" if _platform(place, sharding) == "cpu" else "bfloat16"
    dtype = read_dtype(dtype)
    used = abstract_model(opened.config, decoder=not stt_only, dtype=dtype, sharding=sharding)
    wanted = {
        f"{part}.{name}": jax.ShapeDtypeStruct(
            p.shape, p.dtype, sharding=sharding.named(name if part == "lm" else "", p.shape) if sharding else place
        )
        for part, network in used.items()
        for name, p in with_dtype(part, network.parameters, dtype).items()
    }
    forms: dict[str, _Form] = {}
    if stt_only and sharding is None and _platform(place, sharding) == "cpu":
        pack = functools.partial(_packed, place=place)
        forms |= {name: (jnp.bfloat16, pack) for name in _tables_to_pack(opened, wanted)}
    if quantize is not None:
        forms |= _int8_forms(opened, used.get("lm"))
    for name, (read_as, _) in forms.items():
        wanted[name] = jax.ShapeDtypeStruct(wanted[name].shape, read_as, sharding=wanted[name].sharding)
    arrays: dict[str, Any] = {}
    total, done, start = sum(p.size * p.dtype.itemsize for p in wanted.values()), 0, time.perf_counter()
    for name, array in opened.place(wanted):
        done += array.nbytes
        arrays[name] = forms[name][1](array) if name in forms else array
        if progress is not None:
            progress(Progress(done, total))
    return_freed()  # reading and converting free up to the size of a checkpoint
    _log.info("loaded %s, %.1f MB, from %s in %.1f s", named, total / 1e6, path, time.perf_counter() - start)
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
        name=named,
    )


def _placement(device: Any, sharding: Sharding | None) -> SingleDeviceSharding | None:
    """Return the placement on one device; None for JAX's default, or a sharding in its place.

    Raises:
      ConfigError: there is no such device, or a sharding was given too.
    """
    if device is None:
        return None
    if sharding is not None:
        raise ConfigError("both device and sharding were given; the sharding names its devices, so leave out device")
    if isinstance(device, str):
        try:
            device = jax.devices(device)[0]
        except RuntimeError:
            known = ", ".join(sorted({found.platform for found in jax.devices()} | {"cpu"}))
            raise ConfigError(f"there is no device {device!r} here; expected one of {known}") from None
    if not isinstance(device, jax.Device):
        raise ConfigError(f"device is {device!r}; expected one of jax.devices(), or 'cpu', 'gpu' or 'tpu'")
    return SingleDeviceSharding(device)


def _platform(place: SingleDeviceSharding | None, sharding: Sharding | None) -> str:
    """Return the kind of device that the parameters go to."""
    if sharding is not None:
        return sharding.mesh.devices.flat[0].platform
    return jax.default_backend() if place is None else next(iter(place.device_set)).platform


def save(model: Model, destination: str | Path) -> None:
    """Write a model in the library's own layout, which `load` reads.

    Args:
      model: any model.
      destination: a folder that does not exist yet.

    Raises:
      CheckpointError: the folder exists or cannot be written, the weights are int8, or the file of the model's
        tokenizer is gone.
      ConfigError: the model was loaded with `stt_only`.
      ForkError: the process was forked from one that uses JAX.
    """
    model.codec.require_decoder(model.name)
    lm, mimi = flatten(model.lm_params or nnx.State({})), flatten(model.mimi_params)
    arrays = {f"lm.{name}": array for name, array in lm.items()} | {f"mimi.{name}": a for name, a in mimi.items()}
    if any(not isinstance(array, jax.Array) for array in arrays.values()):
        raise CheckpointError(f"{model.name} has int8 weights; save the model that was loaded without them")
    tokenizer = model.tokenizer.path if model.tokenizer else None
    if tokenizer is not None and not tokenizer.is_file():
        raise CheckpointError(f"{tokenizer}, the tokenizer of {model.name}, is gone since it was loaded; put it back")
    with native.new_folder(expanded(destination), sum(array.nbytes for array in arrays.values())) as folder:
        native.write_about(folder, model.config, dtype_of(lm), model.name, tokenizer)
        for _ in native.write_params(folder, arrays.items()):
            pass


def _packed(table: jax.Array, *, place: SingleDeviceSharding | None) -> PackedBfloat16:
    return PackedBfloat16(jax.device_put(np.asarray(table).view(np.uint16), place))


def _int8_forms(opened: Checkpoint, lm: AbstractNetwork | None) -> dict[str, _Form]:
    """Return the int8 form of the weights of a language model's layers, which are rounded one by one as they come."""
    if lm is None:
        raise ConfigError(f"{opened.name} is a codec, which is always float32; leave out quantize")

    def rounded(array: jax.Array, *, inputs: int) -> QuantizedArray:
        return jax.block_until_ready(quant.quantize_array(array, inputs=inputs))  # or all would be there in float32

    return {
        f"lm.{name}": (jnp.float32, functools.partial(rounded, inputs=inputs))
        for name, inputs in quant.chosen(lm.state).items()
    }


def _tables_to_pack(opened: Checkpoint, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> set[str]:
    """Return the embedding tables that lose nothing by staying in 16 bits, though the model computes in 32."""
    tables = {f"lm.{name}" for name in _TABLES} & wanted.keys()
    return {
        name
        for name in tables
        if wanted[name].dtype == jnp.float32 and opened.stored["lm"][name.removeprefix("lm.")].dtype == jnp.bfloat16
    }

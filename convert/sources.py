"""Opens a checkpoint folder or file of any supported layout, which it recognises by content.

Opening reads headers and configs only, and holds all of them against the model that the config describes; parameters
are read one by one when they are asked for.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsm_jax import strict
from dsm_jax.configs import MimiConfig, ModelConfig
from dsm_jax.convert import files, kyutai, native, pieces, transformers_mimi, transformers_stt
from dsm_jax.convert.networks import ALWAYS_FLOAT32, Network, networks, with_dtype
from dsm_jax.convert.pieces import Claim, Constant, Piece, Tensor
from dsm_jax.convert.transforms import contiguous
from dsm_jax.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class Source:
    """An opened checkpoint.

    Attributes:
      name: of the folder or file.
      layout: "kyutai", "transformers" or "orbax".
      config: what the checkpoint says about itself.
      tokenizer: its file; None for a codec alone.
      networks: the modules to fill, "mimi" and "lm".
      stored: by network and parameter, the shape, and the dtype in which `read` hands it out.
      read: one parameter on the host, by network and name.
      place: maps what is wanted of each parameter ("lm.…" or "mimi.…": shape, dtype, sharding or None for the default
        device) to the arrays on their devices, in turn.
      claims: by network, which tensors make up which parameters; empty for the native layout.
      tensors: by network, the tensors of the files; empty for the native layout.
      notes: what a user should know about how the checkpoint was read.
    """

    name: str
    layout: str
    config: ModelConfig
    tokenizer: Path | None
    networks: dict[str, Network]
    stored: dict[str, dict[str, jax.ShapeDtypeStruct]]
    read: Callable[[str, str], np.ndarray]
    place: Callable[[Mapping[str, jax.ShapeDtypeStruct]], Iterator[tuple[str, jax.Array]]]
    claims: Mapping[str, list[Claim]] = dataclasses.field(default_factory=dict)
    tensors: Mapping[str, dict[str, Tensor]] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


def open_source(path: Path) -> Source:
    """Opens a checkpoint.

    Args:
      path: a folder in one of the layouts, or a file with a Mimi codec.

    Returns:
      The opened checkpoint.

    Raises:
      CheckpointError: the layout is not recognised, or the tensors are not those of the config; all faults at once.
      ConfigError: a config holds what the library does not understand.
    """
    if path.is_file():
        return _open_codec_file(path)
    if (path / native.CONFIG_NAME).is_file():
        return _open_native(path)
    config_path = path / "config.json"
    if not config_path.is_file():
        codecs = sorted(path.glob("*.safetensors"))
        if len(codecs) == 1:
            return _open_codec_file(codecs[0])
        raise CheckpointError(
            f"{path} has no config.json, no {native.CONFIG_NAME} and {len(codecs)} safetensors files; expected a "
            "checkpoint folder of Kyutai, transformers or this library, or one Mimi file"
        )
    values = files.read_json(config_path)
    kind = values.get("model_type")
    if kind == "mimi":
        return _open_transformers_mimi(path, values)
    if kind == "kyutai_speech_to_text":
        return _open_transformers_stt(path, values)
    if "n_q" in values and "text_card" in values:
        return _open_kyutai(path, values)
    raise CheckpointError(
        f"{config_path} is of model_type {kind!r}; expected Kyutai's own format, or transformers' "
        "'kyutai_speech_to_text' or 'mimi'"
    )


def _open_kyutai(path: Path, values: dict[str, Any]) -> Source:
    config, lm, names = kyutai.read_config(values, str(path / "config.json"))
    if names.mimi_config:
        config = dataclasses.replace(config, mimi=_read_mimi_config(path / names.mimi_config))
    lm_tensors, notes = files.tensors_in(path / names.lm), ()
    if "extra_heads_num_heads" not in values:
        lm = kyutai.with_extra_heads(lm, lm_tensors)
        if lm.extra_heads_num_heads:
            notes = (f"config.json does not speak of the {lm.extra_heads_num_heads} pause heads in {names.lm}",)
        config = dataclasses.replace(config, lm=lm)
    unpacked = any(".in_projs.1." in name for name in lm_tensors)
    tables = {"mimi": kyutai.mimi_table(config.mimi), "lm": kyutai.lm_table(lm, unpacked=unpacked)}
    tensors = {"mimi": files.fold_weight_norm(files.tensors_in(path / names.mimi)), "lm": lm_tensors}
    tokenizer = path / names.tokenizer if names.tokenizer else None
    return _published(path, "kyutai", config, tokenizer, tables, tensors, [], notes)


def _open_codec_file(path: Path) -> Source:
    tensors = files.tensors_in(path)
    if "text_linear.weight" in tensors or "lm_head.weight" in tensors:
        raise CheckpointError(
            f"{path} is a language model; give its folder, which also holds config.json and the codec"
        )
    config_path = path.with_name(kyutai.MIMI_CONFIG_NAME)
    mimi = _read_mimi_config(config_path) if config_path.is_file() else MimiConfig()
    tables = {"mimi": kyutai.mimi_table(mimi)}
    config = ModelConfig(model_type="mimi", mimi=mimi)
    return _published(path, "kyutai", config, None, tables, {"mimi": files.fold_weight_norm(tensors)}, [])


def _read_mimi_config(path: Path) -> MimiConfig:
    return strict.from_dict(MimiConfig, files.read_json(path), str(path))


def _open_transformers_mimi(path: Path, values: dict[str, Any]) -> Source:
    mimi = transformers_mimi.read_config(values, str(path / "config.json"))
    tensors, faults = files.sharded_tensors_in(path)
    tables = {"mimi": transformers_mimi.table(mimi)}
    config = ModelConfig(model_type="mimi", mimi=mimi)
    return _published(path, "transformers", config, None, tables, {"mimi": tensors}, faults)


def _open_transformers_stt(path: Path, values: dict[str, Any]) -> Source:
    extractor: dict[str, Any] = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        if not extractor and (path / name).is_file():
            found = files.read_json(path / name)
            found = found.get("feature_extractor", found)
            extractor = found if "audio_delay_seconds" in found else {}
    if not extractor:
        raise CheckpointError(
            f"{path} has no audio_delay_seconds in preprocessor_config.json or processor_config.json; fetch the whole "
            "repository again"
        )
    config, lm = transformers_stt.read_config(values, extractor, str(path / "config.json"))
    tensors, faults = files.sharded_tensors_in(path)
    prefix = transformers_stt.CODEC_PREFIX
    tables = {"mimi": transformers_mimi.table(config.mimi, prefix), "lm": transformers_stt.table(lm)}
    split = {
        "mimi": {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)},
        "lm": {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)},
    }
    return _published(path, "transformers", config, path / "tokenizer.json", tables, split, faults)


def _published(
    path: Path,
    layout: str,
    config: ModelConfig,
    tokenizer: Path | None,
    tables: dict[str, pieces.Table],
    tensors: dict[str, dict[str, Tensor]],
    faults: list[str],
    notes: tuple[str, ...] = (),
) -> Source:
    # Weight norm is folded by now, so what is written from here has none.
    plain = dataclasses.replace(config.mimi.seanet, norm="none")
    config = dataclasses.replace(config, mimi=dataclasses.replace(config.mimi, seanet=plain))
    made, claims, stored = networks(config), {}, {}
    for part, table in tables.items():
        claims[part], found = pieces.plan(table, tensors[part], made[part].parameters)
        faults = faults + found
    if faults:
        raise pieces.fit_error(str(path), faults)
    by_target: dict[tuple[str, str], list[tuple[Piece, pieces.Spellings]]] = {}
    for part in tables:
        for claim in claims[part]:
            if isinstance(claim.item, Piece):
                by_target.setdefault((part, claim.item.target), []).append((claim.item, claim.names))
        stored[part] = with_dtype(part, made[part].parameters, _dtype_of(claims[part], tensors[part]))

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
    return Source(path.name, layout, config, tokenizer, made, stored, read, place, claims, tensors, notes)


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


def _open_native(path: Path) -> Source:
    held = native.open_folder(path)
    made = networks(held.config)
    if faults := native.faults(held, {part: network.parameters for part, network in made.items()}):
        raise pieces.fit_error(str(path), faults)
    stored = {part: {name: held.parameters[f"{part}.{name}"] for name in made[part].parameters} for part in made}
    place = functools.partial(native.restore, held)
    return Source(path.name, "orbax", held.config, held.tokenizer, made, stored, native.reader(held), place)

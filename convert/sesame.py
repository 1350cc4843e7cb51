"""Sesame's own layout of CSM, made of torchtune's layers: `model.safetensors` of sesame/csm-1b.

config.json names the sizes of the decoders by flavor. The codec and the tokenizer come from other repositories; here
they lie in the same folder, under their published names. For a model that no flavor describes, config.json has a key
of this library's own, which Sesame's code does not know.

Source: SesameAILabs/csm@2d72082 models.py and generator.py; torchtune 0.4.0, models/llama3_2.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dsm_jax.configs import CsmConfig, MimiConfig, ModelConfig, TransformerConfig, presets
from dsm_jax.configs.json import from_dict, look_up, to_dict
from dsm_jax.convert import csm_files, files, kyutai, kyutai_config, transformers_csm
from dsm_jax.convert.checkpoint import Checkpoint, LeftOut, from_tensors, outgoing
from dsm_jax.convert.pieces import Outgoing, Table, piece
from dsm_jax.convert.transformers_config import check_whole
from dsm_jax.convert.transforms import STACKED
from dsm_jax.errors import CheckpointError, ConfigError
from dsm_jax.models.family import csm_config

NAME = "sesame"
WEIGHTS = "model.safetensors"
MIMI_NAME = kyutai_config.UNNAMED_MIMI
_KEYS = (*transformers_csm.ORIGINAL_KEYS, "text_vocab_size")
_SETTINGS_KEY = "csm_config"  # this library's own
_PUBLISHED = csm_config(presets.CSM_1B)
_FLAVORS = {"llama-1B": _PUBLISHED.backbone, "llama-100M": _PUBLISHED.depth}
_LAYER = transformers_csm.LayerNames(
    attention="attn",
    out="output",
    half_split=False,
    norms=("sa_norm.scale", "mlp_norm.scale"),
    mlp=("mlp.w1.weight", "mlp.w3.weight", "mlp.w2.weight"),
)


def recognises(path: Path) -> bool:
    """Return whether a path is a folder with flavors in config.json and weights of this layout alone."""
    config = path / "config.json"
    if not config.is_file() or "backbone_flavor" not in files.read_json(config):
        return False
    return not transformers_csm.recognises(path)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a folder.

    Raises:
      CheckpointError: a file is missing, or the tensors do not fit the config; lists all faults.
      ConfigError: a key, a value or a flavor in the config is unknown.
    """
    for name, source in (
        (MIMI_NAME, "the codec, from kyutai/moshiko-pytorch-bf16"),
        (csm_files.TOKENIZER, "of meta-llama/Llama-3.2-1B or sesame/csm-1b"),
    ):
        if not (path / name).is_file():
            raise CheckpointError(f"{path} has no {name}, which this layout takes from elsewhere; add it: {source}")
    csm = read_config(files.read_json(path / "config.json"), str(path / "config.json"))
    codec, codec_tensors = kyutai.read_codec(path / MIMI_NAME)
    config = ModelConfig(model_type="csm", csm=csm, mimi=codec)
    tables = {"mimi": kyutai.mimi_table(codec), "lm": table(csm)}
    tensors = {"mimi": codec_tensors, "lm": files.tensors_in(path / WEIGHTS)}
    return from_tensors(path, NAME, config, tables, tensors, tokenizer=path / csm_files.TOKENIZER)


def write(checkpoint: Checkpoint, folder: Path) -> Iterator[Outgoing | LeftOut]:
    """Write a checkpoint to a folder.

    Args:
      checkpoint: the checkpoint to write.
      folder: an empty folder.

    Yields:
      Each tensor after it is written; this layout leaves nothing out.

    Raises:
      CheckpointError: the checkpoint has no tokenizer.
    """
    config, csm = checkpoint.config, csm_config(checkpoint.config)
    csm_files.copy(checkpoint.tokenizer, folder, checkpoint.name)
    if config.mimi != MimiConfig():
        files.write_json(folder / kyutai_config.MIMI_CONFIG_NAME, kyutai_config.write_mimi_config(config.mimi))
    files.write_json(folder / "config.json", write_config(csm))
    yield from files.write_safetensors(folder / WEIGHTS, outgoing(checkpoint, "lm", table(csm)))
    codec = outgoing(checkpoint, "mimi", kyutai.mimi_table(config.mimi))
    yield from files.write_safetensors(folder / MIMI_NAME, codec)


def table(config: CsmConfig) -> Table:
    """Make the table of both decoders; the head of codebook k + 1 is `audio_head[k]`."""
    return [
        *transformers_csm.audio_table(config, ("audio_embeddings.weight",)),
        piece("audio_head", "depth_linears.weight_QVD", STACKED),
        *transformers_csm.decoder_layers(config.backbone, "backbone", "backbone", _LAYER),
        piece("backbone.norm.scale", "backbone_norm.alpha_D"),
        piece("codebook0_head.weight", "first_linear.weight_VD"),
        *transformers_csm.decoder_layers(config.depth, "decoder", "depth", _LAYER),
        piece("decoder.norm.scale", "depth_norm.alpha_D"),
        piece("projection.weight", "projection.weight_DE"),
        piece("text_embeddings.weight", "text_emb.table_LW"),
    ]


def read_config(values: Mapping[str, Any], where: str) -> CsmConfig:
    """Parse a config.json; that of the published repository has the keys of transformers' layout besides.

    Args:
      values: the decoded JSON.
      where: name of the file, for the error.

    Returns:
      The config of the language model.

    Raises:
      ConfigError: a key, a value or a flavor is unknown.
    """
    if missing := [key for key in _KEYS if key not in values]:
        raise ConfigError(f"{where}: the keys {missing} are missing; fetch the published config.json again")
    check_whole({key: values[key] for key in _KEYS if not key.endswith("_flavor")}, where)
    own = {*_KEYS, _SETTINGS_KEY}
    if _SETTINGS_KEY in values:
        csm = from_dict(CsmConfig, values[_SETTINGS_KEY], f"{where}: {_SETTINGS_KEY}")
    else:
        depth = dataclasses.replace(_PUBLISHED.depth, context=values["audio_num_codebooks"] + 1)
        csm = CsmConfig(
            backbone=_decoder(values["backbone_flavor"], _PUBLISHED.backbone, where),
            depth=_decoder(values["decoder_flavor"], depth, where),
            n_q=values["audio_num_codebooks"],
            card=values["audio_vocab_size"],
            text_card=values["text_vocab_size"],
        )
    found = {key: values[key] for key in _KEYS if not key.endswith("_flavor")}
    if found != (sizes := _sizes(csm)):
        raise ConfigError(f"{where}: {found}, but {_SETTINGS_KEY} has {sizes}; use the file that came with the weights")
    if values.get("model_type") == "csm":  # of both layouts
        _check_transformers_keys(values, csm, where)
    elif unknown := sorted(values.keys() - own):
        raise ConfigError(f"{where}: unknown keys {unknown}; remove them, or use one of {sorted(own)}")
    return csm


def _check_transformers_keys(values: Mapping[str, Any], csm: CsmConfig, where: str) -> None:
    other = transformers_csm.read_config(values, csm.end_id, where)[1]
    if different := [f.name for f in dataclasses.fields(csm) if getattr(csm, f.name) != getattr(other, f.name)]:
        raise ConfigError(
            f"{where}: {different} of transformers' keys and of the flavors differ; use the config.json that was "
            "published with the weights"
        )


def _decoder(flavor: Any, role: TransformerConfig, where: str) -> TransformerConfig:
    """Return the sizes of a flavor with the context and the rotations of a decoder's role."""
    sizes = look_up(_FLAVORS, flavor, f"{where}: the flavor")
    # torchtune scales both roles by factors 1 and 4 of an old context of 8192; transformers' files write the
    # same with other factors for each role, which are those of `role`.
    return dataclasses.replace(sizes, context=role.context, rope_scaling=role.rope_scaling)


def _sizes(csm: CsmConfig) -> dict[str, int]:
    return {"audio_num_codebooks": csm.n_q, "audio_vocab_size": csm.card, "text_vocab_size": csm.text_card}


def write_config(csm: CsmConfig) -> dict[str, Any]:
    """Return the content of a config.json: Sesame's five keys, and a sixth where the flavors do not say everything."""
    values = _sizes(csm) | {"backbone_flavor": "llama-1B", "decoder_flavor": "llama-100M"}
    try:
        if read_config(values, "this model") == csm:
            return values
    except ConfigError:  # as for the ids of a text table that is smaller than Llama's
        pass
    return _sizes(csm) | {"backbone_flavor": "other", "decoder_flavor": "other", _SETTINGS_KEY: to_dict(csm)}

"""transformers' layout of Sesame's CSM, with the codec and the processor in the same folder.

One table embeds the codes for both decoders; a file has it under either of two names, or under both. The published
repository holds Sesame's own layout too, in `model.safetensors`, so that its index has a name of its own, which
config.json gives.

Source: transformers 5.24, models/csm; sesame/csm-1b@c92a71e1, written by 4.52.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dsm_jax.configs import CsmConfig, ModelConfig, RopeScaling, TransformerConfig, llama
from dsm_jax.configs.json import from_dict
from dsm_jax.convert import csm_files, files
from dsm_jax.convert import transformers_mimi as mimi
from dsm_jax.convert.checkpoint import Checkpoint, LeftOut, from_tensors, outgoing
from dsm_jax.convert.pieces import Outgoing, Piece, Table, piece
from dsm_jax.convert.transformers_config import (
    check_expressible,
    check_rest,
    check_whole,
    model_type_of,
    read_number,
    read_object,
)
from dsm_jax.convert.transforms import STACKED
from dsm_jax.errors import CheckpointError, ConfigError
from dsm_jax.models.family import csm_config
from dsm_jax.models.parameters import dtype_of

NAME = mimi.NAME
CODEC_PREFIX = "codec_model."
INDEX_KEY = "transformers_weights"
ORIGINAL_KEYS = ("audio_num_codebooks", "audio_vocab_size", "backbone_flavor", "decoder_flavor")
# Names of the table of codes. The first is the one that is written: transformers 4.52 does not load a file without it.
SHARED = ("depth_decoder.model.embed_tokens.weight", "backbone_model.embed_tokens.embed_audio_tokens.weight")
_FIXED_DECODER: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rms_norm_eps": 1e-5,
}
_FIXED_CSM = {"model_type": "csm", "tie_codebooks_embeddings": True, "codebook_eos_token_id": 0}
_FIXED_DEPTH = {"model_type": "csm_depth_decoder_model", "tie_word_embeddings": False}
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
_CSM_KEYS = (
    *("num_codebooks", "vocab_size", "text_vocab_size", "bos_token_id", "audio_token_id", "audio_eos_token_id"),
    *("depth_decoder_config", "codec_config"),
)
# Keys without effect: padding is masked, and the last three are names for people or of files.
_WITHOUT_EFFECT = ("pad_token_id", "codebook_pad_token_id", "backbone_flavor", "decoder_flavor", INDEX_KEY)
_SCALING = {  # Llama 3's scaling in transformers' spelling
    "factor": "factor",
    "low_freq_factor": "low_frequency",
    "high_freq_factor": "high_frequency",
    "original_max_position_embeddings": "original_context",
}


def recognises(path: Path) -> bool:
    """Return whether a path is a folder of CSM whose weights are not in Sesame's own layout alone."""
    return model_type_of(path) == "csm" and not holds_original_only(path)


def holds_original_only(path: Path) -> bool:
    """Return whether the weights of a folder have the names of Sesame's own layout: config.json can be that of both."""
    index = path / _index_name(files.read_json(path / "config.json"))
    weights = path / "model.safetensors"
    return not index.is_file() and weights.is_file() and "text_embeddings.weight" in files.tensors_in(weights)


def _index_name(values: Mapping[str, Any]) -> str:
    return str(values.get(INDEX_KEY) or files.INDEX_NAME)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a folder.

    Raises:
      CheckpointError: a file is missing, or the tensors do not fit the config; lists all faults.
      ConfigError: a key or a value in the config is unknown.
    """
    values = files.read_json(path / "config.json")
    config, csm = read_config(values, csm_files.end_id(path), str(path / "config.json"))
    if INDEX_KEY in values and not (path / _index_name(values)).is_file():
        raise CheckpointError(f"{path / _index_name(values)} is missing; fetch the whole repository again")
    tensors, faults = files.sharded_tensors_in(path, _index_name(values))
    tables = {"mimi": mimi.table(config.mimi, CODEC_PREFIX), "lm": table(csm)}
    split = {
        "mimi": {name: tensor for name, tensor in tensors.items() if name.startswith(CODEC_PREFIX)},
        "lm": {name: tensor for name, tensor in tensors.items() if not name.startswith(CODEC_PREFIX)},
    }
    tokenizer = path / csm_files.TOKENIZER
    notes = csm_files.sampling_notes(path)
    return from_tensors(path, NAME, config, tables, split, tokenizer=tokenizer, faults=faults, notes=notes)


def write(checkpoint: Checkpoint, folder: Path) -> Iterator[Outgoing | LeftOut]:
    """Write a checkpoint to a folder.

    Args:
      checkpoint: the checkpoint to write.
      folder: an empty folder.

    Yields:
      Each tensor after it is written; this layout leaves nothing out.

    Raises:
      CheckpointError: the checkpoint has no tokenizer with the control tokens of the model.
      ConfigError: transformers cannot express the config.
    """
    config, csm = checkpoint.config, csm_config(checkpoint.config)
    values = write_config(config, csm, dtype_of(checkpoint.stored["lm"]))
    csm_files.write(checkpoint.tokenizer, csm, config.mimi, folder, checkpoint.name)
    files.write_json(folder / "config.json", values)
    tensors = outgoing(checkpoint, "lm", table(csm))
    tensors += outgoing(checkpoint, "mimi", mimi.table(config.mimi, CODEC_PREFIX))
    yield from files.write_sharded(folder, tensors)


@dataclasses.dataclass(frozen=True)
class LayerNames:
    """Names of a decoder layer's tensors in a layout.

    Attributes:
      attention: path of self-attention.
      out: first part of the name of its output projection.
      half_split: whether rotations are by halves of a head.
      norms: names of the two norms.
      mlp: names of the gate, the projection that the gate multiplies, and the output of the feed-forward.
    """

    attention: str
    out: str
    half_split: bool
    norms: tuple[str, str]
    mlp: tuple[str, str, str]


_LAYER = LayerNames(
    attention="self_attn",
    out="o",
    half_split=True,
    norms=("input_layernorm.weight", "post_attention_layernorm.weight"),
    mlp=("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"),
)


def decoder_layers(config: TransformerConfig, src: str, dst: str, names: LayerNames) -> Iterator[Piece]:
    """Make the pieces of a decoder's layers.

    Args:
      config: config of the decoder.
      src: path of the decoder in the file.
      dst: path of the decoder in this library.
      names: names in the file.

    Yields:
      The pieces.
    """
    gate, up, down = names.mlp
    for i in range(config.num_layers):
        old, new = f"{src}.layers.{i}", f"{dst}.layers.{i}"
        yield from mimi.attention(
            config,
            f"{old}.{names.attention}",
            f"{new}.self_attn",
            "_proj.weight",
            out=names.out,
            half_split=names.half_split,
        )
        for part, name in enumerate((gate, up)):
            yield piece(f"{old}.{name}", f"{new}.feedforward.linear_in.weight_PFD", at=(part,))
        yield piece(f"{old}.{down}", f"{new}.feedforward.linear_out.weight_DF")
        for norm, name in zip(("norm1", "norm2"), names.norms, strict=True):
            yield piece(f"{old}.{name}", f"{new}.{norm}.alpha_D")


def audio_table(config: CsmConfig, spellings: tuple[str, ...]) -> Iterator[Piece]:
    """Make the pieces of the table of all codes, one codebook after another, under any of its names in a file."""
    for q in range(config.n_q):
        rows = (q * config.card, (q + 1) * config.card)
        yield piece(spellings, "audio_emb.table_QLW", rows=rows, at=(q,), tied=True)


def table(config: CsmConfig) -> Table:
    """Make the table of both decoders."""
    return [
        piece("lm_head.weight", "first_linear.weight_VD"),
        piece("embed_text_tokens.weight", "text_emb.table_LW"),
        *decoder_layers(config.backbone, "backbone_model", "backbone", _LAYER),
        piece("backbone_model.norm.weight", "backbone_norm.alpha_D"),
        *audio_table(config, SHARED),
        *decoder_layers(config.depth, "depth_decoder.model", "depth", _LAYER),
        piece("depth_decoder.model.norm.weight", "depth_norm.alpha_D"),
        piece("depth_decoder.model.inputs_embeds_projector.weight", "projection.weight_DE"),
        piece("depth_decoder.codebooks_head.weight", "depth_linears.weight_QVD", STACKED),
    ]


def read_config(values: Mapping[str, Any], end_id: int, where: str) -> tuple[ModelConfig, CsmConfig]:
    """Parse the config of a checkpoint, in the spelling of transformers 4.52 or 5.

    Args:
      values: the decoded config.json.
      end_id: token that ends a text, which only the tokenizer's settings name.
      where: name of the file, for the error.

    Returns:
      The config of the model, and that of its language model.

    Raises:
      ConfigError: a key or a value is unknown.
    """
    rest = dict(values)
    if missing := [key for key in (*_SIZES, *_CSM_KEYS) if key not in rest]:
        raise ConfigError(f"{where}: the keys {missing} are missing; fetch the published config.json again")
    v = {key: rest.pop(key) for key in _CSM_KEYS}
    check_whole({key: v[key] for key in ("num_codebooks", "vocab_size", "text_vocab_size")}, where)
    check_whole({key: v[key] for key in ("bos_token_id", "audio_token_id", "audio_eos_token_id")}, where, least=0)
    both = {"num_codebooks": v["num_codebooks"], "vocab_size": v["vocab_size"]}
    original = {"audio_num_codebooks": v["num_codebooks"], "audio_vocab_size": v["vocab_size"]}
    depth_values = read_object(v["depth_decoder_config"], f"{where}: depth_decoder_config")
    depth_fixed = _FIXED_DEPTH | both | {"backbone_hidden_size": rest["hidden_size"]}
    csm = CsmConfig(
        backbone=_read_decoder(rest, _FIXED_CSM | original, where),
        depth=_read_decoder(depth_values, depth_fixed, f"{where}: depth_decoder_config"),
        n_q=v["num_codebooks"],
        card=v["vocab_size"],
        text_card=v["text_vocab_size"],
        begin_id=v["bos_token_id"],
        end_id=end_id,
        audio_id=v["audio_token_id"],
        audio_end_id=v["audio_eos_token_id"],
    )
    where = f"{where}: codec_config"
    codec = mimi.read_config(read_object(v["codec_config"], where), where)
    return ModelConfig(model_type="csm", csm=csm, mimi=codec), csm


def _read_decoder(values: dict[str, Any], fixed: Mapping[str, Any], where: str) -> TransformerConfig:
    """Parse the config of one decoder, whose other keys have these values or no effect."""
    rest = {key: value for key, value in values.items() if key not in _WITHOUT_EFFECT}
    theta, scaling = _pop_rope(rest, where)
    if missing := [key for key in _SIZES if key not in rest]:
        raise ConfigError(f"{where}: the keys {missing} are missing; fetch the published config.json again")
    kv_heads = rest.pop("num_key_value_heads", None) or rest["num_attention_heads"]
    check_whole({key: rest[key] for key in _SIZES} | {"num_key_value_heads": kv_heads}, where)
    width, inner, layers, heads, context = (rest.pop(key) for key in _SIZES)
    check_rest(rest, _FIXED_DECODER | dict(fixed) | {"head_dim": width // heads}, where)
    return llama(
        width=width,
        inner=inner,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        context=context,
        scaling=scaling,
        max_period=theta,
    )


def _pop_rope(rest: dict[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """Remove the settings of the rotary embeddings from a config: one object since transformers 5, two keys before."""
    rope, old = rest.pop("rope_parameters", None), rest.pop("rope_scaling", None)
    theta = rest.pop("rope_theta", 500_000.0)
    settings = read_object(rope or old or {}, f"{where}: rope_parameters")
    theta = settings.pop("rope_theta", theta)
    kind = settings.pop("rope_type", "default")
    expected = {"default": set(), "llama3": set(_SCALING)}.get(str(kind))
    if (rope and old) or theta is None or settings.keys() != expected:
        raise ConfigError(
            f"{where}: rope_theta is {theta}, rope_parameters {rope}, rope_scaling {old}; expected a theta, and "
            f"rope_type 'default' or 'llama3' with {', '.join(_SCALING)}"
        )
    values = {ours: settings[theirs] for theirs, ours in _SCALING.items() if settings}
    scaling = from_dict(RopeScaling, values, f"{where}: rope_parameters") if values else None
    return read_number(theta, f"{where}: rope_theta"), scaling


def write_config(config: ModelConfig, csm: CsmConfig, dtype: str) -> dict[str, Any]:
    """Return the content of a config.json, as transformers 5 writes it.

    Args:
      config: config of the model.
      csm: config of its language model.
      dtype: dtype of the weights, in transformers' spelling.

    Returns:
      JSON values.

    Raises:
      ConfigError: transformers cannot express the config.
    """
    both = {"num_codebooks": csm.n_q, "vocab_size": csm.card}
    depth = {"model_type": _FIXED_DEPTH["model_type"], "backbone_hidden_size": csm.backbone.d_model}
    values = {
        "architectures": ["CsmForConditionalGeneration"],
        "dtype": dtype,
        **_FIXED_CSM,
        **_write_decoder(csm.backbone),
        **both,
        "text_vocab_size": csm.text_card,
        "bos_token_id": csm.begin_id,
        "eos_token_id": None,  # as published: with one, transformers pads rows that have ended with codes of no codec
        "pad_token_id": csm.audio_id,
        "codebook_pad_token_id": csm.card - 1,
        "audio_token_id": csm.audio_id,
        "audio_eos_token_id": csm.audio_end_id,
        "tie_word_embeddings": True,
        "depth_decoder_config": depth | _write_decoder(csm.depth) | both,
        "codec_config": mimi.write_config(config.mimi),
    }
    expressed = read_config(values, csm.end_id, "this model")[1]
    check_expressible(_computed(expressed), _computed(csm))
    return values


def _write_decoder(config: TransformerConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    rope = {"rope_type": "default" if scaling is None else "llama3", "rope_theta": config.max_period}
    if scaling is not None:
        rope |= {theirs: getattr(scaling, ours) for theirs, ours in _SCALING.items()}
    return _FIXED_DECODER | {
        "hidden_size": config.d_model,
        "intermediate_size": config.inner_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context,
        "rope_parameters": rope,
    }


def _computed(csm: CsmConfig) -> dict[str, Any]:
    """Return the settings of a config that change the codes, by dotted name."""
    values = {key: value for key, value in dataclasses.asdict(csm).items() if not isinstance(value, dict)}
    for name, decoder in (("backbone", csm.backbone), ("depth", csm.depth)):
        settings = dataclasses.asdict(decoder) | {"gated_width": decoder.inner_width, "dim_feedforward": None}
        values |= {f"{name}.{key}": value for key, value in settings.items()}
    return values

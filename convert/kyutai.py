"""Kyutai's own layout, shared by the PyTorch package, the Rust server and the published repositories.

A folder holds config.json, the weights of the language model and of the codec, and the tokenizer; or a codec alone.
Models that hear are read under the names of the MLX package too, in which norms have a `weight` and the tables of codes
are `audio_embs`. In tables, `src` is the path of a module in the file and `dst` its path in this library.
Source: kyutai-labs/moshi@e6a55d2 moshi/models/{lm,compression}.py, moshi_mlx/models/lm.py; tests/published lists every
tensor.
"""

import dataclasses
import itertools
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from dsm_jax.configs import (
    LMConfig,
    LutConditioner,
    MimiConfig,
    ModelConfig,
    SeanetConfig,
    TransformerConfig,
    gating_dim,
)
from dsm_jax.configs.json import from_dict
from dsm_jax.convert import adapters, files, kyutai_config, tokenizer
from dsm_jax.convert.checkpoint import Checkpoint, LeftOut, from_tensors, outgoing
from dsm_jax.convert.kyutai_config import LM_NAME, MIMI_CONFIG_NAME, MIMI_NAME
from dsm_jax.convert.pieces import Constant, Outgoing, Piece, Spellings, Table, Tensor, piece
from dsm_jax.convert.transforms import (
    ALPHA,
    CODEBOOK,
    CONV,
    POINTWISE,
    Transform,
    conv_transpose,
    depthwise,
    heads,
    linear,
)
from dsm_jax.errors import CheckpointError

NAME = "kyutai"
_SLICED = re.compile(r"depformer\.(slices\.)?\d+\.")


def recognises(path: Path) -> bool:
    """Return whether a path is a codec's file, a folder with only such a file, or one with Kyutai's config.json."""
    if path.is_file():
        return True
    if not (path / "config.json").is_file():
        return len(list(path.glob("*.safetensors"))) == 1
    return not {"n_q", "text_card"}.isdisjoint(files.read_json(path / "config.json"))


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a folder or a codec's file.

    Raises:
      CheckpointError: the tensors do not fit the config; lists all faults.
      ConfigError: a key or a value in a config is unknown.
    """
    if path.is_file():
        return _open_codec(path)
    if not (path / "config.json").is_file():
        return _open_codec(next(path.glob("*.safetensors")))
    values = files.read_json(path / "config.json")
    config, lm, names = kyutai_config.read_config(values, str(path / "config.json"))
    if names.mimi_config:
        config = dataclasses.replace(config, mimi=_read_mimi_config(path / names.mimi_config))
    others = sorted({p.name for p in path.glob("*.safetensors")} - {names.mimi, names.adapters.lora_name})
    if len(others) == 1 and not (path / names.lm).is_file():
        raise CheckpointError(f"{path} has no {names.lm}, but {others[0]}; name its weights in config.json: moshi_name")
    lm_tensors, notes, faults = files.tensors_in(path / names.lm), (), []
    if names.adapters.lora_name:
        found = files.tensors_in(path / names.adapters.lora_name)
        sets = max(lm.depformer_schedule, default=0) + 1
        lm_tensors, faults = adapters.merge(lm_tensors, found, names.adapters.lora_scaling, sets)
    if "extra_heads_num_heads" not in values:
        lm = kyutai_config.with_extra_heads(lm, lm_tensors)
        if lm.extra_heads_num_heads:
            notes = (f"config.json does not mention the {lm.extra_heads_num_heads} pause heads in {names.lm}",)
        config = dataclasses.replace(config, lm=lm)
    if any(_SLICED.match(name) for name in lm_tensors):
        raise CheckpointError(
            f"{path / names.lm} has a depformer for each codebook, as the packages for MLX and Rust have; use the "
            "repository for PyTorch"
        )
    unpacked = any(name.startswith("depformer.") and ".in_projs." in name for name in lm_tensors)
    tables = {"mimi": mimi_table(config.mimi), "lm": lm_table(lm, unpacked=unpacked)}
    tensors = {"mimi": files.fold_weight_norm(files.tensors_in(path / names.mimi)), "lm": lm_tensors}
    pieces_file = path / names.tokenizer if names.tokenizer else None
    return from_tensors(path, NAME, config, tables, tensors, tokenizer=pieces_file, notes=notes, faults=faults)


def read_codec(path: Path) -> tuple[MimiConfig, dict[str, Tensor]]:
    """Read the config beside a codec's file, else the published one, and list the tensors, without weight norm.

    Raises:
      CheckpointError: the file is missing or unreadable, or a language model's.
      ConfigError: a key or a value in the config is unknown.
    """
    tensors = files.tensors_in(path)
    if not tensors.keys().isdisjoint(("text_linear.weight", "lm_head.weight", "text_embeddings.weight")):
        raise CheckpointError(
            f"{path} is a language model; give its folder, which also holds config.json and the codec"
        )
    if not any(name.startswith("encoder.model.") for name in tensors):
        remedy = "the folder of the model, which also holds config.json"
        if "speaker_wavs" in tensors:
            remedy = "this file as the voice, and as the model one that speaks"
        elif any(".lora_" in name for name in tensors):
            remedy = (
                "the model that these adapters were trained for, after merging them into it (peft's merge_and_unload)"
            )
        raise CheckpointError(
            f"{path} is no Mimi file of Kyutai's: its first tensor is {min(tensors, default=None)}; give {remedy}"
        )
    config_path = path.with_name(MIMI_CONFIG_NAME)
    mimi = _read_mimi_config(config_path) if config_path.is_file() else MimiConfig()
    return mimi, files.fold_weight_norm(tensors)


def _open_codec(path: Path) -> Checkpoint:
    mimi, tensors = read_codec(path)
    config = ModelConfig(model_type="mimi", mimi=mimi)
    return from_tensors(path, NAME, config, {"mimi": mimi_table(mimi)}, {"mimi": tensors})


def _read_mimi_config(path: Path) -> MimiConfig:
    return from_dict(MimiConfig, files.read_json(path), str(path))


def write(checkpoint: Checkpoint, folder: Path) -> Iterator[Outgoing | LeftOut]:
    """Write a checkpoint to a folder.

    Args:
      checkpoint: the checkpoint to write.
      folder: an empty folder.

    Yields:
      Each tensor after it is written; this layout leaves nothing out.
    """
    config, lm = checkpoint.config, checkpoint.config.lm
    mimi_config = None if config.mimi == MimiConfig() else MIMI_CONFIG_NAME
    if mimi_config:
        files.write_json(folder / mimi_config, kyutai_config.write_mimi_config(config.mimi))
    if lm is not None:
        names = kyutai_config.Files(LM_NAME, MIMI_NAME, mimi_config, _write_tokenizer(checkpoint, folder))
        files.write_json(folder / "config.json", kyutai_config.write_config(config, lm, names))
        if config.tts is not None:
            files.copy_voices(checkpoint.tokenizer, folder)
        yield from files.write_safetensors(folder / LM_NAME, outgoing(checkpoint, "lm", lm_table(lm)))
    yield from files.write_safetensors(folder / MIMI_NAME, outgoing(checkpoint, "mimi", mimi_table(config.mimi)))


def _write_tokenizer(checkpoint: Checkpoint, folder: Path) -> str | None:
    """Write the tokenizer as a sentencepiece model; return the file's name."""
    source = checkpoint.tokenizer
    if source is None:
        return None
    if source.suffix == ".json":
        tokenizer.to_sentencepiece(source, folder / "tokenizer.model")
        return "tokenizer.model"
    shutil.copyfile(source, folder / source.name)
    return source.name


def seanet_layers(config: SeanetConfig, side: str) -> Iterator[tuple[str, str, int | None]]:
    """List the paths of SEANet's convolutions.

    Args:
      config: config of SEANet.
      side: "encoder" or "decoder".

    Yields:
      The path in PyTorch's `Sequential`, which counts activations too; the path in this library; the stride of a
      transposed convolution, None for other convolutions.
    """
    dst = f"{side}.seanet.layers"
    yield "0", f"{dst}.0", None
    src, layer = 1, 1
    for ratio in reversed(config.ratios) if side == "encoder" else config.ratios:
        if side == "decoder":
            yield f"{src + 1}", f"{dst}.{layer}", ratio
            src, layer = src + 2, layer + 1
        for _ in range(config.n_residual_layers):
            yield f"{src}.block.1", f"{dst}.{layer}.wide", None
            yield f"{src}.block.3", f"{dst}.{layer}.narrow", None
            src, layer = src + 1, layer + 1
        if side == "encoder":
            yield f"{src + 1}", f"{dst}.{layer}", None
            src, layer = src + 2, layer + 1
    yield f"{src + 1}", f"{dst}.{layer}", None


def convolution(weight: str, bias: str, dst: str, stride: int | None) -> list[Piece]:
    """Make the two pieces of a convolution, or with a stride of a transposed convolution."""
    kernel = piece(weight, f"{dst}.kernel_RCO", CONV)
    if stride is not None:
        kernel = piece(weight, f"{dst}.kernel_RCU", conv_transpose(stride))
    return [kernel, piece(bias, f"{dst}.bias_O")]


def mimi_table(config: MimiConfig) -> Table:
    """Make the table of a Mimi file."""
    table: list[Piece | Constant] = []
    for side in ("encoder", "decoder"):
        for src, dst, stride in seanet_layers(config.seanet, side):
            kind = "conv" if stride is None else "convtr"
            stem = f"{side}.model.{src}.{kind}.{kind}"
            table += convolution(f"{stem}.weight", f"{stem}.bias", dst, stride)
        table += transformer_pieces(config.transformer, f"{side}_transformer.transformer", f"{side}.transformer")
    table.append(piece("downsample.conv.conv.conv.weight", "encoder.downsample.kernel_RCO", CONV))
    upsample = depthwise(config.resample_stride)
    table.append(piece("upsample.convtr.convtr.convtr.weight", "decoder.upsample.kernel_RJC", upsample))
    semantic = config.quantizer.n_q_semantic
    for src, dst, books in (
        ("rvq_first", "semantic", semantic),
        ("rvq_rest", "acoustic", config.quantizer.n_q - semantic),
    ):
        table.append(piece(f"quantizer.{src}.input_proj.weight", f"quantizer.{dst}.input_proj.weight_CD", POINTWISE))
        table.append(piece(f"quantizer.{src}.output_proj.weight", f"quantizer.{dst}.output_proj.weight_DC", POINTWISE))
        for q in range(books):
            book = f"quantizer.{src}.vq.layers.{q}._codebook"
            table += codebook(
                tuple(f"{book}.{name}" for name in ("embedding_sum", "embed_sum", "embed_avg")),
                tuple(f"{book}.{name}" for name in ("cluster_usage", "cluster_size")),
                tuple(f"{book}.{name}" for name in ("_initialized", "inited")),
                f"quantizer.{dst}.codebooks.{q}.embedding_LC",
                config.quantizer.bins,
            )
    return table


def codebook(sums: Spellings, usage: Spellings, initialized: Spellings, dst: str, bins: int) -> list[Piece | Constant]:
    """Make the pieces of a codebook: its entries, stored as sums and counts, and a constant flag."""
    return [
        Piece((sums, usage), dst, CODEBOOK),
        Constant(initialized, (1,), 1.0, "a flag of training: whether the entries have been initialised"),
    ]


def norm_pieces(norm: str, src: str, dst: str) -> list[Piece]:
    """Make the pieces of the norm of that name."""
    if norm.startswith("rms_norm"):
        return [piece((f"{src}.alpha", f"{src}.weight"), f"{dst}.alpha_D", ALPHA)]
    return [piece(f"{src}.weight", f"{dst}.scale_D"), piece(f"{src}.bias", f"{dst}.bias_D")]


def _attention_spellings(src: str) -> tuple[Spellings, Spellings]:
    """List the spellings of the packed input projection and of the output projection."""
    packed = tuple(f"{src}.{name}" for name in ("in_proj_weight", "in_projs.0.weight", "in_proj.weight"))
    return packed, tuple(f"{src}.{name}" for name in ("out_proj.weight", "out_projs.0.weight"))


def attention_pieces(config: TransformerConfig, src: str, dst: str) -> list[Piece]:
    """Make the pieces of self-attention."""
    width, kv_heads, groups = config.d_model, config.num_kv_heads, config.kv_repeat
    packed, out = _attention_spellings(src)
    target = f"{dst}.in_proj.weight_PKHD"
    pieces = [piece(out, f"{dst}.out_proj.weight_DKGH", linear((width,), (kv_heads, groups, config.head_dim)))]
    if groups == 1:
        return [piece(packed, target, linear((3, kv_heads, config.head_dim), (width,))), *pieces]
    keys = kv_heads * config.head_dim
    ends = itertools.accumulate((width, keys, keys))
    for first, count, end, rows in zip((0, groups, groups + 1), (groups, 1, 1), ends, (width, keys, keys), strict=True):
        at = (slice(first, first + count),)
        transform = heads(kv_heads, count, half_split=False)
        pieces.append(piece(packed, target, transform, rows=(end - rows, end), at=at))
    return pieces


def cross_attention_pieces(config: TransformerConfig, src: str, dst: str) -> list[Piece]:
    """Make the pieces of cross-attention, in which this library splits the packed projection."""
    width, shape = config.d_model, (config.num_heads, config.head_dim)
    packed, out = _attention_spellings(src)
    return [
        piece(packed, f"{dst}.q_proj.weight_KHD", linear(shape, (width,)), rows=(0, width)),
        piece(packed, f"{dst}.kv_proj.weight_PKHD", linear((2, *shape), (width,)), rows=(width, 3 * width)),
        piece(out, f"{dst}.out_proj.weight_DKH", linear((width,), shape)),
    ]


def transformer_pieces(config: TransformerConfig, src: str, dst: str) -> list[Piece]:
    """Make the pieces of a stack of layers."""
    pieces = []
    for i in range(config.num_layers):
        old, new = f"{src}.layers.{i}", f"{dst}.layers.{i}"
        pieces += norm_pieces(config.norm, f"{old}.norm1", f"{new}.norm1")
        pieces += attention_pieces(config, f"{old}.self_attn", f"{new}.self_attn")
        if config.cross_attention:
            pieces += norm_pieces("layer_norm", f"{old}.norm_cross", f"{new}.norm_cross")
            pieces += cross_attention_pieces(config, f"{old}.cross_attention", f"{new}.cross_attention")
        pieces += norm_pieces(config.norm, f"{old}.norm2", f"{new}.norm2")
        if config.gating == "none":
            pieces.append(piece(f"{old}.linear1.weight", f"{new}.feedforward.linear1.weight_FD"))
            pieces.append(piece(f"{old}.linear2.weight", f"{new}.feedforward.linear2.weight_DF"))
        else:
            pieces += gating_pieces(config.d_model, config.dim_feedforward, f"{old}.gating", f"{new}.feedforward")
        if config.layer_scale is not None:
            pieces += [piece(f"{old}.layer_scale_{k}.scale", f"{new}.layer_scale_{k}_D") for k in (1, 2)]
    return pieces


def gate_up(width: int, feedforward: int) -> Transform:
    """Make the transform of a gated feed-forward's packed first matrix, for the config's `dim_feedforward`."""
    return linear((2, gating_dim(width, feedforward)), (width,))


def gating_pieces(width: int, feedforward: int, src: str, dst: str) -> list[Piece]:
    """Make the pieces of a gated feed-forward, for the config's `dim_feedforward`."""
    return [
        piece(f"{src}.linear_in.weight", f"{dst}.linear_in.weight_PFD", gate_up(width, feedforward)),
        piece(f"{src}.linear_out.weight", f"{dst}.linear_out.weight_DF"),
    ]


def embedding_pieces(src: str, dst: str, *, rank: bool, demux: bool) -> list[Piece]:
    """Make the pieces of a token embedding."""
    pieces = [piece(f"{src}.weight", f"{dst}.table_LW")]
    if rank:
        pieces.append(piece(f"{src}.low_rank.weight", f"{dst}.low_rank.weight_DW"))
    if demux:
        pieces.append(piece(f"{src}.out1.weight", f"{dst}.first.weight_DW"))
        pieces.append(piece(f"{src}.out2.weight", f"{dst}.second.weight_DW"))
    return pieces


def lm_table(config: LMConfig, *, unpacked: bool = False) -> Table:
    """Make the table of a language model's file.

    Args:
      config: config of the language model.
      unpacked: whether the depformer's attention is one tensor per set of weights (`in_projs.S`, as the current package
        saves it) instead of one tensor for all sets (as published).

    Returns:
      The table.
    """
    pieces = [
        piece((f"emb.{q}.weight", f"audio_embs.{q}.weight"), "audio_emb.table_QLW", at=(q,)) for q in range(config.n_q)
    ]
    pieces += embedding_pieces("text_emb", "text_emb", rank=False, demux=config.demux_second_stream)
    pieces.append(piece("text_linear.weight", "text_linear.weight_VD"))
    if config.bias_proj:
        pieces.append(piece("text_linear.bias", "text_linear.bias_V"))
    pieces += transformer_pieces(config.transformer, "transformer", "transformer")
    pieces += norm_pieces(config.norm, "out_norm", "out_norm")
    for p in range(config.extra_heads_num_heads):
        pieces.append(piece(f"extra_heads.{p}.weight", "extra_heads.weight_AOD", at=(p,)))
    for conditioner in config.conditioners:
        src = f"condition_provider.conditioners.{conditioner.name}"
        dst = f"conditioning.conditioners.{conditioner.name}"
        pieces.append(piece(f"{src}.learnt_padding", f"{dst}.learnt_padding_D", ALPHA))
        pieces.append(piece(f"{src}.output_proj.weight", f"{dst}.output_proj.weight_DW"))
        if isinstance(conditioner, LutConditioner):
            pieces.append(piece(f"{src}.embed.weight", f"{dst}.table.table_LW"))
    return pieces + (_depformer_pieces(config, unpacked) if config.dep_q else [])


def _depformer_pieces(config: LMConfig, unpacked: bool) -> list[Piece]:
    rank, width = config.depformer.low_rank_embeddings is not None, config.depformer.dim
    shape = config.depformer.num_heads, width // config.depformer.num_heads
    sets = max(config.depformer_schedule) + 1
    pieces = [piece(f"depformer_in.{s}.weight", f"depformer.inputs.{s}.weight_DE") for s in range(sets)]
    for q in range(config.dep_q - 1):
        pieces += embedding_pieces(f"depformer_emb.{q}", f"depformer.audio_embs.{q}", rank=rank, demux=False)
    text = "depformer_text_emb", "depformer.text_emb"
    pieces += embedding_pieces(*text, rank=rank, demux=config.demux_second_stream)
    for i in range(config.depformer.num_layers):
        old = new = f"depformer.layers.{i}"
        pieces += norm_pieces(config.norm, f"{old}.norm1", f"{new}.norm1")
        pieces += norm_pieces(config.norm, f"{old}.norm2", f"{new}.norm2")
        for s in range(sets):
            for packed, single, dst, transform, rows in (
                ("in_proj_weight", "in_projs", f"{s}.weight_PKHD", linear((3, *shape), (width,)), 3 * width),
                ("out_proj.weight", "out_projs", f"{s}.weight_DKH", linear((width,), shape), width),
            ):
                target = f"{new}.{single}.{dst}"
                if unpacked:
                    pieces.append(piece(f"{old}.self_attn.{single}.{s}.weight", target, transform))
                else:
                    at = (s * rows, (s + 1) * rows)
                    pieces.append(piece(f"{old}.self_attn.{packed}", target, transform, rows=at))
            pieces += gating_pieces(width, config.depformer_feedforward, f"{old}.gating.{s}", f"{new}.gating.{s}")
    return pieces + [piece(f"linears.{q}.weight", f"depformer.linears.{q}.weight_VD") for q in range(config.dep_q)]

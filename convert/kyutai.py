"""The tables of Kyutai's own layout, which the PyTorch package, the Rust server and the published repositories share.

Source: kyutai-labs/moshi@e6a55d2 moshi/models/{lm,compression}.py; tests/published lists every tensor.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from dsm_jax import strict
from dsm_jax.configs import (
    LMConfig,
    MimiConfig,
    ModelConfig,
    QuantizerConfig,
    SeanetConfig,
    TransformerConfig,
)
from dsm_jax.convert.pieces import Constant, Piece, Spellings, Table, Tensors, piece
from dsm_jax.convert.transforms import ALPHA, CODEBOOK, CONV, LINEAR, POINTWISE, conv_transpose, depthwise

LM_NAME = "model.safetensors"
MIMI_NAME = "mimi-pytorch-e351c8d8@125.safetensors"
MIMI_CONFIG_NAME = "mimi_config.json"
_SETTINGS = ("stt_config", "model_id", "lm_gen_config", "tts_config")
# Keys that the published files always have; the others are written when they say something.
_ALWAYS = (
    *("existing_text_padding_id", "causal", "layer_scale", "max_period", "gating", "norm", "positional_embedding"),
    *("depformer_dim", "depformer_num_heads", "depformer_num_layers", "depformer_dim_feedforward"),
    *("depformer_multi_linear", "depformer_pos_emb", "depformer_weights_per_step", "conditioners", "cross_attention"),
)


@dataclasses.dataclass(frozen=True)
class Files:
    """The files that a config names, besides itself."""

    lm: str
    mimi: str
    mimi_config: str | None
    tokenizer: str | None


def read_config(values: Mapping[str, Any], where: str) -> tuple[ModelConfig, LMConfig, Files]:
    """Reads the content of a config.json.

    Args:
      values: the decoded JSON. What it says about the language model is not nested.
      where: what it was read from, for the error.

    Returns:
      The config, with the published codec; its language model's; and the files it names.

    Raises:
      ConfigError: a key or a value that the library does not understand.
    """
    rest = dict(values)
    names = {key: rest.pop(key, None) for key in ("moshi_name", "mimi_name", "mimi_config_name", "tokenizer_name")}
    settings = {key: rest.pop(key) or {} for key in _SETTINGS if key in rest}
    lm = strict.from_dict(LMConfig, {key: value for key, value in rest.items() if key != "model_type"}, where)
    settings = {"model_type": rest.get("model_type"), **settings}
    settings["stt"] = settings.pop("stt_config", {})
    config = dataclasses.replace(strict.from_dict(ModelConfig, settings, where), lm=lm)
    files = Files(
        names["moshi_name"] or LM_NAME,
        names["mimi_name"] or MIMI_NAME,
        names["mimi_config_name"],
        names["tokenizer_name"],
    )
    return config, lm, files


def write_config(config: ModelConfig, lm: LMConfig, files: Files) -> dict[str, Any]:
    """The content of a config.json that `read_config` and the PyTorch package read; `lm` is the config's."""
    values = strict.to_dict(lm)
    for field in dataclasses.fields(LMConfig):
        default = field.default_factory() if callable(field.default_factory) else field.default
        if field.name not in _ALWAYS and getattr(lm, field.name) == default:
            del values[field.name]
    for key in _SETTINGS[1:]:
        values |= {key: dict(getattr(config, key))} if getattr(config, key) else {}
    values |= {"stt_config": strict.to_dict(config.stt)} if config.model_type == "stt" else {}
    values |= {"model_type": config.model_type, "mimi_name": files.mimi}
    values |= {"moshi_name": files.lm} if files.lm != LM_NAME else {}
    values |= {"mimi_config_name": files.mimi_config} if files.mimi_config else {}
    return values | ({"tokenizer_name": files.tokenizer} if files.tokenizer else {})


def write_mimi_config(config: MimiConfig) -> dict[str, Any]:
    """The content of the file that `mimi_config_name` names."""
    values = strict.to_dict(config)
    if values["quantizer"]["n_q_semantic"] == QuantizerConfig.n_q_semantic:  # the PyTorch package takes no such key
        del values["quantizer"]["n_q_semantic"]
    plain = ("kv_repeat", "cross_attention")
    values["transformer"] = {k: v for k, v in values["transformer"].items() if k not in plain or v not in (1, False)}
    return values


def with_extra_heads(config: LMConfig, tensors: Tensors) -> LMConfig:
    """Adds the pause heads that the file holds and the published config does not speak of."""
    shapes = [t.shape for name, t in tensors.items() if name.startswith("extra_heads.") and name.endswith(".weight")]
    if not shapes:
        return config
    return dataclasses.replace(config, extra_heads_num_heads=len(shapes), extra_heads_dim=shapes[0][0])


def seanet_layers(config: SeanetConfig, side: str) -> Iterator[tuple[str, str, int | None]]:
    """Where SEANet's convolutions are.

    Args:
      config: SEANet's.
      side: "encoder" or "decoder".

    Yields:
      The path in PyTorch's `Sequential`, which counts activations too; the path here; the stride of a transposed
      convolution, None for the others.
    """
    here = f"{side}.seanet.layers"
    yield "0", f"{here}.0", None
    there, layer = 1, 1
    for ratio in reversed(config.ratios) if side == "encoder" else config.ratios:
        if side == "decoder":
            yield f"{there + 1}", f"{here}.{layer}", ratio
            there, layer = there + 2, layer + 1
        for _ in range(config.n_residual_layers):
            yield f"{there}.block.1", f"{here}.{layer}.wide", None
            yield f"{there}.block.3", f"{here}.{layer}.narrow", None
            there, layer = there + 1, layer + 1
        if side == "encoder":
            yield f"{there + 1}", f"{here}.{layer}", None
            there, layer = there + 2, layer + 1
    yield f"{there + 1}", f"{here}.{layer}", None


def convolution(weight: str, bias: str, here: str, stride: int | None) -> list[Piece]:
    """The two pieces of a convolution; with a stride, of a transposed one."""
    kernel = piece(weight, f"{here}.kernel_KCD", CONV)
    if stride is not None:
        kernel = piece(weight, f"{here}.kernel_MCE", conv_transpose(stride))
    return [kernel, piece(bias, f"{here}.bias_D")]


def mimi_table(config: MimiConfig) -> Table:
    """The table of a Mimi file."""
    table: list[Piece | Constant] = []
    for side in ("encoder", "decoder"):
        for there, here, stride in seanet_layers(config.seanet, side):
            kind = "conv" if stride is None else "convtr"
            stem = f"{side}.model.{there}.{kind}.{kind}"
            table += convolution(f"{stem}.weight", f"{stem}.bias", here, stride)
        table += transformer_pieces(config.transformer, f"{side}_transformer.transformer", f"{side}.transformer")
    table.append(piece("downsample.conv.conv.conv.weight", "encoder.downsample.kernel_KCD", CONV))
    upsample = depthwise(config.resample_stride)
    table.append(piece("upsample.convtr.convtr.convtr.weight", "decoder.upsample.kernel_MSC", upsample))
    semantic = config.quantizer.n_q_semantic
    for there, here, books in (
        ("rvq_first", "semantic", semantic),
        ("rvq_rest", "acoustic", config.quantizer.n_q - semantic),
    ):
        table.append(piece(f"quantizer.{there}.input_proj.weight", f"quantizer.{here}.input_proj_DC", POINTWISE))
        table.append(piece(f"quantizer.{there}.output_proj.weight", f"quantizer.{here}.output_proj_CD", POINTWISE))
        for q in range(books):
            book = f"quantizer.{there}.vq.layers.{q}._codebook"
            table += codebook(
                tuple(f"{book}.{name}" for name in ("embedding_sum", "embed_sum", "embed_avg")),
                tuple(f"{book}.{name}" for name in ("cluster_usage", "cluster_size")),
                tuple(f"{book}.{name}" for name in ("_initialized", "inited")),
                f"quantizer.{here}.codebooks.{q}.embedding_VC",
                config.quantizer.bins,
            )
    return table


def codebook(sums: Spellings, usage: Spellings, initialized: Spellings, here: str, bins: int) -> list[Piece | Constant]:
    """A codebook's entries, which the file holds as sums and counts, and the flag beside them."""
    return [
        Piece((sums, usage), here, CODEBOOK),
        Constant(initialized, (1,), 1.0, "a flag of training: whether the entries have been initialised"),
    ]


def norm_pieces(norm: str, there: str, here: str) -> list[Piece]:
    """The pieces of a norm of that name."""
    if norm.startswith("rms_norm"):
        return [piece(f"{there}.alpha", f"{here}.alpha_D", ALPHA)]
    return [piece(f"{there}.weight", f"{here}.scale_D"), piece(f"{there}.bias", f"{here}.bias_D")]


def attention_pieces(there: str, here: str, *, cross_width: int | None = None) -> list[Piece]:
    """The packed projection, in its three spellings, and the one out; in cross-attention queries are apart here."""
    packed = tuple(f"{there}.{name}" for name in ("in_proj_weight", "in_projs.0.weight", "in_proj.weight"))
    out = tuple(f"{there}.{name}" for name in ("out_proj.weight", "out_projs.0.weight"))
    pieces = [piece(out, f"{here}.out_proj_ED", LINEAR)]
    if cross_width is None:
        return [piece(packed, f"{here}.in_proj_DE", LINEAR), *pieces]
    queries, others = (0, cross_width), (cross_width, 3 * cross_width)
    return [
        piece(packed, f"{here}.q_proj_DE", LINEAR, rows=queries),
        piece(packed, f"{here}.kv_proj_DE", LINEAR, rows=others),
        *pieces,
    ]


def transformer_pieces(config: TransformerConfig, there: str, here: str) -> list[Piece]:
    """The pieces of a stack of layers."""
    pieces = []
    for i in range(config.num_layers):
        old, new = f"{there}.layers.{i}", f"{here}.layers.{i}"
        pieces += norm_pieces(config.norm, f"{old}.norm1", f"{new}.norm1")
        pieces += attention_pieces(f"{old}.self_attn", f"{new}.self_attn")
        if config.cross_attention:
            pieces += norm_pieces("layer_norm", f"{old}.norm_cross", f"{new}.norm_cross")
            pieces += attention_pieces(f"{old}.cross_attention", f"{new}.cross_attention", cross_width=config.d_model)
        pieces += norm_pieces(config.norm, f"{old}.norm2", f"{new}.norm2")
        if config.gating == "none":
            pieces.append(piece(f"{old}.linear1.weight", f"{new}.feedforward.linear1_DF", LINEAR))
            pieces.append(piece(f"{old}.linear2.weight", f"{new}.feedforward.linear2_FD", LINEAR))
        else:
            pieces += gating_pieces(f"{old}.gating", f"{new}.feedforward")
        if config.layer_scale is not None:
            pieces += [piece(f"{old}.layer_scale_{k}.scale", f"{new}.layer_scale_{k}_D") for k in (1, 2)]
    return pieces


def gating_pieces(there: str, here: str) -> list[Piece]:
    """The pieces of a gated feed-forward."""
    return [
        piece(f"{there}.linear_in.weight", f"{here}.linear_in_DG", LINEAR),
        piece(f"{there}.linear_out.weight", f"{here}.linear_out_FD", LINEAR),
    ]


def embedding_pieces(there: str, here: str, *, rank: bool, demux: bool) -> list[Piece]:
    """The pieces of a token embedding."""
    pieces = [piece(f"{there}.weight", f"{here}.table_LW")]
    if rank:
        pieces.append(piece(f"{there}.low_rank.weight", f"{here}.low_rank_WD", LINEAR))
    if demux:
        pieces.append(piece(f"{there}.out1.weight", f"{here}.first_WD", LINEAR))
        pieces.append(piece(f"{there}.out2.weight", f"{here}.second_WD", LINEAR))
    return pieces


def lm_table(config: LMConfig, *, unpacked: bool = False) -> Table:
    """The table of a language model's file.

    Args:
      config: the model's.
      unpacked: whether the depformer's attention is one tensor per set of weights (`in_projs.S`, as today's package
        saves it) instead of one for all of them (as published).

    Returns:
      The table.
    """
    pieces = [piece(f"emb.{q}.weight", "audio_emb_QLD", at=(q,)) for q in range(config.n_q)]
    pieces += embedding_pieces("text_emb", "text_emb", rank=False, demux=config.demux_second_stream)
    pieces.append(piece("text_linear.weight", "text_linear_DV", LINEAR))
    if config.bias_proj:
        pieces.append(piece("text_linear.bias", "text_bias_V"))
    pieces += transformer_pieces(config.transformer, "transformer", "transformer")
    pieces += norm_pieces(config.norm, "out_norm", "out_norm")
    for p in range(config.extra_heads_num_heads):
        pieces.append(piece(f"extra_heads.{p}.weight", "extra_heads_PDO", LINEAR, at=(p,)))
    for name, spec in config.conditioners.items():
        there, here = f"condition_provider.conditioners.{name}", f"conditioning.conditioners.{name}"
        pieces.append(piece(f"{there}.learnt_padding", f"{here}.learnt_padding_D", ALPHA))
        pieces.append(piece(f"{there}.output_proj.weight", f"{here}.output_proj_CD", LINEAR))
        if spec["type"] == "lut":
            pieces.append(piece(f"{there}.embed.weight", f"{here}.table_LC"))
    return pieces + (_depformer_pieces(config, unpacked) if config.dep_q else [])


def _depformer_pieces(config: LMConfig, unpacked: bool) -> list[Piece]:
    rank, width = config.depformer_low_rank_embeddings is not None, config.depformer_dim
    sets = max(config.depformer_schedule) + 1
    pieces = [piece(f"depformer_in.{s}.weight", f"depformer.inputs.{s}.weight_DE", LINEAR) for s in range(sets)]
    for q in range(config.dep_q - 1):
        pieces += embedding_pieces(f"depformer_emb.{q}", f"depformer.audio_embs.{q}", rank=rank, demux=False)
    text = "depformer_text_emb", "depformer.text_emb"
    pieces += embedding_pieces(*text, rank=rank, demux=config.demux_second_stream)
    for i in range(config.depformer_num_layers):
        old = new = f"depformer.layers.{i}"
        pieces += norm_pieces(config.norm, f"{old}.norm1", f"{new}.norm1")
        pieces += norm_pieces(config.norm, f"{old}.norm2", f"{new}.norm2")
        for s in range(sets):
            for packed, single, here, rows in (
                ("in_proj_weight", "in_projs", f"{new}.in_projs.{s}.weight_DE", 3 * width),
                ("out_proj.weight", "out_projs", f"{new}.out_projs.{s}.weight_DE", width),
            ):
                if unpacked:
                    pieces.append(piece(f"{old}.self_attn.{single}.{s}.weight", here, LINEAR))
                else:
                    at = (s * rows, (s + 1) * rows)
                    pieces.append(piece(f"{old}.self_attn.{packed}", here, LINEAR, rows=at))
            pieces += gating_pieces(f"{old}.gating.{s}", f"{new}.gating.{s}")
    return pieces + [
        piece(f"linears.{q}.weight", f"depformer.linears.{q}.weight_DE", LINEAR) for q in range(config.dep_q)
    ]

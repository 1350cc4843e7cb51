"""transformers' layout of Mimi: `kyutai/mimi`, and the codec inside its speech-to-text checkpoints.

It differs from Kyutai's own layout in the names, and in the queries, keys and values, which are separate tensors, with
rotations by halves of a head.

Source: transformers 5.23, models/mimi.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dsm_jax.configs import MimiConfig, ModelConfig, QuantizerConfig, SeanetConfig, TransformerConfig
from dsm_jax.convert import files
from dsm_jax.convert.checkpoint import Checkpoint, LeftOut, from_tensors, outgoing
from dsm_jax.convert.kyutai import codebook, convolution, seanet_layers
from dsm_jax.convert.pieces import Constant, Outgoing, Piece, Table, piece
from dsm_jax.convert.transformers_config import (
    check_expressible,
    check_rest,
    check_whole,
    model_type_of,
    pop_theta,
    read_number,
)
from dsm_jax.convert.transforms import CONV, POINTWISE, depthwise, heads, linear
from dsm_jax.errors import ConfigError

_CODEBOOK = ("embed_sum", "cluster_usage", "initialized")
_FIXED_MIMI = {
    "model_type": "mimi",
    "use_causal_conv": True,
    "pad_mode": "constant",
    "trim_right_ratio": 1.0,
    "use_conv_shortcut": False,
    "hidden_act": "gelu",
    "norm_eps": 1e-5,
    "attention_bias": False,
    "normalize": False,
}
_DEFAULT_MIMI = {  # the defaults of transformers' MimiConfig
    "sampling_rate": 24_000,
    "audio_channels": 1,
    "hidden_size": 512,
    "num_filters": 64,
    "num_residual_layers": 1,
    "upsampling_ratios": [8, 6, 5, 4],
    "kernel_size": 7,
    "last_kernel_size": 3,
    "residual_kernel_size": 3,
    "dilation_growth_rate": 2,
    "compress": 2,
    "codebook_size": 2048,
    "codebook_dim": 256,
    "num_quantizers": 32,
    "num_semantic_quantizers": 1,
    "num_hidden_layers": 8,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "sliding_window": 250,
    "layer_scale_initial_scale": 0.01,
}

NAME = "transformers"


def recognises(path: Path) -> bool:
    """Return whether a path is a folder of this layout."""
    return model_type_of(path) == "mimi"


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a folder.

    Raises:
      CheckpointError: the tensors do not fit the config; lists all faults.
      ConfigError: a key or a value in the config is unknown.
    """
    mimi = read_config(files.read_json(path / "config.json"), str(path / "config.json"))
    tensors, faults = files.sharded_tensors_in(path)
    config = ModelConfig(model_type="mimi", mimi=mimi)
    return from_tensors(path, NAME, config, {"mimi": table(mimi)}, {"mimi": tensors}, faults=faults)


def write(checkpoint: Checkpoint, folder: Path) -> Iterator[Outgoing | LeftOut]:
    """Write a codec to a folder.

    Args:
      checkpoint: the checkpoint to write.
      folder: an empty folder.

    Yields:
      Each tensor after it is written; this layout leaves nothing out.

    Raises:
      ConfigError: transformers cannot express the config.
    """
    mimi = checkpoint.config.mimi
    for name, values in write_files(mimi).items():
        files.write_json(folder / name, values)
    yield from files.write_sharded(folder, outgoing(checkpoint, "mimi", table(mimi)))


def table(config: MimiConfig, prefix: str = "") -> Table:
    """Make the table of the codec, with a prefix of all names for use inside a speech-to-text checkpoint."""
    items: list[Piece | Constant] = []
    for side in ("encoder", "decoder"):
        for src, dst, stride in seanet_layers(config.seanet, side):
            stem = f"{prefix}{side}.layers.{src}.conv"
            items += convolution(f"{stem}.weight", f"{stem}.bias", dst, stride)
        items += _codec_layers(config.transformer, f"{prefix}{side}_transformer", f"{side}.transformer")
    items.append(piece(f"{prefix}downsample.conv.weight", "encoder.downsample.kernel_RCO", CONV))
    upsample = depthwise(config.resample_stride)
    items.append(piece(f"{prefix}upsample.conv.weight", "decoder.upsample.kernel_RJC", upsample))
    semantic = config.quantizer.n_q_semantic
    for branch, books in (("semantic", semantic), ("acoustic", config.quantizer.n_q - semantic)):
        src, dst = f"{prefix}quantizer.{branch}_residual_vector_quantizer", f"quantizer.{branch}"
        items.append(piece(f"{src}.input_proj.weight", f"{dst}.input_proj.weight_CD", POINTWISE))
        items.append(piece(f"{src}.output_proj.weight", f"{dst}.output_proj.weight_DC", POINTWISE))
        for q in range(books):
            sums, usage, flag = ((f"{src}.layers.{q}.codebook.{x}",) for x in _CODEBOOK)
            items += codebook(sums, usage, flag, f"{dst}.codebooks.{q}.embedding_LC", config.quantizer.bins)
    return items


def _codec_layers(config: TransformerConfig, src: str, dst: str) -> Iterator[Piece]:
    for i in range(config.num_layers):
        old, new = f"{src}.layers.{i}", f"{dst}.layers.{i}"
        for norm, name in (("norm1", "input_layernorm"), ("norm2", "post_attention_layernorm")):
            yield piece(f"{old}.{name}.weight", f"{new}.{norm}.scale_D")
            yield piece(f"{old}.{name}.bias", f"{new}.{norm}.bias_D")
        yield from attention(config, f"{old}.self_attn", f"{new}.self_attn", "_proj.weight")
        yield piece(f"{old}.mlp.fc1.weight", f"{new}.feedforward.linear1.weight_FD")
        yield piece(f"{old}.mlp.fc2.weight", f"{new}.feedforward.linear2.weight_DF")
        yield piece(f"{old}.self_attn_layer_scale.scale", f"{new}.layer_scale_1_D")
        yield piece(f"{old}.mlp_layer_scale.scale", f"{new}.layer_scale_2_D")


def attention(
    config: TransformerConfig, src: str, dst: str, ending: str, *, out: str = "o", half_split: bool = True
) -> Iterator[Piece]:
    """Make the pieces of self-attention: separate queries, keys and values to one packed projection.

    Args:
      config: config of the transformer.
      src: path of the module in the file.
      dst: path of the module in this library.
      ending: end of each name in the file, after "q", "k", "v" and `out`.
      out: first part of the name of the output projection.
      half_split: whether the file rotates by halves of a head.

    Yields:
      The pieces.
    """
    kv_heads, groups = config.num_kv_heads, config.kv_repeat
    for name, first, parts, turned in (("q", 0, groups, True), ("k", groups, 1, True), ("v", groups + 1, 1, False)):
        transform = heads(kv_heads, parts, half_split=half_split and turned)
        at = (slice(first, first + parts),)
        yield piece(f"{src}.{name}{ending}", f"{dst}.in_proj.weight_PKHD", transform, at=at)
    transform = linear((config.d_model,), (kv_heads, groups, config.head_dim))
    yield piece(f"{src}.{out}{ending}", f"{dst}.out_proj.weight_DKGH", transform)


def read_config(values: Mapping[str, Any], where: str) -> MimiConfig:
    """Parse the config of a Mimi checkpoint, or the `codec_config` of a speech-to-text checkpoint.

    Args:
      values: the decoded JSON; absent keys have transformers' defaults.
      where: name of the file, for the error.

    Returns:
      The config.

    Raises:
      ConfigError: a key or a value is unknown.
    """
    rest = dict(values)
    theta = pop_theta(rest, 10_000.0, where)
    v = {key: rest.pop(key, default) for key, default in _DEFAULT_MIMI.items()}
    check_whole({key: v[key] for key, default in _DEFAULT_MIMI.items() if isinstance(default, int)}, where)
    ratios, scale = v["upsampling_ratios"], v["layer_scale_initial_scale"]
    if not isinstance(ratios, list | tuple):
        raise ConfigError(f"{where}: upsampling_ratios is {ratios!r}; expected a list")
    check_whole({f"upsampling_ratios[{i}]": ratio for i, ratio in enumerate(ratios)}, where)
    read_number(scale, f"{where}: layer_scale_initial_scale")
    width, heads = v["hidden_size"], v["num_attention_heads"]
    rates = [rest.pop(key, None) for key in ("frame_rate", "_frame_rate")]
    kv_heads = rest.pop("num_key_value_heads", None) or heads
    check_whole({"num_key_value_heads": kv_heads}, where)
    check_rest(
        rest,
        _FIXED_MIMI
        | {
            "vector_quantization_hidden_dimension": v["codebook_dim"],
            "upsample_groups": width,
            "head_dim": width // heads,
        },
        where,
    )
    rate = next((r for r in rates if r is not None), v["sampling_rate"] / (2 * math.prod(ratios)))
    config = MimiConfig(
        sample_rate=v["sampling_rate"],
        frame_rate=read_number(rate, f"{where}: frame_rate"),
        channels=v["audio_channels"],
        seanet=SeanetConfig(
            channels=v["audio_channels"],
            dimension=width,
            n_filters=v["num_filters"],
            n_residual_layers=v["num_residual_layers"],
            ratios=tuple(ratios),
            kernel_size=v["kernel_size"],
            residual_kernel_size=v["residual_kernel_size"],
            last_kernel_size=v["last_kernel_size"],
            dilation_base=v["dilation_growth_rate"],
            compress=v["compress"],
        ),
        quantizer=QuantizerConfig(
            dimension=v["codebook_dim"],
            n_q=v["num_quantizers"],
            bins=v["codebook_size"],
            input_dimension=width,
            output_dimension=width,
            n_q_semantic=v["num_semantic_quantizers"],
        ),
        transformer=TransformerConfig(
            d_model=width,
            num_heads=heads,
            num_layers=v["num_hidden_layers"],
            dim_feedforward=v["intermediate_size"],
            context=v["sliding_window"],
            layer_scale=scale,
            max_period=theta,
            kv_repeat=heads // kv_heads,
            input_dimension=width,
            output_dimensions=(width,),
        ),
    )
    if config.resample_stride != 2:
        raise ConfigError(f"{where}: a frame is {config.resample_stride} latents; transformers' Mimi resamples by 2")
    return config


def write_config(config: MimiConfig) -> dict[str, Any]:
    """Return the content of a config.json as in `kyutai/mimi`.

    Raises:
      ConfigError: transformers cannot express the config.
    """
    seanet, transformer, quantizer = config.seanet, config.transformer, config.quantizer
    width = seanet.dimension
    values = _DEFAULT_MIMI | {
        "sampling_rate": config.sample_rate,
        "frame_rate": config.frame_rate,
        "audio_channels": config.channels,
        "hidden_size": width,
        "num_filters": seanet.n_filters,
        "num_residual_layers": seanet.n_residual_layers,
        "upsampling_ratios": list(seanet.ratios),
        "kernel_size": seanet.kernel_size,
        "last_kernel_size": seanet.last_kernel_size,
        "residual_kernel_size": seanet.residual_kernel_size,
        "dilation_growth_rate": seanet.dilation_base,
        "compress": seanet.compress,
        "codebook_size": quantizer.bins,
        "codebook_dim": quantizer.dimension,
        "vector_quantization_hidden_dimension": quantizer.dimension,
        "num_quantizers": quantizer.n_q,
        "num_semantic_quantizers": quantizer.n_q_semantic,
        "upsample_groups": width,
        "num_hidden_layers": transformer.num_layers,
        "intermediate_size": transformer.dim_feedforward,
        "num_attention_heads": transformer.num_heads,
        "num_key_value_heads": transformer.num_kv_heads,
        "head_dim": transformer.head_dim,
        "sliding_window": transformer.context,
        "layer_scale_initial_scale": transformer.layer_scale,
        "rope_parameters": {"rope_theta": transformer.max_period, "rope_type": "default"},
    }
    values |= {key: value for key, value in _FIXED_MIMI.items() if key != "normalize"}
    values |= {"architectures": ["MimiModel"], "dtype": "float32"}
    check_expressible(_computed(read_config(values, "this codec")), _computed(config))
    return values


def write_files(config: MimiConfig) -> dict[str, dict[str, Any]]:
    """Return the contents of the JSON files of `kyutai/mimi`, by file name.

    Raises:
      ConfigError: transformers cannot express the config.
    """
    extractor = {
        "feature_extractor_type": "EncodecFeatureExtractor",
        "feature_size": config.channels,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": True,
        "sampling_rate": config.sample_rate,
    }
    return {"config.json": write_config(config), "preprocessor_config.json": extractor}


def _computed(config: MimiConfig) -> dict[str, Any]:
    """Return the settings of a config that change the codes or samples, by dotted name."""
    values = {}
    for part in ("seanet", "transformer", "quantizer"):
        values |= {f"{part}.{key}": value for key, value in dataclasses.asdict(getattr(config, part)).items()}
    for key in ("seanet.norm", "seanet.disable_norm_outer_blocks"):  # weights are written folded
        del values[key]
    for key in ("transformer.input_dimension", "transformer.output_dimensions", "transformer.conv_layout"):
        del values[key]
    return values | {"sample_rate": config.sample_rate, "frame_rate": config.frame_rate, "channels": config.channels}

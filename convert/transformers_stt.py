"""transformers' layout of Kyutai's speech-to-text models: the `-trfs` repositories.

One table holds all token embeddings: text, then each audio stream, then a row of zeros for padding. The text head has a
row for the initial token, which is never predicted. The layout cannot hold pause heads.

Source: transformers 5.23, models/kyutai_speech_to_text.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dsm_jax.configs import LMConfig, ModelConfig, SttConfig, gating_dim
from dsm_jax.configs.json import from_dict, look_up
from dsm_jax.convert import files, tokenizer
from dsm_jax.convert import transformers_mimi as mimi
from dsm_jax.convert.checkpoint import Checkpoint, LeftOut, from_tensors, outgoing
from dsm_jax.convert.kyutai import gate_up
from dsm_jax.convert.pieces import Constant, Outgoing, Piece, Table, piece
from dsm_jax.convert.transformers_config import (
    check_expressible,
    check_rest,
    check_whole,
    model_type_of,
    pop_theta,
    read_object,
)
from dsm_jax.errors import CheckpointError, ConfigError
from dsm_jax.models.family import lm_config
from dsm_jax.models.parameters import dtype_of
from dsm_jax.tokenizers import copy_tokenizer

NAME = mimi.NAME
CODEC_PREFIX = "codec_model."
NO_PAUSE_HEADS = "transformers' model has no pause heads"
_FIXED_STT = {"model_type": "kyutai_speech_to_text", "hidden_act": "silu", "attention_bias": False}
_STT_KEYS = (
    *("codebook_vocab_size", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("sliding_window", "ffn_dim", "rms_norm_eps", "num_codebooks", "pad_token_id"),
)
# Prefixes of fields without effect: on depformers, which these models lack, or never read by the step.
_WITHOUT_EFFECT = ("depformer", "extra_heads_", "existing_text_end_padding_id", "fuser")
_NORMS = {1e-8: "rms_norm_f32", 1e-5: "rms_norm"}


def recognises(path: Path) -> bool:
    """Return whether a path is a folder of this layout."""
    return model_type_of(path) == _FIXED_STT["model_type"]


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a folder.

    Raises:
      CheckpointError: a file is missing, or the tensors do not fit the config; lists all faults.
      ConfigError: a key or a value in the config is unknown.
    """
    extractor: dict[str, Any] = {}
    for name in ("preprocessor_config.json", "processor_config.json"):
        if not extractor and (path / name).is_file():
            found = files.read_json(path / name)
            found = found.get("feature_extractor", found)
            extractor = found if "audio_delay_seconds" in found else {}
    if not extractor:
        raise CheckpointError(
            f"{path} has no audio_delay_seconds in preprocessor_config.json or processor_config.json; fetch the whole "
            "repository again, or, of a training, save the processor there too: processor.save_pretrained"
        )
    config, lm = read_config(files.read_json(path / "config.json"), extractor, str(path / "config.json"))
    tensors, faults = files.sharded_tensors_in(path)
    tables = {"mimi": mimi.table(config.mimi, CODEC_PREFIX), "lm": table(lm)}
    split = {
        "mimi": {name: tensor for name, tensor in tensors.items() if name.startswith(CODEC_PREFIX)},
        "lm": {name: tensor for name, tensor in tensors.items() if not name.startswith(CODEC_PREFIX)},
    }
    return from_tensors(path, NAME, config, tables, split, tokenizer=path / "tokenizer.json", faults=faults)


def write(checkpoint: Checkpoint, folder: Path) -> Iterator[Outgoing | LeftOut]:
    """Write a checkpoint to a folder.

    Args:
      checkpoint: the checkpoint to write.
      folder: an empty folder.

    Yields:
      Each tensor after it is written, then each parameter that the layout cannot hold.

    Raises:
      CheckpointError: the checkpoint has no tokenizer.
      ConfigError: transformers cannot express the config.
    """
    config, lm = checkpoint.config, lm_config(checkpoint.config)
    contents = write_files(config, lm, dtype_of(checkpoint.stored["lm"]))
    tensors = outgoing(checkpoint, "lm", table(lm))
    tensors += outgoing(checkpoint, "mimi", mimi.table(config.mimi, CODEC_PREFIX))
    _write_tokenizer(checkpoint, folder)
    for name, values in contents.items():
        files.write_json(folder / name, values)
    yield from files.write_sharded(folder, tensors)
    placed = {item.target for item in table(lm) if isinstance(item, Piece)}
    for name in checkpoint.stored["lm"]:
        if name not in placed:
            yield LeftOut("lm", name, NO_PAUSE_HEADS)
    if config.sampling.temp_text:
        why = f"temp_text {config.sampling.temp_text}: a model in transformers' layout is greedy unless it is told"
        yield LeftOut("lm", "lm_gen_config", why)


def _write_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the tokenizer as `tokenizer.json`."""
    source = checkpoint.tokenizer
    if source is None:
        raise CheckpointError(f"{checkpoint.name} names no tokenizer, which transformers' processor needs; add it")
    if source.suffix != ".json":
        tokenizer.to_json(source, folder)
    else:
        copy_tokenizer(source, folder, "tokenizer.json")


def table(config: LMConfig) -> Table:
    """Make the table of the language model, without pause heads."""
    text, audio = config.text_card + 1, config.card + 1
    tokens = "model.embed_tokens.embed_tokens.weight"
    items: list[Piece | Constant] = [piece(tokens, "text_emb.table_LW", rows=(0, text))]
    for q in range(config.n_q):
        rows = (text + q * audio, text + (q + 1) * audio)
        items.append(piece(tokens, "audio_emb.table_QLW", rows=rows, at=(q,)))
    last = text + config.n_q * audio
    items.append(Constant((tokens,), (1, config.dim), 0.0, "the padding token adds nothing", rows=(last, last + 1)))
    first = gate_up(config.dim, config.transformer.dim_feedforward)
    for i in range(config.num_layers):
        src, dst = f"model.layers.{i}", f"transformer.layers.{i}"
        for norm, name in (("norm1", "input_layernorm"), ("norm2", "post_attention_layernorm")):
            items.append(piece(f"{src}.{name}.weight", f"{dst}.{norm}.alpha_D"))
        items += mimi.attention(config.transformer, f"{src}.self_attn", f"{dst}.self_attn", "_proj.linear.weight")
        items.append(piece(f"{src}.mlp.fc1.weight", f"{dst}.feedforward.linear_in.weight_PFD", first))
        items.append(piece(f"{src}.mlp.fc2.weight", f"{dst}.feedforward.linear_out.weight_DF"))
    items.append(piece("model.norm.weight", "out_norm.alpha_D"))
    items.append(piece("lm_head.weight", "text_linear.weight_VD", rows=(0, config.text_card)))
    start = (config.text_card, config.text_card + 1)
    why = "the initial token is never predicted"
    items.append(Constant(("lm_head.weight",), (1, config.dim), 0.0, why, rows=start))
    return items


def read_config(values: Mapping[str, Any], extractor: Mapping[str, Any], where: str) -> tuple[ModelConfig, LMConfig]:
    """Parse the config of a speech-to-text checkpoint.

    Args:
      values: the decoded config.json.
      extractor: the feature extractor's settings, from preprocessor_config.json or processor_config.json.
      where: name of the file, for the error.

    Returns:
      The config of the model, and that of its language model.

    Raises:
      ConfigError: a key or a value is unknown.
    """
    rest = dict(values)
    theta = pop_theta(rest, None, where)
    if missing := [key for key in (*_STT_KEYS, "codec_config") if key not in rest]:
        raise ConfigError(f"{where}: the keys {missing} are missing; fetch the published config.json again")
    v = {key: rest.pop(key) for key in _STT_KEYS}
    codec = read_object(rest.pop("codec_config"), f"{where}: codec_config")
    check_whole({key: v[key] for key in _STT_KEYS if key not in ("rms_norm_eps", "pad_token_id")}, where)
    width, heads = v["hidden_size"], v["num_attention_heads"]
    kv_heads = rest.pop("num_key_value_heads", None) or heads
    check_whole({"num_key_value_heads": kv_heads}, where)
    check_whole({"pad_token_id": v["pad_token_id"]}, where, least=0)
    rows = v["vocab_size"] + v["num_codebooks"] * v["codebook_vocab_size"]
    fixed = {"head_dim": width // heads, "audio_bos_token_id": v["codebook_vocab_size"] - 1, "audio_pad_token_id": rows}
    if rest.get("tie_word_embeddings"):
        raise ConfigError(f"{where}: tie_word_embeddings is true; set it to false: the text head has its own weights")
    check_rest(rest, _FIXED_STT | fixed, where)
    lm = LMConfig(
        card=v["codebook_vocab_size"] - 1,
        n_q=v["num_codebooks"],
        dep_q=0,
        delays=(0,) * (v["num_codebooks"] + 1),
        dim=width,
        text_card=v["vocab_size"] - 1,
        existing_text_padding_id=v["pad_token_id"],
        num_heads=heads,
        num_layers=v["num_hidden_layers"],
        hidden_scale=_hidden_scale(width, v["ffn_dim"], where),
        context=v["sliding_window"],
        max_period=theta,
        norm=look_up(_NORMS, v["rms_norm_eps"], f"{where}: rms_norm_eps"),
        kv_repeat=heads // kv_heads,
    )
    seconds = {name: extractor.get(name) or 0.0 for name in ("audio_delay_seconds", "audio_silence_prefix_seconds")}
    stt = from_dict(SttConfig, seconds, f"{where}: the feature extractor")
    config = ModelConfig(model_type="stt", lm=lm, mimi=mimi.read_config(codec, f"{where}: codec_config"), stt=stt)
    return config, lm


def write_files(config: ModelConfig, lm: LMConfig, dtype: str) -> dict[str, dict[str, Any]]:
    """Return the contents of a speech-to-text checkpoint's JSON files by name, without the tokenizer's.

    Args:
      config: config of the model.
      lm: config of its language model.
      dtype: dtype of the weights, in transformers' spelling.

    Returns:
      Contents by file name.

    Raises:
      ConfigError: transformers cannot express the config.
    """
    audio_rows = lm.n_q * (lm.card + 1)
    values = _FIXED_STT | {
        "architectures": ["KyutaiSpeechToTextForConditionalGeneration"],
        "dtype": dtype,
        "codebook_vocab_size": lm.card + 1,
        "vocab_size": lm.text_card + 1,
        "hidden_size": lm.dim,
        "num_hidden_layers": lm.num_layers,
        "num_attention_heads": lm.num_heads,
        "num_key_value_heads": lm.transformer.num_kv_heads,
        "head_dim": lm.transformer.head_dim,
        "max_position_embeddings": 2 * lm.context,  # as released; nothing is computed from it
        "rope_parameters": {"rope_theta": lm.max_period, "rope_type": "default"},
        "sliding_window": lm.context,
        "ffn_dim": 2 * gating_dim(lm.dim, lm.transformer.dim_feedforward),
        "rms_norm_eps": next((eps for eps, name in _NORMS.items() if name == lm.norm), None),
        "num_codebooks": lm.n_q,
        "audio_bos_token_id": lm.card,
        "audio_pad_token_id": lm.text_card + 1 + audio_rows,
        "pad_token_id": lm.existing_text_padding_id,
        "bos_token_id": lm.text_card,
        "tie_word_embeddings": False,
        "codec_config": mimi.write_config(config.mimi),
    }
    check_expressible(_computed(read_config(values, {}, "this model")[1]), _computed(lm))
    return {
        "config.json": values,
        "generation_config.json": {  # as released: one frame per window, and a ring of the window's length
            "audio_window_size": 1,
            "bos_token_id": lm.text_card,
            "pad_token_id": lm.existing_text_padding_id,
            "cache_implementation": "sliding_window",
            "codec_cache_implementation": "sliding_window",
            "codec_use_cache": True,
            "use_cache": True,
        },
        "preprocessor_config.json": {
            "feature_extractor_type": "KyutaiSpeechToTextFeatureExtractor",
            "processor_class": "KyutaiSpeechToTextProcessor",
            "audio_delay_seconds": config.stt.audio_delay_seconds,
            "audio_silence_prefix_seconds": config.stt.audio_silence_prefix_seconds,
            "feature_size": 1,
            "padding_side": "right",
            "padding_value": 0.0,
            "return_attention_mask": True,
            "sampling_rate": config.mimi.sample_rate,
        },
    }


def _computed(lm: LMConfig) -> dict[str, Any]:
    """Return the settings of a config that change the tokens, so without those of the pause heads."""
    values = {key: value for key, value in dataclasses.asdict(lm).items() if not key.startswith(_WITHOUT_EFFECT)}
    values["text_card_out"] = lm.text_logits
    return values | {"hidden_scale": gating_dim(lm.dim, lm.transformer.dim_feedforward)}


def _hidden_scale(width: int, ffn_dim: int, where: str) -> float:
    """Find the `hidden_scale` from which the reference derives an inner width of `ffn_dim` / 2."""
    for feedforward in (4 * width, math.ceil(ffn_dim * 3 / 4), math.ceil(ffn_dim * 3 / 4) + 1):
        scale = feedforward / width
        scale = scale if int(scale * width) == feedforward else math.nextafter(scale, math.inf)
        if 2 * gating_dim(width, int(scale * width)) == ffn_dim:
            return scale
    raise ConfigError(f"{where}: ffn_dim is {ffn_dim}, which no hidden_scale of a model {width} wide gives")

"""Read a config.json of transformers strictly, for all layouts that have one.

Each key is mapped, or must have the only value that the library supports, or has no effect on the computation; any
other key is an error.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsm_jax.convert import files
from dsm_jax.errors import ConfigError

# Keys without effect on the model's outputs.
_IGNORED = {
    *("architectures", "auto_map", "_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"),
    *("use_streaming", "initializer_range", "attention_dropout", "max_position_embeddings", "chunk_size_feed_forward"),
    *("id2label", "label2id", "is_encoder_decoder", "output_attentions", "output_hidden_states", "return_dict"),
    *("problem_type", "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal"),
    *("frame_size", "bos_token_id", "eos_token_id", "tie_word_embeddings", "unsloth_fixed", "unsloth_version"),
}


def model_type_of(path: Path) -> Any:
    """Return the model type in a folder's config.json; None without a config.json."""
    config_path = path / "config.json"
    return files.read_json(config_path).get("model_type") if config_path.is_file() else None


def check_expressible(expressed: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Compare the settings that transformers' config expresses with the model's settings.

    Raises:
      ConfigError: a setting differs.
    """
    if lost := [f"{key} {wanted[key]!r}" for key in wanted if expressed.get(key) != wanted[key]]:
        raise ConfigError(
            f"transformers' model has no setting for {', '.join(lost)}; convert this model to another layout"
        )


def check_rest(rest: Mapping[str, Any], fixed: Mapping[str, Any], where: str) -> None:
    """Check every key that is not mapped.

    Raises:
      ConfigError: a key is unknown, or its value is not the only one that the library supports.
    """
    if "quantization_config" in rest:
        raise ConfigError(f"{where}: the weights are quantised, which are not read; {files.NOT_ROUNDED}")
    if unknown := sorted(rest.keys() - fixed.keys() - _IGNORED):
        raise ConfigError(f"{where}: unknown keys {unknown}; remove them if they do not change what the model computes")
    for key, value in fixed.items():
        if key in rest and rest[key] != value and not (rest[key] is None and key == "head_dim"):
            raise ConfigError(f"{where}: {key} is {rest[key]!r}; the library computes with {value!r} only")


def check_whole(values: Mapping[str, Any], where: str, *, least: int = 1) -> None:
    """Check settings that are whole numbers.

    Raises:
      ConfigError: one is no whole number, or below the least.
    """
    for key, value in values.items():
        if type(value) is not int or value < least:
            raise ConfigError(f"{where}: {key} is {value!r}; expected a whole number from {least}")


def read_object(value: Any, where: str) -> dict[str, Any]:
    """Return a copy of an object in a config.

    Raises:
      ConfigError: the value is no object.
    """
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} is {value!r}; expected an object")
    return dict(value)


def read_number(value: Any, where: str) -> float:
    """Return a setting that is a number above 0.

    Raises:
      ConfigError: it is not.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ConfigError(f"{where} is {value!r}; expected a number above 0")
    return float(value)


def pop_theta(rest: dict[str, Any], default: float | None, where: str) -> float:
    """Remove the period of the rotary embeddings from a config, in its current or its older spelling.

    Raises:
      ConfigError: the period is missing, or the embeddings are scaled.
    """
    rope = read_object(rest.pop("rope_parameters", None) or {}, f"{where}: rope_parameters")
    scaling, old = rest.pop("rope_scaling", None), rest.pop("rope_theta", default)
    theta = rope.pop("rope_theta", old)
    if theta is None or scaling or rope not in ({}, {"rope_type": "default"}):
        raise ConfigError(f"{where}: rope_theta is {theta}, rope scaling is {scaling or rope}; expected a theta alone")
    return read_number(theta, f"{where}: rope_theta")

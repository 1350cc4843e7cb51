"""The config.json of Kyutai's own layout: a flat object with the language model's fields and all other settings.

The conditioners, the fuser, and the settings of a model family are nested objects; the fields of the depformer are flat
too, with the prefix `depformer_`.
Source: kyutai-labs/moshi@e6a55d2 moshi/models/loaders.py.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dsm_jax.configs import (
    Conditioner,
    DepformerConfig,
    LMConfig,
    LutConditioner,
    MimiConfig,
    ModelConfig,
    ModelId,
    QuantizerConfig,
    SamplingDefaults,
    SttConfig,
    TensorConditioner,
    TtsConfig,
)
from dsm_jax.configs.json import from_dict, look_up, to_dict
from dsm_jax.convert.pieces import Tensors
from dsm_jax.errors import ConfigError
from dsm_jax.models import family

LM_NAME = "model.safetensors"
MIMI_NAME = "mimi-pytorch-e351c8d8@125.safetensors"
UNNAMED_MIMI = "tokenizer-e351c8d8-checkpoint125.safetensors"  # of a config.json that does not name it
MIMI_CONFIG_NAME = "mimi_config.json"
_DEPFORMER = "depformer_"
_CONDITIONERS = {"lut": LutConditioner, "tensor": TensorConditioner}
# Keys that the published files always have; the others are written unless they have their default.
_ALWAYS = (
    *("existing_text_padding_id", "causal", "layer_scale", "max_period", "gating", "norm", "positional_embedding"),
    *("depformer_dim", "depformer_num_heads", "depformer_num_layers", "depformer_dim_feedforward"),
    *("depformer_multi_linear", "depformer_pos_emb", "depformer_weights_per_step", "conditioners", "cross_attention"),
)


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Keys on low-rank adapters: whether there are any, the name of their file, their rank, and the factor of B @ A."""

    lora: bool
    lora_name: str | None = None
    lora_rank: int = 128
    lora_scaling: float = 2.0


@dataclasses.dataclass(frozen=True)
class Files:
    """Names of the other files, as given in config.json."""

    lm: str
    mimi: str
    mimi_config: str | None
    tokenizer: str | None
    adapters: Adapters = Adapters(lora=False)


def read_config(values: Mapping[str, Any], where: str) -> tuple[ModelConfig, LMConfig, Files]:
    """Parse the content of a config.json.

    Args:
      values: the decoded JSON.
      where: name of the file, for the error.

    Returns:
      The config, with the published codec; its language model's config; and the names of the other files.

    Raises:
      ConfigError: a key or a value is unknown.
    """
    rest = dict(values)
    names = {key: rest.pop(key, None) for key in ("moshi_name", "mimi_name", "mimi_config_name", "tokenizer_name")}
    for key, name in names.items():
        if name is not None and (not isinstance(name, str) or name.startswith("hf://")):
            raise ConfigError(f"{where}: {key} is {name!r}; expected the name of a file in the same folder")
    model_type = rest.pop("model_type", None)
    if not isinstance(model_type, str):
        raise ConfigError(f"{where}: model_type is {model_type!r}; expected one of {', '.join(family.FAMILIES)}")
    stt, sampling, tts, model_id = (
        _read_settings(rest, key, kind, where)
        for key, kind in (
            ("stt_config", SttConfig),
            ("lm_gen_config", SamplingDefaults),
            ("tts_config", TtsConfig),
            ("model_id", ModelId),
        )
    )
    adapters = Adapters(lora=False)
    if rest.get("lora") is bool(rest.get("lora_name")):  # else refused as unknown keys, with the rest
        given = {key: rest.pop(key) for key in tuple(rest) if key.startswith("lora")}
        adapters = from_dict(Adapters, given, where)
    for key in ("quantize", "gradient_checkpointing"):  # the weights say the one, and training has the other
        rest.pop(key, None)
    lm = read_lm(rest, where)
    config = ModelConfig(
        model_type=model_type,
        lm=lm,
        stt=stt or SttConfig(),
        tts=tts,
        sampling=sampling or SamplingDefaults(),
        model_id=model_id,
    )
    family.check(config, where)
    files = Files(
        names["moshi_name"] or LM_NAME,
        names["mimi_name"] or UNNAMED_MIMI,
        names["mimi_config_name"],
        names["tokenizer_name"],
        adapters,
    )
    return config, lm, files


def _read_settings(rest: dict[str, Any], key: str, kind: type, where: str) -> Any:
    """Remove an object from a config and parse it; None if it is empty or missing."""
    values = rest.pop(key, None)
    return from_dict(kind, values, f"{where}: {key}") if values else None


def read_lm(values: Mapping[str, Any], where: str) -> LMConfig:
    """Parse the flat config of a language model.

    Args:
      values: the decoded JSON, with the language model's keys only.
      where: name of the file, for the error.

    Returns:
      The config.

    Raises:
      ConfigError: a key or a value is unknown.
    """
    flat = {field.name for field in dataclasses.fields(LMConfig)} - {"depformer"}
    depformer = {_DEPFORMER + field.name for field in dataclasses.fields(DepformerConfig)}
    unknown = sorted(values.keys() - flat - depformer)
    if any(key.startswith("lora") for key in unknown):
        raise ConfigError(
            f"{where}: unknown keys {unknown}; merge the adapters into the weights, as moshi's fuse_lora does, then "
            "remove the keys; or put their file beside the weights, with lora true and lora_name its name"
        )
    if unknown:
        raise ConfigError(f"{where}: unknown keys {unknown}; remove them, or use one of {sorted(flat | depformer)}")
    nested: dict[str, Any] = {key: value for key, value in values.items() if key in flat}
    nested["depformer"] = from_dict(
        DepformerConfig,
        {key.removeprefix(_DEPFORMER): value for key, value in values.items() if key in depformer},
        f"{where}: depformer",
    )
    conditioners = values.get("conditioners", {})
    if not isinstance(conditioners, Mapping):
        raise ConfigError(f"{where}: conditioners is {conditioners!r}; expected an object with each by its name")
    nested["conditioners"] = tuple(
        _read_conditioner(name, spec, f"{where}: conditioners: {name}") for name, spec in conditioners.items()
    )
    return from_dict(LMConfig, nested, where)


def _read_conditioner(name: str, spec: Any, where: str) -> Conditioner:
    kind = spec.get("type") if isinstance(spec, Mapping) else None
    config = look_up(_CONDITIONERS, kind, f"{where}: the type")
    values = spec.get(kind)
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: {kind} is {values!r}; expected an object")
    if unknown := sorted((spec.keys() - {"type", kind}) | (values.keys() & {"type", "name"})):
        raise ConfigError(f"{where}: unknown keys {unknown}; remove them")
    return from_dict(config, {"name": name, **values}, where)


def flat_lm(config: LMConfig) -> dict[str, Any]:
    """Return a config with every key in the form of a published file, which is flat and which `read_lm` reads."""
    values = _flat(to_dict(config))
    values["conditioners"] = {
        conditioner.name: {"type": conditioner.type, conditioner.type: _without(to_dict(conditioner), "name", "type")}
        for conditioner in config.conditioners
    }
    return values


def write_lm(config: LMConfig) -> dict[str, Any]:
    """Return what `flat_lm` does, without keys at their defaults that published files leave out."""
    defaults = _flat({field.name: field.default for field in dataclasses.fields(config)} | {"depformer": _DEFAULTS})
    return {key: value for key, value in flat_lm(config).items() if key in _ALWAYS or value != defaults[key]}


_DEFAULTS = to_dict(DepformerConfig())


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    depformer = {_DEPFORMER + key: value for key, value in values["depformer"].items()}
    return {key: value for key, value in values.items() if key != "depformer"} | depformer


def _without(values: dict[str, Any], *keys: str) -> dict[str, Any]:
    """Drop these keys, and keys whose value is None."""
    return {key: value for key, value in values.items() if key not in keys and value is not None}


def write_config(config: ModelConfig, lm: LMConfig, files: Files) -> dict[str, Any]:
    """Return the content of a config.json, for `read_config` and the PyTorch package.

    Args:
      config: config of the model.
      lm: `config.lm`.
      files: names of the other files.

    Returns:
      JSON values.
    """
    values = write_lm(lm)
    values |= {"model_id": to_dict(config.model_id)} if config.model_id else {}
    sampling = _without(to_dict(config.sampling))
    values |= {"lm_gen_config": sampling} if sampling else {}
    if config.tts is not None:
        values["tts_config"] = to_dict(config.tts)
        if not config.tts.multistream:  # only the files of multistream models have the key
            del values["tts_config"]["multistream"]
    values |= {"stt_config": to_dict(config.stt)} if "stt" in family.family_of(config).parts else {}
    values |= {"model_type": config.model_type, "mimi_name": files.mimi}
    values |= {"moshi_name": files.lm} if files.lm != LM_NAME else {}
    values |= {"mimi_config_name": files.mimi_config} if files.mimi_config else {}
    return values | ({"tokenizer_name": files.tokenizer} if files.tokenizer else {})


def write_mimi_config(config: MimiConfig) -> dict[str, Any]:
    """Return the content of the codec's config file, `mimi_config_name`."""
    values = to_dict(config)
    if values["quantizer"]["n_q_semantic"] == QuantizerConfig.n_q_semantic:  # the PyTorch package takes no such key
        del values["quantizer"]["n_q_semantic"]
    # The PyTorch package takes none of these, and computes as their defaults say.
    plain = {"kv_repeat": 1, "cross_attention": False, "rope_scaling": None, "gated_width": None}
    values["transformer"] = {k: v for k, v in values["transformer"].items() if k not in plain or v != plain[k]}
    return values


def with_extra_heads(config: LMConfig, tensors: Tensors) -> LMConfig:
    """Add the pause heads, which published configs omit, from the shapes of the file's tensors.

    Args:
      config: config of the language model.
      tensors: tensors of the language model's file.

    Returns:
      The config with the pause heads.
    """
    shapes = [t.shape for name, t in tensors.items() if name.startswith("extra_heads.") and name.endswith(".weight")]
    if not shapes:
        return config
    return dataclasses.replace(config, extra_heads_num_heads=len(shapes), extra_heads_dim=shapes[0][0])

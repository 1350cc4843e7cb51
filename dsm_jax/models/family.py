"""The registry of model families: one entry per kind of model, from its config to its networks, layouts and loss.

An entry refers to modules of higher ranks (layouts, loss) by dotted path, which the caller resolves with
`pkgutil.resolve_name`, so that this module imports nothing from above its rank.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax.numpy as jnp
from flax import nnx

from dsm_jax.configs import CsmConfig, LMConfig, MimiConfig, ModelConfig, SttConfig, TtsConfig
from dsm_jax.errors import CheckpointError, ConfigError, ModelKindError
from dsm_jax.models.csm import CsmLM
from dsm_jax.models.lm import DelayedStreamsLM
from dsm_jax.models.mimi import Mimi
from dsm_jax.models.parameters import AbstractNetwork, abstract
from dsm_jax.sharding import Sharding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of model.

    Attributes:
      model_type: the family's name in `ModelConfig.model_type`.
      description: noun phrase for one model, with the article, for messages.
      task: the verb for a model's task, for messages; None where the library has no program that runs the family.
      example: a published model's name on the hub.
      parts: the fields of `ModelConfig` that the family uses besides `mimi`, and the class of each.
      check: raises ConfigError for parts that contradict each other.
      language_model: builds the language model from (config, dtype of the activations); None for a codec alone.
      vocabulary: returns the number of the tokenizer's pieces from a config; None without a tokenizer.
      layouts: dotted paths of the modules that read and write the published layouts, by the layout's name.
      loss: dotted path of the loss of fine-tuning, a function of (language model, batch, key, objective); None for a
        family that is not fine-tuned.
    """

    model_type: str
    description: str
    task: str | None
    example: str
    parts: Mapping[str, type]
    check: Callable[[ModelConfig], None] = lambda config: None
    language_model: Callable[[ModelConfig, Any], nnx.Module] | None = None
    vocabulary: Callable[[ModelConfig], int] | None = None
    layouts: Mapping[str, str]
    loss: str | None = None


class Loaded(Protocol):
    """The attributes of a loaded model that `require` reads."""

    @property
    def name(self) -> str:
        """Name for messages."""
        ...

    @property
    def config(self) -> ModelConfig:
        """Config of the model."""
        ...

    @property
    def tokenizer(self) -> object | None:
        """Tokenizer, if there is one."""
        ...


def lm_config(config: ModelConfig) -> LMConfig:
    """Return the config of the delayed-streams language model.

    Raises:
      ConfigError: the model has no such language model.
    """
    if config.lm is None:
        raise ConfigError(
            f"{config.model_type!r} is the config of a model without a delayed-streams language model; use one with it"
        )
    return config.lm


def csm_config(config: ModelConfig) -> CsmConfig:
    """Return the config of a conversational speech model.

    Raises:
      ConfigError: the model is another one.
    """
    if config.csm is None:
        raise ConfigError(f"{config.model_type!r} is not the config of a conversational speech model; use 'csm'")
    return config.csm


def _delayed_lm(config: ModelConfig, dtype: Any) -> nnx.Module:
    return DelayedStreamsLM(lm_config(config), dtype=dtype, rngs=nnx.Rngs(0))


def _csm_lm(config: ModelConfig, dtype: Any) -> nnx.Module:
    return CsmLM(csm_config(config), dtype=dtype, rngs=nnx.Rngs(0))


def _csm_fits_codec(config: ModelConfig) -> None:
    csm, quantizer = csm_config(config), config.mimi.quantizer
    if csm.n_q > quantizer.n_q or csm.card < quantizer.bins:
        raise ConfigError(
            f"csm has {csm.n_q} codebooks of {csm.card} entries and its codec {quantizer.n_q} of {quantizer.bins}; the "
            "codec needs as many codebooks as csm at least, and as many entries at most"
        )


def _text_card(config: ModelConfig) -> int:
    return lm_config(config).text_card


def _generates_text_only(config: ModelConfig) -> None:
    if dep_q := lm_config(config).dep_q:
        raise ConfigError(f"model_type is {config.model_type!r} and dep_q {dep_q}; such a model generates no audio: 0")


def _generates_audio(config: ModelConfig) -> None:
    if not lm_config(config).dep_q:
        raise ConfigError(f"model_type is {config.model_type!r} and dep_q 0; such a model generates audio: 1 or more")


def _speaks(config: ModelConfig) -> None:
    _generates_audio(config)
    lm = lm_config(config)
    # Fixed in the reference's text-to-speech (moshi/models/tts.py:TokenIds), and so in `tts.script`.
    for name, value in (("existing_text_padding_id", 3), ("existing_text_end_padding_id", 0)):
        if (found := getattr(lm, name)) != value:
            raise ConfigError(f"{name} is {found}; text-to-speech models have {value}, as in the reference")


_KYUTAI = "dsm_jax.convert.kyutai"
_SPEECH_TO_SPEECH = "a speech-to-speech model, which this library loads and does not run"

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            model_type="mimi",
            description="a codec without a language model",
            task=None,
            example="kyutai/mimi",
            parts={},
            layouts={"kyutai": _KYUTAI, "transformers": "dsm_jax.convert.transformers_mimi"},
        ),
        Family(
            model_type="stt",
            description="a speech-to-text model",
            task="transcribe",
            example="kyutai/stt-1b-en_fr",
            parts={"lm": LMConfig, "stt": SttConfig},
            check=_generates_text_only,
            language_model=_delayed_lm,
            vocabulary=_text_card,
            layouts={"kyutai": _KYUTAI, "transformers": "dsm_jax.convert.transformers_stt"},
            loss="dsm_jax.training.losses.stt:stt_batch_loss",
        ),
        Family(
            model_type="tts",
            description="a text-to-speech model",
            task="speak",
            example="kyutai/tts-1.6b-en_fr",
            parts={"lm": LMConfig, "tts": TtsConfig},
            check=_speaks,
            language_model=_delayed_lm,
            vocabulary=_text_card,
            layouts={"kyutai": _KYUTAI},
            loss="dsm_jax.training.losses.tts:tts_batch_loss",
        ),
        Family(
            model_type="csm",
            description="a conversational speech model",
            task="speak in conversations",
            example="sesame/csm-1b",
            parts={"csm": CsmConfig},
            check=_csm_fits_codec,
            language_model=_csm_lm,
            vocabulary=lambda config: csm_config(config).text_card,
            layouts={"sesame": "dsm_jax.convert.sesame", "transformers": "dsm_jax.convert.transformers_csm"},
            loss="dsm_jax.training.losses.csm:csm_loss",
        ),
        Family(
            model_type="moshi",
            description=_SPEECH_TO_SPEECH,
            task=None,
            example="kyutai/moshiko-pytorch-bf16",
            parts={"lm": LMConfig},
            check=_generates_audio,
            language_model=_delayed_lm,
            vocabulary=_text_card,
            layouts={"kyutai": _KYUTAI},
        ),
        Family(
            model_type="hibiki",
            description=_SPEECH_TO_SPEECH,
            task=None,
            example="kyutai/hibiki-1b-pytorch-bf16",
            parts={"lm": LMConfig},
            check=_generates_audio,
            language_model=_delayed_lm,
            vocabulary=_text_card,
            layouts={"kyutai": _KYUTAI},
        ),
    )
}
# The parts of ModelConfig, with the default that a part must have in a family without it.
_PARTS = {
    field.name: field.default for field in dataclasses.fields(ModelConfig) if field.name in ("lm", "csm", "stt", "tts")
}


def family_of(config: ModelConfig) -> Family:
    """Return the family of a config.

    Raises:
      ConfigError: an unknown model type.
    """
    if config.model_type not in FAMILIES:
        raise ConfigError(f"model_type is {config.model_type!r}; choose one of {', '.join(FAMILIES)}")
    return FAMILIES[config.model_type]


def check(config: ModelConfig, where: str) -> Family:
    """Check that a config has exactly the parts of its family.

    Args:
      config: config of a whole model.
      where: name of the config's source, for the error.

    Returns:
      The family.

    Raises:
      ConfigError: an unknown model type, a missing or superfluous part, or parts that contradict each other.
    """
    try:
        family = family_of(config)
        for name, kind in family.parts.items():
            if not isinstance(getattr(config, name), kind):
                raise ConfigError(f"{family.description} needs {name}; add it")
        for name, default in _PARTS.items():
            if name not in family.parts and getattr(config, name) != default:
                raise ConfigError(f"{family.description} has no {name}; leave it out")
        family.check(config)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return family


def abstract_model(
    config: ModelConfig, *, decoder: bool = True, dtype: Any = "float32", sharding: Sharding | None = None
) -> dict[str, AbstractNetwork]:
    """Build the networks of a config without weights; nothing is allocated.

    Args:
      config: config of the model.
      decoder: whether the codec has its decoder.
      dtype: dtype of the language model's activations; the codec computes in float32.
      sharding: split of the language model over devices; the codec is split by rows only.

    Returns:
      The networks by name: "mimi", and "lm" if the family has a language model.

    Raises:
      ConfigError: the config does not fit its family, or has a setting that a network does not support.
    """
    build = check(config, "the config").language_model
    rows = None if sharding is None else sharding.rows
    networks = {"mimi": _codec(config.mimi, decoder, rows)}
    if build is None:
        return networks
    return networks | {"lm": _language_model(build, config, jnp.dtype(dtype), sharding)}


# Tracing a constructor takes a second; loading a checkpoint needs the same networks twice, and again the next time.


@functools.lru_cache(maxsize=16)
def _codec(config: MimiConfig, decoder: bool, sharding: Sharding | None) -> AbstractNetwork:
    return abstract(lambda: Mimi(config, decoder=decoder, rngs=nnx.Rngs(0)), sharding)


@functools.lru_cache(maxsize=16)
def _language_model(
    build: Callable[[ModelConfig, Any], nnx.Module], config: ModelConfig, dtype: Any, sharding: Sharding | None
) -> AbstractNetwork:
    return abstract(lambda: build(config, dtype), sharding)


def require(model: Loaded, model_type: str) -> None:
    """Raise unless a model belongs to a family and is complete.

    Args:
      model: the loaded model.
      model_type: name of the family.

    Raises:
      CheckpointError: the model lacks its tokenizer.
      ModelKindError: the model is of another family.
      ConfigError: the model's config does not fit its family.
    """
    wanted, family = FAMILIES[model_type], check(model.config, model.name)
    if family is not wanted:
        raise ModelKindError(
            f"{model.name} is {family.description}; to {wanted.task}, load {wanted.description} such as "
            f"{wanted.example}"
        )
    if wanted.vocabulary is not None and model.tokenizer is None:
        raise CheckpointError(f"{model.name} has no tokenizer; add the published one, and name it in config.json")

"""Families: each entry is complete, and models and configs of another family are refused."""

import dataclasses
import inspect
import pkgutil
import re

import pytest
from flax import nnx

from dsm_jax.checkpoints import Model
from dsm_jax.configs import ModelConfig, SttConfig, TtsConfig
from dsm_jax.convert import layouts, native
from dsm_jax.errors import CheckpointError, ConfigError
from dsm_jax.models import family
from dsm_jax.models.family import FAMILIES, Family, require
from dsm_jax.training.finetune import TASKS
from tests.helpers import csm_model, small

TTS = TtsConfig(audio_delay=0.2)
CONFIGS = {
    "mimi": ModelConfig(model_type="mimi", mimi=small.MIMI),
    "stt": ModelConfig(model_type="stt", lm=small.STT, mimi=small.MIMI),
    "tts": ModelConfig(model_type="tts", lm=small.TTS, mimi=small.MIMI, tts=TTS),
    "csm": ModelConfig(model_type="csm", csm=csm_model.CSM, mimi=small.MIMI),
    "moshi": ModelConfig(model_type="moshi", lm=small.TTS, mimi=small.MIMI),
    "hibiki": ModelConfig(model_type="hibiki", lm=small.TTS, mimi=small.MIMI),
}


def model(model_type: str, *, tokenizer: object = "a tokenizer") -> Model:
    """Make an object with the attributes of a model that `require` reads."""
    return Model(CONFIGS[model_type], None, None, nnx.split(nnx.Module())[0], nnx.State({}), tokenizer, "some-model")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_has_the_networks_that_its_config_describes(model_type):
    networks = family.abstract_model(CONFIGS[model_type])
    assert list(networks) == (["mimi"] if model_type == "mimi" else ["mimi", "lm"])
    assert all(networks[part].parameters for part in networks)
    light = family.abstract_model(CONFIGS[model_type], decoder=False)["mimi"].parameters
    assert light.keys() == {name for name in networks["mimi"].parameters if not name.startswith("decoder.")}


@pytest.mark.parametrize("entry", FAMILIES.values(), ids=FAMILIES)
def test_the_dotted_paths_of_an_entry_resolve(entry: Family):
    fields = {field.name for field in dataclasses.fields(ModelConfig)}
    assert set(entry.parts) <= fields
    for name, path in entry.layouts.items():
        layout = pkgutil.resolve_name(path)
        assert (layout.NAME, layout.__name__) == (name, path)
        assert all(inspect.isfunction(getattr(layout, f)) for f in ("recognises", "open_checkpoint", "write"))
    if entry.loss is not None:
        assert list(inspect.signature(pkgutil.resolve_name(entry.loss)).parameters) == [
            "lm",
            "batch",
            "key",
            "objective",
        ]


def test_families_with_a_loss_are_those_that_can_be_fine_tuned():
    assert {name for name, entry in FAMILIES.items() if entry.loss is not None} == TASKS.keys()


def test_a_dotted_path_that_does_not_resolve_is_caught():
    with pytest.raises((ImportError, AttributeError)):
        pkgutil.resolve_name("dsm_jax.training.losses.stt:no_such_loss")


def test_every_layout_belongs_to_a_family_or_is_the_native_one():
    assert layouts.layouts()[0] is native
    assert layouts.layout_names() == ["orbax", "kyutai", "transformers", "sesame"]
    assert len(layouts.layouts()) == 6


@pytest.mark.parametrize(
    ("found", "wanted", "message"),
    [
        (
            "mimi",
            "stt",
            "some-model is a codec without a language model; to transcribe, load a speech-to-text model such as "
            "kyutai/stt-1b-en_fr",
        ),
        (
            "tts",
            "stt",
            "some-model is a text-to-speech model; to transcribe, load a speech-to-text model such as "
            "kyutai/stt-1b-en_fr",
        ),
        (
            "stt",
            "tts",
            "some-model is a speech-to-text model; to speak, load a text-to-speech model such as kyutai/tts-1.6b-en_fr",
        ),
        (
            "moshi",
            "tts",
            "some-model is a speech-to-speech model, which this library loads and does not run; to speak, load a "
            "text-to-speech model such as kyutai/tts-1.6b-en_fr",
        ),
    ],
)
def test_a_model_of_another_family_is_refused(found, wanted, message):
    with pytest.raises(CheckpointError, match=f"^{re.escape(message)}$"):
        require(model(found), wanted)


def test_a_model_of_the_family_passes_and_without_its_tokenizer_does_not():
    for model_type in ("stt", "tts"):
        require(model(model_type), model_type)
        message = "^some-model has no tokenizer; add the published one, and name it in config.json$"
        with pytest.raises(CheckpointError, match=message):
            require(model(model_type, tokenizer=None), model_type)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            dataclasses.replace(CONFIGS["stt"], model_type="sst"),
            "model_type is 'sst'; choose one of mimi, stt, tts, csm",
        ),
        (dataclasses.replace(CONFIGS["stt"], lm=None), "a speech-to-text model needs lm; add it"),
        (dataclasses.replace(CONFIGS["tts"], tts=None), "a text-to-speech model needs tts; add it"),
        (dataclasses.replace(CONFIGS["stt"], tts=TTS), "a speech-to-text model has no tts; leave it out"),
        (
            dataclasses.replace(CONFIGS["tts"], stt=SttConfig(audio_delay_seconds=0.5)),
            "a text-to-speech model has no stt; leave it out",
        ),
        (
            dataclasses.replace(CONFIGS["mimi"], lm=small.STT),
            "a codec without a language model has no lm; leave it out",
        ),
        (
            dataclasses.replace(CONFIGS["stt"], lm=small.TTS),
            "model_type is 'stt' and dep_q 4; such a model generates no",
        ),
        (
            dataclasses.replace(CONFIGS["tts"], lm=small.STT),
            "model_type is 'tts' and dep_q 0; such a model generates au",
        ),
        (
            dataclasses.replace(CONFIGS["tts"], lm=dataclasses.replace(small.TTS, existing_text_padding_id=2)),
            "existing_text_padding_id is 2; text-to-speech models have 3, as in the reference",
        ),
        (
            dataclasses.replace(CONFIGS["tts"], lm=dataclasses.replace(small.TTS, existing_text_end_padding_id=1)),
            "existing_text_end_padding_id is 1; text-to-speech models have 0, as in the reference",
        ),
    ],
)
def test_a_config_that_does_not_fit_its_family_is_refused(config, message):
    with pytest.raises(ConfigError, match=f"^somewhere: {re.escape(message)}"):
        family.check(config, "somewhere")
    with pytest.raises(ConfigError, match=re.escape(message)):
        family.abstract_model(config)


def test_lm_config_refuses_a_codec():
    with pytest.raises(ConfigError, match="'mimi' is the config of a model without a delayed-streams"):
        family.lm_config(CONFIGS["mimi"])

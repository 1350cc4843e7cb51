"""Checkpoint folders with random weights in miniature, written by the library's own export: no torch needed."""

import dataclasses
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsm_jax import checkpoints
from dsm_jax.configs import LMConfig, ModelConfig, SttConfig, TtsConfig
from dsm_jax.convert import convert
from dsm_jax.models.family import abstract_model
from dsm_jax.models.parameters import flatten
from dsm_jax.tokenizers import load_tokenizer
from tests.helpers import small
from tests.helpers.tokenizer_maker import make_tokenizer

# What the published models have in common, so that every layout can hold it.
PLAIN_STT = dataclasses.replace(
    small.STT, delays=(0,) * 4, text_card=64, text_card_out=None, bias_proj=False, extra_heads_num_heads=0
)


def model_config(lm: LMConfig | None) -> ModelConfig:
    """The config of a codec alone, or of a model that listens or speaks, as its language model does."""
    if lm is None:
        return ModelConfig(model_type="mimi", mimi=small.MIMI)
    if lm.dep_q:
        return ModelConfig(model_type="tts", lm=lm, mimi=small.MIMI, tts=TtsConfig(audio_delay=0.2))
    stt = SttConfig(audio_delay_seconds=0.5, audio_silence_prefix_seconds=1.0)
    return ModelConfig(model_type="stt", lm=lm, mimi=small.MIMI, stt=stt)


def random_model(folder: Path, lm: LMConfig | None, *, seed: int = 0) -> checkpoints.Model:
    """A model of `small.MIMI` and this language model; every parameter is drawn, norms and biases too."""
    config, tokenizer = model_config(lm), None
    if lm is not None and lm.text_card >= 48:
        tokenizer = load_tokenizer(make_tokenizer(folder / "words.model", lm.text_card))
    made = abstract_model(config)

    random = np.random.default_rng(seed)

    def draw(part: str) -> nnx.State:
        parameters = made[part].parameters.items()
        return made[part].unflatten(
            {name: jnp.asarray(random.normal(size=p.shape), jnp.float32) for name, p in parameters}
        )

    return checkpoints.Model(
        config=config,
        lm_def=made["lm"].graph if lm else None,
        lm_params=draw("lm") if lm else None,
        mimi_def=made["mimi"].graph,
        mimi_params=draw("mimi"),
        tokenizer=tokenizer,
        name="random",
    )


def untrained_lm(lm: LMConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """A language model to be trained: its parameters as `DelayedStreamsLM` draws them, roughly, and fast."""
    made, random = abstract_model(model_config(lm))["lm"], np.random.default_rng(0)
    drawn = {
        name: jnp.ones(p.shape) if len(p.shape) < 2 else jnp.asarray(0.25 * random.normal(size=p.shape), jnp.float32)
        for name, p in made.parameters.items()
    }
    return made.graph, made.unflatten(drawn)


def make_checkpoint(folder: Path, to: str, *, lm: LMConfig | None = PLAIN_STT, dtype: str = "float32") -> Path:
    """Write a random model in a layout and return its folder."""
    native = folder / "made"
    checkpoints.save(random_model(folder, lm), native)
    convert(native, folder / to, to=to, dtype=dtype)
    return folder / to


def copy_of(source: Path, target: Path) -> Path:
    """A copy of a folder, to be spoilt."""
    return Path(shutil.copytree(source, target))


def arrays_of(model: checkpoints.Model) -> dict[str, np.ndarray]:
    """Every parameter of a model by network and dotted path, in float32."""
    states = {"lm": model.lm_params, "mimi": model.mimi_params}
    return {
        f"{part}.{name}": np.asarray(jnp.asarray(array, jnp.float32))
        for part, state in states.items()
        if state is not None
        for name, array in flatten(state).items()
    }


def assert_same_weights(model: checkpoints.Model, expected: checkpoints.Model, *, without: str = "-") -> None:
    """Fails unless the models have the same parameters, bit for bit; `without` names one that may be missing."""
    found, wanted = arrays_of(model), arrays_of(expected)
    assert found.keys() | {without} == wanted.keys() | {without}
    different = [name for name, array in found.items() if not np.array_equal(array, wanted[name])]
    assert different == []

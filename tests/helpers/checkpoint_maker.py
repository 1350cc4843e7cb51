"""Make miniature checkpoint folders with random weights, written by the library's own export, without torch."""

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
from dsm_jax.tokenizers import Tokenizer, load_tokenizer
from tests.helpers import small
from tests.helpers.tokenizer_maker import make_tokenizer

# Only features that every layout can hold.
PLAIN_STT = dataclasses.replace(
    small.STT, delays=(0,) * 4, text_card=64, text_card_out=None, bias_proj=False, extra_heads_num_heads=0
)


def model_config(lm: LMConfig | None) -> ModelConfig:
    """Make the config of a codec alone, or of a speech-to-text or text-to-speech model by its language model."""
    if lm is None:
        return ModelConfig(model_type="mimi", mimi=small.MIMI)
    if lm.dep_q:
        return ModelConfig(model_type="tts", lm=lm, mimi=small.MIMI, tts=TtsConfig(audio_delay=0.2))
    stt = SttConfig(audio_delay_seconds=0.5, audio_silence_prefix_seconds=1.0)
    return ModelConfig(model_type="stt", lm=lm, mimi=small.MIMI, stt=stt)


def random_model(folder: Path, lm: LMConfig | None, *, seed: int = 0) -> checkpoints.Model:
    """Make a model of `small.MIMI` and a language model; all parameters are random, norms and biases too."""
    config, tokenizer = model_config(lm), None
    if lm is not None and lm.text_card >= 48:
        tokenizer = load_tokenizer(make_tokenizer(folder / "words.model", lm.text_card))
    return drawn_model(config, tokenizer, seed=seed)


def drawn_model(config: ModelConfig, tokenizer: Tokenizer | None, *, seed: int = 0) -> checkpoints.Model:
    """Make a model of any family; all parameters are random, norms and biases too."""
    made, random = abstract_model(config), np.random.default_rng(seed)

    def draw(part: str) -> nnx.State:
        parameters = made[part].parameters.items()
        return made[part].unflatten(
            {name: jnp.asarray(random.normal(size=p.shape), jnp.float32) for name, p in parameters}
        )

    return checkpoints.Model(
        config=config,
        lm_def=made["lm"].graph if "lm" in made else None,
        lm_params=draw("lm") if "lm" in made else None,
        mimi_def=made["mimi"].graph,
        mimi_params=draw("mimi"),
        tokenizer=tokenizer,
        name="random",
    )


def untrained_lm(lm: LMConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """Make a language model for training, with weights of about the initial scale, without compiling initialisers."""
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
    """Copy a folder, for a test that damages it."""
    return Path(shutil.copytree(source, target))


def arrays_of(model: checkpoints.Model) -> dict[str, np.ndarray]:
    """Return every parameter of a model by network and dotted path, in float32."""
    states = {"lm": model.lm_params, "mimi": model.mimi_params}
    return {
        f"{part}.{name}": np.asarray(jnp.asarray(array, jnp.float32))
        for part, state in states.items()
        if state is not None
        for name, array in flatten(state).items()
    }


def assert_same_weights(model: checkpoints.Model, expected: checkpoints.Model, *, without: str = "-") -> None:
    """Assert that models have the same parameters, bit for bit; `without` names one that may be missing."""
    found, wanted = arrays_of(model), arrays_of(expected)
    assert found.keys() | {without} == wanted.keys() | {without}
    different = [name for name, array in found.items() if not np.array_equal(array, wanted[name])]
    assert different == []

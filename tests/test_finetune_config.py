"""Settings of fine-tuning and of losses: what cannot work is refused before anything is loaded."""

import dataclasses
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from dsm_jax.configs.json import from_dict, to_dict
from dsm_jax.errors import ConfigError
from dsm_jax.training.codebooks import CodebookRule
from dsm_jax.training.finetune import FinetuneConfig
from dsm_jax.training.loop import RunConfig
from dsm_jax.training.lora import LoraConfig
from dsm_jax.training.losses.codec import CodecObjective
from dsm_jax.training.losses.csm import CsmObjective
from dsm_jax.training.losses.stt import SttObjective
from dsm_jax.training.losses.tts import TtsObjective
from dsm_jax.training.step import OptimizerConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seconds": 0.5}, r"a row has 0\.5 seconds of a recording; give 1 to 3600"),
        ({"seconds": 1e9}, r"a row has 1000000000\.0 seconds of a recording; give 1 to 3600"),
        ({"prefix_seconds": math.nan}, "a prefix has nan seconds of a recording; give 1 to 3600"),
        ({"run": {"steps": 1, "seed": -1}}, "the seed of a run is -1; give a number from 0 to 4294967295"),
        ({"run": {"steps": 1, "seed": 2**70}}, f"the seed of a run is {2**70}; give a number from 0 to"),
        ({"run": {"steps": 2**40}}, f"steps is {2**40}; expected a number of less than 32 bits"),
        ({"batch_size": 2**40}, f"batch_size is {2**40}; expected a number of less than 32 bits"),
        ({"optimizer": {"learning_rate": -1.0}}, r"learning_rate of the optimizer is -1\.0; give a number above 0"),
        ({"optimizer": {"learning_rate": math.nan}}, "learning_rate of the optimizer is nan; give a number above 0"),
        ({"optimizer": {"warmup": -1}}, "warmup of the optimizer is -1; give a number of steps, or 0 for none"),
        ({"optimizer": {"b2": 1.0}}, r"b2 of the optimizer is 1\.0; give a number from 0 to below 1"),
        ({"optimizer": {"clip": 0.0}}, r"clip of the optimizer is 0\.0; give a norm above 0"),
        ({"lora": {"alpha": -1.0}}, r"the alpha of the adapters is -1\.0; give a number above 0"),
        ({"stt": {"text_dropout": 2.0}}, r"stt: text_dropout is 2\.0; give a share, from 0 to 1"),
        ({"tts": {"unconditional": -0.1}}, r"tts: unconditional is -0\.1; give a share, from 0 to 1"),
        ({"stt": {"padding_weight": math.nan}}, "stt: padding_weight is nan; give a weight of 0, .* or more"),
        ({"tts": {"semantic": -7.0}}, r"tts: semantic is -7\.0; give a weight of 0, .* or more"),
        ({"csm": {"depth": math.inf}}, "csm: depth is inf; give a weight of 0, .* or more"),
        ({"positions": 0}, "positions is 0; give at least 1, or null for the longest conversation's"),
        ({"csm": {"depth_share": 0.0}}, r"depth_share is 0\.0; give a share of the frames, above 0 and at most 1"),
        ({"batch_size": 0}, "batch_size is 0, accumulate 1 and encode_batch 8; give at least 1"),
        ({"batch_size": 8, "accumulate": 3}, "a batch_size that is a multiple of accumulate"),
        ({"lora": {"rank": 0}}, "the rank of the adapters is 0"),
        ({"lora": {}, "strength": 0.0}, r"the strength of the adapters is 0\.0; give a number above 0"),
        ({"strength": 0.5}, r"strength is 0\.5, and the whole model is trained; leave it out, or give lora"),
        ({"leraning_rate": 1.0}, "unknown keys"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    values = {"data": "data", "output": "out", "run": {"steps": 1}, **changes}
    with pytest.raises(ConfigError, match=message):
        from_dict(FinetuneConfig, values, "config.json")


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (SttObjective, {"random_codes": 1.5}, r"random_codes is 1\.5; give a share, from 0 to 1"),
        (TtsObjective, {"text": math.nan}, "text is nan; give a weight of 0, which leaves that part out, or more"),
        (CsmObjective, {"backbone": -1.0}, r"backbone is -1\.0; give a weight"),
        (CodecObjective, {"waveform": -0.2}, r"waveform is -0\.2; give a weight"),
        (CodecObjective, {"codebook_dropout": 2.0}, r"codebook_dropout is 2\.0; give a share"),
        (CodecObjective, {"look_ahead": -1}, "look_ahead is -1 and decoded_frames 12; give 0 frames or more to look a"),
        (CodecObjective, {"decoded_frames": 0}, "look_ahead is 3 and decoded_frames 0; give .*, and 1 or more to deco"),
        (CodecObjective, {"decoded_frames": 1.5}, r"decoded_frames is 1\.5; expected a whole number"),
        (
            CodebookRule,
            {"decay": 1.0},
            r"decay of the codebooks is 1\.0 and dead 0\.02; give a decay from 0 to below 1",
        ),
        (CodebookRule, {"dead": math.nan}, "dead nan; give .* and a number of uses of 0 or more"),
        (OptimizerConfig, {"warmup": 2.5}, r"warmup is 2\.5; expected a whole number"),
        (LoraConfig, {"rank": 2.5}, r"rank is 2\.5; expected a whole number"),
        (
            LoraConfig,
            {"targets": "self_attn"},
            r"targets are the text 'self_attn'; give a tuple of texts: \('self_attn',",
        ),
    ],
)
def test_impossible_settings_are_refused_where_they_are_made(kind, changes, message):
    with pytest.raises(ConfigError, match=message):
        kind(**changes)


def test_numbers_of_numpy_are_settings_too():
    assert LoraConfig(rank=np.int64(2)) == LoraConfig(rank=2)
    assert SttObjective(text_dropout=np.float32(0.5)).text_dropout == 0.5


def test_a_config_survives_json():
    config = FinetuneConfig(
        data="a",
        output="b",
        run=RunConfig(steps=4, log_every=1),
        validation="c",
        optimizer=OptimizerConfig(warmup=1),
        stt=SttObjective(text_dropout=0.2),
        lora=LoraConfig(rank=4),
    )
    assert from_dict(FinetuneConfig, to_dict(config), "config.json") == config


def test_a_config_of_paths_dtypes_and_numbers_of_numpy_is_that_of_texts_and_numbers():
    plain = FinetuneConfig(data="a", output="b", run=RunConfig(steps=4), seconds=2.0, compute_dtype="bfloat16")
    given: dict = {"data": Path("a"), "seconds": np.float32(2), "compute_dtype": jnp.dtype("bfloat16")}
    assert to_dict(dataclasses.replace(plain, **given)) == to_dict(plain)

"""Configs: the published ones, what follows from them, and everything that strict reading refuses."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from dsm_jax import presets, strict
from dsm_jax.configs import (
    LMConfig,
    MimiConfig,
    ModelConfig,
    QuantizerConfig,
    SeanetConfig,
    SttConfig,
    Table,
    TransformerConfig,
    gating_dim,
)
from dsm_jax.convert import kyutai
from dsm_jax.errors import ConfigError
from tests import small

PUBLISHED = Path(__file__).parent / "published"
LM = strict.to_dict(small.STT)


def published(name: str) -> ModelConfig:
    return kyutai.read_config(json.loads((PUBLISHED / f"{name}.config.json").read_text()), name)[0]


def test_the_speech_to_text_models_are_what_was_published():
    small_model, large_model = published("stt-1b-en_fr"), published("stt-2.6b-en")
    assert (small_model.lm.dim, small_model.lm.num_layers, small_model.lm.context) == (2048, 16, 750)
    assert (large_model.lm.dim, large_model.lm.num_layers, large_model.lm.context) == (2048, 48, 375)
    assert small_model.stt == SttConfig(audio_delay_seconds=0.5, audio_silence_prefix_seconds=0.0)
    assert large_model.stt == SttConfig(audio_delay_seconds=2.5, audio_silence_prefix_seconds=1.0)
    for config in (small_model.lm, large_model.lm):
        assert (config.dep_q, config.user_q, config.delays) == (0, 32, (0,) * 33)
        assert (gating_dim(config.dim, config.transformer.dim_feedforward), config.transformer.head_dim) == (
            5632,
            2048 // config.num_heads,
        )


def test_the_presets_are_what_was_published():
    assert (presets.STT_1B.lm, presets.STT_1B.stt) == (published("stt-1b-en_fr").lm, published("stt-1b-en_fr").stt)
    assert (presets.STT_2_6B.lm, presets.STT_2_6B.stt) == (published("stt-2.6b-en").lm, published("stt-2.6b-en").stt)


def test_the_text_to_speech_model_is_what_was_published():
    config = published("tts-1.6b-en_fr").lm
    assert (config.dep_q, config.user_q, config.delays[:3]) == (32, 0, (0, 0, 2))
    assert config.depformer_schedule == (0, 1, 2, 3, 4, 5, 6, 7, *[8] * 8, *[9] * 8, *[10] * 8)
    assert (config.text_logits, config.depformer_feedforward) == (8000, 3072)
    assert config.fuser["cross"] == ["speaker_wavs"]
    assert config.transformer.cross_attention


def test_the_defaults_of_the_codec_are_the_published_codec():
    mimi = MimiConfig()
    assert (mimi.frame_size, mimi.seanet.hop, mimi.resample_stride) == (1920, 960, 2)
    assert (mimi.quantizer.n_q, mimi.quantizer.bins, mimi.transformer.context) == (32, 2048, 250)


def test_what_a_file_leaves_out_is_derived():
    config = dataclasses.replace(
        small.TTS, depformer_weights_per_step_schedule=None, depformer_dim_feedforward=None, text_card_out=5
    )
    assert (config.depformer_schedule, config.depformer_feedforward, config.text_logits) == ((0, 1, 2, 3), 32, 5)
    assert (small.STT.text_logits, small.STT.user_q, small.TTS.text_logits) == (18, 3, 20)
    assert (
        TransformerConfig(d_model=8, num_heads=4, num_layers=1, dim_feedforward=9, context=1, kv_repeat=2).num_kv_heads
        == 2
    )


@pytest.mark.parametrize(
    "config",
    [
        small.MIMI,
        small.STT,
        small.TTS,
        MimiConfig(),
        ModelConfig(model_type="mimi"),
        ModelConfig(model_type="stt", lm=small.STT, mimi=small.MIMI, model_id=Table(sig="x", epoch=1)),
    ],
)
def test_a_config_survives_json(config):
    text = json.dumps(strict.to_dict(config))
    again = strict.from_dict(type(config), json.loads(text), "again")
    assert again == config
    assert hash(again) == hash(config)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (
            SttConfig,
            {"delay": 1},
            "f.json: unknown keys ['delay']; remove them, or use one of ['audio_delay_seconds', ",
        ),
        (LMConfig, LM | {"a": 1, "z": 2}, "f.json: unknown keys ['a', 'z']; remove them"),
        (MimiConfig, {"seanet": {"pad": 1}}, "f.json: seanet: unknown keys ['pad']; remove them"),
        (
            LMConfig,
            {k: v for k, v in LM.items() if k not in ("dim", "card")},
            "f.json: the keys ['card', 'dim'] are missing; LMConfig needs them",
        ),
        (SttConfig, [1], "f.json: expected an object with the fields of SttConfig, got [1]"),
        (MimiConfig, {"seanet": 3}, "f.json: seanet: expected an object with the fields of SeanetConfig, got 3"),
        (MimiConfig, {"seanet": None}, "f.json: seanet is None; expected SeanetConfig"),
        (QuantizerConfig, {"n_q": 8.0}, "f.json: n_q is 8.0; expected int"),
        (QuantizerConfig, {"n_q": True}, "f.json: n_q is True; expected int"),
        (QuantizerConfig, {"n_q": None}, "f.json: n_q is None; expected int"),
        (SttConfig, {"audio_delay_seconds": "1"}, "f.json: audio_delay_seconds is '1'; expected float"),
        (SttConfig, {"audio_delay_seconds": False}, "f.json: audio_delay_seconds is False; expected float"),
        (SeanetConfig, {"causal": 1}, "f.json: causal is 1; expected bool"),
        (SeanetConfig, {"ratios": 8}, "f.json: ratios is 8; expected tuple"),
        (SeanetConfig, {"ratios": [8, "6"]}, "f.json: ratios is '6'; expected int"),
        (LMConfig, LM | {"text_card_out": "5"}, "f.json: text_card_out is '5'; expected int | None"),
        (LMConfig, LM | {"conditioners": []}, "f.json: conditioners is []; expected Table"),
    ],
)
def test_what_is_not_understood_is_refused(kind, values, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        strict.from_dict(kind, values, "f.json")


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (SeanetConfig, {"causal": False}, "seanet.causal is False; Mimi has True"),
        (SeanetConfig, {"activation": "GELU"}, "seanet.activation is 'GELU'; Mimi has 'ELU'"),
        (SeanetConfig, {"pad_mode": "reflect"}, "seanet.pad_mode is 'reflect'; Mimi has 'constant'"),
        (SeanetConfig, {"true_skip": False}, "seanet.true_skip is False; Mimi has True"),
        (SeanetConfig, {"norm": "batch"}, "seanet.norm is 'batch'; use 'none' or 'weight_norm'"),
        (MimiConfig, {"frame_rate": 13.0}, "one frame is 1846 samples, which the SEANet hop 960 does not divide"),
        (
            MimiConfig,
            {"quantizer": {"input_dimension": 7}},
            "seanet, transformer and quantizer are [7, 512] wide; use one",
        ),
        (LMConfig, LM | {"causal": False}, "causal is false; the library streams"),
        (LMConfig, LM | {"norm": "batch"}, "norm is 'batch'; choose one of ('layer_norm', "),
        (LMConfig, LM | {"gating": "gelu"}, "gating is 'gelu'; choose 'none' or 'silu'"),
        (LMConfig, LM | {"positional_embedding": "alibi"}, "positional_embedding is 'alibi'; choose one of ('none', "),
        (LMConfig, LM | {"num_heads": 3}, "width 16, 3 heads and kv_repeat 1 do not divide; the width must be"),
        (LMConfig, LM | {"kv_repeat": 3}, "width 16, 4 heads and kv_repeat 3 do not divide; the width must be"),
        (LMConfig, LM | {"delays": [0, 1]}, "2 delays for 1 text and 3 audio streams; give 4"),
        (LMConfig, LM | {"delays": [0, 0, -1, 0]}, "the delays are (0, 0, -1, 0); none can be negative"),
        (LMConfig, LM | {"dep_q": 4}, "dep_q is 4 of n_q 3; generate at most n_q"),
        (LMConfig, LM | {"norm_emb": True}, "norm_emb is true; no published model normalises its embeddings"),
        (
            LMConfig,
            LM | {"dep_q": 2, "depformer_weights_per_step_schedule": [0]},
            "the depformer's schedule has 1 entries; give one per generated codebook, 2",
        ),
    ],
)
def test_what_the_library_cannot_honour_is_refused(kind, values, message):
    with pytest.raises(ConfigError, match=re.escape(f"f.json: {message}")):
        strict.from_dict(kind, values, "f.json")


def test_whole_numbers_pass_as_floats_and_lists_as_tuples():
    config = strict.from_dict(LMConfig, LM | {"max_period": 10_000, "delays": [0, 0, 0, 1]}, "f.json")
    assert (config.max_period, type(config.max_period), config.delays) == (10_000.0, float, (0, 0, 0, 1))

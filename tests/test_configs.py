"""Configs: the published ones, their derived settings, and all errors of strict reading."""

import dataclasses
import json
import re
from pathlib import Path

import pytest

from dsm_jax.configs import (
    DepformerConfig,
    Fuser,
    LMConfig,
    LutConditioner,
    MimiConfig,
    ModelConfig,
    ModelId,
    QuantizerConfig,
    SamplingDefaults,
    SeanetConfig,
    SttConfig,
    TransformerConfig,
    TtsConfig,
    gating_dim,
    presets,
)
from dsm_jax.configs.json import from_dict, to_dict
from dsm_jax.convert import kyutai_config
from dsm_jax.errors import ConfigError
from tests.helpers import small

PUBLISHED = Path(__file__).parent / "published"
LM = to_dict(small.STT)
WIDE = {"d_model": 16, "num_heads": 4, "num_layers": 1, "dim_feedforward": 9, "context": 1}
WHOLE = ModelConfig(
    model_type="tts",
    lm=small.TTS,
    mimi=small.MIMI,
    tts=TtsConfig(audio_delay=0.2, second_stream_ahead=2),
    sampling=SamplingDefaults(temp=0.6, text_temp=0.6),
    model_id=ModelId(sig="x", epoch=1),
)


def published(name: str) -> ModelConfig:
    return kyutai_config.read_config(json.loads((PUBLISHED / f"{name}.config.json").read_text()), name)[0]


def test_the_speech_to_text_configs_are_the_published_ones():
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


def test_the_presets_are_the_published_configs():
    assert (presets.STT_1B.lm, presets.STT_1B.stt) == (published("stt-1b-en_fr").lm, published("stt-1b-en_fr").stt)
    assert (presets.STT_2_6B.lm, presets.STT_2_6B.stt) == (published("stt-2.6b-en").lm, published("stt-2.6b-en").stt)


def test_the_text_to_speech_config_is_the_published_one():
    config = published("tts-1.6b-en_fr").lm
    assert (config.dep_q, config.user_q, config.delays[:3]) == (32, 0, (0, 0, 2))
    assert config.depformer_schedule == (0, 1, 2, 3, 4, 5, 6, 7, *[8] * 8, *[9] * 8, *[10] * 8)
    assert (config.text_logits, config.depformer_feedforward) == (8000, 3072)
    assert config.fuser.cross == ("speaker_wavs",)
    assert config.transformer.cross_attention


def test_the_defaults_of_the_codec_are_the_published_codec():
    mimi = MimiConfig()
    assert (mimi.frame_size, mimi.seanet.hop, mimi.resample_stride) == (1920, 960, 2)
    assert (mimi.quantizer.n_q, mimi.quantizer.bins, mimi.transformer.context) == (32, 2048, 250)


def test_missing_settings_of_a_file_are_derived():
    depformer = dataclasses.replace(small.TTS.depformer, weights_per_step_schedule=None, dim_feedforward=None)
    config = dataclasses.replace(small.TTS, depformer=depformer, text_card_out=5)
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
        ModelConfig(model_type="stt", lm=small.STT, mimi=small.MIMI, model_id=ModelId(sig="x", epoch=1)),
        WHOLE,
    ],
)
def test_a_config_survives_json(config):
    text = json.dumps(to_dict(config))
    again = from_dict(type(config), json.loads(text), "again")
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
        (LMConfig, LM | {"conditioners": {}}, "f.json: conditioners is {}; expected tuple"),
        (
            LMConfig,
            LM | {"conditioners": [{"type": "t5"}]},
            "f.json: conditioners: the type is 't5'; choose one of ['lut'",
        ),
        (LMConfig, LM | {"conditioners": ["cfg"]}, "f.json: conditioners: the type is 'cfg'; choose one of ['lut', 't"),
        (
            LMConfig,
            LM | {"conditioners": [{"type": "tensor", "name": "cfg", "dim": 3, "n_bins": 2}]},
            "f.json: conditioners: unknown keys ['n_bins']; remove them",
        ),
        (TtsConfig, {}, "f.json: the keys ['audio_delay'] are missing; TtsConfig needs them"),
    ],
)
def test_unknown_keys_and_wrong_types_are_refused(kind, values, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        from_dict(kind, values, "f.json")


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
        (SttConfig, {"audio_delay_seconds": float("inf")}, "audio_delay_seconds is inf; expected seconds from 0"),
        (TtsConfig, {"audio_delay": -1.0}, "audio_delay is -1.0; expected seconds from 0"),
        (MimiConfig, {"sample_rate": 0}, "sample_rate is 0; expected a number above 0"),
        (MimiConfig, {"frame_rate": float("nan")}, "frame_rate is nan; expected a number above 0"),
        (SeanetConfig, {"ratios": [8, 0]}, "seanet.ratios is (8, 0); expected numbers above 0"),
        (QuantizerConfig, {"bins": -1}, "bins is -1; expected a number above 0"),
        (QuantizerConfig, {"n_q": 4, "n_q_semantic": 5}, "n_q_semantic is 5 of n_q 4; use 1"),
        (LMConfig, LM | {"num_heads": 0}, "num_heads is 0; expected a number above 0"),
        (LMConfig, LM | {"hidden_scale": float("inf")}, "hidden_scale is inf; expected a number above 0"),
        (LMConfig, LM | {"dep_q": 2, "depformer": {"num_heads": 0}}, "num_heads is 0; expected a number above 0"),
        (
            LMConfig,
            LM | {"dep_q": 2, "depformer": {"dim": 16, "num_heads": 3}},
            "the depformer's width 16 and 3 heads do not divide; the width must be",
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
        (TransformerConfig, WIDE | {"input_dimension": 8}, "input_dimension is 8; a transformer has no projection of"),
        (TransformerConfig, WIDE | {"output_dimensions": [16, 16]}, "output_dimensions is (16, 16); a transformer has"),
        (LMConfig, LM | {"norm_emb": True}, "norm_emb is true; no published model normalises its embeddings"),
        (
            LMConfig,
            LM | {"dep_q": 2, "depformer": {"weights_per_step_schedule": [0]}},
            "the depformer's schedule has 1 entries; give one per generated codebook, 2",
        ),
    ],
)
def test_settings_that_the_library_does_not_support_are_refused(kind, values, message):
    with pytest.raises(ConfigError, match=re.escape(f"f.json: {message}")):
        from_dict(kind, values, "f.json")


MISSPELT = {
    "tts_config": {"audio_dealy": 1.0},
    "lm_gen_config": {"temperature": 0.6},
    "model_id": {"signature": "x", "epoch": 1},
    "stt_config": {"delay": 1.0},
    "fuser": {"sums": ["cfg"]},
    "conditioners": {"cfg": {"type": "lut", "lut": {"n_bins": 1, "dims": 3}}},
    "depformer_dims": 4,
    "depformer": {},
}


@pytest.mark.parametrize("key", MISSPELT)
def test_a_misspelt_key_of_any_part_of_kyutais_file_is_refused_by_its_name(key):
    values = json.loads((PUBLISHED / "tts-1.6b-en_fr.config.json").read_text()) | {key: MISSPELT[key]}
    wrong = {
        "tts_config": "audio_dealy",
        "lm_gen_config": "temperature",
        "model_id": "signature",
        "stt_config": "delay",
    }
    wrong |= {"fuser": "sums", "conditioners": "dims"}
    within = f": {key}: cfg" if key == "conditioners" else f": {key}" if key in wrong else ""
    with pytest.raises(
        ConfigError, match=rf"^c\.json{within}: unknown keys \['{wrong.get(key, key)}'\]; remove them, or"
    ):
        kyutai_config.read_config(values, "c.json")


def _with(config: dict, path: str, key: str) -> dict:
    """Copy a config of plain values, with an additional key at a dotted path."""
    copy = json.loads(json.dumps(config))
    place = copy
    for step in filter(None, path.split(".")):
        place = place[int(step) if step.isdigit() else step]
    place[key] = 1
    return copy


@pytest.mark.parametrize(
    "path",
    ["", "lm", "lm.depformer", "lm.conditioners.0", "lm.conditioners.1", "lm.fuser", "tts", "sampling", "model_id"],
)
def test_a_misspelt_key_of_any_part_of_a_config_is_refused_by_its_name(path):
    values = to_dict(WHOLE)
    assert from_dict(ModelConfig, values, "c.json") == WHOLE
    with pytest.raises(ConfigError, match=r"unknown keys \['misspelt'\]; remove them, or use one of"):
        from_dict(ModelConfig, _with(values, path, "misspelt"), "c.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conditioners": {"x": {"type": "t5"}}}, "conditioners: x: the type is 't5'; choose one of ['lut', 'tensor']"),
        ({"conditioners": {"x": 3}}, "conditioners: x: the type is None; choose one of ['lut', 'tensor']"),
        ({"conditioners": {"x": {"type": "lut"}}}, "conditioners: x: lut is None; expected an object"),
        (
            {"conditioners": {"x": {"type": "lut", "lut": {}, "dim": 3}}},
            "conditioners: x: unknown keys ['dim']; remove",
        ),
        ({"conditioners": {"x": {"type": "tensor", "tensor": {"name": "y"}}}}, "x: unknown keys ['name']; remove them"),
        ({"conditioners": []}, "conditioners is []; expected an object with each by its name"),
        ({"depformer_dim": "wide"}, "depformer: dim is 'wide'; expected int"),
        (
            {"fuser": {"sum": ["cgf"]}},
            "the fuser takes ['cgf'] and the conditioners are ['speaker_wavs', 'cfg', 'contr",
        ),
        ({"model_type": None}, "model_type is None; expected one of mimi, stt, tts"),
        ({"model_type": "csm-9"}, "model_type is 'csm-9'; choose one of mimi, stt, tts"),
        ({"tts_config": {}}, "a text-to-speech model needs tts; add it"),
        ({"model_type": "stt"}, "a speech-to-text model has no tts; leave it out"),
        (
            {"model_type": "stt", "tts_config": None},
            "model_type is 'stt' and dep_q 32; such a model generates no audio: 0",
        ),
    ],
)
def test_a_kyutai_config_with_unknown_values_is_refused(change, message):
    values = json.loads((PUBLISHED / "tts-1.6b-en_fr.config.json").read_text()) | change
    with pytest.raises(ConfigError, match=re.escape(message)):
        kyutai_config.read_config(values, "c.json")


def test_the_settings_of_other_published_models_are_read_and_written_back():
    values = json.loads((PUBLISHED / "tts-1.6b-en_fr.config.json").read_text())
    values |= {"tts_config": {"audio_delay": 1.28, "second_stream_ahead": 2, "multistream": True}}
    values |= {"lm_gen_config": {"temp": 0.8, "temp_text": 0.7, "top_k": 250, "top_k_text": 25, "cfg_coef": 3.0}}
    config, lm, names = kyutai_config.read_config(values, "c.json")
    assert config.tts == TtsConfig(audio_delay=1.28, second_stream_ahead=2, multistream=True)
    written = kyutai_config.write_config(config, lm, names)
    assert json.loads(json.dumps(written)) == {key: v for key, v in values.items() if key != "text_card_out"}


def test_depformer_fields_are_flat_in_the_file_and_nested_in_the_config():
    depformer = DepformerConfig(dim=8, num_heads=2, num_layers=2, dim_feedforward=24, low_rank_embeddings=4)
    lm = dataclasses.replace(small.TTS, depformer=depformer)
    for written in (kyutai_config.flat_lm(lm), kyutai_config.write_lm(lm)):
        assert (written["depformer_dim"], written["depformer_low_rank_embeddings"]) == (8, 4)
        assert kyutai_config.read_lm(json.loads(json.dumps(written)), "x") == lm


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"possible_values": ("a", "b", "c")}, "conditioner cfg has 3 possible_values and n_bins 2; give at least one"),
        ({"tokenizer": "t5"}, "conditioner cfg has tokenizer 't5'; use 'noop'"),
    ],
)
def test_a_look_up_table_with_impossible_settings_is_refused(change, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        LutConditioner(name="cfg", n_bins=2, dim=3, **change)


def test_two_conditioners_of_one_name_are_refused():
    with pytest.raises(ConfigError, match=r"the conditioners are \['cfg', 'cfg'\]; give each a name of its own"):
        dataclasses.replace(small.TTS, conditioners=(small.TTS.conditioners[1],) * 2, fuser=Fuser())


def test_whole_numbers_pass_as_floats_and_lists_as_tuples():
    config = from_dict(LMConfig, LM | {"max_period": 10_000, "delays": [0, 0, 0, 1]}, "f.json")
    assert (config.max_period, type(config.max_period), config.delays) == (10_000.0, float, (0, 0, 0, 1))


def test_the_codecs_file_has_the_keys_that_the_pytorch_package_takes():
    written = kyutai_config.write_mimi_config(small.MIMI)
    assert written["transformer"].keys() == {
        *("causal", "context", "conv_layout", "d_model", "dim_feedforward", "gating", "input_dimension", "layer_scale"),
        *("max_period", "norm", "num_heads", "num_layers", "output_dimensions", "positional_embedding"),
    }
    assert "n_q_semantic" not in written["quantizer"]

"""Adapters of moshi's fine-tuning beside a model's weights are merged into them as they are read."""

import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dsm_jax import checkpoints
from dsm_jax.convert import convert, files, kyutai
from dsm_jax.errors import CheckpointError, ConfigError
from tests.helpers import small
from tests.helpers.checkpoint_maker import assert_same_weights, copy_of, make_checkpoint

pytestmark = pytest.mark.slow

RANK, SCALING, SETS = 2, 1.5, 3  # the last: sets of weights of the depformer of `small.TTS`
TABLE = re.compile(r".*emb(ed|\.\d+)?\.weight")
KEYS = {"lora": True, "lora_rank": RANK, "lora_scaling": SCALING, "lora_name": "lora.safetensors"}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("base"), "kyutai", lm=small.TTS)


def adapters_for(weights: dict[str, np.ndarray], spelling: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Make adapters for every matrix; return them, and the weights that moshi makes of both.

    Their numbers are whole, so that their products are exact in any order of summation.
    """
    random = np.random.default_rng(0)
    adapters, merged = {}, dict(weights)
    for name, weight in weights.items():
        if weight.ndim != 2 or TABLE.fullmatch(name):
            continue
        packed = name.endswith(("in_proj_weight", "out_proj.weight"))
        sets = SETS if packed and name.startswith("depformer.") else 1
        a = random.integers(-3, 4, (sets, RANK, weight.shape[1])).astype(np.float32)
        b = random.integers(-3, 4, (sets, len(weight) // sets, RANK)).astype(np.float32)
        merged[name] = weight + np.float32(SCALING) * (b @ a).reshape(weight.shape)
        stem = name.removesuffix(".weight").removesuffix("_weight")
        if packed and spelling == "current":
            for s in range(sets):
                adapters |= {f"{stem}s.{s}.lora_A.weight": a[s], f"{stem}s.{s}.lora_B.weight": b[s]}
        else:
            both = {"A": a.reshape(-1, weight.shape[1]), "B": b.reshape(-1, RANK)}
            adapters |= {f"{stem}.lora_{part}.weight": matrix for part, matrix in both.items()}
    merged["text_emb.weight"] = adapters["text_emb.weight"] = weights["text_emb.weight"] + 1
    return adapters, merged


def with_keys(source: Path, target: Path, **keys) -> Path:
    """Copy a folder, and change its config.json."""
    folder = copy_of(source, target)
    files.write_json(folder / "config.json", files.read_json(folder / "config.json") | keys)
    return folder


@pytest.mark.parametrize("spelling", ["current", "packed"])
def test_adapters_of_every_matrix_are_merged(base, tmp_path, spelling):
    adapters, merged = adapters_for(load_file(base / kyutai.LM_NAME), spelling)
    assert sum(name.endswith("lora_A.weight") for name in adapters) > 30
    folder = with_keys(base, tmp_path / "in", **KEYS)
    save_file(adapters, folder / "lora.safetensors")
    expected = copy_of(base, tmp_path / "merged")
    save_file(merged, expected / kyutai.LM_NAME)
    assert_same_weights(checkpoints.load(folder), checkpoints.load(expected))
    report = convert(folder, tmp_path / "out", to="kyutai")
    assert adapters.keys() <= {moved.tensor for moved in report.moved}
    assert files.read_json(tmp_path / "out/config.json") == files.read_json(base / "config.json")
    assert_same_weights(checkpoints.load(tmp_path / "out"), checkpoints.load(expected))


def test_merged_weights_keep_the_dtype_of_the_model(base, tmp_path):
    convert(base, tmp_path / "half", to="kyutai", dtype="bfloat16")
    adapters, _ = adapters_for(load_file(base / kyutai.LM_NAME), "current")
    del adapters["text_emb.weight"]
    folder = with_keys(tmp_path / "half", tmp_path / "in", **KEYS)
    save_file(adapters, folder / "lora.safetensors")
    report = convert(folder, tmp_path / "out", to="kyutai")
    assert {dtype for name, _, dtype in report.written if name.startswith("transformer.")} == {"bfloat16"}


def test_the_config_of_a_model_that_was_trained_whole_is_read(base, tmp_path):
    folder = with_keys(base, tmp_path / "in", lora=False, lora_rank=128, lora_scaling=2.0, gradient_checkpointing=True)
    assert_same_weights(checkpoints.load(folder), checkpoints.load(base))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("transformer.layers.0.gating.linear_in.lora_A.weight", None, "needs a matrix .*, has 84x16, 84x2"),
        ("transformer.layers.0.gating.linear_in.lora_B.weight", (3, 2), "needs a matrix .*, has 84x16, 2x16, 3x2"),
        (
            "transformer.layers.9.gating.linear_in.lora_B.weight",
            (44, 2),
            "layers.9.gating.linear_in .*, has 44x2",
        ),
        ("stowaway.weight", (3,), "unknown: stowaway.weight, 3; the model has no place for it"),
    ],
)
def test_an_adapter_that_does_not_fit_is_named(base, tmp_path, name, shape, message):
    adapters, _ = adapters_for(load_file(base / kyutai.LM_NAME), "current")
    changed = {name: np.zeros(shape, np.float32)} if shape else {}
    adapters = {key: value for key, value in adapters.items() if key != name} | changed
    folder = with_keys(base, tmp_path / "in", **KEYS)
    save_file(adapters, folder / "lora.safetensors")
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load(folder)


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        (
            {"lora_name": "gone.safetensors"},
            CheckpointError,
            r"gone.safetensors is missing; fetch the whole",
        ),
        ({"lora_scaling": "2"}, ConfigError, r"config.json: lora_scaling is '2'; expected float"),
        ({"lora": False}, ConfigError, r"unknown keys \['lora', 'lora_name', 'lora_rank', 'lora_scaling'\]; merge the"),
        ({"lora_name": None}, ConfigError, r"or put their file beside the weights, with lora true and lora_name its"),
    ],
)
def test_keys_of_adapters_that_do_not_fit_are_refused(base, tmp_path, keys, error, message):
    folder = with_keys(base, tmp_path / "in", **KEYS | keys)
    save_file({"x": np.zeros(1, np.float32)}, folder / "lora.safetensors")
    with pytest.raises(error, match=message):
        checkpoints.load(folder)

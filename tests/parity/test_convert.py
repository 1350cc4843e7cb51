"""Conversion held against the PyTorch references: their checkpoints are read exactly, and they read ours."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from moshi.models import loaders
from safetensors.torch import load_file, save_file
from transformers import KyutaiSpeechToTextForConditionalGeneration, KyutaiSpeechToTextProcessor, MimiModel

from dsm_jax import checkpoints
from dsm_jax.convert import convert
from dsm_jax.tokenizers import load_tokenizer
from tests.helpers.checkpoint_maker import arrays_of, assert_same_weights
from tests.parity.references import (
    kyutai_stt,
    kyutai_tts,
    make_mimi,
    make_transformers_mimi,
    make_weight_normed_mimi,
    moshi_codes,
    moshi_tokens,
    speech,
    transformers_stt,
    transformers_tokens,
)
from tests.parity.references.kyutai import lm_config

FAULTS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


@pytest.fixture(scope="module")
def pcm_S() -> np.ndarray:
    return speech("librispeech")[: 24_000 * 3]


def test_a_transformers_checkpoint_is_the_kyutai_one_bit_for_bit():
    ours = checkpoints.load(kyutai_stt())
    assert_same_weights(checkpoints.load(transformers_stt()), ours)
    assert_same_weights(checkpoints.load(transformers_stt(max_shard_size="200KB")), ours)
    theirs = checkpoints.load(transformers_stt()).config
    assert (theirs.mimi, theirs.stt) == (ours.config.mimi, ours.config.stt)


@pytest.mark.parametrize("spelling", ["in_proj_weight", "in_projs"])
@pytest.mark.parametrize("extra_heads", [False, True])
def test_kyutais_own_spellings_are_read(spelling, extra_heads):
    model = checkpoints.load(kyutai_stt(spelling=spelling, extra_heads=extra_heads))
    assert model.config.lm.extra_heads_num_heads == (4 if extra_heads else 0)
    assert_same_weights(model, checkpoints.load(kyutai_stt(extra_heads=extra_heads)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_export_to_kyutais_layout_is_the_reference_file_tensor_by_tensor(tmp_path, dtype):
    source = kyutai_stt(extra_heads=True, dtype=dtype)
    convert(source, tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "out", to="kyutai")
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert {name: (t.shape, t.dtype) for name, t in after.items()} == {n: (t.shape, t.dtype) for n, t in before.items()}
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


@pytest.mark.parametrize("source", ["kyutai", "transformers"])
def test_the_reference_package_runs_an_export_as_it_runs_the_original(tmp_path, pcm_S, source):
    convert(kyutai_stt() if source == "kyutai" else transformers_stt(), tmp_path / "out", to="kyutai")
    codes_QT = moshi_codes(kyutai_stt(), pcm_S)
    np.testing.assert_array_equal(moshi_codes(tmp_path / "out", pcm_S), codes_QT)
    np.testing.assert_array_equal(
        moshi_tokens(tmp_path / "out", codes_QT).tokens_T, moshi_tokens(kyutai_stt(), codes_QT).tokens_T
    )


@pytest.mark.parametrize("source", ["kyutai", "transformers"])
def test_transformers_loads_an_export_with_nothing_missing_or_left_over(tmp_path, source):
    convert(kyutai_stt() if source == "kyutai" else transformers_stt(), tmp_path / "out", to="transformers")
    load = KyutaiSpeechToTextForConditionalGeneration.from_pretrained
    model, info = load(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert {kind: list(info[kind]) for kind in FAULTS} == {kind: [] for kind in FAULTS}
    wanted = load(transformers_stt(), dtype=torch.float32).state_dict()
    for name, tensor in model.state_dict().items():
        if "codebook" not in name:  # theirs are sums and counts, ours quotients and ones
            assert torch.equal(tensor, wanted[name]), name


def test_transformers_says_the_same_words_with_an_export(tmp_path, pcm_S):
    convert(kyutai_stt(), tmp_path / "out", to="transformers")
    tokens_T = transformers_tokens(tmp_path / "out", pcm_S)
    assert len(set(tokens_T.tolist())) > 3
    np.testing.assert_array_equal(tokens_T, transformers_tokens(transformers_stt(), pcm_S))


def test_transformers_processor_of_an_export_is_the_original(tmp_path):
    convert(kyutai_stt(), tmp_path / "out", to="transformers")
    ours, theirs = (KyutaiSpeechToTextProcessor.from_pretrained(p) for p in (tmp_path / "out", transformers_stt()))
    keep = ("audio_delay_seconds", "audio_silence_prefix_seconds", "sampling_rate", "feature_size", "padding_side")
    for name in keep:
        assert getattr(ours.feature_extractor, name) == getattr(theirs.feature_extractor, name)
    pieces = load_tokenizer(next(kyutai_stt().glob("*.model")))
    for text in ("good morning everyone", "the train leaves the city"):
        ids = pieces.encode(text)
        assert ours.tokenizer.encode(text, add_special_tokens=False) == ids
        assert ours.tokenizer.decode([0, *ids, 3], skip_special_tokens=True) == text
    assert ours.tokenizer.pad_token_id == 3


def test_a_codec_alone_goes_to_transformers_and_back(tmp_path):
    source = make_transformers_mimi(kyutai_stt(), tmp_path / "source")
    convert(source, tmp_path / "kyutai", to="kyutai")
    convert(tmp_path / "kyutai", tmp_path / "out", to="transformers")
    assert_same_weights(checkpoints.load(tmp_path / "out"), checkpoints.load(source))
    _, info = MimiModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert {kind: list(info[kind]) for kind in FAULTS} == {kind: [] for kind in FAULTS}


def test_a_codebook_is_what_torch_divides():
    tensors = load_file(next(kyutai_stt().glob("mimi-*.safetensors")))
    arrays = arrays_of(checkpoints.load(kyutai_stt()))
    stem = "quantizer.rvq_rest.vq.layers.2._codebook"
    usage = tensors[f"{stem}.cluster_usage"].clamp(min=1e-5)
    wanted = (tensors[f"{stem}.embedding_sum"] / usage[:, None]).numpy()
    np.testing.assert_array_equal(arrays["mimi.quantizer.acoustic.codebooks.2.embedding_LC"], wanted)


def test_a_weight_normed_codec_is_the_plain_one(tmp_path):
    plain = make_mimi(tmp_path / "plain.safetensors")
    (tmp_path / "mimi_config.json").write_bytes((kyutai_stt() / "mimi_config.json").read_bytes())
    normed = make_weight_normed_mimi(plain, tmp_path / "normed.safetensors")
    found, wanted = arrays_of(checkpoints.load(normed)), arrays_of(checkpoints.load(plain))
    assert found.keys() == wanted.keys()
    for name, array in found.items():  # torch and numpy add up the norm in different orders
        np.testing.assert_allclose(array, wanted[name], rtol=1e-5, atol=1e-9)


_MEASURE = """
import sys
from pathlib import Path
import jax
from dsm_jax.convert import convert

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024

jax.devices()
before = peak()
convert(sys.argv[1], sys.argv[2], to=sys.argv[3])
print(peak() - before)
"""


@pytest.mark.parametrize("to", ["orbax", "transformers"])
def test_converting_takes_less_memory_than_the_checkpoint(tmp_path, to):
    folder = kyutai_stt(size="stt-1b", dtype=torch.bfloat16)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    command = [sys.executable, "-c", _MEASURE, str(folder), str(tmp_path / "out"), to]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert size > 2e9
    assert int(done.stdout) < 0.7 * size


@pytest.mark.parametrize("make", [kyutai_stt, kyutai_tts])
def test_adapters_are_merged_as_moshi_merges_them(tmp_path, make):
    folder = Path(shutil.copytree(make(), tmp_path / "in"))
    config = json.loads((folder / "config.json").read_text()) | {"lora": True, "lora_rank": 4, "lora_scaling": 1.5}
    weights = folder / "model.safetensors"

    def read(**options) -> torch.nn.Module:  # the package adds keys of its own to the conditioners that it is given
        return loaders.get_moshi_lm(weights, copy.deepcopy(lm_config(config)), dtype=torch.float32, **options)

    torch.manual_seed(0)
    adapters = {n: 0.1 * torch.randn_like(t) for n, t in read().state_dict().items() if ".lora_" in n}
    assert len(adapters) > 20
    save_file(adapters, folder / "lora.safetensors")
    fused = read(lora_weights=folder / "lora.safetensors", fuse_lora=True)
    (folder / "config.json").write_text(json.dumps(config | {"lora_name": "lora.safetensors"}))
    found = arrays_of(checkpoints.load(folder))
    save_file(fused.state_dict(), weights)
    for key in ("lora", "lora_rank", "lora_scaling"):
        del config[key]
    (folder / "config.json").write_text(json.dumps(config))
    for name, array in arrays_of(checkpoints.load(folder)).items():
        np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-6)

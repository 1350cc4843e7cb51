"""Every module computes what the PyTorch reference computed, from files made by tests/goldens/make_goldens.py."""

import numpy as np
import pytest

from tests.goldens import compare


@pytest.mark.slow
@pytest.mark.parametrize("name", compare.CASES)
def test_the_library_computes_what_the_reference_computed(name):
    compare.CASES[name](*compare.read(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["conv_strided", "conv_transpose", "upsample", "rvq", "transformer_lm"])
def test_one_wrong_weight_is_noticed(name):
    config, arrays = compare.read(name)
    weights = [key for key in arrays if key.startswith("weights.") and not key.endswith("_initialized")]
    key = weights[np.random.default_rng(0).integers(len(weights))]
    with pytest.raises(AssertionError, match=r"off by|differ"):
        compare.CASES[name](config, arrays | {key: arrays[key] * 1.5})


def test_every_golden_has_a_comparison_and_the_other_way_round():
    assert {path.stem for path in compare.FOLDER.glob("*.safetensors")} == set(compare.CASES)
    assert sum(path.stat().st_size for path in compare.FOLDER.glob("*.safetensors")) < 1_000_000


def test_a_weight_without_a_place_is_noticed():
    config, arrays = compare.read("upsample")
    with pytest.raises(AssertionError, match=r"unknown: \.convtr\.bias"):
        compare.CASES["upsample"](config, arrays | {"weights.convtr.bias": np.zeros(3, np.float32)})

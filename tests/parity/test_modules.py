"""The reference's modules, live, on weights that no stored golden has; and the goldens, made again.

Shape letters: B batch rows, V vocabulary.
"""

import importlib.metadata
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from moshi.utils.sampling import sample_token
from safetensors import safe_open

from dsm_jax.nn.sampling import sample
from tests.goldens import compare, make_goldens

ROUNDING = 1e-5  # two releases of torch, or two processors, may add up in another order


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", compare.CASES)
def test_fresh_weights_give_what_the_reference_gives(name, seed):
    compare.CASES[name](*make_goldens.make(name, seed))


@pytest.mark.parametrize("name", compare.CASES)
def test_the_stored_goldens_are_what_the_maker_makes(name):
    stored_config, stored = compare.read(name)
    config, made = make_goldens.make(name)
    assert (json.loads(json.dumps(config)), made.keys()) == (stored_config, stored.keys())
    for key, wanted in made.items():
        assert (stored[key].dtype, stored[key].shape) == (wanted.dtype, wanted.shape)
        if key.startswith("out.") and wanted.dtype.kind == "f":
            assert np.abs(stored[key] - wanted).max() <= ROUNDING * np.abs(wanted).max(), key
        else:
            np.testing.assert_array_equal(stored[key], wanted, err_msg=key)


def test_the_maker_writes_every_case_and_names_the_versions(tmp_path):
    make_goldens.main(tmp_path)
    assert {path.stem for path in tmp_path.iterdir()} == set(compare.CASES)
    with safe_open(tmp_path / "rvq.safetensors", "np") as file:
        assert file.metadata()["moshi"] == importlib.metadata.version("moshi")
        assert file.metadata()["torch"] == importlib.metadata.version("torch")


def test_the_goldens_leave_no_weight_at_an_identity():
    for name in compare.CASES:
        for key, value in make_goldens.make(name)[1].items():
            if key.startswith("weights.") and not key.endswith("_initialized"):
                assert len(np.unique(value)) > value.size / 2, (name, key)


def draw(logits_BV: np.ndarray, temperature: float, top_k: int) -> np.ndarray:
    """Our choice for rows that share a temperature and a top-k, each row's key being its number."""
    rows = len(logits_BV)
    temperature_B, top_k_B = jnp.full(rows, temperature, jnp.float32), jnp.full(rows, top_k, jnp.int32)
    return np.asarray(sample(jnp.asarray(logits_BV), jnp.arange(rows), temperature_B, top_k_B, max_top_k=32))


@pytest.mark.parametrize(("temperature", "top_k"), [(0.6, 0), (1.0, 25), (0.8, 7), (1.3, 1), (0.0, 0)])
def test_the_same_noise_chooses_the_same_tokens(monkeypatch, temperature, top_k):
    random = np.random.default_rng(0)
    logits_BV = 3 * random.normal(size=(200, 50)).astype(np.float32)
    noise_BV = random.exponential(size=(200, 50)).astype(np.float32)
    # The reference divides probabilities by exponential noise, drawn for the k best in order of their probability.
    order_BK = np.argsort(-logits_BV, axis=1)[:, : top_k or 50]
    ranked_BK = np.take_along_axis(noise_BV, order_BK, axis=1) if top_k else noise_BV
    monkeypatch.setattr(
        torch.Tensor, "exponential_", lambda tensor, *args, **kwargs: tensor.copy_(torch.from_numpy(ranked_BK))
    )
    wanted_B = sample_token(torch.from_numpy(logits_BV)[:, None], temperature > 0, temperature, top_k)[:, 0]
    gumbel_BV = jnp.asarray(-np.log(noise_BV))
    monkeypatch.setattr(jax.random, "gumbel", lambda row, shape: gumbel_BV[row])
    found_B = draw(logits_BV, temperature, top_k)
    np.testing.assert_array_equal(found_B, wanted_B)


@pytest.mark.parametrize("top_k", [1, 4, 7, 25])
def test_of_equal_scores_the_same_noise_chooses_one_as_good(monkeypatch, top_k):
    # Scores of 16 bits are often equal. Which of those that are equal come first, the reference leaves to torch.
    random = np.random.default_rng(0)
    logits_BV = np.round(3 * random.normal(size=(200, 50))).astype(np.float32)
    noise_BK = random.exponential(size=(200, top_k)).astype(np.float32)
    monkeypatch.setattr(
        torch.Tensor, "exponential_", lambda tensor, *args, **kwargs: tensor.copy_(torch.from_numpy(noise_BK))
    )
    wanted_B = sample_token(torch.from_numpy(logits_BV)[:, None], True, 0.8, top_k)[:, 0].numpy()
    gumbel_BV = np.zeros_like(logits_BV)
    np.put_along_axis(gumbel_BV, np.argsort(-logits_BV, axis=1, kind="stable")[:, :top_k], -np.log(noise_BK), axis=1)
    monkeypatch.setattr(jax.random, "gumbel", lambda row, shape: jnp.asarray(gumbel_BV)[row])
    found_B = draw(logits_BV, 0.8, top_k)
    rows = np.arange(200)
    np.testing.assert_array_equal(logits_BV[rows, found_B], logits_BV[rows, wanted_B])
    alone_B = (logits_BV == logits_BV[rows, wanted_B][:, None]).sum(1) == 1
    np.testing.assert_array_equal(found_B[alone_B], wanted_B[alone_B])
    assert 20 < alone_B.sum() < 180

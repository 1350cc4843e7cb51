"""Low-rank adapters: they change nothing before training, have all gradients, and merge into the weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsm_jax.errors import ConfigError
from dsm_jax.models.family import abstract_model
from dsm_jax.models.parameters import flatten
from dsm_jax.training import lora
from dsm_jax.training.lora import LoraConfig
from tests.helpers import checkpoint_maker, small

pytestmark = pytest.mark.slow

CONFIG = LoraConfig(rank=3, alpha=6.0)
STT = dataclasses.replace(small.STT, num_layers=1, context=16)


@pytest.fixture(scope="module")
def network():
    made, random = abstract_model(checkpoint_maker.model_config(STT))["lm"], np.random.default_rng(0)
    drawn = {name: jnp.asarray(0.2 * random.normal(size=p.shape), jnp.float32) for name, p in made.parameters.items()}
    return made.graph, made.unflatten(drawn)


def drawn(adapters: lora.Adapters) -> lora.Adapters:
    """Make random adapters of the same shapes, as if trained."""
    random = np.random.default_rng(1)
    return jax.tree.map(lambda a: jnp.asarray(random.normal(size=a.shape), a.dtype), adapters)


def _outputs_first(array: np.ndarray, inputs: int) -> np.ndarray:
    return np.moveaxis(array, range(inputs), range(-inputs, 0))


def codes() -> jax.Array:
    return jax.random.randint(jax.random.key(2), (2, 4, 9), 4, 12)


def test_adapters_have_the_targets_and_rank_of_the_config(network):
    adapters = lora.init(network[1], CONFIG, jax.random.key(0))
    layer = "transformer.layers.0"
    assert {name: (a.shape, b.shape) for name, (a, b) in adapters.items()} == {
        f"{layer}.self_attn.in_proj.weight_PKHD": ((16, 3), (3, 3, 4, 4)),
        f"{layer}.self_attn.out_proj.weight_DKGH": ((4, 1, 4, 3), (3, 16)),
        f"{layer}.feedforward.linear_in.weight_PFD": ((16, 3), (3, 2, 44)),
        f"{layer}.feedforward.linear_out.weight_DF": ((44, 3), (3, 16)),
    }
    assert all(np.std(a) * np.prod(a.shape[:-1]) ** 0.5 == pytest.approx(1, abs=0.4) for a, _ in adapters.values())
    assert not any(np.any(b) for _, b in adapters.values())
    first, second = (
        adapters[f"{layer}.self_attn.{name}"][0] for name in ("in_proj.weight_PKHD", "out_proj.weight_DKGH")
    )
    assert not np.array_equal(first.ravel(), second.ravel())


@pytest.mark.parametrize("targets", [("out_proj",), (r"layers\.0\..*_DKGH$",)])
def test_a_target_is_a_part_of_a_name_or_an_expression(network, targets):
    adapters = lora.init(network[1], LoraConfig(targets=targets), jax.random.key(0))
    assert list(adapters) == ["transformer.layers.0.self_attn.out_proj.weight_DKGH"]


def test_merging_untrained_adapters_changes_no_bit(network):
    everything = LoraConfig(targets=(".",))
    merged = lora.merge(network[1], lora.init(network[1], everything, jax.random.key(0)), everything)
    before, after = flatten(network[1]), flatten(merged)
    assert before.keys() == after.keys()
    assert [name for name in before if not np.array_equal(before[name], after[name])] == []


def test_merged_weights_are_the_weights_plus_the_scaled_products(network):
    adapters = drawn(lora.init(network[1], CONFIG, jax.random.key(0)))
    before, after = flatten(network[1]), flatten(lora.merge(network[1], adapters, CONFIG))
    for name, weight in before.items():
        expected = np.asarray(weight, np.float64)
        if name in adapters:
            a, b = (np.asarray(part, np.float64) for part in adapters[name])
            expected = expected + 6.0 / 3 * _outputs_first(np.tensordot(a, b, 1), a.ndim - 1)
        np.testing.assert_allclose(after[name], expected, rtol=1e-5, atol=1e-5)  # float32 against float64


def test_the_merged_head_equals_the_head_plus_its_adapters(network):
    """Compare the merged text head with the sum of the head and its adapters."""
    graph, params = network
    config = LoraConfig(rank=2, alpha=3.0, targets=("text_linear",))
    adapters = drawn(lora.init(params, config, jax.random.key(0)))
    (a, b) = adapters["text_linear.weight_VD"]
    hidden = jax.random.normal(jax.random.key(3), (2, 5, STT.dim))
    apart = nnx.merge(graph, params).text_logits(hidden) + 1.5 * (hidden @ a) @ b
    together = nnx.merge(graph, lora.merge(params, adapters, config)).text_logits(hidden)
    np.testing.assert_allclose(together, apart, rtol=1e-5, atol=1e-4)  # two orders of the same sums
    assert not np.allclose(together, nnx.merge(graph, params).text_logits(hidden), atol=0.1)


def test_a_stack_of_matrices_has_adapters_for_each(network):
    config = LoraConfig(rank=2, alpha=2.0, targets=("audio_emb",))
    adapters = drawn(lora.init(network[1], config, jax.random.key(0)))
    (a, b) = adapters["audio_emb.table_QLW"]
    assert a.shape == (STT.n_q, STT.card + 1, 2)
    assert b.shape == (STT.n_q, 2, STT.dim)
    merged = flatten(lora.merge(network[1], adapters, config))["audio_emb.table_QLW"]
    for q, weight in enumerate(flatten(network[1])["audio_emb.table_QLW"]):
        np.testing.assert_allclose(merged[q], weight + a[q] @ b[q], rtol=1e-5, atol=1e-5)


def test_gradients_reach_every_adapter(network):
    graph, params = network
    adapters = drawn(lora.init(params, CONFIG, jax.random.key(0)))

    @jax.jit
    @jax.grad
    def gradient(adapters):
        return jnp.square(nnx.merge(graph, lora.merge(params, adapters, CONFIG))(codes()).text_logits_BTV).mean()

    grads = gradient(adapters)
    assert jax.tree.structure(grads) == jax.tree.structure(adapters)
    assert all(np.isfinite(g).all() and np.any(g) for g in jax.tree.leaves(grads))


def test_a_bfloat16_model_stays_bfloat16(network):
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), network[1])
    adapters = lora.init(narrow, CONFIG, jax.random.key(0))
    assert {part.dtype.name for part in jax.tree.leaves(adapters)} == {"float32"}
    adapters = drawn(adapters)
    merged = lora.merge(narrow, adapters, CONFIG)
    assert {array.dtype.name for array in flatten(merged).values()} == {"bfloat16"}
    # Rounded once, as a sum, and not as an addition before.
    in_float32 = lora.merge(jax.tree.map(lambda p: p.astype(jnp.float32), narrow), adapters, CONFIG)
    for name, array in flatten(merged).items():
        np.testing.assert_array_equal(array, flatten(in_float32)[name].astype(jnp.bfloat16))


def test_the_rank_is_at_most_the_highest_of_the_targets(network):
    """The embeddings have 13 rows and a width of 16."""
    config = LoraConfig(rank=16, targets=("audio_emb", "self_attn"))
    assert len(lora.init(network[1], config, jax.random.key(0))) == 3
    for wrong, highest in (
        (dataclasses.replace(config, rank=17), 16),
        (LoraConfig(rank=14, targets=("audio_emb",)), 13),
    ):
        with pytest.raises(
            ConfigError, match=rf"the matrices to adapt have ranks of up to {highest}; give that at most"
        ):
            lora.init(network[1], wrong, jax.random.key(0))


@pytest.mark.parametrize("target", ["lstm", "norm1"])
def test_a_target_that_matches_no_matrix_is_refused(network, target):
    config = LoraConfig(targets=("self_attn", target))
    with pytest.raises(
        ConfigError, match=rf"'{target}' is found in no matrix of the model; its .* audio_emb.table_QLW"
    ):
        lora.init(network[1], config, jax.random.key(0))


def test_adapters_of_another_model_are_refused(network):
    adapters = lora.init(network[1], CONFIG, jax.random.key(0))
    adapters["nosuch.weight_ED"] = adapters["transformer.layers.0.self_attn.in_proj.weight_PKHD"]
    with pytest.raises(ConfigError, match=r"of parameters that the model does not have, nosuch\.weight_ED first"):
        lora.merge(network[1], adapters, CONFIG)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "the rank of the adapters is 0; give at least 1"),
        ({"alpha": 0.0}, r"the alpha of the adapters is 0\.0; give a number above 0"),
        ({"alpha": float("inf")}, "the alpha of the adapters is inf; give a number above 0"),
        ({"targets": ()}, "have no targets; name parts"),
        ({"targets": ("[",)}, r"the target '\[' is no regular expression"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**settings)

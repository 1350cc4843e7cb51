"""The train step against a plain optax loop, and its guarantees about keys, memory and devices.

Shape letters: B batch rows, D features in, E features out.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from dsm_jax.errors import ConfigError
from dsm_jax.nn.linear import Linear
from dsm_jax.training.step import OptimizerConfig, TrainState, clip_by_norm, init, make_step, norm
from tests.helpers import small
from tests.helpers.optimized import compile_optimized

STEPS = 6
OPTIMIZER = OptimizerConfig(learning_rate=0.05, warmup=2, weight_decay=0.1, clip=0.5)


def loss(params, frozen, aux, batch, key):
    """Compute a regression loss and a moving average of its targets; the key goes to the metrics only."""
    made_BE = batch["x_BD"].astype(params["w_DE"].dtype) @ params["w_DE"] + params["b_E"]
    value = jnp.mean((made_BE - batch["y_BE"].astype(made_BE.dtype)) ** 2)
    aux = {"average_E": 0.9 * aux["average_E"] + 0.1 * batch["y_BE"].mean(0), "seen": aux["seen"] + 1}
    return value, (aux, {"draw": jax.random.uniform(key)})


def start(optimizer: optax.GradientTransformation, seed: int = 0) -> TrainState:
    random = np.random.default_rng(1)
    params = {
        "w_DE": jnp.asarray(random.normal(size=(3, 2)), jnp.float32),
        "b_E": jnp.full((2,), 1.0),  # weakly typed, as is the average
    }
    return init(params, optimizer, seed, aux={"average_E": jnp.full((2,), 0.0), "seen": jnp.array(0)})


def batch(number: int, rows: int = 8) -> dict[str, np.ndarray]:
    random = np.random.default_rng(number)
    x_BD = random.normal(size=(rows, 3)).astype(np.float32)
    return {"x_BD": x_BD, "y_BE": np.stack([3 * x_BD.sum(1), x_BD[:, 0]], axis=1)}


def run(step, state: TrainState, steps: int = STEPS) -> tuple[TrainState, list[dict[str, float]]]:
    rows = []
    for number in range(steps):
        state, metrics = step(state, batch(number))
        rows.append({name: float(value) for name, value in metrics.items()})
    return state, rows


def assert_close(found, wanted, **tolerance):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, **tolerance)


@pytest.fixture
def compilations():
    """Count the programs that are compiled during a test."""
    found = []

    def count(event: str, _: float, **__: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    yield found
    jax.monitoring.unregister_event_duration_listener(count)


@pytest.mark.slow
def test_steps_equal_a_plain_optax_loop():
    optimizer = OPTIMIZER.build(STEPS)
    found, rows = run(make_step(loss, optimizer), start(optimizer))

    wanted = start(optimizer)
    params, aux, opened = wanted.params, wanted.aux, wanted.optimizer
    for number in range(STEPS):
        key = jax.random.fold_in(jax.random.PRNGKey(0), number)
        (value, (aux, metrics)), grads = jax.value_and_grad(loss, has_aux=True)(params, (), aux, batch(number), key)
        with jax.numpy_dtype_promotion("standard"):
            updates, opened = optimizer.update(grads, opened, params)
        params = optax.apply_updates(params, updates)
        wanted_row = {"loss": value, "gradient_norm": optax.tree.norm(grads), "finite": 1.0, **metrics}
        assert rows[number].keys() == wanted_row.keys()
        assert rows[number] == pytest.approx({name: float(value) for name, value in wanted_row.items()}, rel=1e-5)
    assert_close((found.params, found.aux, found.optimizer), (params, aux, opened), rtol=1e-5, atol=1e-7)
    assert (int(found.step), found.key.tolist()) == (STEPS, jax.random.PRNGKey(0).tolist())
    assert rows[-1]["loss"] < rows[0]["loss"]


@pytest.mark.slow
def test_accumulated_parts_equal_the_whole_batch_for_a_mean_over_rows():
    parts = 4
    optimizer = OPTIMIZER.build(STEPS)
    whole, whole_rows = run(make_step(loss, optimizer), start(optimizer))
    found, rows = run(make_step(loss, optimizer, accumulate=parts), start(optimizer))
    assert_close((found.params, found.optimizer), (whole.params, whole.optimizer), rtol=1e-5, atol=1e-6)
    for name in ("loss", "gradient_norm"):
        assert [row[name] for row in rows] == pytest.approx([row[name] for row in whole_rows], rel=1e-5)
    assert int(found.aux["seen"]) == STEPS * parts, "each part starts from the aux of the part before"


def test_a_batch_that_does_not_divide_into_parts_is_refused():
    optimizer = OPTIMIZER.build(STEPS)
    with pytest.raises(ConfigError, match="a batch of 8 rows cannot be cut into 3 equal parts; change either"):
        make_step(loss, optimizer, accumulate=3)(start(optimizer), batch(0))
    with pytest.raises(ConfigError, match="a batch is to be cut into 0 parts; give 1 or more"):
        make_step(loss, optimizer, accumulate=0)


def test_bfloat16_parameters_are_trained_in_float32():
    state = init({"w_D": jnp.ones(3, jnp.bfloat16)}, optax.adam(0.1), 0)
    assert {a.dtype.name for a in jax.tree.leaves((state.params, state.optimizer))} == {"float32", "int32"}


@pytest.mark.slow
def test_a_batch_that_is_not_finite_changes_nothing_but_the_step_number():
    optimizer = OPTIMIZER.build(STEPS)
    for parts in (1, 2):
        step = make_step(loss, optimizer, accumulate=parts)
        state, _ = run(step, start(optimizer), 2)
        before = jax.tree.map(np.asarray, state)
        bad = batch(2)
        bad["y_BE"][5, 1] = np.nan
        state, metrics = step(state, bad)
        assert (float(metrics["finite"]), np.isnan(metrics["loss"])) == (0.0, True)
        assert_close(state, dataclasses.replace(before, step=before.step + 1), rtol=0, atol=0)
        state, metrics = step(state, batch(3))
        assert float(metrics["finite"]) == 1.0
        assert not np.array_equal(state.params["w_DE"], before.params["w_DE"])


def test_a_gradient_that_is_not_finite_changes_nothing_but_the_step_number():
    def root(params, frozen, aux, batch, key):
        return jnp.sqrt(params["w"] * batch.sum()), (aux, {})

    state, metrics = make_step(root, optax.sgd(0.1))(init({"w": jnp.ones(())}, optax.sgd(0.1), 0), np.zeros(2))
    assert (float(metrics["loss"]), float(metrics["finite"]), float(state.params["w"])) == (0.0, 0.0, 1.0)


def test_the_key_depends_on_the_seed_and_the_step_only():
    optimizer = OPTIMIZER.build(STEPS)
    step = make_step(loss, optimizer)
    draws = [row["draw"] for row in run(step, start(optimizer))[1]]
    assert len(set(draws)) == STEPS
    assert [row["draw"] for row in run(make_step(loss, optax.sgd(0.1)), start(optax.sgd(0.1)))[1]] == draws
    jumped = dataclasses.replace(start(optimizer), step=jnp.int32(4))
    assert float(step(jumped, batch(0))[1]["draw"]) == draws[4]
    assert not {row["draw"] for row in run(step, start(optimizer, seed=1))[1]} & set(draws)


def test_each_accumulated_part_has_its_own_key():
    def keep(params, frozen, aux, batch, key):
        return jnp.sum(params) * 0.0, (jnp.stack([aux[1], jax.random.uniform(key)]), {})

    state, _ = make_step(keep, optax.sgd(0.1), accumulate=2)(
        init(jnp.ones(1), optax.sgd(0.1), 0, aux=jnp.zeros(2)), np.zeros(2)
    )
    first, second = state.aux.tolist()
    assert 0 < first != second > 0


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_updates_the_donated_state_in_place(parts):
    optimizer = OPTIMIZER.build(STEPS)
    step, state = make_step(loss, optimizer, accumulate=parts), start(optimizer)
    size = sum(a.nbytes for a in jax.tree.leaves(state))
    assert compile_optimized(step.lower(state, batch(0))).memory_analysis().alias_size_in_bytes == size
    after, _ = step(state, batch(0))
    assert all(a.is_deleted() for a in jax.tree.leaves((state.params, state.aux, state.optimizer)))
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, start(optimizer)), "weak types included"


@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_is_compiled_once(compilations, parts):
    optimizer = OPTIMIZER.build(STEPS)
    step, state = make_step(loss, optimizer, accumulate=parts), start(optimizer)
    before = len(compilations)
    run(step, state)
    assert len(compilations) == before + 1


@pytest.mark.slow
@pytest.mark.parametrize("parts", [1, 2])
def test_batches_split_over_two_devices_give_the_steps_of_one_device(compilations, parts):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere, shared = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    optimizer = OPTIMIZER.build(STEPS)
    step = make_step(loss, optimizer, accumulate=parts)
    alone, alone_rows = run(step, start(optimizer))

    state = jax.device_put(start(optimizer), everywhere)
    before = len(compilations)
    for number in range(STEPS):
        state, metrics = step(state, jax.device_put(batch(number), shared))
        # Sums over rows are added in another order.
        assert {k: float(v) for k, v in metrics.items()} == pytest.approx(alone_rows[number], rel=1e-5)
    assert len(compilations) == before + 1
    assert_close(state, alone, rtol=1e-4, atol=1e-6)
    assert all(a.is_fully_replicated and len(a.sharding.device_set) == 2 for a in jax.tree.leaves(state))


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")
@pytest.mark.parametrize(("steps", "warmup", "peak"), [(50, 10, 10), (8, 100, 4), (1, 100, 0)])
def test_the_learning_rate_warms_up_and_ends_at_a_fiftieth(steps, warmup, peak):
    config = OptimizerConfig(learning_rate=0.3, warmup=warmup, b1=0.0, b2=0.0, clip=1.0)
    optimizer = config.build(steps)
    params, rates = jnp.zeros(1), []
    state = optimizer.init(params)
    for _ in range(steps + 1):
        updates, state = optimizer.update(jnp.ones(1), state, params)
        rates.append(-float(updates[0]))  # without its averages Adam moves by the rate itself
    assert rates[peak] == pytest.approx(0.3, rel=1e-4)
    assert rates[-1] == pytest.approx(0.3 / 50, rel=1e-4)
    assert np.argmax(rates) == peak
    assert rates[0] == (0.0 if peak else pytest.approx(0.3, rel=1e-4))


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")
def test_gradients_are_clipped_by_their_global_norm():
    optimizer = OptimizerConfig(clip=2.0, b1=0.5).build(10)
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    state = optimizer.update({"a": jnp.full(1, 30.0), "b": jnp.full(1, 40.0)}, optimizer.init(params), params)[1]
    mu = optax.tree.get(state, "mu")
    assert [float(mu[name][0]) for name in "ab"] == pytest.approx([0.5 * 2 * 0.6, 0.5 * 2 * 0.8], rel=1e-5)


def test_clipping_matches_optax_and_the_norm_does_not_depend_on_a_weights_axes():
    weight = small.build(lambda rngs: Linear({"D": 192}, {"P": 3, "K": 4, "H": 48}, rngs=rngs))
    grads, plain = nnx.state(weight), {"w": weight.weight[...].reshape(576, 192)}
    assert float(jax.jit(norm)(grads)) == float(jax.jit(optax.tree.norm)(plain))
    for largest in (1e-3, 1e3):
        clipped, _ = jax.jit(clip_by_norm(largest).update)(grads, optax.EmptyState())
        wanted, _ = jax.jit(optax.clip_by_global_norm(largest).update)(plain, optax.EmptyState())
        np.testing.assert_array_equal(jax.tree.leaves(clipped)[0].reshape(576, 192), wanted["w"])

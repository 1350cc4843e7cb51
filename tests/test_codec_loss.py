"""The loss of a codec: it trains every part, and masked labels and dropped codebooks do not count.

Every test runs the same compiled step: compiling it is what takes the time here.

Shape letters: B batch rows, T samples, N frames, C codebook width, L entries, Q codebooks, V labels.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from dsm_jax.models.mimi import Mimi
from dsm_jax.training.losses.codec import CodecObjective, CodecTrainee, codec_loss, merge, split
from dsm_jax.training.step import TrainState, init, make_step
from tests.helpers import small

pytestmark = pytest.mark.slow

# Frames of 128 samples, so that a few of them are as long as the longest window of the spectral loss.
CONFIG = dataclasses.replace(
    small.MIMI,
    sample_rate=3200,
    seanet=dataclasses.replace(small.MIMI.seanet, ratios=(64,)),
    transformer=dataclasses.replace(small.MIMI.transformer, num_layers=1),
    quantizer=dataclasses.replace(small.MIMI.quantizer, n_q=3),
)
ROWS, FRAMES, LABELS = 4, 20, 5
OBJECTIVE = CodecObjective(decoded_frames=17)
OPTIMIZER = optax.adam(3e-3)  # its first step moves every parameter that has a gradient, however small


def new_trainee() -> CodecTrainee:
    return small.build(lambda rngs: CodecTrainee(Mimi(CONFIG, block_frames=None, rngs=rngs), LABELS, rngs=rngs))


GRAPH, _, _ = split(new_trainee(), fresh=True)


def loss(params, frozen, aux, batch, key):
    # An argument, so that no other share of dropout is compiled.
    objective = dataclasses.replace(OBJECTIVE, codebook_dropout=batch["dropout_B"])
    return codec_loss(merge(GRAPH, params, aux), aux, batch, key, objective)


STEP = make_step(loss, OPTIMIZER)


def start(*, fresh: bool = False) -> TrainState:
    _, params, aux = split(new_trainee(), fresh=fresh)
    return init(params, OPTIMIZER, 0, aux=aux)


def batch(seed: int = 0, *, dropout: float = 0.5) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    labels_BN = random.integers(0, LABELS, (ROWS, FRAMES)).astype(np.int32)
    # Each label is a level, so that labels can be predicted from the audio.
    level_BT = 0.05 * np.repeat(1 + labels_BN, CONFIG.frame_size, axis=1)
    pcm_BT = (level_BT * random.normal(size=level_BT.shape)).astype(np.float32)
    return {"pcm_BT": pcm_BT, "labels_BN": labels_BN, "dropout_B": np.full(ROWS, dropout, np.float32)}


def arrays_by_name(tree) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


@pytest.mark.parametrize("fresh", [True, False])
def test_merge_undoes_split(fresh):
    trainee = new_trainee()
    graph, params, aux = split(trainee, fresh=fresh)
    found, wanted = (arrays_by_name(nnx.state(t)) for t in (merge(graph, params, aux), trainee))
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
    books = {name for name in wanted if "embedding_LC" in name}
    assert len(books) == CONFIG.quantizer.n_q
    assert arrays_by_name(aux.entries).keys() == books
    assert arrays_by_name(params).keys() == wanted.keys() - books


def test_a_step_moves_every_parameter_and_every_codebook():
    before, params = arrays_by_name(start().aux.entries), arrays_by_name(start().params)
    state, metrics = STEP(start(), batch())
    assert float(metrics["finite"]) == 1
    assert all(np.isfinite(value) for value in metrics.values())
    for part in ("seanet", "transformer", "downsample", "input_proj", "output_proj", "upsample", "head", "decoder"):
        assert any(part in name for name in params), part
    moved = arrays_by_name(state.params)
    assert [name for name in params if np.array_equal(moved[name], params[name])] == []
    entries = arrays_by_name(state.aux.entries)
    assert [name for name in before if np.array_equal(entries[name], before[name])] == []


def test_a_step_rounds_the_operands_of_no_product():
    """A CPU computes as in full precision without being told; a GPU and a TPU round what they are allowed to."""
    lines = STEP.lower(start(), batch()).as_text().splitlines()
    products = [line for line in lines if re.search(r"stablehlo\.(dot_general|convolution)", line)]
    assert len(products) > 50
    assert [line for line in products if line.count("HIGHEST") != 2] == []


@pytest.mark.parametrize("fresh", [True, False])
def test_entries_are_those_of_the_averages_step_after_step(fresh):
    state = start(fresh=fresh)
    kinds = jax.tree.map(jax.typeof, state)
    for seed in range(2):
        state, _ = STEP(state, batch(seed))
        assert jax.tree.map(jax.typeof, state) == kinds
        quantizer = merge(GRAPH, state.params, state.aux).mimi.quantizer
        for averages, branch in (
            (state.aux.semantic, quantizer.semantic),
            (state.aux.acoustic, quantizer.acoustic),
        ):
            for q, book in enumerate(branch.codebooks):
                wanted_LC = np.asarray(averages.sum_QLC[q]) / np.asarray(averages.usage_QL[q])[:, None]
                np.testing.assert_allclose(book.embedding_LC[...], wanted_LC, rtol=1e-6)


def test_unknown_labels_do_not_count():
    given, look = batch(), OBJECTIVE.look_ahead
    given["labels_BN"][:, ::2] = -1

    @jax.jit
    def head(params, aux):
        trainee = merge(GRAPH, params, aux)
        branch = trainee.mimi.quantizer.semantic
        codes_BN = branch.encode(trainee.mimi.encoder(given["pcm_BT"][..., None]), 1)[:, 0]
        return trainee.head(branch.codebooks[0].embedding_LC[...][codes_BN])

    logits_BNV = np.asarray(head(start().params, start().aux))[:, look:]
    score_BNV = logits_BNV - np.log(np.exp(logits_BNV).sum(-1, keepdims=True))
    target_BN = given["labels_BN"][:, : FRAMES - look]  # predicted that many frames later
    known = [(b, n) for b in range(ROWS) for n in range(FRAMES - look) if target_BN[b, n] >= 0]
    assert 0 < len(known) < target_BN.size
    _, metrics = STEP(start(), given)
    wanted = -np.mean([score_BNV[b, n, target_BN[b, n]] for b, n in known])
    assert float(metrics["semantic"]) == pytest.approx(wanted, rel=1e-4)
    right = np.mean([score_BNV[b, n].argmax() == target_BN[b, n] for b, n in known])
    assert float(metrics["label_accuracy"]) == pytest.approx(right)


def test_without_known_labels_the_head_has_no_gradient():
    given = batch()
    given["labels_BN"][:] = -1
    before = arrays_by_name(start().params)
    state, metrics = STEP(start(), given)
    assert (float(metrics["semantic"]), float(metrics["label_accuracy"]), float(metrics["finite"])) == (0.0, 0.0, 1.0)
    stayed = {name for name, value in arrays_by_name(state.params).items() if np.array_equal(value, before[name])}
    assert stayed == {name for name in before if "head" in name} != set()


def test_the_loss_is_the_weighted_sum_of_its_parts():
    _, metrics = STEP(start(), batch())
    weights = {"spectral": 1.0} | {name: getattr(OBJECTIVE, name) for name in ("waveform", "commitment", "semantic")}
    assert float(metrics["loss"]) == pytest.approx(sum(w * float(metrics[n]) for n, w in weights.items()), rel=1e-5)


def rows_that_use(dropout: float, step: int) -> list[list[float]]:
    """Count the rows that use each codebook, semantic and acoustic."""
    state, decay = dataclasses.replace(start(), step=jnp.int32(step)), OBJECTIVE.codebooks.decay
    before = [np.asarray(a.usage_QL).sum(1) for a in (state.aux.semantic, state.aux.acoustic)]
    state, _ = STEP(state, batch(dropout=dropout))
    after = [np.asarray(a.usage_QL).sum(1) for a in (state.aux.semantic, state.aux.acoustic)]
    each = [(b - decay * a) / (1 - decay) / FRAMES for a, b in zip(before, after, strict=True)]
    return [np.round(e, 2).tolist() for e in each]


def test_dropout_takes_the_last_acoustic_codebooks_of_some_rows_and_never_the_semantic_one():
    assert rows_that_use(0.0, step=0) == [[ROWS], [ROWS, ROWS]]
    drawn = [rows_that_use(1.0, step) for step in range(5)]
    assert all(semantic == [ROWS] for semantic, _ in drawn)
    assert all(first >= second for _, (first, second) in drawn)
    assert len({tuple(acoustic) for _, acoustic in drawn}) > 2, "another draw each step"
    assert all(second < ROWS for _, (_, second) in drawn)


def test_a_few_steps_lower_the_loss():
    state, losses = start(fresh=True), []
    for _ in range(30):
        state, metrics = STEP(state, batch())
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[1:6])


def test_a_batch_split_over_two_devices_has_the_loss_and_codebooks_of_one_device():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere, shared = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    state = jax.device_put(start(), everywhere)
    key = jax.random.fold_in(state.key, 0)
    value, (aux, metrics) = jax.jit(loss)(state.params, (), state.aux, jax.device_put(batch(), shared), key)
    alone, alone_metrics = STEP(start(), batch())
    for name, found in {"loss": value, **metrics}.items():
        assert float(found) == pytest.approx(float(alone_metrics[name]), rel=1e-4), name
    wanted = arrays_by_name(alone.aux)
    for name, found in arrays_by_name(aux).items():
        # Sums over rows are added in another order.
        np.testing.assert_allclose(found, wanted[name], rtol=1e-4, atol=1e-5, err_msg=name)

"""The loss of conversational speech: against plain numpy, and the frames that it takes.

Shape letters: B batch rows, M streams (text first), Q codebooks, T positions, V codes, N turns, R chosen frames.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsm_jax.csm.prompt import turn_MT
from dsm_jax.errors import ConfigError
from dsm_jax.models.csm import CsmLM
from dsm_jax.nn.precision import set_compute_dtype
from dsm_jax.training.losses.csm import CsmObjective, csm_loss, draw_frames
from tests.helpers import small
from tests.helpers.csm_model import CSM

pytestmark = pytest.mark.slow  # the models compile for seconds

ROOM = 40
KEY = jax.random.key(0)
EVERY_FRAME = CsmObjective(depth_share=1.0)
LAST_TURN = dataclasses.replace(EVERY_FRAME, mask_context=True)


def conversation(seed: int, *frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Make a row of turns of three tokens of text and some frames: positions [M, T] and the starts of the turns [N]."""
    random = np.random.default_rng(seed)
    turns = [
        turn_MT(CSM, [36, *random.integers(0, 30, 1), 37], random.integers(1, CSM.card, (CSM.n_q, count)))
        for count in frames
    ]
    row_MT = np.concatenate(turns, axis=1)
    starts = np.cumsum([0, *(turn.shape[1] for turn in turns[:-1])])
    tokens_MT = np.pad(row_MT, ((0, 0), (0, ROOM - row_MT.shape[1])), constant_values=-1)
    return tokens_MT.astype(np.int32), np.pad(starts, (0, 3 - len(starts)), constant_values=-1).astype(np.int32)


@pytest.fixture(scope="module")
def batch() -> dict[str, jax.Array]:
    """Make three conversations of one to three turns, the first turn of the second one with a frame of zeros inside."""
    rows = [conversation(0, 5), conversation(1, 4, 6), conversation(2, 3, 2, 8)]
    tokens_BMT, starts_BN = (np.stack(arrays) for arrays in zip(*rows, strict=True))
    tokens_BMT[1, 1:, 4] = 0
    return {"tokens_BMT": jnp.asarray(tokens_BMT), "starts_BN": jnp.asarray(starts_BN)}


@pytest.fixture(scope="module")
def network() -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(small.build(lambda rngs: CsmLM(CSM, rngs=rngs)))


@pytest.fixture(scope="module")
def measured(network):
    """Compute the parts of the loss."""
    graph, params = network

    def parts(batch, objective=EVERY_FRAME, key=KEY):
        loss, found = jax.jit(lambda params: csm_loss(nnx.merge(graph, params), batch, key, objective))(params)
        return float(loss), float(found["backbone"]), float(found["depth"])

    return parts


@pytest.fixture(scope="module")
def wanted(network, batch):
    """Compute the parts of the loss plainly, for the frames that a mask [B, T] counts in each decoder."""
    graph, params = network
    out = jax.jit(lambda params: nnx.merge(graph, params)(batch["tokens_BMT"]))(params)
    first_BTV, depth_BTQV = (np.asarray(jax.nn.log_softmax(a)) for a in (out.first_logits_BTV, out.depth_logits_BTQV))
    codes_BQT = np.asarray(batch["tokens_BMT"][:, 1:])

    def parts(counted_BT, chosen_BT):
        first = [-first_BTV[b, t - 1, codes_BQT[b, 0, t]] for b, t in np.argwhere(counted_BT)]
        depth = [
            -depth_BTQV[b, t, q, codes_BQT[b, q + 1, t]] for b, t in np.argwhere(chosen_BT) for q in range(CSM.n_q - 1)
        ]
        return np.mean(first), np.mean(depth)

    return parts


def frames_of(batch) -> np.ndarray:
    return np.array(batch["tokens_BMT"][:, 1] >= 0)


def ends_of(batch) -> np.ndarray:
    """Mark the ends: a frame with no frame after it."""
    frames_BT = frames_of(batch)
    return frames_BT & ~np.pad(frames_BT[:, 1:], ((0, 0), (0, 1)))


def test_with_a_share_of_1_every_frame_counts_in_both_decoders(batch, measured, wanted):
    assert frames_of(batch).sum(1).tolist() == [6, 12, 16], "with the frames of zeros that end the recordings"
    loss, *parts = measured(batch)
    # float32 sums in another order
    assert parts == pytest.approx(wanted(frames_of(batch), frames_of(batch)), rel=1e-5)
    assert loss == pytest.approx(sum(parts), rel=1e-6)
    weighted = measured(batch, dataclasses.replace(EVERY_FRAME, backbone=0.5, depth=3.0))[0]
    assert weighted == pytest.approx(0.5 * parts[0] + 3.0 * parts[1], rel=1e-6)


def test_context_turns_count_only_if_the_objective_says_so(batch, measured, wanted):
    last_BT = frames_of(batch) & (np.arange(ROOM) >= np.asarray(batch["starts_BN"]).max(1)[:, None])
    assert last_BT.sum(1).tolist() == [6, 7, 9]
    assert measured(batch, LAST_TURN)[1:] == pytest.approx(wanted(last_BT, last_BT), rel=1e-5)


def test_the_frames_of_the_depth_decoder_can_be_given(batch, measured, wanted):
    given_BT = frames_of(batch) & (np.arange(ROOM) % 2 == 0)
    loss = measured(batch | {"depth_BT": jnp.asarray(given_BT)}, CsmObjective())
    assert loss[1:] == pytest.approx(wanted(frames_of(batch), given_BT), rel=1e-5)


@pytest.mark.parametrize("share", [1 / 16, 0.3, 1.0])
def test_the_depth_decoder_gets_all_ends_and_a_share_of_the_other_frames(batch, share):
    frames_BT, ends_BT = frames_of(batch), ends_of(batch)
    frames_BT[2, :10] = False  # as if its first turn did not count

    def chosen(seed):
        chosen_BR, index_BR = draw_frames(
            jnp.asarray(frames_BT), jnp.asarray(ends_BT), jax.random.key(seed), share=share, turns=3
        )
        assert chosen_BR.shape[1] == min(ROOM, int(np.ceil(share * ROOM)) + 3), "whatever the rows hold"
        taken_BT = np.zeros_like(frames_BT)
        for taken_T, chosen_R, index_R in zip(taken_BT, np.asarray(chosen_BR), np.asarray(index_BR), strict=True):
            taken_T[index_R[chosen_R]] = True
            assert taken_T.sum() == chosen_R.sum(), "no frame twice"
        return taken_BT

    draws = [chosen(seed) for seed in range(40)]
    for taken_BT in draws:
        assert not (taken_BT & ~frames_BT).any()
        assert (taken_BT & ends_BT).sum() == (frames_BT & ends_BT).sum() == 5
        others_B = (frames_BT & ~ends_BT).sum(1)
        assert (taken_BT & ~ends_BT).sum(1).tolist() == np.ceil(share * others_B).tolist()
    if share < 1:
        # All frames come up: where one of ten is drawn, 40 draws miss a frame with a probability of 0.015.
        assert np.any(draws, axis=0)[frames_BT].mean() > 0.9
        assert any((draws[0] != taken_BT).any() for taken_BT in draws[1:])


def test_the_loss_of_a_share_is_that_of_the_frames_that_were_drawn(batch, measured, wanted):
    objective = CsmObjective(depth_share=0.3)
    chosen_BR, index_BR = draw_frames(
        jnp.asarray(frames_of(batch)[:, 1:]), jnp.asarray(ends_of(batch)[:, 1:]), KEY, share=0.3, turns=3
    )
    taken_BT = np.zeros((3, ROOM), bool)
    for taken_T, chosen_R, index_R in zip(taken_BT, np.asarray(chosen_BR), np.asarray(index_BR), strict=True):
        taken_T[1 + index_R[chosen_R]] = True
    assert taken_BT.sum() == 6 + 2 + 3 + 4
    assert measured(batch, objective)[1:] == pytest.approx(wanted(frames_of(batch), taken_BT), rel=1e-5)
    assert measured(batch, objective, jax.random.key(1))[2] != measured(batch, objective)[2]


def test_rows_without_a_frame_have_no_loss_and_no_gradient(network, batch):
    graph, params = network
    text = batch | {"tokens_BMT": batch["tokens_BMT"].at[:, 1:].set(-1)}
    gradient = jax.jit(jax.grad(lambda params: csm_loss(nnx.merge(graph, params), text, KEY, CsmObjective())[0]))
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(gradient(params)))


def test_in_bfloat16_the_loss_is_about_the_same(network, batch, measured):
    graph, params = network

    def loss(params):
        lm = nnx.merge(graph, jax.tree.map(lambda p: p.astype(jnp.bfloat16), params))
        set_compute_dtype(lm, jnp.bfloat16)
        value, parts = csm_loss(lm, batch, KEY, EVERY_FRAME)
        assert value.dtype == parts["depth"].dtype == jnp.float32
        return value

    assert float(jax.jit(loss)(params)) == pytest.approx(measured(batch)[0], rel=0.02)  # 8 bits of mantissa


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ConfigError, match=f"depth_share is {share}; give a share of the frames, above 0 and at most 1"):
        CsmObjective(depth_share=share)

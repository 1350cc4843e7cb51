"""The training steps that the benchmarks time compute the same: losses, gradients of every parameter, and updates.

Shape letters: B batch rows.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from dsm_jax.configs import MimiConfig
from dsm_jax.convert import kyutai, pieces
from dsm_jax.models.lm import DelayedStreamsLM
from dsm_jax.models.mimi import Mimi
from dsm_jax.models.parameters import flatten
from dsm_jax.training.losses.codec import CodecTrainee
from dsm_jax.training.step import OptimizerConfig
from tests.benchmarks import moshi_training, training
from tests.helpers import small
from tests.parity.references.kyutai import published_names

ROUNDING = 1e-4  # of float32, relative to the largest value, through the backward passes of whole networks
# What the first layer's weights add up, over samples of noise, nearly cancels.
NEARLY_CANCELS, ITS_ROUNDING = "mimi.encoder.model.0.conv.conv.weight", 1e-3


def published(table: pieces.Table, values: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return parameters of this library, or their gradients, as a file of the reference has them."""
    return {tensor.name: np.array(tensor.make()) for tensor in pieces.save(table, values, lambda name: values[name])}


def fill(module: torch.nn.Module, table: pieces.Table, values: Mapping[str, Any]) -> None:
    """Give a module of the reference this library's parameters, all of them."""
    module.load_state_dict({name: torch.from_numpy(a) for name, a in published(table, values).items()})


def expect_gradients(module: torch.nn.Module, ours: Mapping[str, np.ndarray]) -> None:
    """Raise AssertionError unless every parameter of the module has the gradient that is listed under its name."""
    for name, parameter in published_names(dict(module.named_parameters())).items():
        wanted = np.zeros(parameter.shape) if parameter.grad is None else parameter.grad.numpy()
        allowed = (ITS_ROUNDING if name == NEARLY_CANCELS else ROUNDING) * np.abs(wanted).max()
        np.testing.assert_allclose(ours[name], wanted, rtol=0, atol=allowed, err_msg=name)


def gradients(ours: training.Training) -> tuple[float, dict[str, Any]]:
    value_and_grad = jax.jit(jax.value_and_grad(ours.loss, has_aux=True))
    (loss, _), grads = value_and_grad(ours.params, (), ours.aux, ours.batch, jax.random.key(0))
    return float(loss), flatten(grads)


# The language model: a clip three times as long as its window, delays, and tokens of -1.


def lm_pair(case: training.LmCase) -> tuple[training.Training, moshi_training.Training]:
    lm = small.build(lambda rngs: DelayedStreamsLM(case.config, rngs=rngs))
    theirs = moshi_training.make_lm(case.config)
    fill(theirs, kyutai.lm_table(case.config), flatten(nnx.state(lm)))
    return training.train_lm(case, lm), moshi_training.train_lm(case, theirs)


def test_the_language_model_has_the_loss_and_the_gradients_of_the_reference(monkeypatch):
    codes_BKT = training.TINY_LM.codes()
    codes_BKT[1, 0, 5:8] = codes_BKT[2, 1:, 9] = -1
    monkeypatch.setattr(training.LmCase, "codes", lambda case: codes_BKT)
    ours, theirs = lm_pair(training.TINY_LM)
    loss, grads = gradients(ours)
    wanted = theirs.loss()
    wanted.backward()
    assert loss == pytest.approx(wanted.item(), rel=1e-5)
    expect_gradients(theirs.model, published(kyutai.lm_table(training.TINY_LM.config), grads))


def test_the_language_model_learns_as_the_reference_does():
    # Steps so large that rate, decay, clipping and both moments each change the losses by more than is allowed here: a
    # clip of twice as much by 5e-5, the others by 6e-4 and more.
    optimizer = OptimizerConfig(learning_rate=0.02, warmup=0, weight_decay=1.0, clip=0.2)
    ours, theirs = lm_pair(dataclasses.replace(training.TINY_LM, optimizer=optimizer))
    step, wanted = training.start(ours), moshi_training.start(theirs)
    assert [step() for _ in range(5)] == pytest.approx([wanted() for _ in range(5)], rel=2e-5)


# The codec: from samples through the quantiser, straight through, to samples.


def trainee_table(config: MimiConfig) -> pieces.Table:
    """Return the table of a codec and its head, under the names of the trainees of both sides."""
    codec: list[pieces.Piece | pieces.Constant] = [
        dataclasses.replace(item, sources=tuple(_under_mimi(s) for s in item.sources), target=f"mimi.{item.target}")
        if isinstance(item, pieces.Piece)
        else dataclasses.replace(item, source=_under_mimi(item.source))
        for item in kyutai.mimi_table(config)
    ]
    # Between its two convolutions the reference's head counts the activation.
    for there, here in (0, 0), (2, 1):
        stem = f"head.{there}.conv.conv"
        codec += kyutai.convolution(f"{stem}.weight", f"{stem}.bias", f"head.convolutions.layers.{here}", None)
    return codec


def _under_mimi(spellings: pieces.Spellings) -> pieces.Spellings:
    return tuple(f"mimi.{name}" for name in spellings)


def test_the_codec_has_the_loss_and_the_gradients_of_the_reference(monkeypatch):
    case = training.TINY_CODEC
    table = trainee_table(case.config)
    trainee = small.build(
        lambda rngs: CodecTrainee(Mimi(case.config, block_frames=None, rngs=rngs), case.labels, rngs=rngs)
    )
    theirs = moshi_training.CodecTrainee(case.config, case.labels)
    entries = flatten(nnx.state(trainee))
    fill(theirs, table, entries)
    # Each row is cut somewhere else.
    monkeypatch.setattr(jax.random, "randint", lambda key, shape, low, high: jnp.arange(shape[0]) % high + low)
    monkeypatch.setattr(torch, "randint", lambda high, shape: torch.arange(shape[0]) % high)
    ours = training.train_codec(case, trainee, fresh=False)
    loss, grads = gradients(ours)
    wanted = moshi_training.train_codec(case, theirs).loss()
    wanted.backward()
    assert loss == pytest.approx(wanted.item(), rel=1e-5)
    # Codebooks have no gradients on either side.
    grads |= {name: np.zeros(value.shape) for name, value in entries.items() if "embedding_LC" in name}
    expect_gradients(theirs, published(table, grads))
    assert min(np.abs(g).max() for name, g in grads.items() if "encoder" in name) > 0


def test_the_timed_steps_of_the_codec_go_on_from_the_ones_before():
    for side in (training, moshi_training):
        step = side.make("train_codec_step", tiny=True)
        losses = [step() for _ in range(4)]
        assert losses[-1] < losses[1] < losses[0]


def test_a_wrong_gradient_is_noticed():
    linear = torch.nn.Linear(3, 2)
    linear(torch.ones(1, 3)).sum().backward()
    right = {"weight": np.ones((2, 3)), "bias": np.ones(2)}
    expect_gradients(linear, right)
    wrong = np.ones((2, 3))
    wrong[1, 2] += 2e-4
    for name, gradient in {"weight": wrong, "bias": np.zeros(2)}.items():
        with pytest.raises(AssertionError, match=name):
            expect_gradients(linear, right | {name: gradient})
    with pytest.raises(KeyError, match="bias"):
        expect_gradients(linear, {"weight": right["weight"]})

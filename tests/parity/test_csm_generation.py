"""Conversational speech beside transformers: greedy codes and sound, endings, and the distribution that is sampled."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper

import dsm_jax
from dsm_jax.csm import CsmOptions, Request, Segment
from dsm_jax.csm.batch import synthesize_each
from dsm_jax.csm.synthesizer import ConversationSynthesizer
from dsm_jax.nn.sampling import sample
from tests.parity.references import csm as reference

MAX_FRAMES = 14
GREEDY = CsmOptions(temperature=0.0, max_frames=MAX_FRAMES)
CLEAR = 2e-3  # margin of a greedy choice that no rounding of float32 can turn


@pytest.fixture(scope="module", params=[0, 1], ids=["seed 0", "seed 1"])
def folder(request, tmp_path_factory) -> Path:
    return reference.make_transformers_csm(tmp_path_factory.mktemp("csm") / "small", seed=request.param)


@pytest.fixture(scope="module")
def model(folder):
    return dsm_jax.load(folder)


def recording(model: dsm_jax.Model, frames: float, seed: int) -> np.ndarray:
    size = int(frames * model.config.mimi.frame_size)
    return np.random.default_rng(seed).normal(scale=0.2, size=size).astype(np.float32)


def conversations(model: dsm_jax.Model) -> list[Request]:
    first = Segment("Hello there.", 0, recording(model, 5, 0))
    second = Segment("Good morning!", 1, recording(model, 9, 1))
    return [
        Request(reference.ENDS.removeprefix("[0]"), 0),
        Request("And what is this?", 1, [first]),
        Request("Yes.", 0, [first, second]),
        Request("No, it is not so.", 1, [second, first, second]),
    ]


def messages(request: Request) -> list[dict]:
    def message(text: str, speaker: int, *audio: dict) -> dict:
        return {"role": str(speaker), "content": [{"type": "text", "text": text}, *audio]}

    turns = [message(one.text, one.speaker, {"type": "audio", "audio": one.audio}) for one in request.context]
    return [*turns, message(request.text, request.speaker)]


def until_end(codes_QT: np.ndarray) -> np.ndarray:
    """Return the frames before the first one of zeros."""
    ends_T = (codes_QT == 0).all(0)
    return codes_QT[:, : int(ends_T.argmax())] if ends_T.any() else codes_QT


def spoken(model: dsm_jax.Model, requests: list[Request], options: CsmOptions = GREEDY) -> list[dsm_jax.Speech]:
    results = dict(synthesize_each(model, requests, options=options))
    return [r.speech if isinstance(r := results[i], dsm_jax.IncompleteSpeechError) else r for i in range(len(requests))]


def test_greedy_codes_and_sound_of_each_conversation_are_transformers(folder, model):
    lengths = set()
    for request in conversations(model):
        (theirs_QT,), (theirs_T,) = reference.transformers_csm_talk(folder, [messages(request)], MAX_FRAMES)
        (ours,) = spoken(model, [request])
        prompt_MT = ConversationSynthesizer(model, 1).prompt(request)
        assert reference.transformers_csm_margin(folder, prompt_MT, ours.frames) > CLEAR
        np.testing.assert_array_equal(ours.frames, until_end(theirs_QT))
        np.testing.assert_allclose(ours.pcm, np.clip(theirs_T, -1, 1)[: ours.pcm.size], atol=2e-4)
        lengths.add(ours.frames.shape[1])
    assert len(lengths) > 1  # some end by themselves


def test_ragged_batch_is_transformers_and_each_row_is_as_alone(folder, model):
    requests = conversations(model)
    theirs, _ = reference.transformers_csm_talk(folder, [messages(request) for request in requests], MAX_FRAMES)
    for request, ours, codes_QT in zip(requests, spoken(model, requests), theirs, strict=True):
        np.testing.assert_array_equal(ours.frames, until_end(codes_QT))
        np.testing.assert_array_equal(ours.frames, spoken(model, [request])[0].frames)


def test_sesames_layout_gives_the_same_codes(folder, model, tmp_path):
    dsm_jax.convert(folder, tmp_path / "sesame", to="sesame")
    other = dsm_jax.load(tmp_path / "sesame")
    for request, ours in zip(conversations(model), spoken(other, conversations(model)), strict=True):
        np.testing.assert_array_equal(ours.frames, spoken(model, [request])[0].frames)


def test_last_frame_of_a_recording_is_padded_as_sesame_pads_it(folder, model):
    """Ours pads samples to a whole frame, as Sesame does; transformers pads in every convolution instead."""
    size = model.config.mimi.frame_size
    partial = recording(model, 5.4, 2)
    whole = np.pad(partial, (0, -partial.size % size))
    ours_QT = dsm_jax.encode(model, partial)
    np.testing.assert_array_equal(ours_QT, reference.transformers_csm_context(folder, whole))
    theirs_QT = reference.transformers_csm_context(folder, partial)
    assert theirs_QT.shape == ours_QT.shape
    np.testing.assert_array_equal(ours_QT[:, :-1], theirs_QT[:, :-1])
    assert (ours_QT[:, -1] != theirs_QT[:, -1]).any()
    request = Request("And what is this?", 1, [Segment("Hello there.", 0, partial)])
    padded = Request("And what is this?", 1, [Segment("Hello there.", 0, whole)])
    (theirs_QT,), _ = reference.transformers_csm_talk(folder, [messages(padded)], MAX_FRAMES)
    np.testing.assert_array_equal(spoken(model, [request])[0].frames, until_end(theirs_QT))


def test_frame_of_zeros_but_for_its_last_code_does_not_end_the_speech(folder, model):
    """Ours goes on, as Sesame does; transformers ends there, and speaks the frame."""
    later = Request(reference.ENDS_LATER.removeprefix("[1]"), 1)
    (theirs_QT,), (theirs_T,) = reference.transformers_csm_talk(folder, [messages(later)], MAX_FRAMES)
    (ours,) = spoken(model, [later])
    nearly = reference.NEARLY_END_FRAME
    assert not ours.frames[:-1, nearly].any()
    assert ours.frames[-1, nearly]
    assert ours.complete
    assert ours.frames.shape[1] == reference.LATER_END_FRAME
    assert theirs_QT.shape[1] == nearly + 1
    assert theirs_T.size == (nearly + 1) * model.config.mimi.frame_size
    np.testing.assert_array_equal(ours.frames[:, : nearly + 1], theirs_QT)


def test_speech_that_ends_stops_its_row(folder, model):
    ends = Request(reference.ENDS.removeprefix("[0]"), 0)
    other = conversations(model)[1]
    ours = spoken(model, [ends, other])
    assert ours[0].complete
    assert ours[0].frames.shape[1] == reference.END_FRAME
    theirs, _ = reference.transformers_csm_talk(folder, [messages(ends), messages(other)], MAX_FRAMES)
    assert theirs[0].shape[1] == theirs[1].shape[1] > reference.END_FRAME  # transformers lets the row run on
    np.testing.assert_array_equal(ours[0].frames, until_end(theirs[0]))


@pytest.mark.parametrize(("temperature", "top_k"), [(0.9, 50), (0.9, 5), (1.3, 0)])
def test_distribution_is_transformers_given_the_same_logits(temperature, top_k):
    logits_V = np.random.default_rng(0).normal(scale=2.0, size=67).astype(np.float32)
    scores = TemperatureLogitsWarper(temperature)(None, torch.from_numpy(logits_V)[None])
    scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    expected_V = scores.softmax(-1)[0].numpy()
    rows = 200_000
    tokens_B = sample(
        jnp.broadcast_to(logits_V, (rows, 67)),
        jax.random.split(jax.random.PRNGKey(1), rows),
        jnp.full(rows, temperature),
        jnp.full(rows, top_k, jnp.int32),
        max_top_k=64,
    )
    found_V = np.bincount(np.asarray(tokens_B), minlength=67) / rows
    assert not found_V[expected_V == 0].any()
    # Six standard deviations of each share.
    np.testing.assert_array_less(np.abs(found_V - expected_V), 6 * np.sqrt(expected_V / rows) + 1e-9)

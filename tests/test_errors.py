"""Errors that carry results: they survive the way from one process to another."""

import copy
import pickle

import numpy as np
import pytest

from dsm_jax.errors import AudioError, BatchError, UnsayableError
from dsm_jax.speech import IncompleteSpeechError, Speech

SPEECH = Speech(np.zeros(3, np.float32), 24_000, (), np.zeros((2, 1), np.int32), "some-model")
ERRORS = (
    BatchError(["said", None], {1: AudioError("it is empty")}),
    UnsayableError("a tag is unknown", [1, 2]),
    IncompleteSpeechError("it did not end", SPEECH),
)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("again", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy], ids=["pickled", "copied"])
def test_an_error_keeps_what_it_carries(error, again):
    other = again(error)
    assert (type(other), str(other)) == (type(error), str(error))
    assert other.__dict__.keys() == error.__dict__.keys() != set()


def test_a_batch_error_keeps_its_results():
    other = pickle.loads(pickle.dumps(ERRORS[0]))
    assert other.results == ["said", None]
    assert str(other.errors[1]) == "it is empty"


def test_a_batch_error_says_others_only_where_there_are_some():
    assert str(ERRORS[0]) == "1 of 2 inputs failed, the others are in `.results`: it is empty"
    assert str(BatchError([None], {0: AudioError("it is empty")})) == "1 of 1 input failed: it is empty"


def test_speech_is_compared_by_identity():
    assert SPEECH == SPEECH
    assert copy.copy(SPEECH) not in [SPEECH]
    assert len({SPEECH, copy.copy(SPEECH)}) == 2

"""The stored miniature of stt-1b-en_fr with pause heads, its recording, and moshi's outputs."""

import dataclasses
import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

import dsm_jax
from dsm_jax import audio
from dsm_jax.checkpoints import Model

DATA = Path(__file__).parent.with_name("data")
RECORDING = DATA / "librispeech-1272-128104-0000.flac"
CHECKPOINT = Path(__file__).parents[1] / "goldens/stt/checkpoint"


@functools.cache
def model() -> Model:
    """Load the miniature from Kyutai's layout."""
    return dsm_jax.load(CHECKPOINT)


@functools.cache
def recording() -> np.ndarray:
    """Read 5.9 s of read speech at 24 kHz."""
    pcm = audio.read(RECORDING)
    pcm.setflags(write=False)
    return pcm


@functools.cache
def expected() -> dict[str, np.ndarray]:
    """Load moshi's codes_QT, tokens_T, logits_TV and pauses_TH of the padded recording, and first_token."""
    return load_file(CHECKPOINT.with_name("expected.safetensors"))


def expected_words() -> list[tuple[str, float, float]]:
    """Load moshi's words with start and end, by the published script's rules."""
    return [tuple(row) for row in json.loads(CHECKPOINT.with_name("expected_words.json").read_text(encoding="utf-8"))]


def check_same(found: Iterable[Any], wanted: Iterable[Any]) -> None:
    """Assert equal words or pauses; probabilities may differ by sums in another order, as in batches of other sizes."""
    found, wanted = list(found), list(wanted)
    alike = [[dataclasses.replace(one, probability=0.0) for one in events] for events in (found, wanted)]
    assert alike[0] == alike[1]
    np.testing.assert_allclose(*([one.probability for one in events] for events in (found, wanted)), atol=1e-5)

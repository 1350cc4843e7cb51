"""Live audio: events as they come, and a stream that knows when it is over."""

import numpy as np
import pytest

import dsm_jax
from dsm_jax.errors import AudioError, StreamError
from dsm_jax.stt import WordEnded, WordStarted
from tests.helpers import stt_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model():
    return stt_model.model()


def test_every_word_starts_before_it_ends(model):
    events = list(dsm_jax.transcribe_stream(model, [stt_model.recording()]))
    started = [e for e in events if isinstance(e, WordStarted)]
    ended = [e.word for e in events if isinstance(e, WordEnded)]
    assert [e.start for e in started] == [w.start for w in ended]
    for start, word in zip(started, ended, strict=True):
        assert events.index(start) < events.index(WordEnded(word))


def test_a_live_transcriber_takes_frames_as_they_complete(model):
    listener = dsm_jax.StreamingTranscriber(model)
    pcm = stt_model.recording()
    assert listener.feed(pcm[:0]) == []
    events = [event for i in range(0, pcm.size, 960) for event in listener.feed(pcm[i : i + 960])]
    assert any(isinstance(e, WordEnded) for e in events), "words come before the audio is over"
    listener.finish()
    assert listener.text == dsm_jax.transcribe(model, pcm).text


def test_a_finished_live_transcriber_takes_no_more(model):
    listener = dsm_jax.StreamingTranscriber(model)
    with pytest.raises(AudioError, match=r"shape \(2, 5\); feed mono samples"):
        listener.feed(np.zeros((2, 5), np.float32))
    listener.finish()
    with pytest.raises(StreamError, match="fed to a stream that has been finished"):
        listener.feed(np.zeros(5, np.float32))
    with pytest.raises(StreamError, match="finished already"):
        listener.finish()

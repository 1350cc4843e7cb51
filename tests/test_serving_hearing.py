"""A client's audio in a slot: words as `transcribe` has them, markers, silence of the server's own, several at once."""

import dataclasses
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dsm_jax
from dsm_jax import audio
from dsm_jax.errors import PromptError
from dsm_jax.runtime.compile import compilations
from dsm_jax.serving.engine import Engine
from dsm_jax.serving.hearing import STARVED_S, Heard, HearingService, LiveHearing, Marked, groups_of
from dsm_jax.serving.outbox import Ended, Outbox, Started, put_all
from dsm_jax.stt import Prompt, TranscribeOptions, WordEnded, WordStarted
from dsm_jax.stt.transcriber import RecordingSession

pytestmark = pytest.mark.slow
AUDIO = Path(__file__).resolve().parents[1] / "examples/audio"
FRAME = 1920


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """A service and its engine, turned by hand."""

    def __init__(self, model, slots: int):
        self.clock = Clock()
        self.service = HearingService(model, slots, clock=self.clock)
        self.engine = Engine(
            "digits",
            self.service.groups,
            post=put_all,
            plan=self.service.plan,
            hurry=lambda session: session.behind,
            clock=self.clock,
        )

    def begin(self, **settings) -> LiveHearing:
        session = LiveHearing(self.service, Outbox(), **settings)
        self.engine.hold(session)
        self.engine.start(session)
        return session

    def run(self, seconds: float = 0.0) -> None:
        """Turn until nothing is due, then let time pass, and so on up to so many seconds."""
        end = self.clock.now + seconds
        while True:
            wait = self.engine.turn()
            if wait > 0:
                if self.clock.now + wait > end:
                    self.clock.now = end
                    return
                self.clock.now += wait + 1e-9  # past the rounding of the sum

    def end(self, *sessions: LiveHearing) -> None:
        for session in sessions:
            self.engine.leave(session)
        self.run()
        assert self.engine.used == 0


@pytest.fixture(scope="module")
def model():
    return dsm_jax.load("digits")


@pytest.fixture(scope="module")
def bench(model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dsm_jax.serving.hearing._cores", lambda: 1)
        patch.setattr("dsm_jax.serving.hearing._SLOTS_PER_CORE", 2)
        return Bench(model, 4)  # in two groups


@pytest.fixture(scope="module")
def clips():
    return [audio.read(AUDIO / f"{name}.flac") for name in ("digits_jackson", "digits_lucas")]


@pytest.fixture(scope="module")
def wanted(model, clips):
    return dsm_jax.transcribe(model, clips)


def messages(session: LiveHearing) -> list:
    return list(session.outbox._waiting)


def words(session: LiveHearing) -> list:
    return [message.word for message in messages(session) if isinstance(message, WordEnded)]


def of(session: LiveHearing, kind: type) -> list:
    return [message for message in messages(session) if isinstance(message, kind)]


def same(found, words) -> None:
    assert [(w.text, w.start, w.end) for w in found] == [(w.text, w.start, w.end) for w in words]
    np.testing.assert_allclose([w.probability for w in found], [w.probability for w in words], atol=1e-5)


def test_a_recording_has_the_words_of_transcribe(bench, clips, wanted):
    for clip, transcript in zip(clips, wanted, strict=True):
        session = bench.begin(is_file=True)
        session.push(clip)
        session.finish()
        bench.run()
        same(words(session), transcript.words)
        assert session.transcript(None).text == transcript.text
        assert [messages(session)[0], messages(session)[-1]] == [Started(), Ended()]
        heard = of(session, Heard)
        assert [message.index for message in heard] == list(range(math.ceil(clip.size / FRAME)))
        assert heard[-1].buffered == 0
        assert bench.engine.used == 0


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(size=st.integers(300, 5000), every=st.integers(1, 5))
def test_chunks_of_any_size_and_markers_anywhere_change_no_word(bench, clips, wanted, size, every):
    session, clip = bench.begin(), clips[0]
    count = 0
    for number, first in enumerate(range(0, clip.size, size)):
        if number % every == 0:
            session.mark(count)
            count += 1
        session.push(clip[first : first + size])
        bench.run()
    session.mark(-1)
    bench.run(1.0)
    same(words(session), wanted[0].words)
    assert [mark.id for mark in of(session, Marked)] == [*range(count), -1]
    assert len(of(session, Heard)) == math.ceil(clip.size / FRAME)  # no added silence is told
    bench.end(session)


def test_a_marker_waits_for_audio_and_after_a_while_is_answered_by_added_silence(bench, clips, wanted):
    session = bench.begin()
    session.push(clips[0])
    session.mark(5)
    bench.run(STARVED_S * 0.9)
    assert of(session, Marked) == []
    bench.run(STARVED_S)
    assert messages(session)[-1] == Marked(5)
    same(words(session), wanted[0].words)
    bench.end(session)


def test_a_flushing_marker_is_answered_at_once(bench, clips, wanted):
    session = bench.begin()
    session.push(clips[1])
    session.mark(5, flush=True)
    bench.run()
    assert messages(session)[-1] == Marked(5)
    same(words(session), wanted[1].words)
    bench.end(session)


def test_the_end_of_a_word_comes_before_the_marker_behind_it_while_silence_flows(bench, clips, wanted):
    session = bench.begin()
    session.push(clips[0])
    session.mark(1)
    for _ in range(60):
        session.push(np.zeros(FRAME, np.float32))
        bench.run()
    kinds = [type(message) for message in messages(session) if isinstance(message, WordStarted | WordEnded | Marked)]
    assert kinds == [WordStarted, WordEnded] * len(wanted[0].words) + [Marked]
    bench.end(session)


def test_added_silence_is_not_in_the_times_of_later_words(bench, clips, wanted):
    session = bench.begin()
    for _ in range(2):
        session.push(clips[0])
        session.mark(0, flush=True)
        bench.run()
    first, again = words(session)[: len(wanted[0].words)], words(session)[len(wanted[0].words) :]
    later = [
        dataclasses.replace(w, start=w.start - clips[0].size / 24_000, end=w.end - clips[0].size / 24_000)
        for w in again
    ]
    same(first, wanted[0].words)
    assert [w.text for w in later] == [w.text for w in first]
    np.testing.assert_allclose([w.start for w in later], [w.start for w in first], atol=0.081)  # a frame
    bench.end(session)


def test_sessions_beside_each_other_are_as_alone_whatever_the_order_of_their_audio(bench, clips, wanted):
    random = np.random.default_rng(3)
    streams = [(bench.begin(), clips[number % 2], wanted[number % 2]) for number in range(4)]
    places = [0] * 4
    before = compilations()
    while any(place < stream[1].size for place, stream in zip(places, streams, strict=True)):
        chosen = int(random.integers(4))
        session, clip, _ = streams[chosen]
        size = int(random.integers(1, 9000))
        session.push(clip[places[chosen] : places[chosen] + size])
        places[chosen] += size
        if random.random() < 0.5:
            bench.run()
    for session, _, _ in streams:
        session.finish()
    bench.run()
    for session, _, transcript in streams:
        same(words(session), transcript.words)
    assert compilations() == before


def test_a_session_in_the_slot_of_one_that_left_hears_nothing_of_it(bench, clips, wanted):
    for cut in (0.3, 0.7):
        aborted = [bench.begin() for _ in range(4)]
        for session in aborted:
            session.push(clips[0][: int(cut * clips[0].size)])
            session.mark(1)
        for _ in range(20):
            bench.engine.turn()
        bench.end(*aborted)
        session = bench.begin()
        session.push(clips[1])
        session.finish()
        bench.run()
        same(words(session), wanted[1].words)


def test_restarting_begins_anew_and_keeps_audio_that_waits(bench, clips, wanted):
    session = bench.begin()
    session.push(clips[0][: 50 * FRAME])
    bench.run()
    session.push(clips[1])
    bench.engine.restart(session)
    session.finish()
    bench.run()
    assert len(of(session, Started)) == 2
    at = messages(session).index(Started(), 1)
    same([m.word for m in messages(session)[at:] if isinstance(m, WordEnded)], wanted[1].words)


def test_beginning_anew_keeps_markers_and_what_is_no_whole_frame(bench):
    session = bench.begin()
    session.push(np.zeros(20 * FRAME + 1000, np.float32))
    session.mark(7)
    bench.run(0.1)
    bench.engine.restart(session)
    bench.run(0.1)
    session.push(np.zeros(FRAME - 1000, np.float32))
    bench.run(1.0)
    at = messages(session).index(Started(), 1)
    assert [type(message) for message in messages(session)[at:]] == [Started, Heard, Marked]
    assert messages(session)[-1] == Marked(7)
    bench.end(session)


def test_beginning_anew_drops_the_silence_of_a_marker(bench):
    session = bench.begin()
    session.push(np.zeros(10 * FRAME, np.float32))
    session.mark(1, flush=True)
    while len(of(session, Heard)) < 10:
        bench.engine.turn()
    bench.engine.turn()  # takes some of the silence
    bench.engine.restart(session)
    bench.run(1.0)
    session.push(np.zeros(3 * FRAME, np.float32))
    bench.run(1.0)
    at = messages(session).index(Started(), 1)
    assert [message.index for message in messages(session)[at:] if isinstance(message, Heard)] == [0, 1, 2]
    assert of(session, Marked) == [Marked(1)]
    bench.end(session)


def test_a_client_ahead_of_its_slot_is_told_what_waits(bench, clips):
    session = bench.begin()
    session.push(clips[0])
    assert session.waiting == pytest.approx(clips[0].size / 24_000)
    bench.engine.turn()
    heard = of(session, Heard)
    assert heard[0].buffered == clips[0].size - FRAME
    assert session.waiting == pytest.approx((clips[0].size - len(heard) * FRAME) / 24_000)
    bench.end(session)


def test_a_prompt_is_followed_and_one_that_is_too_long_is_refused(bench, model, clips):
    options = TranscribeOptions(prompt=Prompt(text="one two three", exclude_from_output=True))
    session = bench.begin(utterance=bench.service.read(options))
    session.push(clips[0])
    session.finish()
    bench.run()
    same(words(session), dsm_jax.transcribe(model, clips[0], options=options).words)
    heard = of(session, Heard)
    assert len(heard) == math.ceil(clips[0].size / FRAME)  # the prompt's frames are not the client's
    with pytest.raises(PromptError, match=r"the prompt has .* tokens; this server takes up to 64: shorten it"):
        bench.service.read(TranscribeOptions(prompt=Prompt(text="seven " * 40)))


@pytest.mark.parametrize(
    ("slots", "platform", "cores", "groups"),
    [(1, "cpu", 1, 1), (16, "cpu", 1, 1), (17, "cpu", 1, 2), (64, "cpu", 2, 2), (64, "cpu", 8, 1), (512, "gpu", 2, 1)],
)
def test_a_cpu_steps_so_many_slots_at_a_time_for_each_core(monkeypatch, slots, platform, cores, groups):
    monkeypatch.setattr("dsm_jax.serving.hearing._cores", lambda: cores)
    assert groups_of(slots, platform) == groups


def test_equal_groups_take_no_more_sessions_than_there_are_to_be(model, monkeypatch):
    monkeypatch.setattr("dsm_jax.serving.hearing.groups_of", lambda slots, platform: 2)
    service = HearingService(model, 3)
    assert [slots.program.slots for slots in service.groups] == [2, 2]
    assert (service.total, service.groups[0].program) == (3, service.groups[1].program)


def test_a_larger_chunk_is_taken_once_it_takes_more_frames_a_second(bench, monkeypatch):
    service = bench.service
    monkeypatch.setattr(service.transcriber.program, "chunks", (1, 4))
    monkeypatch.setattr(service, "step_seconds", {1: 0.01, 4: 0.025})

    def chunk(*ready: int) -> int:
        sessions = [SimpleNamespace(buffer=SimpleNamespace(ready=frames)) for frames in ready]
        service.plan(sessions)
        return service.transcriber.chunk

    assert [chunk(), chunk(1), chunk(2), chunk(3), chunk(9), chunk(3, 1), chunk(9, 1), chunk(9, 1, 1)] == [
        *(1, 1, 1, 4),
        *(4, 1, 1, 1),
    ]
    assert chunk(9, 9, 1) == 4
    service.plan(())


def test_a_warm_up_that_fails_is_an_error(model, monkeypatch):
    def request(session):
        raise PromptError("no room")

    monkeypatch.setattr(RecordingSession, "request", request)
    with pytest.raises(PromptError, match="no room"):
        HearingService(model, 1)


def test_a_sampled_session_is_as_transcribe_with_the_same_seed(bench, model, clips):
    options = TranscribeOptions(temperature=0.8, seed=11)
    session = bench.begin(utterance=bench.service.read(options))
    session.push(clips[0])
    session.finish()
    bench.run()
    same(words(session), dsm_jax.transcribe(model, clips[0], options=options).words)


def test_audio_that_was_heard_before_beginning_anew_does_not_wait(bench, clips):
    session = bench.begin()
    session.push(np.zeros(20 * FRAME, np.float32))
    bench.run(0.1)
    bench.engine.restart(session)
    bench.run(0.1)
    assert session.waiting < 0.5
    bench.end(session)


def test_many_markers_are_answered_in_their_order(bench):
    session = bench.begin()
    for number in range(20_000):
        session.mark(number)
    session.push(np.zeros(0, np.float32))
    bench.run(2.0)
    assert [mark.id for mark in of(session, Marked)] == list(range(20_000))
    assert not session._flushes
    bench.end(session)


@pytest.mark.parametrize("size", [FRAME, 701, 24_000])
def test_audio_that_waits_is_copied_once_however_much_there_is(bench, monkeypatch, size):
    """Joining all that waits for each frame would copy ten minutes of audio some thousand times."""
    session, joined = LiveHearing(bench.service, Outbox()), []

    def concatenate(parts, *arguments, **settings):
        made = join(parts, *arguments, **settings)
        joined.append(made.size)
        return made

    join = np.concatenate
    monkeypatch.setattr("dsm_jax.stt.framing.np.concatenate", concatenate)
    samples = 600 * 24_000
    for _ in range(samples // size):
        session.push(np.ones(size, np.float32))
    heard = 0
    while (part := session.take_input()) is not None:
        assert part.pcm_T.all()
        heard += part.pcm_T.size
    assert heard >= samples - size - FRAME
    assert sum(joined) <= samples


@pytest.mark.parametrize("behind", ["nothing", "audio", "the end"])
def test_silence_is_added_for_a_word_unless_audio_or_the_end_has_come_behind_it(bench, behind):
    session = LiveHearing(bench.service, Outbox())
    session.push(np.zeros(FRAME, np.float32))
    session.mark(1)
    bench.clock.now += 2 * STARVED_S
    while (part := session.take_input()) is not None and not session._silence:
        assert part.pcm_T.size
    ((start, end),) = session._silence
    if behind == "audio":
        session.push(np.ones(FRAME, np.float32))
    elif behind == "the end":
        session.finish()
    session._collect()
    total, most = session.buffer.total, (bench.service.late + bench.service.patience) * FRAME
    assert not session._is_flushed(end - FRAME, in_text=True)
    assert session._is_flushed(end, in_text=False)
    if behind != "nothing":
        assert session._is_flushed(end, in_text=True)
        assert (session.buffer.total, list(session._silence)) == (total, [(start, end)])
        return
    for added in range(FRAME, most, FRAME):
        if session._is_flushed(end + added - FRAME, in_text=True):
            break
        assert list(session._silence) == [(start, end + added)]
        assert session.buffer.total == total + added
    assert session._silence[0][1] - start == most, "it was not as much as a word may be given"

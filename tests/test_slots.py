"""The scheduler: sessions start and end in slots, and no session affects another.

The program here is the least that has a state: a slot counts from its request's number, one more a step.
"""

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsm_jax.errors import DsmError, FaultError, StreamError
from dsm_jax.runtime.slots import Slots, grow, write_rows
from dsm_jax.runtime.steps import Leave, step_limits, take_steps


@dataclasses.dataclass(frozen=True)
class Part:
    last: bool


@dataclasses.dataclass
class Count:
    """A session of some chunks, which ends with its last input, or when an output of the program ends it."""

    first: int
    chunks: int
    by_output: bool = False
    fails_at: int | None = None
    refuses: Exception | None = None  # raised for its request
    chokes_on: int | None = None  # the output that it cannot read
    sits_out: tuple[int, ...] = ()
    error: DsmError | None = None
    ended: bool = False
    taken: int = 0
    asked: int = 0
    seen: list[int] = dataclasses.field(default_factory=list)

    def request(self) -> int:
        if self.refuses is not None:
            raise self.refuses
        return self.first

    def take_input(self) -> Part | None:
        self.asked += 1
        if self.fails_at is not None and self.taken == self.fails_at:
            raise StreamError(f"chunk {self.taken} of {self.first} cannot be read")
        if self.asked - 1 in self.sits_out:
            return None
        self.taken += 1
        return Part(not self.by_output and self.taken == self.chunks)

    def read(self, outputs: np.ndarray, slot: int, part: Part) -> None:
        if int(outputs[slot]) == self.chokes_on:
            raise StreamError(f"output {self.chokes_on} cannot be read")
        self.seen.append(int(outputs[slot]))
        self.ended = len(self.seen) == self.chunks

    @property
    def wanted(self) -> list[int]:
        return list(range(self.first, self.first + self.chunks))


class Counting:
    """The program; `log` has the inserted requests, and the number of slots of each step."""

    def __init__(self, slots: int, inserts: int = 1):
        self.slots, self.inserts, self.log, self.waited = slots, inserts, [], []

    def init(self) -> np.ndarray:
        return np.full(self.slots, -1000)

    def insert(self, state, slot_N, requests):
        assert len(slot_N) == len(requests) <= self.inserts
        state = state.copy()
        state[list(slot_N)] = requests
        self.log.append(list(requests))
        return state

    def step(self, state, parts, *, waiting):
        ran = np.array([part is not None for part in parts])
        self.log.append(int(ran.sum()))
        self.waited.append(waiting)
        return np.where(ran, state, -1), state + ran


counts = st.builds(
    Count,
    first=st.integers(0, 10**6),
    chunks=st.integers(1, 6),
    by_output=st.booleans(),
    sits_out=st.lists(st.integers(0, 4), max_size=2).map(tuple),
)


@settings(deadline=None, max_examples=60)
@given(st.lists(counts, max_size=12), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2))
def test_every_session_ends_with_its_own_outputs_among_any_other_sessions(sessions, slots, inserts, behind):
    program = Counting(slots, inserts)
    done = list(Slots(program, behind=behind).run(iter(sessions)))
    assert sorted(map(id, done)) == sorted(map(id, sessions))
    assert all(session.ended and session.seen == session.wanted for session in sessions)
    assert max([entry for entry in program.log if isinstance(entry, int)], default=0) <= slots


def test_a_free_slot_is_reused_while_others_run():
    sessions = [Count(0, 9), Count(100, 1), Count(200, 1), Count(300, 2)]
    program = Counting(2, inserts=2)
    done = list(Slots(program).run(sessions))
    assert [session.first for session in done] == [100, 200, 300, 0]
    steps = [entry for entry in program.log if isinstance(entry, int)]
    assert steps == [2, 2, 2, 2, 1, 1, 1, 1, 1], "no chunk is dispatched with a slot empty while requests wait"
    assert program.waited == [True] * 2 + [False] * 7


@pytest.mark.parametrize("behind", [0, 1])
def test_outputs_are_read_at_most_behind_chunks_late(behind):
    one = Count(5, 4)
    slots = Slots(Counting(1), behind=behind)
    slots.admit([one])
    for dispatched in range(1, 5):
        slots.step()
        assert one.seen == one.wanted[: dispatched - behind]
    assert (slots.drain() == [one]) == bool(behind)
    assert one.ended


def test_a_failing_session_does_not_stop_others():
    bad, good = Count(10, 4, fails_at=2), Count(20, 4)
    never = Count(30, 2, error=StreamError("it could not be opened"))
    slots = Slots(Counting(2))
    done = list(slots.run([bad, never, good]))
    assert sorted(session.first for session in done) == [10, 20, 30]
    assert "chunk 2 of 10 cannot be read" in str(bad.error)
    assert (good.error, good.seen) == (None, good.wanted)
    assert never.seen == []
    assert slots.free == [0, 1]


@pytest.mark.parametrize("behind", [0, 1])
def test_a_session_without_a_request_or_that_cannot_read_fails_alone(behind):
    refused = [Count(n, 3, refuses=StreamError(f"{n} is no request")) for n in (10, 20, 30)]
    choking, good = Count(40, 5, chokes_on=42), [Count(50, 4), Count(60, 2)]
    slots = Slots(Counting(2), behind=behind)
    done = list(slots.run([*refused, choking, *good]))
    assert sorted(session.first for session in done) == [10, 20, 30, 40, 50, 60]
    assert [str(session.error) for session in refused] == [f"{n} is no request" for n in (10, 20, 30)]
    assert (choking.seen, str(choking.error)) == ([40, 41], "output 42 cannot be read")
    assert all((session.error, session.seen) == (None, session.wanted) for session in good)
    assert slots.free == [0, 1]


def test_a_session_that_is_started_alone_raises_its_error():
    slots = Slots(Counting(1))
    with pytest.raises(StreamError, match="10 is no request"):
        slots.start(Count(10, 3, refuses=StreamError("10 is no request")))
    slots.start(one := Count(20, 1))
    assert slots.sessions == [one]


def test_other_faults_end_the_run_unless_they_are_to_be_caught():
    with pytest.raises(KeyError, match="a bug"):
        list(Slots(Counting(1)).run([Count(10, 1, refuses=KeyError("a bug"))]))
    slots, bad, good = Slots(Counting(1)), Count(10, 1, refuses=KeyError("a bug")), Count(20, 2)
    slots.caught = Exception
    assert list(slots.run([bad, good])) == [bad, good]
    assert isinstance(bad.error, FaultError)
    assert str(bad.error) == "a request has failed by a fault of ours: KeyError: 'a bug'"
    assert bad.error.__cause__ is bad.refuses
    assert good.seen == good.wanted


@settings(deadline=None, max_examples=60)
@given(st.lists(counts, min_size=2, max_size=8), st.data())
def test_cancelling_at_any_time_changes_no_other_session(sessions, data):
    slots = Slots(Counting(len(sessions)))
    slots.admit(sessions)
    cancelled, kept = [], list(sessions)
    for _ in range(40):
        if len(kept) > 1 and data.draw(st.integers(0, 5)) == 0:
            cancelled.append(kept.pop(data.draw(st.integers(0, len(kept) - 1))))
            slots.cancel(cancelled[-1])
            seen = len(cancelled[-1].seen)
            slots.step()
            assert len(cancelled[-1].seen) == seen, "nothing is delivered after that"
        slots.step()
    slots.drain()
    assert all(session.ended and session.seen == session.wanted for session in kept)
    for session in cancelled:
        assert session.seen == session.wanted[: len(session.seen)]


def test_a_cancelled_sessions_slot_is_free_at_once_and_its_outputs_are_dropped():
    old, new = Count(1, 9), Count(500, 3)
    slots = Slots(Counting(1))
    slots.admit([old])
    slots.step()
    slots.step()
    slots.cancel(old)
    slots.admit([new])
    while not new.ended:
        slots.step()
        slots.drain()
    assert new.seen == new.wanted
    assert old.seen == [1]


def test_outputs_that_were_waited_for_when_an_interrupt_came_are_read_by_the_next_step(monkeypatch):
    slots, session = Slots(Counting(1), behind=0), Count(5, 3)
    slots.start(session)
    slots.step()
    get = jax.device_get

    def interrupted(outputs):
        get(outputs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(jax, "device_get", interrupted)
        with pytest.raises(KeyboardInterrupt):
            slots.step()
    assert slots.step() == [session]
    assert session.seen == session.wanted


def test_more_sessions_than_free_slots_are_refused():
    slots = Slots(Counting(2))
    slots.admit([Count(0, 3)])
    with pytest.raises(ValueError, match="2 sessions for 1 free slots; admit at most as many as are free"):
        slots.admit([Count(1, 1), Count(2, 1)])


def test_run_takes_sessions_only_as_slots_become_free():
    drawn = []

    def sessions() -> Iterator[Count]:
        for number in range(20):
            drawn.append(number)
            yield Count(10 * number, 3)

    ended = Slots(Counting(2)).run(sessions())
    next(ended)
    assert len(drawn) <= 5, "two that have ended, two in slots, one that waits"


def test_an_idle_session_dispatches_no_chunk():
    slots, one = Slots(Counting(1)), Count(7, 2, sits_out=(1, 2))
    slots.admit([one])
    for _ in range(3):
        slots.step()
    assert slots.program.log[1:] == [1]
    assert one.seen == [7], "what is unread is read when there is nothing to dispatch"


def test_rows_are_written_by_number_and_a_number_out_of_range_writes_nothing():
    rows = {"a_B": np.arange(4.0), "b_BT": np.zeros((4, 2))}
    new = {"a_B": np.array([9.0, 8.0]), "b_BT": np.ones((2, 2))}
    written = write_rows(_jax(rows), np.array([2, 4]), _jax(new))
    assert written["a_B"].tolist() == [0, 1, 9, 3]
    assert np.asarray(written["b_BT"]).sum(1).tolist() == [0, 0, 2, 0]


def test_growing_pads_at_the_ends_with_zeros():
    import jax

    wanted = {"a_BT": jax.ShapeDtypeStruct((2, 5), np.float32), "b_B": jax.ShapeDtypeStruct((2,), np.float32)}
    grown = grow(_jax({"a_BT": np.ones((2, 3), np.float32), "b_B": np.ones(2, np.float32)}), wanted)
    assert grown["a_BT"].tolist() == [[1, 1, 1, 0, 0]] * 2
    assert grown["b_B"].tolist() == [1, 1]


def _jax(tree):
    import jax
    import jax.numpy as jnp

    return jax.tree.map(jnp.asarray, tree)


def stepped(start: list[int], ends: list[int], *, allowed=(True, True), limit=8, room=8, waiting=False, stops=None):
    """Count in each slot up to its end; return the number of steps, the counts before each and those after all."""
    limits = step_limits([Leave() if one else None for one in allowed], limit, waiting=waiting)
    count, columns, state = take_steps(
        lambda count_B, active_B: (count_B, count_B + active_B.astype(jnp.int32)),
        jnp.array(start),
        jnp.zeros((room, len(start)), jnp.int32),
        limits,
        ended_B=lambda count_B: count_B >= jnp.array(ends),
        waits_B=None if stops is None else lambda count_B: count_B == jnp.array(stops),
    )
    return int(count), columns.tolist(), state.tolist()


def test_steps_go_on_while_a_slot_has_any_left():
    assert stepped([0, 1], [2, 4], room=5) == (3, [[0, 1], [1, 2], [2, 3], [0, 0], [0, 0]], [2, 4])
    assert stepped([0, 1], [2, 4], limit=1, room=2) == (1, [[0, 1], [0, 0]], [1, 2])
    assert stepped([0, 1], [2, 4], room=2) == (2, [[0, 1], [1, 2]], [2, 3])
    assert stepped([2, 4], [2, 4], room=1) == (0, [[0, 0]], [2, 4])


def test_steps_leave_slots_alone_that_may_take_none_or_wait():
    assert stepped([0, 0], [2, 4], allowed=(True, False))[::2] == (2, [2, 0])
    assert stepped([0, 0], [2, 4], stops=[1, 3])[::2] == (3, [1, 3])


def test_steps_end_for_a_request_that_waits_once_a_slot_is_free():
    assert stepped([0, 0], [2, 4], waiting=True)[::2] == (2, [2, 2])
    assert stepped([0, 9], [2, 4], waiting=True, allowed=(True, False))[::2] == (2, [2, 9])
    assert stepped([0, 4], [2, 4], waiting=True)[::2] == (0, [0, 4])

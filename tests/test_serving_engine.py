"""The engine's schedule, by a clock of the test's own: who gets a slot, when steps are taken, what a fault does.

The program is the least that has a state, as in test_slots: a slot counts up from its request's number.
"""

import asyncio
import dataclasses
import math
import threading
import time

import numpy as np
import pytest

from dsm_jax.errors import FullError, StreamError
from dsm_jax.runtime.slots import Slots
from dsm_jax.serving.engine import LONGEST_STEP_S, Device, Engine
from dsm_jax.serving.outbox import Ended, Outbox, Started


@dataclasses.dataclass(frozen=True)
class Part:
    last: bool


class Counting:
    inserts = 8

    def __init__(self, slots: int, clock: "Clock", seconds: float = 0.0):
        self.slots, self.clock, self.seconds = slots, clock, seconds
        self.steps: list[tuple[float, int]] = []  # time, and slots that ran

    def init(self):
        return np.zeros(self.slots, np.int64)

    def insert(self, state, slot_N, requests):
        state = state.copy()
        state[list(slot_N)] = requests
        return state

    def step(self, state, parts, *, waiting):
        self.steps.append((self.clock.now, sum(part is not None for part in parts)))
        self.clock.now += self.seconds
        ran = np.array([part is not None for part in parts])
        return state.copy(), state + ran


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Fake:
    """A session with a number of steps ready, which tells each number that its slot has counted."""

    def __init__(self, first: int, ready: int = 0, *, is_file: bool = False, steps: int = 1_000):
        self.first, self.ready, self.is_file, self.steps = first, ready, is_file, steps
        self.outbox, self.error, self.ended = self, None, False
        self.got: list = []
        self.new: list = []
        self.restarts = 0

    def request(self):
        return self.first

    def restart(self):
        self.restarts += 1

    def due(self, now):
        return now if self.ready else math.inf

    def take_input(self):
        if not self.ready:
            return None
        if self.first < 0:
            raise StreamError("a negative session cannot be read")
        self.ready -= 1
        self.steps -= 1
        return Part(last=self.steps == 0)

    def read(self, outputs, slot, part):
        self.new.append(int(outputs[slot]))
        self.ended = part.last

    def take_messages(self):
        new, self.new = self.new, []
        return new

    def put(self, messages):
        self.got += messages

    @property
    def numbers(self):
        return [message for message in self.got if isinstance(message, int)]


def make(slots: int, *, groups: int = 1, seconds: float = 0.0, **settings):
    """Return an engine of groups of so many slots, their program, the clock and what is posted."""
    clock = Clock()
    program = Counting(slots, clock, seconds)
    posted = []

    def post(batch):
        posted.append(batch)
        for outbox, messages in batch:
            outbox.put(messages)

    together = [Slots(program, behind=0) for _ in range(groups)]
    engine = Engine("counter", together, post=post, clock=clock, **settings)
    return engine, program, clock, posted


def begin(engine: Engine, *sessions: Fake) -> None:
    for session in sessions:
        if engine.hold(session):
            engine.start(session)


def test_a_session_gets_its_slot_at_once_and_each_step_is_posted_once():
    engine, program, _, posted = make(2)
    one, two = Fake(10, 3), Fake(20, 1)
    begin(engine, one, two)
    while engine.turn() == 0:
        pass
    assert one.got == [Started(), 10, 11, 12]
    assert two.got == [Started(), 20]
    assert [rows for _, rows in program.steps] == [2, 1, 1]
    assert len(posted) == 3  # one post a turn, for all sessions


def test_live_sessions_are_refused_when_all_slots_are_held_and_files_wait_in_order():
    engine, _, _, _ = make(1, queue=2)
    live = Fake(1)
    begin(engine, live)
    with pytest.raises(FullError, match=r"^no free channels$"):
        engine.hold(Fake(2))
    files = [Fake(n, 1, is_file=True, steps=1) for n in (10, 20)]
    assert [engine.hold(file) for file in files] == [False, False]
    with pytest.raises(FullError, match="no free channels, and 2 recordings wait for one; try again later"):
        engine.hold(Fake(30, is_file=True))
    engine.turn()
    assert files[0].got == []
    engine.leave(live)
    for _ in range(5):
        engine.turn()
    assert [file.got for file in files] == [[Started(), 10, Ended()], [Started(), 20, Ended()]]
    assert (engine.used, engine.queued) == (0, 0)


def test_twice_as_many_files_as_slots_may_wait_and_all_free_slots_are_filled_at_once():
    engine, _, _, _ = make(2)
    live, files = [Fake(1), Fake(2)], [Fake(n, is_file=True) for n in range(4)]
    begin(engine, *live, *files)
    with pytest.raises(FullError, match="4 recordings wait"):
        engine.hold(Fake(9, is_file=True))
    for session in live:
        engine.leave(session)
    engine.turn()
    assert [file.got for file in files] == [[Started()], [Started()], [], []]


def test_a_file_does_not_overtake_those_that_wait():
    engine, _, _, _ = make(2, reserve=1)
    begin(engine, Fake(1, is_file=True))
    waiting = Fake(2, is_file=True)
    assert not engine.hold(waiting)  # the other slot is for live sessions
    begin(engine, Fake(3))
    engine.turn()
    assert waiting.got == []
    engine, _, _, _ = make(1)
    begin(engine, Fake(1, 1, is_file=True, steps=1), waiting)
    engine.turn()
    assert engine.used == 0
    assert not engine.hold(Fake(2, is_file=True))
    engine.turn()
    assert waiting.got == [Started()]


def test_reserved_slots_are_for_live_sessions():
    engine, _, _, _ = make(3, reserve=2)
    assert engine.hold(Fake(1, is_file=True))
    assert not engine.hold(Fake(2, is_file=True))
    assert engine.hold(Fake(3))
    assert engine.hold(Fake(4))


def test_a_session_that_leaves_is_never_told_of_again_and_its_slot_begins_anew():
    engine, _, _, _ = make(1)
    gone = Fake(10, 5)
    begin(engine, gone)
    engine.turn()
    engine.leave(gone)
    next_one = Fake(50, 2)
    with pytest.raises(FullError):
        engine.hold(next_one)  # the slot is free at the next step
    engine.turn()
    begin(engine, next_one)
    engine.turn()
    engine.turn()
    assert gone.got == [Started(), 10]
    assert next_one.got == [Started(), 50, 51]
    assert engine.used == 1


def test_a_session_may_leave_before_it_has_begun_and_from_the_queue():
    engine, _, _, _ = make(2)
    early, other = Fake(1, 1), Fake(3)
    begin(engine, early, other)
    waiting = Fake(2, 1, is_file=True)
    engine.hold(waiting)
    engine.restart(early)
    engine.leave(early)
    engine.leave(waiting)
    engine.turn()
    assert (early.got, waiting.got, engine.used, engine.queued) == ([], [], 1, 0)
    assert other.got == [Started()]


def test_a_session_that_has_ended_neither_starts_nor_begins_anew():
    engine, _, _, _ = make(1)
    session = Fake(10, 1, steps=1)
    begin(engine, session)
    engine.turn()
    engine.start(session)
    engine.restart(session)
    begin(engine, other := Fake(20))
    engine.turn()
    assert (session.got, session.restarts, other.got) == ([Started(), 10, Ended()], 0, [Started()])


def test_leaving_twice_frees_one_slot():
    engine, _, _, _ = make(1)
    session = Fake(1)
    begin(engine, session)
    engine.turn()
    engine.leave(session)
    engine.leave(session)
    engine.turn()
    engine.leave(session)
    assert engine.used == 0
    assert engine.hold(Fake(2))


def test_steps_start_no_sooner_than_the_least_time_apart():
    engine, program, clock, _ = make(2, min_step=0.02)
    one, two = Fake(1, 1), Fake(2)
    begin(engine, one, two)
    assert engine.turn() == pytest.approx(0.02)
    two.ready = 1
    clock.now += 0.005
    assert engine.turn() == pytest.approx(0.015)
    one.ready = 1  # arrives in between, and shares the step
    clock.now += 0.015
    engine.turn()
    assert [(round(at, 3), rows) for at, rows in program.steps] == [(0.0, 1), (0.02, 2)]


def test_groups_are_filled_one_after_the_other_and_those_without_sessions_take_no_steps():
    engine, program, _, _ = make(2, groups=3)
    assert (engine.group_count, engine.total) == (3, 6)
    begin(engine, *(sessions := [Fake(10 * n, 1) for n in (1, 2, 3)]))
    while engine.turn() == 0:
        pass
    assert [rows for _, rows in program.steps] == [2, 1]
    assert [session.got for session in sessions] == [[Started(), 10], [Started(), 20], [Started(), 30]]
    engine.leave(sessions[0])
    engine.turn()
    begin(engine, again := Fake(40, 1))
    sessions[1].ready = 1
    while engine.turn() == 0:
        pass
    assert [rows for _, rows in program.steps] == [2, 1, 2], "the place in the first group is free, and is taken"
    assert (again.numbers, sessions[1].numbers) == ([40], [20, 21])


def test_fewer_sessions_than_slots_may_be_taken():
    engine, _, _, _ = make(2, groups=2, total=3)
    begin(engine, *(Fake(n) for n in range(3)))
    with pytest.raises(FullError, match="no free channels"):
        engine.hold(Fake(3))


def test_groups_step_in_turn_so_that_none_waits_for_two_steps_of_another():
    engine, program, clock, _ = make(1, groups=2, seconds=0.03, min_step=0.02)
    one, two = Fake(10, 9), Fake(20, 2)
    begin(engine, one, two)
    for _ in range(3):
        engine.turn()
    assert (one.numbers, two.numbers) == ([10, 11], [20])
    clock.now += 1.0
    two.ready = 0
    engine.turn()
    two.ready = 1  # comes in that step
    engine.turn()
    assert (one.numbers, two.numbers) == ([10, 11, 12], [20, 21])
    assert len(program.steps) == 5


def test_the_least_time_between_steps_is_that_of_each_group():
    engine, program, clock, _ = make(1, groups=2, min_step=0.02)
    one, two = Fake(10, 1), Fake(20, 0)
    begin(engine, one, two)
    assert engine.turn() == pytest.approx(0.02)
    clock.now += 0.005
    one.ready = two.ready = 1
    assert engine.turn() == pytest.approx(0.015), "until the first group's next step"
    clock.now += 0.015
    engine.turn()
    assert [(round(at, 3), rows) for at, rows in program.steps] == [(0.0, 1), (0.005, 1), (0.02, 1)]
    assert (one.numbers, two.numbers) == ([10, 11], [20])


def test_the_plan_is_made_for_the_group_that_steps():
    planned = []
    engine, _, _, _ = make(1, groups=2, plan=planned.append)
    begin(engine, one := Fake(10, 1), two := Fake(20, 1))
    while engine.turn() == 0:
        pass
    assert planned == [[one], [two]]


def test_sessions_of_any_group_leave_begin_anew_and_fail_alone():
    engine, _, _, _ = make(1, groups=3)
    gone, again, bad = Fake(10, 9), Fake(20, 9), Fake(-1, 1)
    begin(engine, gone, again, bad)
    for _ in range(3):
        engine.turn()
    engine.leave(gone)
    engine.restart(again)
    for _ in range(2):
        engine.turn()
    assert gone.numbers == [10]
    assert again.got == [Started(), 20, Started(), 20, 21]
    assert bad.got == [Started(), Ended(1007, "a negative session cannot be read")]
    assert engine.used == 1


def test_a_step_is_planned_and_taken_in_the_engines_turn_on_the_device():
    planned, urgencies, device = [], [], Device()
    run = device.run

    def noted(function, *, urgent):
        urgencies.append(urgent)
        return run(function, urgent=urgent)

    device.run = noted
    engine, _, _, _ = make(1, seconds=1.0, plan=planned.append, device=device, urgent=False)
    begin(engine, session := Fake(1, 1))
    assert engine.turn() == 0.0, "a step that takes longer than the least time makes nobody wait"
    assert planned == [[session]]
    assert urgencies == [False, False], "to fill the slot, and to take the step"


def test_sessions_that_are_behind_do_not_wait_for_the_least_time():
    engine, program, _, _ = make(1, min_step=0.02, hurry=lambda session: session.ready > 1)
    begin(engine, Fake(1, 4))
    for _ in range(5):
        engine.turn()
    assert [round(at, 3) for at, _ in program.steps] == [0.0, 0.0, 0.0]  # the last one may wait


def test_an_idle_engine_waits_until_it_is_woken():
    engine, program, _, _ = make(1)
    begin(engine, Fake(1))
    assert engine.turn() == math.inf
    assert program.steps == []


def test_an_error_of_one_session_ends_it_alone():
    engine, _, _, _ = make(2)
    bad, good = Fake(-1, 1), Fake(5, 2)
    begin(engine, bad, good)
    engine.turn()
    engine.turn()
    assert bad.got == [Started(), Ended(1007, "a negative session cannot be read")]
    assert good.numbers == [5, 6]
    assert engine.used == 1


@pytest.mark.parametrize("method", ["request", "take_input", "read"])
def test_a_bug_in_one_sessions_handling_ends_it_alone_and_is_logged(caplog, method):
    engine, _, _, _ = make(2)
    bad, good = Fake(1, 2), Fake(5, 2)

    def broken(*_):
        raise KeyError("a name in the code")

    setattr(bad, method, broken)
    begin(engine, bad, good)
    engine.turn()
    engine.turn()
    told = [] if method == "request" else [Started()]
    assert bad.got == [*told, Ended(1011, "the server has failed at this request; it serves others on")]
    assert good.numbers == [5, 6]
    assert engine.used == 1
    assert engine.alive()
    assert "KeyError: 'a name in the code'" in caplog.text
    begin(engine, third := Fake(9, 1))
    engine.turn()
    assert third.numbers == [9]


def test_restarting_makes_the_slot_fresh_and_changes_no_other():
    engine, _, _, _ = make(2)
    again, other = Fake(10, 4), Fake(20, 4)
    begin(engine, again, other)
    engine.turn()
    engine.turn()
    engine.restart(again)
    engine.turn()
    assert again.got == [Started(), 10, 11, Started(), 10]
    assert other.numbers == [20, 21, 22]
    assert again.restarts == 1


def test_restarting_before_the_start_is_answered_too():
    engine, _, _, _ = make(1)
    session = Fake(10, 1)
    begin(engine, session)
    engine.restart(session)
    engine.turn()
    assert session.got == [Started(), Started(), 10]


def test_a_fault_ends_all_sessions_with_a_code_and_the_engine_refuses_further_ones():
    faults = []
    engine, program, _, _ = make(1, on_fault=faults.append)
    session, waiting = Fake(1, 1), Fake(2, is_file=True)
    begin(engine, session, waiting)

    def broken(*_, **__):
        raise RuntimeError("the device is gone")

    program.step = broken
    engine.run()
    engine._thread.join(10)
    assert [str(fault) for fault in faults] == ["the device is gone"]
    for one in (session, waiting):
        assert one.got[-1] == Ended(1011, "the server's engine has failed")
    assert not engine.alive()
    assert (engine.used, engine.queued) == (0, 0)
    with pytest.raises(FullError, match="the engine has ended"):
        engine.hold(Fake(3))


def test_an_engine_that_is_stuck_is_not_alive():
    engine, _, clock, _ = make(1, seconds=LONGEST_STEP_S + 1)
    assert engine.alive()
    clock.now += LONGEST_STEP_S + 1
    assert not engine.alive()
    engine.turn()
    assert engine.alive()


def test_a_stuck_step_ends_its_sessions_and_the_engine_though_its_thread_still_waits():
    faults, entered, released = [], threading.Event(), threading.Event()
    engine, program, clock, _ = make(1, on_fault=faults.append)
    session, waiting, step = Fake(1, 1), Fake(2, is_file=True), program.step
    begin(engine, session, waiting)

    def stuck(*args, **kwargs):
        entered.set()
        released.wait(30)
        return step(*args, **kwargs)

    program.step = stuck
    engine.run()
    assert entered.wait(10)
    engine.give_up_if_stuck()
    assert (faults, engine.stuck, session.got) == ([], False, [])
    clock.now += LONGEST_STEP_S + 1
    engine.give_up_if_stuck()
    engine.give_up_if_stuck()
    assert [str(fault) for fault in faults] == ["a step has taken over 30 s"]
    for one in (session, waiting):
        assert one.got[-1] == Ended(1011, "the server's engine has failed")
    assert engine.stuck
    engine.close()  # does not wait for the thread
    assert engine._thread.is_alive()
    released.set()
    engine._thread.join(10)
    assert not engine._thread.is_alive()
    assert len(faults) == 1


def test_an_engine_whose_server_took_long_to_start_is_not_stuck():
    engine, _, clock, _ = make(1)
    clock.now += LONGEST_STEP_S + 1
    engine.run()
    assert engine.alive()
    engine.close()


def test_the_thread_takes_steps_when_it_is_woken_and_ends_when_it_is_closed():
    done = threading.Event()
    engine, _, _, _ = make(1)
    session = Fake(7)
    begin(engine, session)
    engine.run()
    put = session.put

    def seen(messages):
        put(messages)
        if session.numbers:
            done.set()

    session.put = seen
    session.ready = 1
    engine.wake()
    assert done.wait(10)
    engine.close()
    assert session.numbers == [7]
    assert not engine._thread.is_alive()
    with pytest.raises(FullError, match="the engine has ended"):
        engine.hold(Fake(3))


def test_the_next_of_the_queue_starts_at_once_when_the_one_before_it_has_failed(monkeypatch):
    monkeypatch.setattr("dsm_jax.serving.engine._IDLE_S", 60.0)
    engine, _, _, _ = make(1)
    bad, good, started = Fake(1, is_file=True), Fake(2, is_file=True), threading.Event()

    def refused():
        raise StreamError("it cannot be read")

    bad.request, good.put = refused, lambda messages: started.set()
    engine.run()
    while not engine._changed._waiters:
        pass
    with engine._changed:  # the thread finds both
        begin(engine, bad, good)
    assert started.wait(10)
    engine.close()


def test_no_wake_is_lost_and_none_is_heard_twice(monkeypatch):
    monkeypatch.setattr("dsm_jax.serving.engine._IDLE_S", 60.0)
    engine, _, _, _ = make(1)
    session, turn, turns, idle = Fake(7), engine.turn, [], threading.Event()

    def counted() -> float:
        turns.append(turn())
        if len(turns) == 1:  # between the turn and the wait
            session.ready = 1
            engine.wake()
        if turns[-1] > 0 and session.numbers:
            idle.set()
        return turns[-1]

    engine.turn = counted
    begin(engine, session)
    engine.run()
    assert idle.wait(10)
    time.sleep(0.05)
    assert turns == [math.inf, 0, math.inf]
    engine.close()


def test_urgent_engines_go_first_on_a_shared_device():
    device, order, inside = Device(), [], threading.Event()
    release = threading.Event()

    def hold():
        inside.set()
        release.wait(10)
        order.append("first")

    threads = [threading.Thread(target=device.run, args=(hold,), kwargs={"urgent": False})]
    threads[0].start()
    inside.wait(10)
    threads.append(threading.Thread(target=device.run, args=(lambda: order.append("later"),), kwargs={"urgent": False}))
    threads[1].start()
    while not device._condition._waiters:
        pass
    threads.append(threading.Thread(target=device.run, args=(lambda: order.append("urgent"),), kwargs={"urgent": True}))
    threads[2].start()
    while device._urgent == 0:
        pass
    release.set()
    for thread in threads:
        thread.join(10)
    assert order == ["first", "urgent", "later"]


def test_an_outbox_takes_no_more_than_its_limit_but_always_the_end_and_nothing_after_it():
    outbox = Outbox(limit=2)
    outbox.put(["one", "two"])
    assert not outbox.overflowed
    outbox.put(["three", Ended(), "four"])
    assert outbox.overflowed
    assert asyncio.run(outbox.take()) == ["one", "two", Ended()]


def test_beginning_anew_many_times_before_a_step_is_done_once():
    engine = make(1)[0]
    session = Fake(1)
    begin(engine, session)
    for _ in range(1000):
        engine.restart(session)
    assert len(engine._restarting) == 1

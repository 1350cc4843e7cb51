"""Run the slots of one model in a thread of their own, for sessions that come and go.

The slots may be in several groups, which take their steps in turn: a session waits for the steps of its own group and
for the one that runs when its input comes, and groups without input cost nothing.

The thread alone touches the model's state. The event loop admits and cancels sessions and fills their inboxes; each
step's messages go back to it together. A session that has left is known to nobody but its handler, so nothing of it
can reach the session that has its slot next.

`Engine.turn` does all that is due at one moment, without a thread, so that the schedule can be tested with a clock of
the test's own.
"""

import dataclasses
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from dsm_jax.errors import DsmError, FaultError, FullError
from dsm_jax.runtime.slots import Session, Slots
from dsm_jax.serving.outbox import Ended, Outbox, Posted, Started

LONGEST_STEP_S = 30.0  # of one turn, after which the engine counts as stuck
_IDLE_S = 1.0  # between two looks at the clock, so that a stuck engine can be told from an idle one

_log = logging.getLogger("dsm_jax.serving")


class ServedSession(Session, Protocol):
    """A request of a client, which holds a slot while it runs.

    Attributes:
      outbox: messages to the client.
      is_file: whether the session may wait for a slot, and must leave the reserved ones.
    """

    outbox: Outbox
    is_file: bool

    def due(self, now: float) -> float:
        """Return the time at which the session can take a step: `now`, or later; infinity while it needs its client."""
        ...

    def take_messages(self) -> list[Any]:
        """Return the messages to the client since the last call."""
        ...


class Device:
    """Let several engines take turns on one device; urgent ones go first, as live audio has a deadline."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._held, self._urgent = False, 0

    def run(self, function: Callable[[], Any], *, urgent: bool) -> Any:
        """Call a function while no other engine uses the device."""
        with self._condition:
            self._urgent += urgent
            while self._held or (self._urgent and not urgent):
                self._condition.wait()
            self._urgent -= urgent
            self._held = True
        try:
            return function()
        finally:
            with self._condition:
                self._held = False
                self._condition.notify_all()


@dataclasses.dataclass(eq=False)
class _Group:
    """Slots that step together, and the time of their last step's start."""

    slots: Slots[Any]
    last_start: float = -math.inf

    @property
    def sessions(self) -> list[Any]:
        """The sessions in the slots."""
        return [session for session in self.slots.sessions if session is not None]


class Engine:
    """The slots of a model and the sessions of its clients.

    Attributes:
      group_count: number of the groups that the slots are in.
      fault: error that has ended the engine; None while it runs.
      stuck: whether it has ended in a step that may never end.

    Args:
      name: name of the model, for messages.
      groups: slots of the program in one group or more, all free, warmed up; made with `behind=0`.
      post: called on the engine's thread with the messages of a turn.
      total: sessions at a time; None for as many as there are slots.
      plan: called before each step with its sessions, for example to choose the size of the chunk.
      device: shared with the other engines of the process.
      urgent: whether this engine goes before others on the device.
      min_step: seconds from the start of a group's step to that of its next one, which gathers frames of several
        sessions into one step.
      hurry: whether a session is behind, so that the next step need not wait.
      reserve: slots that sessions of files may not take.
      queue: sessions of files that may wait; None for twice the slots.
      on_step: called with the seconds of each step and the number of sessions that it had input for.
      on_fault: called once with an error that ends the engine.
      clock: seconds, monotonic.
    """

    def __init__(
        self,
        name: str,
        groups: Sequence[Slots[Any]],
        *,
        post: Callable[[Posted], None],
        total: int | None = None,
        plan: Callable[[Sequence[Any]], None] = lambda sessions: None,
        device: Device | None = None,
        urgent: bool = True,
        min_step: float = 0.0,
        hurry: Callable[[Any], bool] = lambda session: False,
        reserve: int = 0,
        queue: int | None = None,
        on_step: Callable[[float, int], None] = lambda seconds, rows: None,
        on_fault: Callable[[BaseException], None] = lambda error: None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.name, self.group_count, self.min_step = name, len(groups), min_step
        self.total = sum(slots.program.slots for slots in groups) if total is None else total
        self.fault: BaseException | None = None
        self.stuck = False
        for slots in groups:
            slots.caught = Exception  # a fault in one session's handling costs the others nothing
        self._groups = [_Group(slots) for slots in groups]
        self._post, self._plan, self._hurry, self._clock = post, plan, hurry, clock
        self._device, self._urgent = device or Device(), urgent
        self._reserve, self._queue_limit = reserve, 2 * self.total if queue is None else queue
        self._on_step, self._on_fault = on_step, on_fault
        self._changed = threading.Condition()
        # Guarded by `_changed`, as the event loop's thread writes them too.
        self._held: set[Any] = set()  # sessions that have a slot, or will have one at the next turn
        self._starting: list[Any] = []
        self._restarting: list[Any] = []
        self._leaving: list[Any] = []
        self._queue: deque[Any] = deque()
        self._woken = self._closed = False
        self._posted: Posted = []
        self._beat = clock()
        self._thread: threading.Thread | None = None

    # The event loop's side.

    @property
    def used(self) -> int:
        """Slots that are held."""
        return len(self._held)

    @property
    def queued(self) -> int:
        """Sessions of files that wait for a slot."""
        return len(self._queue)

    @property
    def sessions(self) -> list[Any]:
        """The sessions that hold a slot."""
        with self._changed:
            return list(self._held)

    def alive(self) -> bool:
        """Tell whether the thread has looked at the clock lately."""
        return self.fault is None and self._clock() - self._beat < LONGEST_STEP_S

    def give_up_if_stuck(self) -> None:
        """End all sessions if a turn has taken too long: the device may never answer."""
        if self.fault is None and not self.alive():
            self.stuck = True
            _log.error("the engine of %s is stuck: a step has taken over %.0f s", self.name, LONGEST_STEP_S)
            self._fail(FaultError(f"a step has taken over {LONGEST_STEP_S:.0f} s"))

    def hold(self, session: Any) -> bool:
        """Take a slot for a session, or a place in the queue where the session is a file's.

        Returns:
          Whether the session has a slot now.

        Raises:
          FullError: there is no slot for it, or the engine has ended.
        """
        with self._changed:
            if self.fault is not None or self._closed:
                raise FullError("the engine has ended")
            if self._has_room(session) and not (session.is_file and self._queue):
                self._held.add(session)
                return True
            if not session.is_file:
                raise FullError("no free channels")
            if len(self._queue) >= self._queue_limit:
                raise FullError(f"no free channels, and {len(self._queue)} recordings wait for one; try again later")
            self._queue.append(session)
            return False

    def start(self, session: Any) -> None:
        """Put a session that holds a slot into it; a queued session starts by itself."""
        with self._changed:
            if session in self._held:
                self._starting.append(session)
                self._wake()

    def restart(self, session: Any) -> None:
        """Make the session's slot fresh at the next turn; the session is asked for its request again."""
        with self._changed:
            if session in self._held and session not in self._restarting:
                self._restarting.append(session)
                self._wake()

    def leave(self, session: Any) -> None:
        """End a session before the next step and drop its unread outputs; one that has ended may leave too."""
        with self._changed:
            if session in self._queue:
                self._queue.remove(session)
            if session in self._held:
                self._leaving.append(session)
                self._wake()

    def wake(self) -> None:
        """Wake the thread, as an inbox was filled."""
        with self._changed:
            self._wake()

    def _wake(self) -> None:
        self._woken = True
        self._changed.notify()

    def _has_room(self, session: Any) -> bool:
        return len(self._held) < self.total - (self._reserve if session.is_file else 0)

    def run(self) -> None:
        """Start the thread."""
        self._beat = self._clock()  # the models after this one may have taken a while to load
        self._thread = threading.Thread(target=self._loop, name=f"engine {self.name}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread once it has finished its step."""
        with self._changed:
            self._closed = True
            self._wake()
        if self._thread is not None and not self.stuck:
            self._thread.join(LONGEST_STEP_S)

    # The engine's own thread.

    def _loop(self) -> None:
        try:
            while not self._closed:
                wait = self.turn()
                with self._changed:
                    if not self._woken:
                        self._changed.wait(min(wait, _IDLE_S))
                    self._woken = False
        except BaseException as error:
            if not self.stuck:  # its end has been told
                _log.exception("the engine of %s has ended", self.name)
                self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """End all sessions with an error of the server."""
        with self._changed:
            self.fault, self._closed = error, True
            ending = [*self._held, *self._queue]
            self._held.clear()
            self._queue.clear()
        self._post([(session.outbox, [Ended(1011, "the server's engine has failed")]) for session in ending])
        self._on_fault(error)

    def turn(self) -> float:
        """Do all that is due: end and start sessions, and take one step of a group in which a session can.

        Returns:
          Seconds until something may be due without a further `wake`; infinity if nothing is.
        """
        self._beat = self._clock()
        self._come_and_go()
        now = self._clock()
        due = {one: self._due(one, now) for one in self._groups}
        # Take the group whose last step is longest ago among those that are due.
        first = min(self._groups, key=lambda one: (due[one], one.last_start))
        if due[first] <= now:
            first.last_start = now
            due[first] = now + self.min_step
            self._plan(first.sessions)
            self._device.run(lambda: self._step(first), urgent=self._urgent)
        if self._posted:
            posted, self._posted = self._posted, []
            self._post(posted)
        return max(0.0, min(due.values()) - self._clock())

    def _due(self, one: _Group, now: float) -> float:
        """Return the time at which a group takes its next step: `now`, or later."""
        sessions = one.sessions
        due = min((session.due(now) for session in sessions), default=math.inf)
        earliest = one.last_start + self.min_step
        return earliest if due <= now < earliest and not any(map(self._hurry, sessions)) else max(due, now)

    def _come_and_go(self) -> None:
        """Free the slots of sessions that leave, and fill free ones."""
        with self._changed:
            leaving, starting, restarting = self._leaving, self._starting, self._restarting
            self._leaving, self._starting, self._restarting = [], [], []
            self._held.difference_update(leaving)
            while self._queue and self._has_room(self._queue[0]):
                session = self._queue.popleft()
                self._held.add(session)
                starting.append(session)
        running: dict[Any, Slots[Any]] = {}
        if leaving or restarting:
            running = {session: one.slots for one in self._groups for session in one.sessions}
        for session in leaving:
            if session in running:
                running.pop(session).cancel(session)
        gone = set(leaving)
        again: list[Any] = [session for session in restarting if session in running]
        for session in again:
            running[session].cancel(session)
            session.restart()
        new: list[Any] = [session for session in (*again, *starting) if session not in gone]
        restarting = [session for session in restarting if session not in again]
        if new:
            failed = self._device.run(lambda: self._admit(new), urgent=self._urgent)
            # A session in `restarting` was to begin anew before it had a slot: it is told `Started` for that, too.
            self._posted += [
                (session.outbox, [Started()])
                for session in (*new, *restarting)
                if session not in gone and session not in failed
            ]
            self._end(failed)

    def _admit(self, new: Sequence[Any]) -> list[Any]:
        """Fill the groups one after the other, so that few of them take steps; return the sessions that failed."""
        waiting, failed = deque(new), []
        for one in self._groups:
            if taken := [waiting.popleft() for _ in one.slots.free[: len(waiting)]]:
                failed += one.slots.admit(taken)
        assert not waiting  # each holds a slot
        return failed

    def _step(self, one: _Group) -> None:
        start, running = self._clock(), one.sessions
        done = one.slots.step()
        self._on_step(self._clock() - start, len(running))
        for session in running:
            if messages := session.take_messages():
                self._posted.append((session.outbox, messages))
        self._end(done)

    def _end(self, done: Sequence[Any]) -> None:
        """Tell the clients of sessions that have ended or failed, and give up their slots."""
        for session in done:
            self._posted.append((session.outbox, [self._ending(session.error)]))
        if done:
            with self._changed:
                self._held.difference_update(done)
                self._woken = self._woken or bool(self._queue)

    def _ending(self, error: DsmError | None) -> Ended:
        """Return the last message of a session; a fault of the library goes to the log, and not to the client."""
        if error is None:
            return Ended()
        if not isinstance(error, FaultError):
            return Ended(1007, str(error))
        _log.error("a session of %s has failed", self.name, exc_info=error)
        return Ended(1011, "the server has failed at this request; it serves others on")

"""Run the slots of one model in a thread of their own, for sessions that come and go.

The thread alone touches the model's state. The event loop admits and cancels sessions and fills their inboxes; each
step's messages go back to it together. A session that has left is known to nobody but its handler, so nothing of it
can reach the session that has its slot next.

`Engine.turn` does all that is due at one moment, without a thread, so that the schedule can be tested with a clock of
the test's own.
"""

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


class Engine:
    """The slots of a model and the sessions of its clients.

    Attributes:
      fault: error that has ended the engine; None while it runs.
      stuck: whether it has ended in a step that may never end.

    Args:
      name: name of the model, for messages.
      slots: slots of the program, all free, warmed up; made with `behind=0`.
      post: called on the engine's thread with the messages of a turn.
      plan: called before each step with the sessions, for example to choose the size of the chunk.
      device: shared with the other engines of the process.
      urgent: whether this engine goes before others on the device.
      min_step: seconds from one step's start to the next, which gathers frames of several sessions into one step.
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
        slots: Slots[Any],
        *,
        post: Callable[[Posted], None],
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
        self.name, self.total, self.min_step = name, slots.program.slots, min_step
        self.fault: BaseException | None = None
        self.stuck = False
        slots.caught = Exception  # a fault in one session's handling costs the others nothing
        self._slots, self._post, self._plan, self._hurry, self._clock = slots, post, plan, hurry, clock
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
        self._last_start = -math.inf
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
        """Say that an inbox was filled."""
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
        """Do all that is due: end and start sessions, and take one step if a session can.

        Returns:
          Seconds until something may be due without a further `wake`; infinity if nothing is.
        """
        self._beat = self._clock()
        self._come_and_go()
        now = self._clock()
        sessions = [session for session in self._slots.sessions if session is not None]
        due = min((session.due(now) for session in sessions), default=math.inf)
        earliest = self._last_start + self.min_step
        if due <= now < earliest and not any(map(self._hurry, sessions)):
            due = earliest
        if due <= now:
            self._last_start = now
            self._plan(sessions)
            self._device.run(self._step, urgent=self._urgent)
            due = now + self.min_step
        if self._posted:
            posted, self._posted = self._posted, []
            self._post(posted)
        return max(0.0, due - self._clock())

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
        for session in leaving:
            self._slots.cancel(session)
        gone = set(leaving)
        again: list[Any] = [session for session in restarting if session in self._slots.sessions]
        for session in again:
            self._slots.cancel(session)
            session.restart()
        new: list[Any] = [session for session in (*again, *starting) if session not in gone]
        restarting = [session for session in restarting if session not in again]
        if new:
            failed = self._device.run(lambda: self._slots.admit(new), urgent=self._urgent)
            # A session in `restarting` was to begin anew before it had a slot: it is told `Started` for that, too.
            self._posted += [
                (session.outbox, [Started()])
                for session in (*new, *restarting)
                if session not in gone and session not in failed
            ]
            self._end(failed)

    def _step(self) -> None:
        start, running = self._clock(), [session for session in self._slots.sessions if session is not None]
        done = self._slots.step()
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

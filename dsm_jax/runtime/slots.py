"""The scheduler: runs requests in the slots of a program, each slot independent of the others.

A program has a fixed number of slots and three functions, like JetStream's engine: `init` makes the state of all slots,
`insert` puts requests into some slots, `step` runs one chunk of the slots that have input. The settings of a request
are in the state, so requests with different settings share one compiled program. A session is the host's side of one
request: it provides the slot's inputs and reads the slot's outputs.

Files, live streams, texts and server connections all run through `Slots`.
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

import jax
import jax.numpy as jnp

from dsm_jax.errors import DsmError, FaultError


class Part(Protocol):
    """The input of one slot for one chunk."""

    @property
    def last(self) -> bool:
        """True for the session's last input, after whose dispatch the slot is free."""
        ...


class Session(Protocol):
    """One request while it holds a slot.

    Attributes:
      error: the error that the session has failed with; None if it has not failed.
      ended: whether all outputs have been read.
    """

    error: DsmError | None
    ended: bool

    def request(self) -> Any:
        """Return the request for `insert`, a pytree of arrays without a slot axis.

        Raises:
          DsmError: there is no such request; the session fails with this error.
        """
        ...

    def take_input(self) -> Any:
        """Return the slot's input of the next chunk, a `Part`; None to leave the slot idle in this chunk.

        Raises:
          DsmError: the input cannot be read; the session fails with this error.
        """
        ...

    def read(self, outputs: Any, slot: int, part: Any) -> None:
        """Read the slot's outputs for the input `part` from a chunk's outputs, numpy arrays of all slots.

        Raises:
          DsmError: the outputs make no sense; the session fails with this error.
        """
        ...


AnySession = TypeVar("AnySession", bound=Session)


class Program(Protocol):
    """Compiled functions over the state of `slots` slots.

    Attributes:
      slots: number of slots.
      inserts: the most requests that one call of `insert` takes.
    """

    slots: int
    inserts: int

    def init(self) -> Any:
        """Make the state of all slots, without requests."""
        ...

    def insert(self, state: Any, slot_N: Sequence[int], requests: Sequence[Any]) -> Any:
        """Reset slots and put a request into each; return the next state."""
        ...

    def step(self, state: Any, parts: Sequence[Any], *, waiting: bool) -> tuple[Any, Any]:
        """Run one chunk.

        Args:
          state: from the call before; donated.
          parts: the input of every slot; None for idle slots.
          waiting: whether requests wait for a slot, so that the chunk should end early once a slot becomes free.

        Returns:
          The outputs, possibly not computed yet, and the next state.
        """
        ...


@dataclasses.dataclass(frozen=True)
class _Dispatched(Generic[AnySession]):
    """A chunk whose outputs have not been read: the outputs, and (slot, session, input) of each slot that ran."""

    outputs: Any
    parts: list[tuple[int, AnySession, Any]]


class Slots(Generic[AnySession]):
    """The slots of one program and the sessions in them.

    Args:
      program: the program that the slots run.
      behind: number of chunks whose outputs may be unread after a step. With 1, the device computes the newest chunk
        while the host reads the chunk before it; with 0, a step reads its own outputs.

    Attributes:
      caught: the errors of a session that end this session alone; others are raised. One that is not a `DsmError`
        becomes the cause of a `FaultError`.
    """

    def __init__(self, program: Program, *, behind: int = 1):
        self.program, self.behind = program, behind
        self.caught: type[Exception] = DsmError
        self.sessions: list[AnySession | None] = [None] * program.slots
        self._unread: deque[_Dispatched[AnySession]] = deque()
        self._state: Any = program.init()

    @property
    def free(self) -> list[int]:
        """The numbers of the slots that hold no session."""
        return [slot for slot, session in enumerate(self.sessions) if session is None]

    def slot_of(self, session: AnySession) -> int:
        """Return the number of the slot that a session holds.

        Raises:
          ValueError: the session holds no slot.
        """
        return self.sessions.index(session)

    def apply(self, change: Callable[[Any], Any]) -> None:
        """Replace the state by a function of it, for example to extend a request that is running."""
        self._state = change(self._state)

    def admit(self, sessions: Sequence[AnySession]) -> list[AnySession]:
        """Put sessions into free slots while other slots run.

        Returns:
          The sessions that have failed; they have no slot.

        Raises:
          ValueError: there are more sessions than free slots.
        """
        free = self.free
        if len(sessions) > len(free):
            raise ValueError(f"{len(sessions)} sessions for {len(free)} free slots; admit at most as many as are free")
        requests, failed = [], []
        for session in sessions:
            try:
                requests.append((session, session.request()))
            except self.caught as error:
                failed.append(self._failed(session, error))
        taken = [(slot, *pair) for slot, pair in zip(free, requests, strict=False)]
        for first in range(0, len(taken), self.program.inserts):
            slots, _, some = zip(*taken[first : first + self.program.inserts], strict=True)
            self._state = self.program.insert(self._state, slots, some)
        for slot, session, _ in taken:
            self.sessions[slot] = session
        return failed

    def start(self, session: AnySession) -> None:
        """Put one session into a free slot.

        Raises:
          DsmError: the session has failed.
          ValueError: no slot is free.
        """
        for failed in self.admit([session]):
            assert failed.error is not None
            raise failed.error

    def cancel(self, session: AnySession) -> None:
        """Free the session's slot at once and drop its unread outputs."""
        self.sessions = [None if held is session else held for held in self.sessions]
        for dispatched in self._unread:
            dispatched.parts[:] = [part for part in dispatched.parts if part[1] is not session]

    def step(self, *, waiting: bool = False) -> list[AnySession]:
        """Dispatch one chunk of all sessions that have input, then read all but the newest `behind` chunks.

        Args:
          waiting: whether requests wait for a slot.

        Returns:
          The sessions that have ended or failed; their slots are free.
        """
        parts: list[Any] = [None] * len(self.sessions)
        done, taken = [], []
        for slot, session in enumerate(self.sessions):
            if session is None:
                continue
            try:
                parts[slot] = session.take_input()
            except self.caught as error:
                done.append(self._failed(session, error))
            if parts[slot] is not None:
                taken.append((slot, session, parts[slot]))
        if taken:
            outputs, self._state = self.program.step(self._state, parts, waiting=waiting)
            self._unread.append(_Dispatched(outputs, taken))
            for slot, _, part in taken:
                if part.last:
                    self.sessions[slot] = None
        while len(self._unread) > (self.behind if taken else 0):
            done += self._read()
        return done

    def drain(self) -> list[AnySession]:
        """Read all unread outputs; return the sessions that ended."""
        done = []
        while self._unread:
            done += self._read()
        return done

    def _read(self) -> list[AnySession]:
        # An interrupt while the device computes leaves the outputs for the next step to read.
        outputs = jax.device_get(self._unread[0].outputs)
        dispatched = self._unread.popleft()
        done = []
        for slot, session, part in dispatched.parts:
            if session.ended:  # its end was read from an earlier chunk, after this chunk was dispatched
                continue
            try:
                session.read(outputs, slot, part)
            except self.caught as error:
                done.append(self._failed(session, error))
                continue
            if session.ended:
                if self.sessions[slot] is session:
                    self.sessions[slot] = None
                done.append(session)
        return done

    def _failed(self, session: AnySession, error: Exception) -> AnySession:
        if isinstance(error, DsmError):
            session.error = error
        else:
            session.error = FaultError(f"a request has failed by a fault of ours: {type(error).__name__}: {error}")
            session.error.__cause__ = error
        self.cancel(session)
        return session

    def run(self, sessions: Iterable[AnySession]) -> Iterator[AnySession]:
        """Run sessions to their ends, as many at a time as there are slots, and yield each when it ends or fails.

        Args:
          sessions: taken one by one as slots become free; a session that has already failed is yielded without running.
        """
        waiting = iter(sessions)
        upcoming = next(waiting, None)
        while True:
            admitted: list[AnySession] = []
            free = len(self.free)
            while upcoming is not None and len(admitted) < free:
                if upcoming.error is None:
                    admitted.append(upcoming)
                else:
                    yield upcoming
                upcoming = next(waiting, None)
            yield from self.admit(admitted)
            if upcoming is None and not any(session is not None for session in self.sessions):
                break
            yield from self.step(waiting=upcoming is not None)
        yield from self.drain()


def write_rows(rows: Any, slot_N: jax.Array, new: Any) -> Any:
    """Write rows of every leaf in place; a slot number out of range writes nothing.

    Args:
      rows: any pytree of arrays [B, ...].
      slot_N: int32, indices of the rows to write.
      new: the same pytree with arrays [N, ...].
    """
    return jax.tree.map(lambda old, rows_N: old.at[slot_N].set(rows_N, mode="drop"), rows, new)


def grow(state: Any, wanted: Any) -> Any:
    """Pad the leaves of a state with zeros at the ends of their axes, to the shapes of a larger state.

    Args:
      state: pytree of arrays.
      wanted: the same pytree of shapes, none of them smaller.
    """

    def padded(leaf: jax.Array, shape: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf.shape == shape.shape:
            return leaf
        return jnp.pad(leaf, [(0, new - old) for old, new in zip(leaf.shape, shape.shape, strict=True)])

    return jax.tree.map(padded, state, wanted)

"""The scheduler: runs requests through the slots of a program, each slot on its own.

A program has a fixed number of slots and three functions, as JetStream's engine has: `init` makes the state of all
slots, `insert` puts requests into some of them, `step` runs a chunk of every slot that takes part. Everything that a
request chooses lies in the state, so requests of any kind share one compiled program. A session is the host's side of
one request: it hands out the inputs of its slot and reads the outputs.

Whoever runs rows (files, live streams, texts, server connections) is a client of `Slots`.
"""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, Protocol, TypeVar

import jax
import jax.numpy as jnp

from dsm_jax.errors import DsmError


class Part(Protocol):
    """The input of one slot for one chunk."""

    @property
    def last(self) -> bool:
        """Whether it is the session's last input, so that the slot is free once the chunk has been dispatched."""
        ...


class Session(Protocol):
    """One request while it holds a slot.

    Attributes:
      error: the reason for which the session has failed; None while it has not.
      ended: whether all outputs have been read.
    """

    error: DsmError | None
    ended: bool

    def request(self) -> Any:
        """Returns what `insert` writes into the slot, a pytree of arrays without a slot axis."""
        ...

    def take_input(self) -> Any:
        """Returns the slot's part of the next chunk, a `Part`; None for a slot that sits this chunk out.

        Raises:
          DsmError: the input cannot be read; the session fails with this error.
        """
        ...

    def read(self, outputs: Any, slot: int, part: Any) -> None:
        """Reads the slot's outputs of a chunk, numpy arrays of all slots, made of the input `part`."""
        ...


AnySession = TypeVar("AnySession", bound=Session)


class Program(Protocol):
    """Compiled functions over the state of `slots` slots.

    Attributes:
      slots: number of slots.
      inserts: requests that one call of `insert` takes at most.
    """

    slots: int
    inserts: int

    def init(self) -> Any:
        """Makes the state of all slots, none of which holds a request."""
        ...

    def insert(self, state: Any, slot_N: Sequence[int], requests: Sequence[Any]) -> Any:
        """Makes slots fresh and puts a request into each; returns the next state."""
        ...

    def step(self, state: Any, parts: Sequence[Any], *, waiting: bool) -> tuple[Any, Any]:
        """Runs one chunk.

        Args:
          state: from the call before; it is donated.
          parts: the input of every slot; None for slots that sit out.
          waiting: whether requests wait for a slot, so that a chunk is best cut short once a slot becomes free.

        Returns:
          The outputs, which the device may still be computing, and the next state.
        """
        ...


@dataclasses.dataclass(frozen=True)
class _Dispatched(Generic[AnySession]):
    """A chunk whose outputs have not been read back: its outputs and, by slot, the sessions and inputs in it."""

    outputs: Any
    parts: list[tuple[int, AnySession, Any]]


class Slots(Generic[AnySession]):
    """The slots of one program and the sessions in them.

    Args:
      program: what the slots run.
      behind: chunks whose outputs may be left unread after a step. With 1 the device works on the newest chunk while
        the one before it is read; with 0 a step returns what it made.
    """

    def __init__(self, program: Program, *, behind: int = 1):
        self.program, self.behind = program, behind
        self.sessions: list[AnySession | None] = [None] * program.slots
        self._unread: deque[_Dispatched[AnySession]] = deque()
        self._state: Any = program.init()

    @property
    def free(self) -> list[int]:
        """The numbers of the slots that hold no session."""
        return [slot for slot, session in enumerate(self.sessions) if session is None]

    def slot_of(self, session: AnySession) -> int:
        """Returns the number of the slot that a session holds.

        Raises:
          ValueError: it holds none.
        """
        return self.sessions.index(session)

    def apply(self, change: Callable[[Any], Any]) -> None:
        """Replaces the state by what a function makes of it, such as a request that grows while it runs."""
        self._state = change(self._state)

    def admit(self, sessions: Sequence[AnySession]) -> None:
        """Puts sessions into free slots, while others run.

        Raises:
          ValueError: there are more sessions than free slots.
        """
        free = self.free
        if len(sessions) > len(free):
            raise ValueError(f"{len(sessions)} sessions for {len(free)} free slots; admit at most as many as are free")
        taken = list(zip(free, sessions, strict=False))
        for first in range(0, len(taken), self.program.inserts):
            some = taken[first : first + self.program.inserts]
            requests = [session.request() for _, session in some]
            self._state = self.program.insert(self._state, [slot for slot, _ in some], requests)
        for slot, session in taken:
            self.sessions[slot] = session

    def cancel(self, session: AnySession) -> None:
        """Frees the session's slot at once; outputs that are still to come are dropped."""
        self.sessions = [None if held is session else held for held in self.sessions]
        for dispatched in self._unread:
            dispatched.parts[:] = [part for part in dispatched.parts if part[1] is not session]

    def step(self, *, waiting: bool = False) -> list[AnySession]:
        """Dispatches one chunk of all sessions that have input, and reads the outputs that are due.

        Args:
          waiting: whether requests wait for a slot.

        Returns:
          Sessions that have ended or failed; their slots are free.
        """
        parts: list[Any] = [None] * len(self.sessions)
        done, taken = [], []
        for slot, session in enumerate(self.sessions):
            if session is None:
                continue
            try:
                parts[slot] = session.take_input()
            except DsmError as error:
                session.error = error
                self.cancel(session)
                done.append(session)
                continue
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
        """Reads all outputs that are still unread; returns the sessions that have ended in them."""
        done = []
        while self._unread:
            done += self._read()
        return done

    def _read(self) -> list[AnySession]:
        dispatched = self._unread.popleft()
        if not dispatched.parts:
            return []
        outputs = jax.device_get(dispatched.outputs)
        done = []
        for slot, session, part in dispatched.parts:
            if session.ended:  # in the chunk before; this one was dispatched before that was known
                continue
            session.read(outputs, slot, part)
            if session.ended:
                if self.sessions[slot] is session:
                    self.sessions[slot] = None
                done.append(session)
        return done

    def run(self, sessions: Iterable[AnySession]) -> Iterator[AnySession]:
        """Runs sessions to their ends, as many at a time as there are slots, and yields each as it ends or fails.

        Args:
          sessions: drawn one by one as slots become free; one that has failed already is yielded as it is.
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
            self.admit(admitted)
            if not any(session is not None for session in self.sessions):
                break
            yield from self.step(waiting=upcoming is not None)
        yield from self.drain()


def write_rows(rows: Any, slot_N: jax.Array, new: Any) -> Any:
    """Writes rows of every leaf in place; a slot number out of range writes nothing.

    Args:
      rows: any pytree of arrays [B, ...].
      slot_N: int32, the rows to write.
      new: the same pytree, of arrays [N, ...].
    """
    return jax.tree.map(lambda old, rows_N: old.at[slot_N].set(rows_N, mode="drop"), rows, new)


def grow(state: Any, wanted: Any) -> Any:
    """Pads the leaves of a state with zeros at the ends of their axes, to the shapes of a larger one.

    Args:
      state: arrays.
      wanted: the same pytree of shapes, none smaller.
    """

    def padded(leaf: jax.Array, shape: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf.shape == shape.shape:
            return leaf
        return jnp.pad(leaf, [(0, new - old) for old, new in zip(leaf.shape, shape.shape, strict=True)])

    return jax.tree.map(padded, state, wanted)

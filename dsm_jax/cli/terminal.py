"""Show bars, warnings and errors on standard error, apart from the command's output."""

import contextlib
import functools
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TextIO

from dsm_jax.progress import Progress

if TYPE_CHECKING:
    from types import FrameType

    import numpy as np
    from rich.console import Console

INTERRUPTED = 130  # exit code of a program that was ended by Ctrl-C
_GRACE_S = 1.0  # after Ctrl-C, in which files are put in order


@functools.cache
def console() -> "Console":
    """Return the console of standard error: one, or messages would not be printed above the bars."""
    from rich.console import Console

    return Console(stderr=True, emoji=False)


@contextlib.contextmanager
def messages(*, quiet: bool, verbose: bool) -> Iterator[None]:
    """Send the library's log to standard error while the block runs, and let text that an encoding lacks be replaced.

    Args:
      quiet: show errors alone.
      verbose: show what is fetched, loaded and compiled as well.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    log = logging.getLogger("dsm_jax")
    before = log.handlers, log.level, log.propagate
    log.handlers, log.propagate = [_Handler()], False  # orbax gives the root logger a handler too
    log.setLevel(logging.ERROR if quiet else logging.INFO if verbose else logging.WARNING)
    try:
        yield
    finally:
        log.handlers, log.propagate = before[0], before[2]
        log.setLevel(before[1])


class _Handler(logging.Handler):
    """Print records as the command's own messages."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage(), style="yellow" if record.levelno >= logging.WARNING else "dim")


def say(message: object, *, style: str = "") -> None:
    """Print a message on standard error, above the bars."""
    console().print(f"dsm-jax: {message}", style=style, soft_wrap=True, markup=False, highlight=False)


def note(message: object) -> None:
    """Print what was done on standard error, as it is."""
    console().print(str(message), soft_wrap=True, markup=False, highlight=False)


def refuse(reason: object) -> None:
    """Print why something failed."""
    say(reason, style="red")


@contextlib.contextmanager
def ended_by_one_interrupt() -> Iterator[None]:
    """Make one Ctrl-C enough: where nothing comes of it, the process ends a second later.

    Python raises an exception, and may drop it, in a callback of the garbage collector for example. It raises none
    while a library runs, such as XLA's compiler for seconds, but writes the signal's number to a pipe even then.
    """
    raised, ending = -math.inf, None

    def interrupt(*_: object) -> None:
        nonlocal raised, ending
        raised = time.monotonic()
        ending = threading.Timer(_GRACE_S, os._exit, [INTERRUPTED])
        ending.daemon = True
        ending.start()
        raise KeyboardInterrupt

    def watch() -> None:
        while number := os.read(reading, 1):
            came = time.monotonic()
            # A server takes signals over, and this handler has no part in its end.
            if number[0] != signal.SIGINT or signal.getsignal(signal.SIGINT) is not interrupt:
                continue
            time.sleep(_GRACE_S)
            if raised < came - _GRACE_S and signal.getsignal(signal.SIGINT) is interrupt:
                os._exit(INTERRUPTED)
        os.close(reading)

    def unraisable(dropped: "sys.UnraisableHookArgs") -> None:
        if dropped.exc_type is not KeyboardInterrupt:
            hook(dropped)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    threading.Thread(target=watch, daemon=True).start()
    pipe_before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    before, hook = signal.signal(signal.SIGINT, interrupt), sys.unraisablehook
    sys.unraisablehook = unraisable
    try:
        yield
    finally:
        if ending is not None:
            ending.cancel()
        sys.unraisablehook = hook
        signal.signal(signal.SIGINT, before)
        signal.set_wakeup_fd(pipe_before)
        os.close(writing)


@contextlib.contextmanager
def first_interrupt_calls(action: Callable[[], None]) -> Iterator[None]:
    """Call a function at the first Ctrl-C, in place of an exception; the second Ctrl-C is as it was before.

    An exception may leave a step of a model half done, and its state unusable; the function is called between two
    instructions of any code, so it should set no more than a flag.
    """
    is_first = True

    def interrupt(number: int, frame: "FrameType | None") -> None:
        nonlocal is_first
        if is_first or not callable(before):
            is_first = False
            action()
        else:
            before(number, frame)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class Level:
    """Show the level of a microphone on one line of standard error; nothing where that is no terminal.

    Args:
      quiet: show nothing.
    """

    WIDTH, FLOOR_DB = 30, -60.0

    def __init__(self, *, quiet: bool):
        self._shown = not quiet and console().is_terminal

    def show(self, samples: "np.ndarray") -> None:
        """Show the level of some samples [T] in [-1, 1]."""
        if self._shown:
            power = float((samples * samples).mean()) if samples.size else 0.0
            db = max(self.FLOOR_DB, 10 * math.log10(power + 1e-10))
            filled = round(self.WIDTH * (1 - db / self.FLOOR_DB))
            write(f"\r[{'#' * filled}{' ' * (self.WIDTH - filled)}]", sys.stderr)

    def clear(self) -> None:
        """Take the level away."""
        if self._shown:
            write("\r" + " " * (self.WIDTH + 2) + "\r", sys.stderr)


class Bars:
    """Show a bar for each item of some work; nothing where standard error is no terminal.

    Attributes:
      shown: whether bars are shown.

    Args:
      quiet: show nothing.
      unit: unit of the numbers, such as "s".
      scale: factor from the reported numbers to the unit.
    """

    def __init__(self, *, quiet: bool, unit: str = "s", scale: float = 1.0):
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        amount = TextColumn(f"{{task.completed:.0f}} {unit}")
        # Names of files are shown as they are: in rich's markup, brackets and colons mean something.
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), amount, TimeRemainingColumn())
        # Standard output is for the text alone: rich would send what is printed meanwhile to its own console, wrapped.
        self.shown = not quiet and console().is_terminal
        self._scale = scale
        self._bars = RichProgress(
            *columns, console=console(), transient=True, disable=not self.shown, redirect_stdout=False
        )
        self._names: dict[int, str] = {}
        self._tasks: dict[int, object] = {}

    def __enter__(self) -> "Bars":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def name(self, item: int, name: str) -> None:
        """Name an item, before its bar is shown."""
        self._names[item] = name

    def update(self, progress: Progress) -> None:
        """Show how far an item has come; its first call makes its bar."""
        total = None if progress.total is None else progress.total * self._scale
        if progress.item not in self._tasks:
            self._tasks[progress.item] = self._bars.add_task(self._names.get(progress.item, ""), total=total)
        self._bars.update(self._tasks[progress.item], completed=progress.done * self._scale, total=total)  # pyright: ignore[reportArgumentType]

    def remove(self, item: int) -> None:
        """Take away the bar of an item that is done."""
        if item in self._tasks:
            self._bars.remove_task(self._tasks.pop(item))  # pyright: ignore[reportArgumentType]

    def print(self, text: str) -> None:
        """Print text on standard output; on a terminal that both share, the bars make room for it."""
        self._bars.stop()
        write(text)
        self._bars.start()


def write(text: str, file: TextIO | None = None) -> None:
    """Write text to standard output at once."""
    out = sys.stdout if file is None else file
    if out is None:
        return
    out.write(text)
    out.flush()


@contextlib.contextmanager
def loading_bar(name: str, *, quiet: bool) -> Iterator[Callable[[Progress], None]]:
    """Show a bar over the megabytes of a model while the block runs; yields what to call with the progress."""
    with Bars(quiet=quiet, unit="MB", scale=1e-6) as bars:
        bars.name(0, name)
        yield bars.update


@contextlib.contextmanager
def training_bar(*, quiet: bool) -> Iterator[Callable[[Progress], None]]:
    """Show a bar over the steps of a training while the block runs, and the training's log unless that is quiet.

    Yields:
      A function to call with the progress.
    """
    log = logging.getLogger("dsm_jax.training")
    level = log.level
    if not quiet:
        log.setLevel(logging.INFO)
    try:
        with Bars(quiet=quiet, unit="steps") as bars:
            bars.name(0, "training")
            yield bars.update
    finally:
        log.setLevel(level)

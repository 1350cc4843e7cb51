"""A bar over bytes on standard error; nothing where that is not a terminal."""

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def byte_bar(title: str, total: int, show: bool) -> Iterator[Callable[[int], None]]:
    """Shows a bar while the block runs.

    Args:
      title: what is going on.
      total: bytes in all.
      show: False for no bar.

    Yields:
      What to call with the bytes that have just been dealt with.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    hidden = not (show and console.is_terminal)
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task(title, total=total)
        yield lambda count: bar.advance(task, count)

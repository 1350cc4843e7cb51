"""What the command shows beside its output, on standard error."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


def progress(*, quiet: bool) -> "Progress":
    """A bar per recording on standard error; nothing where that is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    seconds = TextColumn("{task.completed:.0f} s")
    columns = (TextColumn("{task.description}"), BarColumn(), seconds, TimeRemainingColumn())
    # Standard output is for the text alone: rich would send what is printed meanwhile to its own console, wrapped.
    hidden = quiet or not console.is_terminal
    return Progress(*columns, console=console, transient=True, disable=hidden, redirect_stdout=False)


def refuse(bar: "Progress", reason: object) -> None:
    """Says beside the bars what failed."""
    bar.console.print(f"dsm-jax: {reason}", style="red", soft_wrap=True, markup=False, highlight=False)

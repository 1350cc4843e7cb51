"""Write files so that a failure leaves nothing new: beside their place first, then renamed."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file for writing that takes the place of `path` once the block ends well.

    The file's mode follows the umask, or is that of the file that it replaces. A link is written through.

    Args:
      path: path of the file; its folder exists.

    Yields:
      A binary file, at its start.

    Raises:
      OSError: the place cannot be written; what was at `path` is still there.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        # A device or a named pipe cannot be replaced.
        with target.open("wb") as file:
            yield file
        return
    start = os.fsdecode(os.fsencode(target.name)[:200])  # a name may have 255 bytes
    beside = target.with_name(f".{start}.{secrets.token_hex(4)}.part")
    try:
        with beside.open("xb") as file:
            if target.exists():
                os.chmod(beside, target.stat().st_mode & 0o7777)
            yield file
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text as `replacing` does; what UTF-8 lacks (parts of names in other encodings) becomes "?"."""
    with replacing(path) as file:
        file.write(text.encode("utf-8", errors="replace"))


def read_text(path: str | os.PathLike[str]) -> str:
    """Read UTF-8 text, with a byte order mark or without.

    Raises:
      OSError: the file cannot be read.
      UnicodeDecodeError: it is not UTF-8.
    """
    return Path(path).read_text(encoding="utf-8-sig")

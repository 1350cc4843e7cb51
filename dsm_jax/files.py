"""Write files so that a failure leaves nothing new: beside their place, then renamed. Read text and JSON."""

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from dsm_jax.errors import DsmError


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


def check_folder_of(path: str | os.PathLike[str], error: type[DsmError]) -> None:
    """Refuse an output that could not be written, before the work for it is done.

    Args:
      path: path of the output.
      error: class of the error to raise.

    Raises:
      DsmError: of that class; the output's folder does not exist.
    """
    if not (folder := Path(path).parent).is_dir():
        raise error(f"{path} cannot be written: there is no folder {folder}; make it first")


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


def file_in(folder: Path, name: str) -> str:
    """Return the path of a file by its name in a folder; the name as it is where no such file is there."""
    path = folder / name
    return str(path) if os.path.isfile(path) else name  # says no to names that pathlib raises at


def json_lines(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the number, from 1, and the bytes of each line of a JSON Lines file that is not blank.

    Args:
      content: the whole file. Lines end at line feeds and carriage returns alone: texts in JSON may hold other ends of
        lines as they are.
    """
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            yield number, line


def parse_json(text: bytes, expected: str, *, line: bool) -> Any:
    """Parse JSON in UTF-8, with a byte order mark or without.

    Args:
      text: JSON of a file, or of a line of a file.
      expected: noun phrase for the expected form, for the error.
      line: whether the text is one line, whose file and number the caller adds to the error.

    Raises:
      ValueError: the text is no JSON in UTF-8, or beyond the limits of Python's reader; in one sentence.
    """
    try:
        return decode_json(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"this is not text in UTF-8 ({error.reason}); save it as UTF-8") from None
    except json.JSONDecodeError as error:
        where = f"column {error.colno}" if line else f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"this is no JSON ({error.msg} at {where}); expected {expected}") from None


def decode_json(text: str | bytes) -> Any:
    """Return the values of JSON.

    Raises:
      UnicodeDecodeError: bytes that are not UTF-8.
      json.JSONDecodeError: no JSON, or JSON beyond what Python reads: nested too deeply, or with a number of thousands
        of digits. All of these are ValueErrors.
    """
    try:
        return json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise
    except RecursionError:
        raise json.JSONDecodeError("it is nested too deeply", "", 0) from None
    except ValueError:
        raise json.JSONDecodeError("a number has too many digits", "", 0) from None

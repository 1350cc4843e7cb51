"""Write files whole or not at all, and journals line by line, so that a run that is stopped loses nothing."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dsm_jax import files
from dsm_jax.errors import EvaluationError


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes the place of `path`, see `dsm_jax.files.replacing`.

    Raises:
      EvaluationError: the file cannot be written there.
    """
    try:
        with files.replacing(path) as file:
            yield file
    except OSError as error:
        raise EvaluationError(f"{path} cannot be written ({error.strerror}); give another place") from None


def encoded(values: Any, *, indent: int | None = None) -> bytes:
    """Write values as JSON in UTF-8; what UTF-8 lacks, such as parts of file names in other encodings, is escaped.

    `json` reads the escapes back, so that such a name still names the same recording.
    """
    return json.dumps(values, indent=indent, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


class Journal:
    """A file of JSON lines that grows while a run lasts, and from which the next run continues.

    Args:
      path: path of the file, which is made if it does not exist.
      run: settings that all rows have in common, as JSON values; the first line of the file.

    Raises:
      EvaluationError: the file cannot be read or written, is no journal, or is that of another run.
    """

    def __init__(self, path: Path, run: dict[str, object]):
        self.path, self.rows = path, []
        try:
            written = path.read_bytes() if path.exists() else b""
            # A run that was killed may have left half a line.
            whole = written[: written.rfind(b"\n") + 1]
            lines = whole.splitlines()
            if written and not lines:
                raise EvaluationError(f"{path} has no whole line of results; delete it, or give another file")
            if lines:
                self._check(_parsed(path, 1, lines[0]), run)
                self.rows = [_parsed(path, number, line) for number, line in enumerate(lines[1:], 2)]
            if whole != written:
                path.write_bytes(whole)
        except OSError as error:
            raise EvaluationError(f"{path} cannot be read or written ({error.strerror}); give another place") from None
        if not lines:
            self.append(run)

    def _check(self, found: dict[str, object], expected: dict[str, object]) -> None:
        for name, value in expected.items():
            if found.get(name) != value:
                raise EvaluationError(
                    f"{self.path} holds rows of another run, whose {name} was {found.get(name)!r} and not {value!r}; "
                    "give another file, or leave out resume and start again"
                )

    def append(self, row: dict[str, object]) -> None:
        """Write a line in one piece.

        Raises:
          EvaluationError: it cannot be written.
        """
        try:
            with self.path.open("ab") as file:
                file.write(encoded(row))
        except OSError as error:
            raise EvaluationError(f"{self.path} cannot be written ({error.strerror}); give another place") from None


def _parsed(path: Path, number: int, line: bytes) -> dict[str, object]:
    try:
        values = files.decode_json(line)
    except ValueError as error:
        raise EvaluationError(f"{path} line {number} is no JSON ({error}); delete the line, or start again") from None
    if not isinstance(values, dict):
        raise EvaluationError(f"{path} line {number} is no row of results; delete the line, or start again")
    return values

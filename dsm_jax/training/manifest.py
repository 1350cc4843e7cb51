"""Reads what to learn from: recordings, and the words said in each with their times.

Either a JSON Lines file, a row a recording:

    {"audio": "talks/first.flac", "words": [{"text": "hello", "start": 0.48, "end": 0.8}, ...]}

with the path relative to the file's folder, or a folder of recordings with a JSON file of the same name beside each.
Both are what `dsm-jax transcribe --format json` writes, so its transcripts can be corrected and learnt from; keys other
than these are not looked at. Everything is checked, and every recording decoded to its end, before anything is learnt.
"""

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeGuard

from dsm_jax import audio
from dsm_jax.errors import DsmError, TrainingError
from dsm_jax.training.compose import Spoken

SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus")
LISTED = 5  # faults that an error spells out
# A recording is heard with a second of silence after it, and a transcript may time a last word into that.
SLACK_S = 1.0
LONGEST_S = 1e7
_FORMAT = '{"audio": PATH, "words": [{"text": TEXT, "start": SECONDS, "end": SECONDS}, ...]}'


@dataclasses.dataclass(frozen=True)
class Recording:
    """One recording to learn from.

    Attributes:
      audio: its file, which has been decoded to its end once.
      words: what is said, in order.
      seconds: its length.
    """

    audio: Path
    words: tuple[Spoken, ...]
    seconds: float


@dataclasses.dataclass(frozen=True)
class _Row:
    """A recording that has not been looked at: `place` is what errors call it, one of the others may be missing."""

    place: str
    audio: Path | None
    transcript: Path | bytes | None


def read(
    source: Path,
    sample_rate: int,
    *,
    check: Callable[[str], object] | None = None,
    skip_bad: bool = False,
) -> list[Recording]:
    """Reads a manifest or a folder.

    Args:
      source: a JSON Lines file, or a folder.
      sample_rate: Hz that the recordings will be read at.
      check: called with the text of each word; raises a DsmError for one that cannot be learnt.
      skip_bad: leave faulty recordings out, each with a line on standard error, instead of refusing them all.

    Returns:
      The recordings, in the order of the file, or of the names in the folder.

    Raises:
      TrainingError: there is nothing to read, nothing without fault, or something faulty and not `skip_bad`. All faulty
        recordings are counted, and the first few listed with what is wrong.
    """
    recordings, faults = [], []
    rows = list(_folder_rows(source) if source.is_dir() else _file_rows(source))
    for row in rows:
        try:
            recordings.append(_read_row(row, source, sample_rate, check))
        except DsmError as error:
            faults.append(f"{row.place}: {error}")
            if skip_bad:
                print(f"left out: {faults[-1]}", file=sys.stderr, flush=True)
    if not rows:
        raise TrainingError(f"{source} lists no recordings; expected rows {_FORMAT}, or a folder of recordings")
    if faults and not (skip_bad and recordings):
        listed = "".join(f"\n  {fault}" for fault in faults[:LISTED])
        more = f"\n  and {len(faults) - LISTED} more" if len(faults) > LISTED else ""
        remedy = "mend them, or set skip_bad to leave them out" if recordings else "mend them"
        raise TrainingError(
            f"{len(faults)} of the {len(rows)} recordings of {source} cannot be learnt from; {remedy}:{listed}{more}"
        )
    return recordings


def _file_rows(source: Path) -> Iterator[_Row]:
    for number, line in enumerate(_bytes_of(source).splitlines(), 1):
        if line.strip():
            yield _Row(f"{source.name} line {number}", None, line)


def _folder_rows(folder: Path) -> Iterator[_Row]:
    """A row for every recording, and for every transcript that has none."""
    recordings = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES]
    for path in recordings:
        transcript = path.with_suffix(".json")
        found = transcript.is_file()
        yield _Row(transcript.name if found else path.name, path, transcript if found else None)
    stems = {path.stem for path in recordings}
    for path in sorted(folder.glob("*.json")):
        if path.stem not in stems:
            yield _Row(path.name, None, None)


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TrainingError(
            f"{path} cannot be read ({error.strerror}); give a JSON Lines file, or a folder of recordings"
        ) from None


def _read_row(row: _Row, source: Path, sample_rate: int, check: Callable[[str], object] | None) -> Recording:
    if row.transcript is None and row.audio is None:
        raise TrainingError(f"there is no recording of this name beside it; add one ({', '.join(SUFFIXES)})")
    if row.transcript is None:
        raise TrainingError(f"there is no {Path(row.place).stem}.json beside it; write one: {_FORMAT}")
    text = row.transcript if isinstance(row.transcript, bytes) else _bytes_of(row.transcript)
    try:
        values = json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise TrainingError(f"this is not text in UTF-8 ({error.reason}); expected {_FORMAT}") from None
    except json.JSONDecodeError as error:
        where = f"column {error.colno}" if row.audio is None else f"line {error.lineno}, column {error.colno}"
        raise TrainingError(f"this is no JSON ({error.msg} at {where}); expected {_FORMAT}") from None
    path = row.audio
    if path is None:
        named = values.get("audio") if isinstance(values, dict) else None
        if not isinstance(named, str):
            raise TrainingError(f"the key 'audio' is {named!r}; expected the path of a recording: {_FORMAT}")
        path = source.parent / named
    words = tuple(_words(values, check))
    samples = sum(len(block_T) for block_T in audio.blocks(path, sample_rate))
    seconds = samples / sample_rate
    late = next((word for word in words if word.start > seconds + SLACK_S), None)
    if late is not None:
        raise TrainingError(
            f"the word {late.text!r} starts at {late.start} s and {path} ends at {seconds:.2f} s; is the recording cut "
            "short, or the transcript another's?"
        )
    return Recording(path, words, seconds)


def _words(values: Any, check: Callable[[str], object] | None) -> Iterator[Spoken]:
    rows = values.get("words") if isinstance(values, dict) else None
    text = values.get("text") if isinstance(values, dict) else None
    if not isinstance(rows, list) or (not rows and isinstance(text, str) and text.strip()):
        raise TrainingError(f"the transcript has no words with times; expected {_FORMAT}")
    before = 0.0
    for number, row in enumerate(rows, 1):
        found = row if isinstance(row, dict) else {}
        text, start, end = found.get("text"), found.get("start"), found.get("end")
        if not isinstance(text, str) or not text.strip():
            raise TrainingError(f"word {number} is {row!r}, without text; expected {_FORMAT}")
        if not (_is_time(start) and _is_time(end) and start <= end):
            raise TrainingError(
                f"word {number}, {text!r}, goes from {start!r} to {end!r}; expected two times in seconds, the end not "
                "before the start"
            )
        if start < before:
            raise TrainingError(
                f"word {number}, {text!r}, starts at {start} s, before the one ahead of it ({before} s); sort the words"
            )
        if check is not None:
            check(text)
        before = start
        yield Spoken(text, float(start), float(end))


def _is_time(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < LONGEST_S

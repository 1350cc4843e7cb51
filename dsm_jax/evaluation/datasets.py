"""Read recordings and their reference transcripts: folders, JSON Lines files, and data sets of the Hugging Face hub.

A folder has a transcript of the same name next to each recording: `.json`, as training and `dsm-jax transcribe --format
json` have it, or else `.txt`. A file has a line `{"audio": PATH, "text": TEXT}` for each recording, with paths relative
to its folder; `"id"` may name the recording, and `"words": [{"text": WORD}, ...]` may stand in for the text, so that
manifests for training can be evaluated on.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from dsm_jax import files
from dsm_jax.audio import Source
from dsm_jax.errors import DsmError, EvaluationError
from dsm_jax.evaluation import hub_datasets
from dsm_jax.training.data import SUFFIXES, no_recording

_FORMAT = '{"audio": PATH, "text": TEXT}'


@dataclasses.dataclass(frozen=True)
class Sample:
    """One recording and its reference transcript.

    Attributes:
      id: names it; no other sample of the data set has the same.
      reference: the right transcript.
      audio: a recording, as `transcribe` takes it, or a function that opens it when its turn comes.

    Raises:
      EvaluationError: the id or the reference is no string.
    """

    id: str
    reference: str
    audio: Source | Callable[[], Source]

    def __post_init__(self) -> None:
        for name in ("id", "reference"):
            if not isinstance(found := getattr(self, name), str):
                raise EvaluationError(f"the {name} of a sample is {found!r}; expected a string")

    def open(self) -> Source:
        """Open the recording."""
        return self.audio() if callable(self.audio) else self.audio


@dataclasses.dataclass(frozen=True)
class Failure:
    """A recording that could not be evaluated, and why."""

    id: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Recordings to evaluate on.

    Attributes:
      name: name of the data set.
      samples: in order.
      failures: recordings whose transcript is missing or cannot be read.
    """

    name: str
    samples: tuple[Sample, ...]
    failures: tuple[Failure, ...] = ()


def read(source: str | Path) -> Dataset:
    """Read a data set; each recording is opened when it is transcribed.

    Args:
      source: a folder; a JSON Lines file; one of `hub_datasets.ALIASES`, such as "librispeech.clean"; or
        "ORGANISATION/NAME:CONFIG:SPLIT" on the hub, of which config and split may be left out.

    Raises:
      EvaluationError: there is no such data set, it has no recordings with transcripts, or the
        library `datasets` is needed and missing.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        found = list(_folder(path))
    elif path.is_file():
        found = list(_manifest(path))
    elif place := hub_datasets.find(str(source)):
        found = [
            Sample(one.id, one.text, one.open) if isinstance(one.text, str) else Failure(one.id, "it has no text")
            for one in hub_datasets.fetch(place)
        ]
    else:
        raise EvaluationError(
            f"{source} is no folder, no file, and no data set; give one of them, ORGANISATION/NAME on the hub, or one "
            f"of {', '.join(hub_datasets.ALIASES)}"
        )
    dataset = gather(str(source), found)
    if not found:
        raise EvaluationError(f"{source} has no recordings; expected a folder of them, or lines {_FORMAT}")
    if not dataset.samples:
        first = dataset.failures[0]
        raise EvaluationError(f"no recording of {source} has a transcript that can be read; {first.id}: {first.reason}")
    return dataset


def gather(name: str, found: Iterable[Sample | Failure]) -> Dataset:
    """Make a data set; a recording with the id of another is a failure."""
    samples, failures, seen = [], [], set()
    for one in found:
        if isinstance(one, Failure):
            failures.append(one)
        elif not isinstance(one, Sample):
            raise EvaluationError(f"{name} hold {one!r}; expected dsm_jax.evaluation.Sample(id, reference, audio)")
        elif one.id in seen:
            failures.append(Failure(one.id, "another recording before it has this id; give each its own"))
        else:
            seen.add(one.id)
            samples.append(one)
    return Dataset(name, tuple(samples), tuple(failures))


def _folder(folder: Path) -> Iterator[Sample | Failure]:
    recordings = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES]
    for path in recordings:
        beside = [path.with_suffix(suffix) for suffix in (".json", ".txt")]
        transcript = next((file for file in beside if file.is_file()), None)
        if transcript is None:
            yield Failure(path.name, f"there is no {path.stem}.json or {path.stem}.txt next to it; write one")
            continue
        try:
            content = _bytes(transcript)
            if transcript.suffix == ".json":
                text = _reference(_object(content, '{"text": TEXT}', line=False))
            else:
                text = _text(content)
            yield Sample(path.name, text, path)
        except DsmError as error:
            yield Failure(path.name, f"{transcript.name}: {error}")
    stems = {path.stem for path in recordings}
    for path in sorted(folder.glob("*.json")):
        if path.stem not in stems:
            yield Failure(path.name, no_recording(path))


def _manifest(path: Path) -> Iterator[Sample | Failure]:
    for number, line in files.json_lines(_bytes(path)):
        try:
            values = _object(line, _FORMAT, line=True)
            recording, name = values.get("audio"), values.get("id", values.get("audio"))
            if not isinstance(recording, str):
                raise EvaluationError(f"the key 'audio' is {recording!r}; expected the path of a recording: {_FORMAT}")
            if not isinstance(name, str | int):
                raise EvaluationError(f"the key 'id' is {name!r}; expected a name")
            yield Sample(str(name), _reference(values), path.parent / recording)
        except DsmError as error:
            yield Failure(f"{path.name} line {number}", str(error))


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise EvaluationError(f"{path} cannot be read ({error.strerror}); check its permissions") from None


def _text(written: bytes) -> str:
    try:
        return written.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise EvaluationError(f"this is not text in UTF-8 ({error.reason}); save it as UTF-8") from None


def _object(content: bytes, expected: str, *, line: bool) -> dict[str, object]:
    try:
        values = files.parse_json(content, expected, line=line)
    except ValueError as error:
        raise EvaluationError(str(error)) from None
    if not isinstance(values, dict):
        raise EvaluationError(f"this is {_text(content).strip()[:40]!r}; expected {expected}")
    return values


def _reference(values: dict[str, object]) -> str:
    """Find the text of a transcript; refuse one of which only one half has been corrected."""
    text, listed = values.get("text"), values.get("words")
    words = None
    if isinstance(listed, list):
        spoken = [word.get("text") if isinstance(word, dict) else None for word in listed]
        if not all(isinstance(word, str) for word in spoken):
            raise EvaluationError('a word has no text; expected "words": [{"text": TEXT}, ...]')
        words = " ".join(str(word) for word in spoken)
    if isinstance(text, str) and words is not None and text.split() != words.split():
        raise EvaluationError(
            f"the text is {text[:60]!r} and its words are {words[:60]!r}; was only one of them corrected? Leave the "
            "wrong one out"
        )
    if isinstance(text, str):
        return text
    if words is None:
        raise EvaluationError("there is no text and there are no words; give the transcript as 'text'")
    return words

"""Read training data, recordings with timed words, and draw batches of rows.

The data is either a JSON Lines file with a line for each recording:

    {"audio": "talks/first.flac", "words": [{"text": "hello", "start": 0.48, "end": 0.8}, ...]}

with paths relative to the file's folder, or a folder in which every recording has a JSON file of the same name. Both
formats are written by `dsm-jax transcribe --format json`, so its transcripts can be corrected and trained on. For
text-to-speech, `"speaker": NAME` names the speaker of a recording, or of a word in it, and `"voice": VOICE` or
`"voices": {NAME: VOICE, ...}` gives the speakers' voices: files, or names as for `synthesize`. Other keys are ignored.
All data is checked, and every recording decoded to its end, before training starts.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from dsm_jax import audio, files
from dsm_jax.errors import DsmError, TrainingError

Example = TypeVar("Example")

_log = logging.getLogger("dsm_jax")
_FORMATS = "wav flac mp3 ogg opus m4a aac mp4 webm wma aiff caf mka mkv mov 3gp"
SUFFIXES = frozenset(f".{name}" for name in _FORMATS.split())  # tell recordings from other files of a folder
LISTED = 5  # faults that an error lists
# `transcribe` appends a second of silence to a recording, and may time a last word into that silence.
SLACK_S = 1.0
LONGEST_S = 1e7
CLOSEST_S = 0.04  # mean time from word to word: nobody says 25 words a second
_FORMAT = '{"audio": PATH, "words": [{"text": TEXT, "start": SECONDS, "end": SECONDS}, ...]}'
EXPECTED = "a JSON Lines file, or a folder of recordings"


@dataclasses.dataclass(frozen=True)
class WordSpan:
    """A word in a recording.

    Attributes:
      text: the word.
      start, end: times of the word, in seconds.
      speaker: name of the speaker; empty if unknown.
    """

    text: str
    start: float
    end: float
    speaker: str = ""


@dataclasses.dataclass(frozen=True)
class Recording:
    """One recording to train on.

    Attributes:
      audio: path of the audio file.
      words: the spoken words, in order.
      seconds: length of the audio.
      voices: pairs of a speaker and the speaker's voice; the speaker "" stands for all other speakers.
    """

    audio: Path
    words: tuple[WordSpan, ...]
    seconds: float
    voices: tuple[tuple[str, str], ...] = ()

    def voice_of(self, speaker: str) -> str | None:
        """Find the voice of a speaker; None if the data names none."""
        voices = dict(self.voices)
        return voices.get(speaker, voices.get(""))


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A recording before its check, with its name for errors; audio or transcript may be missing."""

    place: str
    audio: Path | None
    transcript: Path | bytes | None


def read_recordings(
    source: Path,
    sample_rate: int,
    *,
    check: Callable[[str], object] | None = None,
    check_recording: Callable[[Recording], object] | None = None,
    check_all: Callable[[Mapping[int, Recording]], Mapping[int, DsmError]] | None = None,
    skip_bad: bool = False,
) -> list[Recording]:
    """Read a manifest or a folder.

    Args:
      source: a JSON Lines file, or a folder.
      sample_rate: sample rate of the training audio, Hz.
      check: called with the text of each word; raises a DsmError for a word that the model cannot learn.
      check_recording: called with each recording; raises a DsmError for one that the model cannot learn.
      check_all: as for `read_examples`.
      skip_bad: leave out faulty recordings, with a logged warning for each, instead of raising.

    Returns:
      The recordings, in the order of the file, or of the names in the folder.

    Raises:
      TrainingError: there are no recordings, all recordings are faulty, or any is and `skip_bad` is false. The error
        counts the faulty recordings and lists the first few.
    """
    entries = list(_folder_entries(source) if source.is_dir() else _file_entries(source))
    if not entries:
        raise TrainingError(f"{source} lists no recordings; expected rows {_FORMAT}, or a folder of recordings")

    def read(entry: _Entry) -> Recording:
        recording = _read_entry(entry, source, sample_rate, check)
        if check_recording is not None:
            check_recording(recording)
        return recording

    readers = [(entry.place, functools.partial(read, entry)) for entry in entries]
    return read_examples(readers, source, "recordings", check_all=check_all, skip_bad=skip_bad)


def read_examples(
    readers: Sequence[tuple[str, Callable[[], Example]]],
    source: Path,
    noun: str,
    *,
    check_all: Callable[[Mapping[int, Example]], Mapping[int, DsmError]] | None = None,
    skip_bad: bool,
) -> list[Example]:
    """Read all examples of a data set, and list the faults of all together.

    Args:
      readers: pairs of an example's place, for errors, and the function that reads the example.
      source: the data set, for errors.
      noun: word for several examples, for errors.
      check_all: called with the examples that could be read, by their place; returns the errors of those that do not
        fit the others.
      skip_bad: leave out faulty examples, with a logged warning for each, instead of raising.

    Raises:
      TrainingError: all examples are faulty, or any is and `skip_bad` is false.
    """
    examples: dict[int, Example] = {}
    faults: dict[int, str] = {}

    def leave_out(number: int, error: DsmError) -> None:
        faults[number] = f"{readers[number][0]}: {error}"
        if skip_bad:
            _log.warning("left out: %s", faults[number])

    for number, (_, read) in enumerate(readers):
        try:
            examples[number] = read()
        except DsmError as error:
            leave_out(number, error)
    for number, error in ({} if check_all is None else check_all(examples)).items():
        del examples[number]
        leave_out(number, error)
    if faults and not (skip_bad and examples):
        listed = "".join(f"\n  {faults[number]}" for number in sorted(faults)[:LISTED])
        more = f"\n  and {len(faults) - LISTED} more" if len(faults) > LISTED else ""
        remedy = "fix them, or set skip_bad to leave them out" if examples else "fix them"
        raise TrainingError(
            f"{len(faults)} of the {len(readers)} {noun} of {source} cannot be trained on; {remedy}:{listed}{more}"
        )
    return list(examples.values())


def lines_of(source: Path, expected: str) -> Iterator[tuple[str, bytes]]:
    """Yield the place and the bytes of each line of a file that is not blank.

    Args:
      source: a JSON Lines file.
      expected: noun phrase for the data to give, for the error.

    Raises:
      TrainingError: the file cannot be read.
    """
    for number, line in files.json_lines(_bytes_of(source, expected)):
        yield f"{source.name} line {number}", line


def parse_json(text: bytes, form: str, *, line: bool) -> Any:
    """Parse JSON, see `dsm_jax.files.parse_json`.

    Raises:
      TrainingError: the text is no JSON in UTF-8.
    """
    try:
        return files.parse_json(text, form, line=line)
    except ValueError as error:
        raise TrainingError(str(error)) from None


def samples_of(path: Path, sample_rate: int) -> int:
    """Decode a recording to its end and return its number of samples.

    Raises:
      AudioError: the recording cannot be read, or is damaged.
    """
    return sum(len(block_T) for block_T in audio.blocks(path, sample_rate, strict=True))


def _file_entries(source: Path) -> Iterator[_Entry]:
    for place, line in lines_of(source, EXPECTED):
        yield _Entry(place, None, line)


def _folder_entries(folder: Path) -> Iterator[_Entry]:
    """List every recording of a folder, and every transcript that has no recording."""
    recordings = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES]
    for path in recordings:
        transcript = path.with_suffix(".json")
        found = transcript.is_file()
        yield _Entry(transcript.name if found else path.name, path, transcript if found else None)
    stems = {path.stem for path in recordings}
    for path in sorted(folder.glob("*.json")):
        if path.stem not in stems:
            yield _Entry(path.name, None, None)


def no_recording(transcript: Path) -> str:
    """Return the sentence on a transcript in a folder without its recording."""
    stem = transcript.stem
    return f"there is no recording of this name next to it; add one, such as {stem}.wav or {stem}.m4a"


def _bytes_of(path: Path, expected: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TrainingError(f"{path} cannot be read ({error.strerror}); give {expected}") from None


def _read_entry(entry: _Entry, source: Path, sample_rate: int, check: Callable[[str], object] | None) -> Recording:
    if entry.transcript is None and entry.audio is None:
        raise TrainingError(no_recording(Path(entry.place)))
    if entry.transcript is None:
        raise TrainingError(f"there is no {Path(entry.place).stem}.json next to it; write one: {_FORMAT}")
    text = entry.transcript if isinstance(entry.transcript, bytes) else _bytes_of(entry.transcript, EXPECTED)
    values = parse_json(text, _FORMAT, line=entry.audio is None)
    path = entry.audio
    if path is None:
        named = values.get("audio") if isinstance(values, dict) else None
        if not isinstance(named, str):
            raise TrainingError(f"the key 'audio' is {named!r}; expected the path of a recording: {_FORMAT}")
        path = source.parent / named
    words = tuple(_words(values, check))
    if len(words) > 2 and words[-1].start - words[0].start < (len(words) - 1) * CLOSEST_S:
        raise TrainingError(
            f"its {len(words)} words start at {words[0].start} s to {words[-1].start} s, which is faster than speech; "
            "give each word its own start, in seconds"
        )
    seconds = samples_of(path, sample_rate) / sample_rate
    for word in words:
        # A last word may last for a second after its start, see `dsm_jax.stt.words`.
        for name, time, latest in (("starts", word.start, SLACK_S), ("ends", word.end, SLACK_S + 1)):
            if time > seconds + latest:
                raise TrainingError(
                    f"the word {word.text!r} {name} at {time} s and {path} ends at {seconds:.2f} s; check that the "
                    "recording is complete, the transcript its own, and its times in seconds"
                )
    return Recording(path, words, seconds, tuple(_voices(values, source if source.is_dir() else source.parent)))


def _voices(values: Mapping[str, Any], folder: Path) -> Iterator[tuple[str, str]]:
    """Yield speakers and their voices; paths become relative to the working directory."""
    if {"voice", "voices"} <= values.keys():
        raise TrainingError('both "voice" and "voices" are given; give the voice of all speakers, or one for each')
    voices = {"": values["voice"]} if "voice" in values else values.get("voices", {})
    if not isinstance(voices, dict) or not all(isinstance(voice, str) for voice in voices.values()):
        raise TrainingError(
            f'the voices are {voices!r}; expected "voice": VOICE, or "voices": {{SPEAKER: VOICE, ...}}, files or names'
        )
    for speaker, voice in voices.items():
        yield speaker, files.file_in(folder, voice)


def _words(values: Any, check: Callable[[str], object] | None) -> Iterator[WordSpan]:
    listed = values.get("words") if isinstance(values, dict) else None
    text = values.get("text") if isinstance(values, dict) else None
    if not isinstance(listed, list) or (not listed and isinstance(text, str) and text.strip()):
        raise TrainingError(f"the transcript has no words with times; expected {_FORMAT}")
    before = 0.0
    for number, word in enumerate(listed, 1):
        found = word if isinstance(word, dict) else {}
        text, start, end = found.get("text"), found.get("start"), found.get("end")
        speaker = found.get("speaker", values.get("speaker", ""))
        if not isinstance(text, str) or not text.strip():
            raise TrainingError(f"word {number} is {word!r}, without text; expected {_FORMAT}")
        if not (_is_time(start) and _is_time(end) and start <= end):
            raise TrainingError(
                f"word {number}, {text!r}, goes from {start!r} to {end!r}; expected two times in seconds, the end not "
                "before the start"
            )
        if start < before:
            raise TrainingError(
                f"word {number}, {text!r}, starts at {start} s, before the one ahead of it ({before} s); sort the words"
            )
        if not isinstance(speaker, str):
            raise TrainingError(f"word {number}, {text!r}, has the speaker {speaker!r}; expected a name")
        if check is not None:
            check(text)
        before = start
        yield WordSpan(text, float(start), float(end), speaker)


def _is_time(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < LONGEST_S


def batches(rows: Any, *, batch_size: int, seed: int, first_step: int) -> Iterator[Any]:
    """Draw endless batches of a random-access source, in a new order every epoch, prefetched on a thread.

    Batch n depends on the seed only, so a resumed run continues with the batch after its last one.

    Args:
      rows: a sequence of dicts of arrays without a batch axis.
      batch_size: rows in a batch.
      seed: seed of the order.
      first_step: index of the first batch: the number of steps already taken.

    Raises:
      TrainingError: there are no rows.
    """
    import grain

    if not len(rows):
        raise TrainingError("there are no rows to train on; look at where the data comes from")
    # Grain counts batches in floating point: of its own endless repetition there would be too many of one row.
    epochs = max(1, 2**52 // len(rows))
    endless = grain.MapDataset.source(rows).seed(seed).shuffle().repeat(epochs).batch(batch_size)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    return iter(endless[first_step:].to_iter_dataset(options))

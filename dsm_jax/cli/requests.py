"""Read the requests of `dsm-jax speak`: a text, a file of text, of a conversation or of a JSON object a line."""

import dataclasses
import functools
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from dsm_jax import csm, files, tts
from dsm_jax.csm import CsmOptions, Segment
from dsm_jax.errors import ConfigError, SpeechError, TextError
from dsm_jax.tokenizers import check_characters
from dsm_jax.tts import Dialogue, SynthesizeOptions, Turn
from dsm_jax.tts.voices import Voice

_TEXT = "a text, or a file of one"
_TURNS = "a file with a JSON object a line: text, speaker and audio"


@dataclasses.dataclass(frozen=True)
class Job:
    """A request, and the name of its files; None for a single text."""

    request: tts.Request | csm.Request
    name: str | None = None


class RequestForm(Protocol):
    """The form of the requests to one family of models.

    Attributes:
      keys: keys of a row besides the options.
      needs: keys of which a row has exactly one.
      usual: keys that most rows have, for a message.
    """

    keys: ClassVar[tuple[str, ...]]
    needs: ClassVar[tuple[str, ...]]
    usual: ClassVar[str]

    @property
    def options(self) -> Any:
        """Options of requests that have none of their own."""
        ...

    def of_text(self, text: str) -> tts.Request | csm.Request:
        """Return the request of a text alone."""
        ...

    def of_conversation(self, messages: Any, where: str, folder: Path) -> tts.Request | csm.Request:
        """Return the request of a conversation in the published chat format.

        Args:
          messages: values of the file.
          where: the file, for errors.
          folder: of the file, to which paths in it are relative.

        Raises:
          SpeechError: the family takes no conversations, or the values are none.
        """
        ...

    def of_row(self, row: Mapping[str, Any], where: str, folder: Path, options: Any) -> tts.Request | csm.Request:
        """Return the request of a row.

        Args:
          row: object with keys of `keys` and options.
          where: file and line, for errors.
          folder: of the file, to which paths in it are relative.
          options: of the request.

        Raises:
          SpeechError: a value of another kind.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Voices:
    """Requests to a text-to-speech model.

    Attributes:
      voices: for requests that name none.
      options: of requests that have none of their own.
    """

    voices: Sequence[Voice] = ()
    options: SynthesizeOptions = SynthesizeOptions()
    keys: ClassVar[tuple[str, ...]] = ("id", "text", "turns", "voice", "voices")
    needs: ClassVar[tuple[str, ...]] = ("text", "turns")
    usual: ClassVar[str] = "id, text and voice"

    def of_text(self, text: str) -> tts.Request:
        """Return the request of a text alone."""
        return tts.Request(text, tuple(self.voices), options=self.options)

    def of_conversation(self, messages: Any, where: str, folder: Path) -> tts.Request:
        """Refuse a conversation; see `RequestForm`."""
        raise SpeechError(f"{where} is JSON, which a text-to-speech model takes as requests: name it .jsonl, or .txt")

    def of_row(self, row: Mapping[str, Any], where: str, folder: Path, options: SynthesizeOptions) -> tts.Request:
        """Return the request of a row; see `RequestForm`."""
        if "voice" in row and "voices" in row:
            raise SpeechError(f"{where} has voice and voices; give one of them")
        given = [row["voice"]] if "voice" in row else row.get("voices", list(self.voices))
        if "text" in row and not isinstance(row["text"], str):
            raise SpeechError(f"{where} has text {row['text']!r}; expected a text")
        turns: Any = [row["text"]] if "text" in row else row["turns"]
        if not isinstance(given, list) or not all(isinstance(voice, str | os.PathLike) for voice in given):
            raise SpeechError(f"{where} has the voices {given!r}; expected a text, or a list of texts")
        if len(given) > 2:
            raise SpeechError(f"{where} has {len(given)} voices; the models know two speakers, so give two at most")
        if "voice" in row or "voices" in row:  # those of the command line are not relative to the file
            given = [files.file_in(folder, voice) for voice in given]
        if isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns):
            for turn in turns:
                texts = isinstance(turn.get("text"), str) and isinstance(turn.get("voice"), str | None)
                if not texts or set(turn) - {"text", "voice"}:
                    raise SpeechError(f"{where} has the turn {turn!r}; expected an object of text and voice")
            voices = [turn.get("voice") and files.file_in(folder, turn["voice"]) for turn in turns]
            dialogue = Dialogue([Turn(turn["text"], voice) for turn, voice in zip(turns, voices, strict=True)])
            return tts.Request.of(dialogue, given[0] if given else None, options)
        if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
            raise SpeechError(
                f"{where} has the turns {turns!r}; expected a list of texts, or of objects of text and voice"
            )
        return tts.Request(tuple(turns), tuple(given), options=options)


@dataclasses.dataclass(frozen=True)
class Turns:
    """Requests to a conversational speech model.

    Attributes:
      speaker: for requests that name none.
      context: for requests that have none of their own.
      options: of requests that have none of their own.
    """

    speaker: int = 0
    context: Sequence[Segment] = ()
    options: CsmOptions = CsmOptions()
    keys: ClassVar[tuple[str, ...]] = ("id", "text", "speaker", "context")
    needs: ClassVar[tuple[str, ...]] = ("text",)
    usual: ClassVar[str] = "id, text, speaker and context"

    def of_text(self, text: str) -> csm.Request:
        """Return the request of a text alone."""
        return csm.Request(text, self.speaker, self.context, self.options)

    def of_conversation(self, messages: Any, where: str, folder: Path) -> csm.Request:
        """Return the request of a conversation; see `RequestForm`."""
        if self.speaker or self.context:
            raise SpeechError(f"{where} is a conversation with speakers and a context of its own; leave out yours")
        if not isinstance(messages, list):
            raise SpeechError(f"{where} has {type(messages).__name__}; expected a list of messages")
        try:
            request = csm.Request.of_messages(messages, self.options)
        except SpeechError as error:
            raise SpeechError(f"{where}: {error}") from None
        context = [
            dataclasses.replace(turn, audio=folder / turn.audio) if isinstance(turn.audio, str) else turn
            for turn in request.context
        ]
        return dataclasses.replace(request, context=context)

    def of_row(self, row: Mapping[str, Any], where: str, folder: Path, options: CsmOptions) -> csm.Request:
        """Return the request of a row; see `RequestForm`."""
        turns = row.get("context")
        if not isinstance(row["text"], str) or not isinstance(turns, list | None):
            raise SpeechError(f"{where} has text {row['text']!r} and context {turns!r}; expected a text and a list")
        context = self.context if turns is None else [_segment(turn, where, folder) for turn in turns]
        return csm.Request(row["text"], _speaker(row.get("speaker", self.speaker), where), context, options)


def _speaker(value: Any, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise SpeechError(f"{where} has the speaker {value!r}; expected a number: 0, 1 and so on")
    return value


def _segment(turn: Any, where: str, folder: Path) -> Segment:
    """Read a turn of a context; its recording may be relative to a folder."""
    if not isinstance(turn, Mapping) or turn.keys() != {"text", "speaker", "audio"}:
        found = sorted(map(str, turn)) if isinstance(turn, Mapping) else type(turn).__name__
        raise SpeechError(f"{where} has a turn with {found}; expected an object of text, speaker and audio")
    if not isinstance(turn["text"], str) or not isinstance(turn["audio"], str):
        raise SpeechError(f"{where} has the turn {dict(turn)!r}; expected a text, and the path of its recording")
    return _shared_segment(turn["text"], _speaker(turn["speaker"], where), folder / turn["audio"])


@functools.lru_cache(maxsize=4096)
def _shared_segment(text: str, speaker: int, audio: Path) -> Segment:
    """Return one segment for equal turns of all rows: the recording of a segment is encoded once."""
    return Segment(text, speaker, audio)


def read_context(path: str | os.PathLike[str]) -> list[Segment]:
    """Read the turns of a conversation: a file with an object of text, speaker and audio on each line.

    Args:
      path: of the file; recordings may be relative to its folder.

    Raises:
      SpeechError: the file cannot be read, or a line is no turn.
    """
    turns = [_segment(_object(line, where), where, Path(path).parent) for where, line in _lines(str(path), _TURNS)]
    if not turns:
        raise SpeechError(f"{path} has no turns; expected {_TURNS}")
    return turns


def check_source(source: str) -> None:
    """Refuse a file that cannot be read, before anything is done for it.

    Args:
      source: as for `read_jobs`.

    Raises:
      SpeechError: the file is not there, or is no text.
    """
    if _is_file(source):
        _text(_content(source), source)


def holds_requests(source: str) -> bool:
    """Return whether a source is a file of requests, each of which has a name."""
    return _is_file(source) and Path(source).suffix == ".jsonl"


def _is_file(source: str) -> bool:
    looks_like_file = not any(c.isspace() for c in source) and Path(source).suffix in (".txt", ".json", ".jsonl")
    # A text may be longer than a file's name can be: os.path says no where pathlib raises.
    return source != "-" and (looks_like_file or os.path.isfile(source))


def read_jobs(source: str, form: RequestForm) -> list[Job]:
    """Read the requests that a command names.

    Args:
      source: "-" for standard input; a file of requests, one JSON object a line, named `.jsonl`; a conversation
        in the published chat format, named `.json`; a file of text; or else the text itself. A request has `id` and the
        keys of its form; any option of its form may be added.
      form: of the requests.

    Raises:
      ConfigError: an option out of its range.
      SpeechError: a file that cannot be read, or a line that is no request.
    """
    if source == "-":
        if sys.stdin is None:
            raise SpeechError("standard input is closed; give a text, or a file of one")
        return [Job(form.of_text(_text(sys.stdin.buffer.read(), "standard input")))]
    if not _is_file(source):
        return [Job(form.of_text(source))]
    if Path(source).suffix == ".json":
        try:
            messages = files.parse_json(_content(source), "a list of messages", line=False)
        except ValueError as error:
            raise SpeechError(f"{source}: {error}") from None
        return [Job(form.of_conversation(messages, source, Path(source).parent))]
    if not holds_requests(source):
        return [Job(form.of_text(_text(_content(source), source)))]
    jobs = [_job(line, where, Path(source).parent, form) for where, line in _lines(source)]
    names = [job.name for job in jobs]
    if twice := sorted({str(name) for name in names if names.count(name) > 1}):
        raise SpeechError(f"{source} has the id {twice[0]!r} more than once; it names files, so give each another")
    if not jobs:
        raise SpeechError(f"{source} has no requests; write one JSON object a line: {form.usual}")
    return jobs


def _content(source: str, expected: str = _TEXT) -> bytes:
    try:
        return Path(source).read_bytes()
    except OSError as error:
        name = source or "a file without a name"
        raise SpeechError(f"{name} cannot be read ({error.strerror}); give {expected}") from None


def _lines(source: str, expected: str = _TEXT) -> Iterator[tuple[str, bytes]]:
    """Yield the file and number of each line that is not blank, for errors, and the line."""
    for number, line in files.json_lines(_content(source, expected)):
        yield f"{source}:{number}", line


def _text(content: bytes, where: str) -> str:
    """Decode UTF-8, with a byte order mark or without."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise SpeechError(f"{where} cannot be read (it is not UTF-8 text); give {_TEXT}") from None


def _object(line: bytes, where: str) -> Any:
    try:
        return files.parse_json(line, "one object a line", line=True)
    except ValueError as error:
        raise SpeechError(f"{where}: {error}") from None


def _job(line: bytes, where: str, folder: Path, form: RequestForm) -> Job:
    """Read one line of a file of requests."""
    row = _object(line, where)
    known = {field.name: field.type for field in dataclasses.fields(form.options)}
    if not isinstance(row, dict) or "id" not in row or sum(key in row for key in form.needs) != 1:
        found = sorted(row) if isinstance(row, dict) else type(row).__name__
        needed = " or ".join(form.needs)
        raise SpeechError(f"{where} has {found}; a request has an id, and {needed}")
    if unknown := sorted(set(row) - {*form.keys, *known}):
        names = ", ".join([*form.keys, *known])
        raise SpeechError(f"{where} has {unknown[0]!r}, which is unknown; a request may have {names}")
    name = row["id"]
    if not isinstance(name, str) or Path(name).name != name or name in ("", "..") or "\0" in name:
        raise SpeechError(f"{where} has the id {name!r}; it names files, so give a text without slashes")
    try:
        check_characters(name)
    except TextError as error:
        raise SpeechError(f"{where} has an id that cannot name files: {error}") from None
    own = {key: _option(row[key], key, str(kind), where) for key, kind in known.items() if key in row}
    try:
        options = dataclasses.replace(form.options, **own)
    except ConfigError as error:
        raise SpeechError(f"{where}: {error}") from None
    return Job(form.of_row(row, where, folder, options), name)


def _option(value: Any, key: str, kind: str, where: str) -> Any:
    """Check the kind of an option's value."""
    kinds, expected = ((int, float), "a number") if "float" in kind else (int, "a whole number")
    if key == "on_unsayable":
        kinds, expected = str, "a text"
    if value is None and "None" in kind:
        return None
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise SpeechError(f"{where} has {key} = {value!r}; expected {expected}")
    return value

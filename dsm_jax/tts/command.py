"""What `dsm-jax speak` does: texts and request files in, recordings out."""

import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import soundfile
from safetensors.numpy import save_file

from dsm_jax import audio
from dsm_jax.checkpoints import Model
from dsm_jax.errors import DsmError, SpeechError
from dsm_jax.tts.batch import Progress, synthesize_each
from dsm_jax.tts.speech import Request, Speech, SpeechOptions
from dsm_jax.tts.voices import Voice

SUFFIXES = (".wav", ".flac", ".ogg")
_PLAYERS = (
    ("ffplay", "-v", "error", "-nodisp", "-autoexit", "-i", "-"),
    ("aplay", "-q", "-"),
    ("play", "-q", "-t", "wav", "-"),
)


@dataclasses.dataclass(frozen=True)
class Job:
    """A request, and the name that its files get; None where there is one of them."""

    request: Request
    name: str | None = None


def read_jobs(source: str, voices: Sequence[Voice]) -> list[Job]:
    """What is to be said.

    Args:
      source: "-" for standard input; a file of requests, one JSON object `{"id", "turns", "voices"}` a line, named
        `.jsonl`; a file of text; or else the text itself.
      voices: for requests that name none.

    Raises:
      SpeechError: a file that cannot be read, or a line that is no request.
    """
    if source == "-":
        return [Job(Request(_text(sys.stdin.buffer.read(), "standard input"), tuple(voices)))]
    path = Path(source)
    looks_like_file = not any(c.isspace() for c in source) and path.suffix in (".txt", ".jsonl")
    # A text may be longer than a file's name can be: os.path says no where pathlib raises.
    if not looks_like_file and not os.path.isfile(source):
        return [Job(Request(source, tuple(voices)))]
    try:
        content = _text(path.read_bytes(), source)
    except OSError as error:
        raise SpeechError(f"{source} cannot be read ({error.strerror}); give a text, or a file of one") from None
    if path.suffix != ".jsonl":
        return [Job(Request(content, tuple(voices)))]
    lines = enumerate(content.split("\n"), 1)  # not splitlines: JSON may hold other ends of lines as they are
    jobs = [_job(line, f"{source}:{number}", voices) for number, line in lines if line.strip()]
    names = [job.name for job in jobs]
    if twice := sorted({str(name) for name in names if names.count(name) > 1}):
        raise SpeechError(f"{source} has the id {twice[0]!r} more than once; it names files, so give each another")
    if not jobs:
        raise SpeechError(f"{source} has no requests; write one JSON object a line: id, turns and voices")
    return jobs


def _text(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise SpeechError(f"{where} cannot be read (it is not UTF-8 text); give a text, or a file of one") from None


def _job(line: str, where: str, voices: Sequence[Voice]) -> Job:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise SpeechError(f"{where} is not JSON ({error}); write one object a line: id, turns and voices") from None
    wanted = {"id": str, "turns": list, "voices": list}
    if not isinstance(row, dict) or set(row) - set(wanted) or not {"id", "turns"} <= set(row):
        found = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise SpeechError(f"{where} has {found}; a request has id and turns, and may have voices")
    wrong = [key for key, value in row.items() if not isinstance(value, wanted[key])]
    wrong = wrong or [key for key in row if not all(isinstance(item, str) for item in row[key])]
    if wrong:
        raise SpeechError(
            f"{where} has {wrong[0]} = {row[wrong[0]]!r}; id is a text, turns and voices are lists of texts"
        )
    if Path(row["id"]).name != row["id"] or row["id"] in ("", "..") or "\0" in row["id"]:
        raise SpeechError(f"{where} has the id {row['id']!r}; it names files, so give one without slashes")
    return Job(Request(tuple(row["turns"]), tuple(row.get("voices", voices))), row["id"])


def check_output(jobs: Sequence[Job], output: str, *, save_frames: bool) -> None:
    """Says before the work is done that its result cannot be written.

    Raises:
      SpeechError: several requests for one file, a folder that cannot be made, or a suffix that is no sound.
    """
    path = Path(output)
    if jobs[0].name is not None:
        if output == "-" or path.suffix.lower() in SUFFIXES:
            raise SpeechError(f"requests are written to a folder, and {output} is none; name one")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SpeechError(f"{output} cannot be made ({error.strerror}); name another folder") from None
    elif output == "-":
        if save_frames:
            raise SpeechError("--save-frames writes files beside the recording; name one in place of -")
    elif path.suffix.lower() not in SUFFIXES or not path.parent.is_dir():
        why = f"there is no folder {path.parent}"
        if path.suffix.lower() not in SUFFIXES:
            why = f"it does not end in {', '.join(SUFFIXES)}"
        raise SpeechError(f"{output} cannot be written: {why}; name another file, or - to play")


def speak(
    model: Model,
    jobs: Sequence[Job],
    output: str,
    options: SpeechOptions,
    *,
    batch_size: int,
    save_frames: bool,
    progress: Progress | None,
) -> Iterator[tuple[str, Speech | DsmError]]:
    """Says every request and writes its files; yields what was written, or why not, with the file's name."""
    results = synthesize_each(model, [job.request for job in jobs], options, batch_size=batch_size, progress=progress)
    for index, result in results:
        name = jobs[index].name
        path = Path(output) if name is None else Path(output) / f"{name}.wav"
        if isinstance(result, Speech):
            try:
                if output == "-":
                    play(result)
                else:
                    _write(result, path, details=name is not None or save_frames, frames=save_frames)
            except DsmError as error:
                result = error
        yield str(path), result


def _write(speech: Speech, path: Path, *, details: bool, frames: bool) -> None:
    audio.write(path, speech.pcm, speech.sample_rate)
    try:
        if details:
            path.with_suffix(".json").write_text(json.dumps(speech.to_json(), indent=1) + "\n", encoding="utf-8")
        if frames:
            save_file({"frames": np.ascontiguousarray(speech.frames)}, path.with_suffix(".safetensors"))
    except OSError as error:
        raise SpeechError(f"{path.with_suffix('')} cannot be written ({error.strerror}); name another place") from None


def play(speech: Speech) -> None:
    """Sends the sound to standard output as a wav file; where that is a terminal, to a player.

    Raises:
      SpeechError: there is no player, or it failed.
    """
    held = io.BytesIO()
    soundfile.write(held, speech.pcm, speech.sample_rate, format="WAV", subtype="PCM_16")
    if not sys.stdout.isatty():
        sys.stdout.buffer.write(held.getvalue())
        sys.stdout.buffer.flush()
        return
    player = next((command for command in _PLAYERS if shutil.which(command[0])), None)
    if player is None:
        names = ", ".join(command[0] for command in _PLAYERS)
        raise SpeechError(f"there is no player here ({names}); name a file, or send the sound on with a pipe")
    if code := subprocess.run(player, input=held.getvalue(), check=False).returncode:
        raise SpeechError(f"{player[0]} ended with {code}, so the sound may not have been heard; name a file instead")

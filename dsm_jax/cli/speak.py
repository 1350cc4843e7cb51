"""`dsm-jax speak`: texts and request files in, recordings out."""

import argparse
import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from safetensors.numpy import save

from dsm_jax import audio, files, microphone
from dsm_jax.checkpoints import Model
from dsm_jax.cli import terminal
from dsm_jax.cli.setup import load
from dsm_jax.errors import ConfigError, DsmError, SpeechError
from dsm_jax.progress import ProgressCallback
from dsm_jax.tts import Dialogue, IncompleteSpeechError, Request, Speech, SynthesizeOptions, Turn, synthesize_each
from dsm_jax.tts.voices import Voice

_PLAYERS = (
    ("ffplay", "-v", "error", "-nodisp", "-autoexit", "-i", "-"),
    ("aplay", "-q", "-"),
    ("play", "-q", "-t", "wav", "-"),
)
_OPTIONS = {field.name: field.type for field in dataclasses.fields(SynthesizeOptions)}
_KEYS = ("id", "text", "turns", "voice", "voices")


def run(args: argparse.Namespace) -> int:
    """Say what the arguments name; return the exit code."""
    options = SynthesizeOptions(
        guidance_scale=args.guidance_scale,
        temperature=args.temperature,
        top_k=args.top_k,
        seed=args.seed,
        codebooks=args.codebooks,
        padding_between=args.padding_between,
        padding_bonus=args.padding_bonus,
        max_frames=args.max_frames,
        on_unsayable=args.on_unsayable,
    )
    jobs = read_jobs(args.text, args.voice, options)
    check_output(jobs, args.output, save_frames=args.save_frames)
    model = load(args, stt_only=False)
    options.checked(model)
    failed = 0
    with terminal.Bars(quiet=args.quiet) as bars:
        for item, job in enumerate(jobs):
            bars.name(item, job.name or "speaking")
        results = speak(
            model, jobs, args.output, batch_size=args.batch_size, save_frames=args.save_frames, progress=bars.update
        )
        for item, name, result in results:
            bars.remove(item)
            if isinstance(result, DsmError):
                failed += 1
                terminal.refuse(result if len(jobs) == 1 else f"{name}: {result}")
            elif args.output != "-" and not args.quiet:
                terminal.note(f"{name}: {result.duration:.2f} s")
    return 1 if failed else 0


@dataclasses.dataclass(frozen=True)
class Job:
    """A request, and the name of its files; None for a single text."""

    request: Request
    name: str | None = None


def read_jobs(source: str, voices: Sequence[Voice], options: SynthesizeOptions = SynthesizeOptions()) -> list[Job]:
    """Read the requests that a command names.

    Args:
      source: "-" for standard input; a file of requests, one JSON object a line, named `.jsonl`; a file of text; or
        else the text itself. A request has `id` and either `text` and `voice`, or `turns` (texts of alternating
        speakers, or objects of `text` and `voice`) and `voices`; any field of `SynthesizeOptions` may be added.
      voices: for requests that name none.
      options: for requests that have none of their own.

    Raises:
      ConfigError: an option out of its range.
      SpeechError: a file that cannot be read, or a line that is no request.
    """
    if source == "-":
        if sys.stdin is None:
            raise SpeechError("standard input is closed; give a text, or a file of one")
        return [Job(Request(_text(sys.stdin.buffer.read(), "standard input"), tuple(voices), options=options))]
    path = Path(source)
    looks_like_file = not any(c.isspace() for c in source) and path.suffix in (".txt", ".jsonl")
    # A text may be longer than a file's name can be: os.path says no where pathlib raises.
    if not looks_like_file and not os.path.isfile(source):
        return [Job(Request(source, tuple(voices), options=options))]
    try:
        content = _text(path.read_bytes(), source)
    except OSError as error:
        raise SpeechError(f"{source} cannot be read ({error.strerror}); give a text, or a file of one") from None
    if path.suffix != ".jsonl":
        return [Job(Request(content, tuple(voices), options=options))]
    lines = enumerate(content.split("\n"), 1)  # not splitlines: JSON may hold other ends of lines as they are
    jobs = [_job(line, f"{source}:{number}", voices, options) for number, line in lines if line.strip()]
    names = [job.name for job in jobs]
    if twice := sorted({str(name) for name in names if names.count(name) > 1}):
        raise SpeechError(f"{source} has the id {twice[0]!r} more than once; it names files, so give each another")
    if not jobs:
        raise SpeechError(f"{source} has no requests; write one JSON object a line: id, text and voice")
    return jobs


def _text(content: bytes, where: str) -> str:
    """Decode UTF-8, with a byte order mark or without."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise SpeechError(f"{where} cannot be read (it is not UTF-8 text); give a text, or a file of one") from None


def _job(line: str, where: str, voices: Sequence[Voice], options: SynthesizeOptions) -> Job:
    """Read one line of a file of requests."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise SpeechError(f"{where} is not JSON ({error}); write one object a line: id, text and voice") from None
    if not isinstance(row, dict) or "id" not in row or ("text" in row) == ("turns" in row):
        found = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise SpeechError(f"{where} has {found}; a request has an id, and either a text or turns")
    if unknown := sorted(set(row) - {*_KEYS, *_OPTIONS}):
        known = ", ".join([*_KEYS, *_OPTIONS])
        raise SpeechError(f"{where} has {unknown[0]!r}, which is unknown; a request may have {known}")
    name = row["id"]
    if not isinstance(name, str) or Path(name).name != name or name in ("", "..") or "\0" in name:
        raise SpeechError(f"{where} has the id {name!r}; it names files, so give a text without slashes")
    return Job(_request(row, where, voices, _own_options(row, where, options)), name)


def _own_options(row: Mapping[str, Any], where: str, options: SynthesizeOptions) -> SynthesizeOptions:
    """Return the options of a request: its own, and for the rest those of the command."""
    own = {key: row[key] for key in _OPTIONS if key in row}
    for key, value in own.items():
        kinds = str if key == "on_unsayable" else int if "int" in str(_OPTIONS[key]) else (int, float)
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise SpeechError(f"{where} has {key} = {value!r}; expected {'a text' if kinds is str else 'a number'}")
    try:
        return dataclasses.replace(options, **own)
    except ConfigError as error:
        raise SpeechError(f"{where}: {error}") from None


def _request(row: Mapping[str, Any], where: str, voices: Sequence[Voice], options: SynthesizeOptions) -> Request:
    """Return the request of a line."""
    given = [row["voice"]] if "voice" in row else row.get("voices", list(voices))
    turns = [row["text"]] if "text" in row else row["turns"]
    if not isinstance(given, list) or not all(isinstance(voice, str | os.PathLike) for voice in given):
        raise SpeechError(f"{where} has the voices {given!r}; expected a text, or a list of texts")
    if isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns):
        if wrong := [turn for turn in turns if set(turn) - {"text", "voice"} or "text" not in turn]:
            raise SpeechError(f"{where} has the turn {wrong[0]!r}; expected an object of text and voice")
        dialogue = Dialogue([Turn(str(turn["text"]), turn.get("voice")) for turn in turns])
        return Request.of(dialogue, given[0] if given else None, options)
    if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
        raise SpeechError(f"{where} has the turns {turns!r}; expected a list of texts, or of objects of text and voice")
    return Request(tuple(turns), tuple(given), options=options)


def check_output(jobs: Sequence[Job], output: str, *, save_frames: bool) -> None:
    """Refuse an output that could not be written, before the work for it is done.

    Raises:
      SpeechError: several requests for one file, a folder that cannot be made, or a suffix that is no sound.
    """
    path = Path(output)
    if jobs[0].name is not None:
        if output == "-" or path.suffix.lower() in audio.SUFFIXES:
            raise SpeechError(f"requests are written to a folder, and {output} is none; name one")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SpeechError(f"{output} cannot be made ({error.strerror}); name another folder") from None
    elif output == "-":
        if save_frames:
            raise SpeechError("--save-frames writes files beside the recording; name one in place of -")
    elif path.suffix.lower() not in audio.SUFFIXES or not path.parent.is_dir():
        why = f"there is no folder {path.parent}"
        if path.suffix.lower() not in audio.SUFFIXES:
            why = f"it does not end in {', '.join(audio.SUFFIXES)}"
        raise SpeechError(f"{output} cannot be written: {why}; name another file, or - to play")


def speak(
    model: Model,
    jobs: Sequence[Job],
    output: str,
    *,
    batch_size: int,
    save_frames: bool,
    progress: ProgressCallback | None,
) -> Iterator[tuple[int, str, Speech | DsmError]]:
    """Say every request and write its files.

    A speech that was not said to its end is written as far as it came, and its error yielded.

    Yields:
      The place of the request, the name of its file, and the speech or the reason why there is none.
    """
    requests = [job.request for job in jobs]
    for index, result in synthesize_each(model, requests, batch_size=batch_size, progress=progress):
        name = jobs[index].name
        path = Path(output) if name is None else Path(output) / f"{name}.wav"
        speech = result.speech if isinstance(result, IncompleteSpeechError) else result
        if isinstance(speech, Speech) and speech.pcm.size:
            try:
                if output == "-":
                    play(speech)
                else:
                    _write(speech, path, details=name is not None or save_frames, frames=save_frames)
            except DsmError as error:
                result = error
        yield index, str(path), result


def _write(speech: Speech, path: Path, *, details: bool, frames: bool) -> None:
    """Write a speech, and where it is asked for its words and frames beside it."""
    speech.save(path)
    try:
        if details:
            text = json.dumps(speech.to_dict(), indent=1, ensure_ascii=False)
            files.write_text(path.with_suffix(".json"), text + "\n")
        if frames:
            with files.replacing(path.with_suffix(".safetensors")) as file:
                file.write(save({"frames": np.ascontiguousarray(speech.frames)}))
    except OSError as error:
        raise SpeechError(f"{path.with_suffix('')} cannot be written ({error.strerror}); name another place") from None


def play(speech: Speech) -> None:
    """Send the sound to standard output as a wav file; where that is a terminal, play it.

    Raises:
      SpeechError: there is no player, or it failed.
    """
    if sys.stdout.isatty() and microphone.play(speech.pcm, speech.sample_rate):
        return
    held = io.BytesIO()
    soundfile.write(held, speech.pcm, speech.sample_rate, format="WAV", subtype="PCM_16")
    if not sys.stdout.isatty():
        sys.stdout.buffer.write(held.getvalue())
        sys.stdout.buffer.flush()
        return
    player = next((command for command in _PLAYERS if shutil.which(command[0])), None)
    if player is None:
        names = ", ".join(command[0] for command in _PLAYERS)
        raise SpeechError(
            f"there is no player here ({names}); install dsm-jax[mic], name a file, or send the sound on with a pipe"
        )
    if code := subprocess.run(player, input=held.getvalue(), check=False).returncode:
        raise SpeechError(f"{player[0]} ended with {code}, so the sound may not have been played; name a file instead")

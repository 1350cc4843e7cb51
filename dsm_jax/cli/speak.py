"""`dsm-jax speak`: texts and request files in, recordings out."""

import argparse
import dataclasses
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import soundfile
from safetensors.numpy import save

from dsm_jax import audio, files, microphone
from dsm_jax.checkpoints import Model
from dsm_jax.cli import terminal
from dsm_jax.cli.requests import Job, RequestForm, Turns, Voices, check_source, holds_requests, read_context, read_jobs
from dsm_jax.cli.setup import UsageError, load, set_up_jax
from dsm_jax.convert.layouts import model_types
from dsm_jax.csm import CsmOptions, Segment
from dsm_jax.errors import DsmError, SpeechError
from dsm_jax.hub import HubOptions, find
from dsm_jax.progress import ProgressCallback
from dsm_jax.speech import IncompleteSpeechError, Speech
from dsm_jax.synthesis import synthesize_each
from dsm_jax.tts import SynthesizeOptions

_PLAYERS = (
    ("ffplay", "-v", "error", "-nodisp", "-autoexit", "-i", "-"),
    ("aplay", "-q", "-"),
    ("play", "-q", "-t", "wav", "-"),
)
# Fields of both families' options; each has a flag of the same name, or none.
FLAGS = tuple(
    dict.fromkeys(field.name for kind in (SynthesizeOptions, CsmOptions) for field in dataclasses.fields(kind))
)


def run(args: argparse.Namespace) -> int:
    """Say what the arguments name; return the exit code."""
    set_up_jax(args)
    # Check before the model is loaded, which may take a download, all that needs no model.
    check_source(args.text)
    check_output(args.output, named=holds_requests(args.text), save_frames=args.save_frames)
    form = _form(args, None if args.context is None else read_context(args.context))
    jobs = read_jobs(args.text, form)
    model = load(args, stt_only=False)
    if isinstance(form.options, SynthesizeOptions):
        form.options.checked(model)
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


def _form(args: argparse.Namespace, context: Sequence[Segment] | None) -> RequestForm:
    """Return the form of the requests that the family of the model takes, with the options of the arguments."""
    conversational = model_types(find(args.model, HubOptions(revision=args.revision))) == ("csm",)
    kind = CsmOptions if conversational else SynthesizeOptions
    other = {name for name, value in (("speaker", args.speaker), ("context", context)) if value is not None}
    given = {name: value for name in FLAGS if (value := getattr(args, name, None)) is not None}
    strange = given.keys() - {field.name for field in dataclasses.fields(kind)}
    strange |= ({"voice"} if args.voice else set()) if conversational else other
    if strange:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(strange))
        what = "a conversational speech model" if conversational else "a text-to-speech model"
        raise UsageError(f"{args.model} is {what}, which has no {flags}; leave that out")
    if conversational:
        if args.speaker is not None and args.speaker < 0:
            raise UsageError(f"--speaker is {args.speaker}; expected a number: 0, 1 and so on")
        return Turns(args.speaker or 0, context or (), CsmOptions(**given))
    if len(args.voice) > 2:
        raise UsageError(
            f"--voice was given {len(args.voice)} times; the models know two speakers, so give it twice at most"
        )
    return Voices(args.voice, SynthesizeOptions(**given))


def check_output(output: str, *, named: bool, save_frames: bool) -> None:
    """Refuse an output that could not be written, before the work for it is done.

    Args:
      output: as the command names it.
      named: whether the requests have names, and so go to files of a folder.
      save_frames: whether codes are written beside the recordings.

    Raises:
      SpeechError: several requests for one file, a folder that cannot be made, a suffix that is no sound, or a
        standard output that is closed.
    """
    path = Path(output)
    if named:
        if output == "-" or path.suffix.lower() in audio.SUFFIXES:
            raise SpeechError(f"requests are written to a folder, and {output} is none; name one")
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SpeechError(f"{output} cannot be made ({error.strerror}); name another folder") from None
    elif output == "-":
        if sys.stdout is None:
            raise SpeechError("standard output is closed, so the sound has no place; open it, or name a file")
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

"""`dsm-jax transcribe`: recordings or a microphone in, text out."""

import argparse
import glob
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsm_jax.cli import terminal
from dsm_jax.cli.setup import UsageError, check_recordings, load, set_up_jax
from dsm_jax.errors import DsmError

if TYPE_CHECKING:
    from dsm_jax.checkpoints import Model
    from dsm_jax.stt import Event, TranscribeOptions, Transcript

LINES = ("text", "json", "jsonl")  # formats of which several may follow each other on standard output


def run(args: argparse.Namespace) -> int:
    """Transcribe what the arguments name; return the exit code."""
    from dsm_jax import microphone
    from dsm_jax.stt import Prompt, TranscribeOptions

    names = check(args)
    for recordings in (names, [args.prompt_audio] if args.prompt_audio else []):
        check_recordings(recordings)
    if args.mic:
        microphone.find_input(args.input_device)
    outputs = output_files(names, args.output_dir, args.format)
    options = TranscribeOptions(
        prompt=Prompt(text=args.prompt_text, audio=args.prompt_audio, exclude_from_output=args.exclude_prompt),
        temperature=args.temperature,
        top_k=args.top_k,
        seed=args.seed,
        word_times=args.word_times,
    )
    set_up_jax(args)
    model = load(args, stt_only=True)
    if args.vad and not (model.config.lm and model.config.lm.extra_heads_num_heads):
        raise UsageError(f"{model.name} has no pause heads, which --vad needs; kyutai/stt-1b-en_fr-candle has them")
    return listen(args, model, options) if args.mic else transcribe_files(args, model, options, names, outputs)


def check(args: argparse.Namespace) -> list[str]:
    """Return the recordings' names; refuse arguments that do not go together."""
    if args.mic and args.audio:
        raise UsageError("--mic takes the microphone, and recordings were given too; leave one of them out")
    if not args.mic and not args.audio:
        raise UsageError("there is nothing to transcribe; give recordings, - for standard input, or --mic")
    if args.input_device and not args.mic:
        raise UsageError("--input-device names a microphone; add --mic")
    if args.mic and (args.output_dir or args.frames):
        raise UsageError("--mic prints its transcript; leave out --output-dir and --frames")
    if sys.stdout is None and not args.output_dir:
        raise UsageError(
            "standard output is closed, so nothing can be printed; open it, or name a folder with --output-dir"
        )
    names = expand(args.audio)
    if args.frames and args.format != "json":
        raise UsageError(f"--frames is part of the JSON, and --format is {args.format}; add --format json")
    if args.vad and args.format not in LINES:
        raise UsageError(f"--vad marks pauses in text, and --format is {args.format}; leave one of them out")
    if args.exclude_prompt and not (args.prompt_text or args.prompt_audio):
        raise UsageError("--exclude-prompt has nothing to exclude; give --prompt-text or --prompt-audio")
    if len(names) > 1 and not args.output_dir and args.format not in LINES:
        raise UsageError(f"{len(names)} recordings as {args.format} need a file each; add --output-dir FOLDER")
    if args.output_dir and args.format == "jsonl":
        raise UsageError("--format jsonl prints words as they come; leave out --output-dir, or write json")
    return names


def transcribe_files(
    args: argparse.Namespace, model: "Model", options: "TranscribeOptions", names: list[str], outputs: list[Path]
) -> int:
    """Transcribe recordings; print or write each in order, and return the exit code."""
    from dsm_jax.stt import transcribe_each

    failed, finished, shown = False, {}, 0
    with terminal.Bars(quiet=args.quiet) as bars:
        for item, name in enumerate(names):
            bars.name(item, Path(name).name)

        def found(index: int, event: "Event") -> None:
            bars.print(event_line(event, names[index]))

        results = transcribe_each(
            model,
            names,
            options=options,
            batch_size=args.batch_size,
            frames=args.frames,
            progress=bars.update if bars.shown else None,  # it costs another opening of each recording
            on_event=found if args.format == "jsonl" else None,
        )
        for index, result in results:
            finished[index] = result
            bars.remove(index)
            while shown in finished:
                done, output = finished.pop(shown), outputs[shown] if outputs else None
                failed |= not deliver(done, output, args, several=len(names) > 1, write=bars.print)
                shown += 1
    return int(failed)


def deliver(
    result: "Transcript | DsmError",
    output: Path | None,
    args: argparse.Namespace,
    *,
    several: bool,
    write: Callable[[str], None],
) -> bool:
    """Write a transcript to its file, or print it; report an error.

    Args:
      result: a transcript, or the error in its place.
      output: the file; None to print.
      args: of the command.
      several: whether other recordings are printed too.
      write: prints a line.

    Returns:
      Whether there is a transcript, printed or written.
    """
    from dsm_jax import files

    if isinstance(result, DsmError):
        terminal.refuse(result)
        return False
    if output is None:
        write(end_line(result) if args.format == "jsonl" else render(result, args, several=several))
        return True
    try:
        files.write_text(output, render(result, args, several=several))
    except OSError as error:
        terminal.refuse(f"{output} cannot be written ({error.strerror}); choose another folder")
        return False
    return True


def listen(args: argparse.Namespace, model: "Model", options: "TranscribeOptions") -> int:
    """Transcribe the microphone until Ctrl-C; print words as they end, then the transcript in its format."""
    from dsm_jax import microphone
    from dsm_jax.stt import StreamingTranscriber

    transcriber, shown = StreamingTranscriber(model, options=options), Shown(args)
    with (
        microphone.Microphone(model.sample_rate, device=args.input_device) as source,
        terminal.first_interrupt_calls(source.end),
    ):
        terminal.say(f"listening to {source.name}; Ctrl-C ends", style="dim")
        level = terminal.Level(quiet=args.quiet or (args.format == "text" and sys.stdout.isatty()))
        try:
            for chunk_T in source.chunks():
                level.show(chunk_T)
                shown.events(transcriber.feed(chunk_T))
        finally:
            level.clear()
        shown.events(transcriber.finish())
        shown.end(transcriber.transcript)
    return 0


class Shown:
    """Print what is heard live: words as they end, then the transcript in its format.

    Args:
      args: arguments of the command.
    """

    def __init__(self, args: argparse.Namespace):
        self._args = args

    def events(self, events: "Sequence[Event]") -> None:
        """Print words and pauses, where the format has them as they come."""
        from dsm_jax.stt.events import Pause, WordEnded

        for event in events:
            if self._args.format == "jsonl":
                terminal.write(_line(_event(event)))
            elif self._args.format == "text" and isinstance(event, WordEnded):
                terminal.write(event.word.text + " ")
            elif self._args.format == "text" and self._args.vad and isinstance(event, Pause):
                terminal.write("[pause] ")

    def end(self, transcript: "Transcript") -> None:
        """Print what comes after the last word."""
        if self._args.format == "text":
            terminal.write("\n")
        else:
            is_lines = self._args.format == "jsonl"
            terminal.write(end_line(transcript) if is_lines else render(transcript, self._args, several=False))


def expand(patterns: list[str]) -> list[str]:
    """Return file names from names and glob patterns; a name that exists is never taken for a pattern."""
    names: list[str] = []
    for pattern in patterns:
        if pattern == "-" or os.path.lexists(pattern) or not glob.has_magic(pattern):
            names.append(pattern)
        elif found := sorted(glob.glob(pattern, recursive=True)):
            names += found
        else:
            raise UsageError(f"{pattern} matches no file; check the pattern, or give file names")
    if names.count("-") > 1:
        raise UsageError("standard input (-) was given more than once; it can be read once")
    return names


def output_files(names: list[str], folder: Path | None, kind: str) -> list[Path]:
    """Return the file of each transcript; none where transcripts are printed."""
    from dsm_jax.stt.transcript import SUFFIXES

    if folder is None:
        return []
    stems = ["stdin" if name == "-" else Path(name).stem for name in names]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        written = [name for name in names if Path(name).stem == twice[0] and Path(name).suffix in SUFFIXES.values()]
        if written:  # by this command, which a pattern such as folder/* then takes for a recording
            raise UsageError(f"{written[0]} is no recording; leave it out, for example by a pattern that ends in .wav")
        raise UsageError(f"several recordings would be written to {twice[0]}{SUFFIXES[kind]}; transcribe them apart")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder} cannot be made ({error.strerror}); give a folder with --output-dir") from None
    return [folder / f"{stem}{SUFFIXES[kind]}" for stem in stems]


def render(transcript: "Transcript", args: argparse.Namespace, *, several: bool) -> str:
    """Return a transcript in the format of the arguments."""
    if args.format == "text":
        text = transcript.text_with_pauses() if args.vad else transcript.text
        return f"{transcript.audio}: {text}\n" if several and not args.output_dir else f"{text}\n"
    if args.format == "json" and several and not args.output_dir:
        return _line(transcript.to_dict())
    return transcript.render(args.format)


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False) + "\n"


def _event(event: "Event") -> dict[str, Any]:
    """Return an event as plain values."""
    from dsm_jax.stt.events import Pause, WordStarted
    from dsm_jax.stt.transcript import pause_dict, word_dict

    if isinstance(event, WordStarted):
        return {"type": "word_started", "text": event.text, "start": round(event.start, 3)}
    if isinstance(event, Pause):
        return {"type": "pause", **pause_dict(event)}
    return {"type": "word", **word_dict(event.word)}


def event_line(event: "Event", name: str) -> str:
    """Return the line of an event in a recording."""
    return _line({"audio": name} | _event(event))


def end_line(transcript: "Transcript") -> str:
    """Return the last line of a recording."""
    about = {"audio": transcript.audio} if transcript.audio else {}
    return _line({**about, "type": "end", "duration": round(transcript.duration, 3), "text": transcript.text})

"""Commands that use a server: transcribe, speak, and load a server to measure it. None of them needs JAX."""

import argparse
import asyncio
import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsm_jax.cli import terminal
from dsm_jax.cli.parser import DefaultModel
from dsm_jax.cli.setup import UsageError
from dsm_jax.errors import DsmError, SpeechError

if TYPE_CHECKING:
    from dsm_jax.stt.events import Event
    from dsm_jax.stt.transcript import Transcript

KEY = "DSM_JAX_API_KEY"  # the environment's variable
# Options of models on this machine, and their values where they were not given.
_LOCAL_STT: dict[str, Any] = {
    "device": None, "compile_cache": None, "no_cache": False, "dtype": None, "quantize": None, "revision": None,
    "frames": False, "temperature": None, "top_k": None, "seed": 0, "prompt_text": None, "prompt_audio": None,
    "exclude_prompt": False, "word_times": "sound",
}  # fmt: skip
_LOCAL_TTS: dict[str, Any] = {
    "device": None, "compile_cache": None, "no_cache": False, "dtype": None, "quantize": None, "revision": None,
    "guidance_scale": None, "temperature": None, "top_k": None, "codebooks": None, "padding_between": None,
    "padding_bonus": None, "max_frames": None, "on_unsayable": None, "speaker": None, "context": None,
    "depth_temperature": None, "depth_top_k": None, "save_frames": False,
}  # fmt: skip


def _clients() -> Any:
    try:
        from dsm_jax.serving import client
    except ImportError as error:
        raise UsageError(
            f"--server needs the package {error.name}; install what it needs: pip install 'dsm-jax[serve]'"
        ) from None
    return client


def _refuse_local(args: argparse.Namespace, local: dict[str, Any]) -> None:
    if given := [name for name, value in local.items() if getattr(args, name) != value]:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UsageError(f"{flags} is for a model on this machine, and --server uses a server's; leave one of them out")


def api_key(args: argparse.Namespace) -> str | None:
    """Return the key of a file or of the environment; None for none."""
    if args.api_key_file is None:
        return os.environ.get(KEY, "").strip() or None
    try:
        key = args.api_key_file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the key in {args.api_key_file} cannot be read ({error}); give a text file") from None
    if len(key.split()) != 1:
        raise UsageError(f"{args.api_key_file} holds {len(key.split())} keys; write one")
    return key


def _model(args: argparse.Namespace) -> str | None:
    return None if isinstance(args.model, DefaultModel) else args.model


def transcribe(args: argparse.Namespace) -> int:
    """Transcribe what the arguments name over a server; return the exit code."""
    from dsm_jax.cli.transcribe import check, output_files

    client = _clients()
    from dsm_jax.serving.client import links

    links.address(args.server)  # refused once, and not for each recording
    names = check(args)
    _refuse_local(args, _LOCAL_STT)
    outputs = output_files(names, args.output_dir, args.format)
    if args.mic:
        return _listen(args, client)
    return asyncio.run(_transcribe_files(args, client, names, outputs))


async def _transcribe_files(args: argparse.Namespace, client: Any, names: list[str], outputs: list[Path]) -> int:
    """Transcribe recordings, several at a time; print or write each in order."""
    from dsm_jax.cli.transcribe import deliver, event_line

    room, key = asyncio.Semaphore(args.batch_size), api_key(args)

    async def one(name: str) -> "Transcript | DsmError":
        def found(event: "Event") -> None:
            terminal.write(event_line(event, name))

        async with room:
            try:
                # Until Ctrl-C: how long others use the server is not known, and no recording of a list may be lost.
                return await client.transcribe_async(
                    args.server,
                    name,
                    model=_model(args),
                    api_key=key,
                    on_event=found if args.format == "jsonl" else None,
                    patience_s=math.inf,
                    needs_pauses=args.vad,
                )
            except DsmError as error:
                return error

    failed = False
    tasks = [asyncio.create_task(one(name)) for name in names]
    try:
        for index, task in enumerate(tasks):
            output = outputs[index] if outputs else None
            failed |= not deliver(await task, output, args, several=len(names) > 1, write=terminal.write)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return int(failed)


def _listen(args: argparse.Namespace, client: Any) -> int:
    """Transcribe the microphone until Ctrl-C."""
    from dsm_jax import microphone
    from dsm_jax.cli.transcribe import Shown
    from dsm_jax.serving.client.sound import SAMPLE_RATE

    shown = Shown(args)
    with (
        client.Transcription(args.server, model=_model(args), api_key=api_key(args), needs_pauses=args.vad) as session,
        microphone.Microphone(SAMPLE_RATE, device=args.input_device) as source,
        terminal.first_interrupt_calls(source.end),
    ):
        terminal.say(f"listening to {source.name}; Ctrl-C ends", style="dim")
        level = terminal.Level(quiet=args.quiet or (args.format == "text" and sys.stdout.isatty()))
        try:
            for chunk_T in source.chunks():
                level.show(chunk_T)
                session.send(chunk_T)
                shown.events(session.ready())
        finally:
            level.clear()
        session.finish()
        for event in session:
            shown.events([event])
        shown.end(session.transcript)
    return 0


def speak(args: argparse.Namespace) -> int:
    """Say a text over a server; return the exit code. A speech that broke off is written as far as it came."""
    from dsm_jax import audio
    from dsm_jax.speech import IncompleteSpeechError

    client = _clients()
    _refuse_local(args, _LOCAL_TTS)
    if len(args.voice) > 1:
        raise UsageError("a server speaks with one voice, and --voice was given more than once; give one")
    path = Path(args.output)
    if path.suffix.lower() not in audio.SUFFIXES or not path.parent.is_dir():
        raise UsageError(
            f"{args.output} cannot be written: with --server, name a file that ends in {', '.join(audio.SUFFIXES)}, "
            "in a folder that there is"
        )
    voice = args.voice[0] if args.voice else None
    try:
        speech = client.synthesize(
            args.server, _text(args.text), voice=voice, seed=args.seed, model=_model(args), api_key=api_key(args)
        )
    except IncompleteSpeechError as error:
        error.speech.save(path)
        terminal.refuse(error)
        return 1
    speech.save(path)
    if not args.quiet:
        terminal.note(f"{path}: {speech.duration:.2f} s")
    return 0


def _text(source: str) -> str:
    """Return a text, or that of a file or of standard input."""
    if source.endswith(".jsonl"):
        raise UsageError(f"{source} holds requests, and --server says one text; say them without --server")
    try:
        if source == "-":
            return sys.stdin.buffer.read().decode("utf-8-sig")
        if os.path.isfile(source) or (source.endswith(".txt") and not any(c.isspace() for c in source)):
            return Path(source).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise SpeechError(f"{source} cannot be read ({error}); give a text, or a file of one") from None
    return source


def bench_serve(args: argparse.Namespace) -> int:
    """Load a server with streams and print what was measured; return 1 if a stream failed or no load held."""
    _clients()
    from dsm_jax.serving import load as loads

    load = loads.Load(
        url=args.url,
        streams=args.streams,
        seconds=args.seconds,
        recording=args.audio,
        tts=args.tts,
        model=args.model,
        api_key=api_key(args),
    )
    if args.find:
        highest, reports = asyncio.run(loads.find_highest(load, args.target_ms, args.percentile))
    else:
        reports = [asyncio.run(loads.run(load))]
        highest = load.streams if reports[0].holds(args.target_ms, args.percentile) else 0
    if args.json:
        told = {"target_ms": args.target_ms, "percentile": args.percentile, "holds": highest}
        terminal.write(json.dumps(told | {"reports": [report.to_dict() for report in reports]}) + "\n")
    else:
        for report in reports:
            terminal.write(report.text())
        verdict = f"{highest} streams hold" if highest else "it does not hold"
        terminal.write(f"target: {args.percentile} within {args.target_ms:g} ms: {verdict}\n")
    return 0 if highest else 1

"""The shorter commands: each takes parsed arguments and returns an exit code."""

import argparse
import json
import sys

from dsm_jax import files, malloc
from dsm_jax.cli import terminal
from dsm_jax.cli.parser import parser
from dsm_jax.cli.setup import UsageError, check_folder_of, check_recordings, load, set_up_jax


def codec_encode(args: argparse.Namespace) -> int:
    """Turn a recording into codes."""
    from safetensors.numpy import save

    from dsm_jax import audio, codec

    if args.output.suffix.lower() in audio.SUFFIXES:
        raise UsageError(f"{args.output} is named like a recording, and codes are written; name a .safetensors file")
    check_folder_of(args.output)
    check_recordings([args.input])
    set_up_jax(args)
    model = load(args, stt_only=True)
    codes_QT = codec.encode(model, args.input, codebooks=args.codebooks)
    config = model.config.mimi
    facts = {"model": model.name, "sample_rate": str(config.sample_rate), "frame_rate": str(config.frame_rate)}
    try:
        with files.replacing(args.output) as file:
            file.write(save({"codes": codes_QT}, metadata=facts))
    except OSError as error:
        raise UsageError(f"{args.output} cannot be written ({error.strerror}); choose another place") from None
    if not args.quiet:
        terminal.note(f"{args.output}: {codes_QT.shape[0]} codebooks x {codes_QT.shape[1]} frames")
    return 0


def codec_decode(args: argparse.Namespace) -> int:
    """Turn codes into a recording."""
    from dsm_jax import audio, codec

    if args.output.suffix.lower() not in audio.SUFFIXES:
        raise UsageError(f"{args.output} is no recording's name; end it in one of {', '.join(audio.SUFFIXES)}")
    check_folder_of(args.output)
    codes_QT = codec.read_codes(args.input)
    set_up_jax(args)
    model = load(args, stt_only=False)
    pcm = codec.decode(model, codes_QT)
    audio.write(args.output, pcm, model.config.mimi.sample_rate)
    if not args.quiet:
        terminal.note(f"{args.output}: {pcm.size / model.config.mimi.sample_rate:.2f} s")
    return 0


def convert(args: argparse.Namespace) -> int:
    """Rewrite a checkpoint in another layout."""
    from dsm_jax.convert import convert

    if args.report:
        check_folder_of(args.report)
    set_up_jax(args)
    with terminal.loading_bar(f"converting {args.source}", quiet=args.quiet) as progress:
        report = convert(
            args.source, args.destination, to=args.to, dtype=args.dtype, revision=args.revision, progress=progress
        )
    if args.report:
        try:
            files.write_text(args.report, json.dumps(report.to_dict(), indent=2) + "\n")
        except OSError as error:
            raise UsageError(
                f"{args.destination} is written, and {args.report} cannot be ({error.strerror}); choose another place"
            ) from None
    if not args.quiet:
        lines = report.text().splitlines()
        terminal.write("".join(f"{line}\n" for line in lines if args.verbose or not line.startswith("  ")))
    return 0


def train(args: argparse.Namespace) -> int:
    """Fine-tune a model as a config file describes."""
    malloc.keep_freed()
    set_up_jax(args)
    malloc.set_pieces_aside_after_compiling()
    from dsm_jax import tasks

    config, run = tasks.read_config(args.config, tasks.library_tasks())
    with terminal.training_bar(quiet=args.quiet) as progress:
        model = run(config, resume=args.resume, progress=progress)
    if not args.quiet:
        terminal.note(f"trained: {model!r}")
    return 0


def evaluate(args: argparse.Namespace) -> int:
    """Measure the errors and speed of a model on a data set, or compare two results."""
    from dsm_jax.evaluation import command

    if args.compare and args.source:
        raise UsageError("--compare reads results that are there, and a source was given too; leave one of them out")
    if args.compare:
        defaults = parser().parse_args(["evaluate"])
        used = {"compare", "worst", "quiet", "verbose"}
        if idle := [name for name in vars(args) if name not in used and vars(args)[name] != vars(defaults)[name]]:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
            raise UsageError(
                f"--compare prints what it finds in two results, and does nothing with {flags}; leave that out"
            )
        terminal.write(command.compare(*args.compare, worst=args.worst) + "\n")
        return 0
    if not args.source:
        raise UsageError("there is nothing to evaluate; give recordings, or --compare A.json B.json")
    job = command.Job(
        source=args.source,
        normalizer=args.normalizer,
        streaming=args.streaming,
        batch_size=args.batch_size,
        limit=args.limit,
        output=args.output,
        plot=args.plot,
        resume=args.resume,
    )
    set_up_jax(args)
    model = load(args, stt_only=True)
    with terminal.Bars(quiet=args.quiet, unit="recordings") as bars:
        bars.name(0, "evaluating")
        evaluation = command.run(model, job, progress=bars.update)
    for failure in evaluation.failed:
        terminal.refuse(f"{failure.id}: {failure.reason}")
    terminal.write(command.text(evaluation, worst=args.worst) + "\n")
    return 1 if evaluation.failed else 0


def bench(args: argparse.Namespace) -> int:
    """Time the published sizes on this machine, with random weights."""
    set_up_jax(args)
    from dsm_jax.benchmark import run

    asked = {"sizes": args.size, "batches": args.batch, "dtype": args.dtype, "quantize": args.quantize}
    for row in run.run(args.what or ["lm", "mimi"], **asked, steps=args.steps):
        terminal.write(json.dumps(row) + "\n", sys.stdout)
    return 0

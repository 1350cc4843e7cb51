"""The `dsm-jax` command. Each sub-command is one function that takes parsed arguments and returns an exit code.

Exit codes: 0, all went well; 1, some inputs failed and the others were written; 2, usage, or a model that cannot be
read.
"""

import argparse
import glob
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dsm_jax import malloc, terminal
from dsm_jax.arguments import PLATFORMS, cache_folder, parser
from dsm_jax.errors import DsmError

if TYPE_CHECKING:
    from dsm_jax.checkpoints import Model
    from dsm_jax.stt.transcript import Transcript

# Heavy imports are inside the commands, so that `--help` is instant.


class UsageError(DsmError):
    """Arguments that do not go together."""


def transcribe(args: argparse.Namespace) -> int:
    """Turns recordings into text."""
    from dsm_jax import audio
    from dsm_jax.stt import Options, Prompt, transcribe_each

    names = _expand(args.audio)
    if args.frames and args.format != "json":
        raise UsageError(f"--frames is part of the JSON, and --format is {args.format}; add --format json")
    if args.vad and args.format not in ("text", "json"):
        raise UsageError(f"--vad marks pauses in text, and --format is {args.format}; leave one of them out")
    if args.cut_prompt and not (args.prompt_text or args.prompt_audio):
        raise UsageError("--cut-prompt has nothing to cut; give --prompt-text or --prompt-audio")
    if len(names) > 1 and not args.output_dir and args.format not in ("text", "json"):
        raise UsageError(f"{len(names)} recordings as {args.format} need a file each; add --output-dir FOLDER")
    outputs = _output_files(names, args.output_dir, args.format)
    model = _load(args, listen_only=True)
    _check_vad(args, model)
    options = Options(
        prompt=Prompt(text=args.prompt_text, audio=args.prompt_audio, cut=args.cut_prompt),
        temperature=args.temperature,
        seed=args.seed,
    )
    failed, finished, shown = 0, {}, 0

    def refuse(reason: object) -> None:
        nonlocal failed
        failed += 1
        terminal.refuse(bar, reason)

    with terminal.progress(quiet=args.quiet) as bar:
        tasks = [bar.add_task(Path(name).name, total=audio.duration(name), start=False) for name in names]

        def heard(index: int, seconds: float) -> None:
            bar.start_task(tasks[index])
            bar.update(tasks[index], completed=seconds)

        results = transcribe_each(model, names, options, batch_size=args.batch_size, frames=args.frames, progress=heard)
        for index, result in results:
            finished[index] = result
            bar.remove_task(tasks[index])
            while shown in finished:
                done = finished.pop(shown)
                if isinstance(done, DsmError):
                    refuse(done)
                elif outputs:
                    try:
                        outputs[shown].write_text(_render(done, args, several=len(names) > 1), encoding="utf-8")
                    except OSError as error:
                        refuse(f"{outputs[shown]} cannot be written ({error.strerror}); choose another folder")
                else:
                    bar.stop()  # else it would be drawn into the text where both go to one terminal
                    print(_render(done, args, several=len(names) > 1), end="", flush=True)
                    bar.start()
                shown += 1
    return 1 if failed else 0


def speak(args: argparse.Namespace) -> int:
    """Turns text into speech."""
    from dsm_jax.tts import SpeechOptions, command

    jobs = command.read_jobs(args.text, args.speaker)
    command.check_output(jobs, args.output, save_frames=args.save_frames)
    options = SpeechOptions(
        guidance=args.cfg,
        temperature=args.temperature,
        top_k_audio=args.top_k,
        codebooks=args.codebooks,
        padding_between=args.padding_between,
        padding_bonus=args.padding_bonus,
        max_frames=args.max_frames,
        seed=args.seed,
    )
    model = _load(args, listen_only=False)
    failed = 0
    with terminal.progress(quiet=args.quiet) as bar:
        task = bar.add_task("speaking", total=None)
        results = command.speak(
            model,
            jobs,
            args.output,
            options,
            batch_size=args.batch_size,
            save_frames=args.save_frames,
            progress=lambda seconds: bar.update(task, completed=seconds),
        )
        for name, result in results:
            if isinstance(result, DsmError):
                failed += 1
                terminal.refuse(bar, result if len(jobs) == 1 else f"{name}: {result}")
            elif args.output != "-":
                bar.console.print(f"{name}: {result.duration:.2f} s", markup=False, highlight=False, soft_wrap=True)
    return 1 if failed else 0


def codec_encode(args: argparse.Namespace) -> int:
    """Turns a recording into codes."""
    from safetensors.numpy import save_file

    from dsm_jax import codec

    _check_folder_of(args.output)
    model = _load(args, listen_only=True)
    codes_QT = codec.encode(model, args.input, codebooks=args.codebooks)
    config = model.config.mimi
    facts = {"model": model.name, "sample_rate": str(config.sample_rate), "frame_rate": str(config.frame_rate)}
    save_file({"codes": codes_QT}, args.output, metadata=facts)
    print(f"{args.output}: {codes_QT.shape[0]} codebooks x {codes_QT.shape[1]} frames", file=sys.stderr)
    return 0


def codec_decode(args: argparse.Namespace) -> int:
    """Turns codes into a recording."""
    from dsm_jax import audio, codec

    _check_folder_of(args.output)
    model = _load(args, listen_only=False)
    pcm = codec.decode(model, codec.read_codes(args.input))
    audio.write(args.output, pcm, model.config.mimi.sample_rate)
    print(f"{args.output}: {pcm.size / model.config.mimi.sample_rate:.2f} s", file=sys.stderr)
    return 0


def convert(args: argparse.Namespace) -> int:
    """Rewrites a checkpoint in another layout."""
    from dsm_jax.convert import convert

    if args.report:
        _check_folder_of(args.report)
    _set_up_jax(args)
    report = convert(args.source, args.destination, to=args.to, dtype=args.dtype)
    if args.report:
        args.report.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    lines = report.text().splitlines()
    print("\n".join(line for line in lines if args.verbose or not line.startswith("  ")))
    return 0


def train(args: argparse.Namespace) -> int:
    """Fine-tunes a model as a config file describes."""
    malloc.keep_freed()
    _set_up_jax(args)
    from dsm_jax import tasks

    config, run = tasks.read_config(args.config, tasks.library_tasks())
    model = run(config, resume=args.resume)
    print(f"trained: {model!r}", file=sys.stderr)
    return 0


def evaluate(args: argparse.Namespace) -> int:
    """Measure the errors and speed of a model on a data set, or compare two results."""
    from dsm_jax.evaluation import command

    if args.compare and args.source:
        raise UsageError("--compare reads results that are there, and a source was given too; leave one of them out")
    if args.compare:
        print(command.compare(*args.compare, worst=args.worst))
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
    model = _load(args, listen_only=True)
    with terminal.progress(quiet=args.quiet) as bar:
        task = bar.add_task("evaluating", total=None)

        def heard(done: int, total: int, seconds: float) -> None:
            bar.update(task, description=f"{done} of {total}", completed=seconds, total=seconds / done * total)

        evaluation = command.run(model, job, progress=heard)
        for failure in evaluation.failed:
            terminal.refuse(bar, f"{failure.id}: {failure.reason}")
    print(command.text(evaluation, worst=args.worst))
    return 1 if evaluation.failed else 0


def bench(args: argparse.Namespace) -> int:
    """Times the published sizes on this machine, with random weights."""
    _set_up_jax(args)
    from dsm_jax import benchmark

    what = args.what or ["lm", "mimi"]
    if unknown := sorted(set(what) - {"lm", "mimi", "stt"}):
        raise UsageError(f"{unknown[0]} cannot be timed; choose of lm, mimi and stt")
    for row in benchmark.run(what, sizes=args.size, batches=args.batch, dtype=args.dtype, steps=args.steps):
        print(json.dumps(row), flush=True)
    return 0


def _check_folder_of(path: Path) -> None:
    """Says so before the work is done that the result of it cannot be written."""
    if not path.parent.is_dir():
        raise UsageError(f"{path} cannot be written: there is no folder {path.parent}; make it first")


def _expand(patterns: list[str]) -> list[str]:
    """File names from names and glob patterns; a name that exists is never taken for a pattern."""
    names: list[str] = []
    for pattern in patterns:
        if pattern == "-" or Path(pattern).exists() or not glob.has_magic(pattern):
            names.append(pattern)
        elif found := sorted(glob.glob(pattern, recursive=True)):
            names += found
        else:
            raise UsageError(f"{pattern} matches no file; check the pattern, or give file names")
    if names.count("-") > 1:
        raise UsageError("standard input (-) was given more than once; it can be read once")
    return names


def _output_files(names: list[str], folder: Path | None, kind: str) -> list[Path]:
    from dsm_jax.stt.formats import SUFFIXES

    if folder is None:
        return []
    stems = ["stdin" if name == "-" else Path(name).stem for name in names]
    if twice := sorted({stem for stem in stems if stems.count(stem) > 1}):
        raise UsageError(f"several recordings would be written to {twice[0]}{SUFFIXES[kind]}; transcribe them apart")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder} cannot be made ({error.strerror}); give a folder with --output-dir") from None
    return [folder / f"{stem}{SUFFIXES[kind]}" for stem in stems]


def _check_vad(args: argparse.Namespace, model: "Model") -> None:
    if args.vad and not (model.config.lm and model.config.lm.extra_heads_num_heads):
        raise UsageError(f"{model.name} has no pause heads, which --vad needs; kyutai/stt-1b-en_fr-candle has them")


def _render(transcript: "Transcript", args: argparse.Namespace, *, several: bool) -> str:
    from dsm_jax.stt import formats

    if args.format == "text":
        text = formats.text_with_pauses(transcript) if args.vad else transcript.text
        return f"{transcript.audio}: {text}\n" if several and not args.output_dir else f"{text}\n"
    if args.format == "json" and several and not args.output_dir:
        return json.dumps(transcript.to_json(), ensure_ascii=False) + "\n"  # JSON Lines
    return formats.render(transcript, args.format)


def _set_up_jax(args: argparse.Namespace) -> None:
    """Chooses the device and the compilation cache, before JAX starts."""
    import jax

    if args.device:
        jax.config.update("jax_platforms", PLATFORMS[args.device])
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter where jax has no such backend at all
        reason = (str(error) or "JAX knows of none").splitlines()[0]
        asked = f"--device {args.device}" if args.device else "a device"
        raise UsageError(f"{asked} is not to be had here ({reason}); try --device cpu") from None
    if not args.no_cache:
        folder = args.cache_dir or cache_folder()
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _load(args: argparse.Namespace, *, listen_only: bool) -> "Model":
    _set_up_jax(args)
    from dsm_jax import checkpoints

    model = checkpoints.load(args.model, dtype=args.dtype, listen_only=listen_only)
    malloc.return_freed()  # reading and converting a checkpoint frees up to its size
    return model


COMMANDS = {
    "transcribe": transcribe,
    "speak": speak,
    "codec_encode": codec_encode,
    "codec_decode": codec_decode,
    "convert": convert,
    "train": train,
    "evaluate": evaluate,
    "bench": bench,
}


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    args = parser().parse_args(argv)
    try:
        return COMMANDS[args.command](args)
    except DsmError as error:  # its message says what to do; anything else is a bug, so let it show
        print(f"dsm-jax: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read the output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())

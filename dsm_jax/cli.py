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

from dsm_jax.errors import DsmError

if TYPE_CHECKING:
    from rich.progress import Progress

    from dsm_jax.checkpoints import Model
    from dsm_jax.stt.transcript import Transcript

# Heavy imports are inside the commands, so that `--help` is instant.

FORMATS = ("text", "json", "srt", "vtt", "tsv")
_PLATFORMS = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}


class UsageError(DsmError):
    """Arguments that do not go together."""


def transcribe(args: argparse.Namespace) -> int:
    """Turns recordings into text."""
    from dsm_jax import audio
    from dsm_jax.stt import Options, Prompt, transcribe_each

    names = _expand(args.audio)
    if args.frames and args.format != "json":
        raise UsageError(f"--frames is part of the JSON, and --format is {args.format}; add --format json")
    if args.cut_prompt and not (args.prompt_text or args.prompt_audio):
        raise UsageError("--cut-prompt has nothing to cut; give --prompt-text or --prompt-audio")
    if len(names) > 1 and not args.output_dir and args.format not in ("text", "json"):
        raise UsageError(f"{len(names)} recordings as {args.format} need a file each; add --output-dir FOLDER")
    outputs = _output_files(names, args.output_dir, args.format)
    model = _load(args)
    _check_vad(args, model)
    heard_first = audio.read(args.prompt_audio, model.config.mimi.sample_rate) if args.prompt_audio else None
    options = Options(
        prompt=Prompt(text=args.prompt_text, audio=heard_first, cut=args.cut_prompt),
        temperature=args.temperature,
        seed=args.seed,
    )
    failed, finished, shown = 0, {}, 0
    with _progress(args) as bar:
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
                    failed += 1
                    bar.console.print(f"dsm-jax: {done}", style="red", soft_wrap=True, markup=False, highlight=False)
                else:
                    text = _render(done, args, several=len(names) > 1)
                    if outputs:
                        outputs[shown].write_text(text, encoding="utf-8")
                    else:
                        print(text, end="" if text.endswith("\n") or not text else "\n", flush=True)
                shown += 1
    return 1 if failed else 0


def codec_encode(args: argparse.Namespace) -> int:
    """Turns a recording into codes."""
    from safetensors.numpy import save_file

    from dsm_jax import codec

    model = _load(args)
    codes_QT = codec.encode(model, args.input, codebooks=args.codebooks)
    config = model.config.mimi
    facts = {"model": model.name, "sample_rate": str(config.sample_rate), "frame_rate": str(config.frame_rate)}
    save_file({"codes": codes_QT}, args.output, metadata=facts)
    print(f"{args.output}: {codes_QT.shape[0]} codebooks x {codes_QT.shape[1]} frames", file=sys.stderr)
    return 0


def codec_decode(args: argparse.Namespace) -> int:
    """Turns codes into a recording."""
    from dsm_jax import audio, codec

    model = _load(args)
    pcm = codec.decode(model, codec.read_codes(args.input))
    audio.write(args.output, pcm, model.config.mimi.sample_rate)
    print(f"{args.output}: {pcm.size / model.config.mimi.sample_rate:.2f} s", file=sys.stderr)
    return 0


def convert(args: argparse.Namespace) -> int:
    """Rewrites a checkpoint in another layout."""
    from dsm_jax.convert import command

    _set_up_jax(args)
    report = command.convert(args.source, args.destination, to=args.to, dtype=args.dtype)
    print(report.text())
    return 0


def bench(args: argparse.Namespace) -> int:
    """Times the published sizes on this machine, with random weights."""
    _set_up_jax(args)
    from dsm_jax import benchmark

    for row in benchmark.run(args.what, sizes=args.size, batches=args.batch, dtype=args.dtype, steps=args.steps):
        print(json.dumps(row), flush=True)
    return 0


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
    folder.mkdir(parents=True, exist_ok=True)
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
    if args.device:
        os.environ["JAX_PLATFORMS"] = _PLATFORMS[args.device]
    import jax

    try:
        jax.devices()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"--device {args.device} is not to be had here ({reason}); try --device cpu") from None
    if not args.no_cache:
        folder = args.cache_dir or _cache_folder()
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _cache_folder() -> Path:
    if sys.platform == "darwin":
        base = Path.home() / "Library/Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home()))
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return base / "dsm_jax" / "compiled"


def _load(args: argparse.Namespace) -> "Model":
    _set_up_jax(args)
    from dsm_jax import checkpoints

    return checkpoints.load(args.model, dtype=args.dtype)


def _progress(args: argparse.Namespace) -> "Progress":
    """A bar per recording on standard error; nothing where that is not a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    seconds = TextColumn("{task.completed:.0f} s")
    columns = (TextColumn("{task.description}"), BarColumn(), seconds, TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=args.quiet or not console.is_terminal)


def _parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="dsm-jax", description="Kyutai's delayed streams models in JAX.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    device = argparse.ArgumentParser(add_help=False)
    group = device.add_argument_group("device")
    group.add_argument("--device", choices=_PLATFORMS, help="default: the best that JAX finds")
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the weights; default: bfloat16 on GPU and TPU, float32 on CPU; the codec is always float32",
    )
    group.add_argument(
        "--cache-dir", type=Path, metavar="FOLDER", help=f"keep compiled programs here; default: {_cache_folder()}"
    )
    group.add_argument("--no-cache", action="store_true", help="compile anew, keep nothing")
    model = argparse.ArgumentParser(add_help=False, parents=[device])
    model.add_argument(
        "--model",
        default="kyutai/stt-1b-en_fr",
        help="a published name or a local folder, in any supported layout (default: %(default)s)",
    )

    p = commands.add_parser("transcribe", parents=[model], help="turn recordings into text with word times")
    p.add_argument(
        "audio", nargs="+", help="files (wav, flac, mp3, ogg, opus; any rate), patterns, or - for standard input"
    )
    p.add_argument("--format", choices=FORMATS, default="text", help="default: %(default)s")
    p.add_argument("--output-dir", type=Path, metavar="FOLDER", help="write a file per recording; default: print")
    p.add_argument(
        "--frames", action="store_true", help="add every frame's text token and pause probabilities to the JSON"
    )
    p.add_argument(
        "--batch-size", type=_positive, default=8, metavar="N", help="recordings at a time (default: %(default)s)"
    )
    p.add_argument("--temperature", type=float, metavar="T", help="0 is greedy; default: the checkpoint's")
    p.add_argument("--seed", type=int, default=0, help="of the sampling (default: %(default)s)")
    p.add_argument("--prompt-text", metavar="TEXT", help="words that the model is made to say first, in your spelling")
    p.add_argument("--prompt-audio", metavar="FILE", help="a recording that the model hears first")
    p.add_argument("--cut-prompt", action="store_true", help="leave the prompt out of the transcript")
    p.add_argument("--vad", action="store_true", help="mark the pauses that the model foresees in the text")
    p.add_argument("--quiet", action="store_true", help="no progress bar")
    p.set_defaults(run=transcribe)

    codec = commands.add_parser("codec", help="turn audio into Mimi codes and back")
    ways = codec.add_subparsers(required=True, metavar="encode|decode")
    p = ways.add_parser("encode", parents=[model], help="audio to codes")
    p.add_argument("input", help="an audio file, or - for standard input")
    p.add_argument("output", type=Path, help="a safetensors file: codes, int32 [codebooks, frames]")
    p.add_argument("--codebooks", type=_positive, metavar="N", help="default: all of the codec's")
    p.set_defaults(run=codec_encode)
    p = ways.add_parser("decode", parents=[model], help="codes to audio")
    p.add_argument("input", type=Path, help="a safetensors file, as `codec encode` writes it")
    p.add_argument("output", type=Path, help="a wav, flac or ogg file")
    p.set_defaults(run=codec_decode)

    p = commands.add_parser("convert", parents=[device], help="rewrite a checkpoint in another layout")
    p.add_argument("source", help="a published name or a local folder, in any supported layout")
    p.add_argument("destination", type=Path, help="a folder that does not exist yet")
    p.add_argument("--to", choices=("orbax", "kyutai", "transformers"), default="orbax", help="default: %(default)s")
    p.set_defaults(run=convert)

    p = commands.add_parser("bench", parents=[device], help="time the published sizes here, with random weights")
    p.add_argument("what", nargs="*", default=["lm", "mimi"], choices=("lm", "mimi", "stt"), help="default: lm mimi")
    p.add_argument("--size", nargs="+", default=["stt-1b"], choices=("stt-1b", "stt-2.6b"), help="default: stt-1b")
    p.add_argument("--batch", nargs="+", type=_positive, default=[1, 8], metavar="N", help="default: 1 8")
    p.add_argument("--steps", type=_positive, default=20, help="timed steps (default: %(default)s)")
    p.set_defaults(run=bench)
    return top


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except DsmError as error:  # its message says what to do; anything else is a bug, so let it show
        print(f"dsm-jax: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())

"""Run the recipes: `python -m recipes.digits train | evaluate | new-speaker`."""

import argparse
import sys
from pathlib import Path

from dsm_jax import malloc, tasks
from dsm_jax.cli import terminal
from dsm_jax.cli.parser import PLATFORMS, cache_folder
from dsm_jax.errors import DsmError

FOLDER = Path(__file__).parent
MODELS = ("digits", "digits-tts")


def parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    top = argparse.ArgumentParser(prog="python -m recipes.digits", description=__doc__)
    commands = top.add_subparsers(required=True, dest="command")
    p = commands.add_parser("train", help="train a model from scratch")
    p.add_argument("config", help="digits, digits-tts, or a JSON file: `task` (one of these) and its settings")
    p.add_argument("--resume", action="store_true", help="continue each stage from its last checkpoint")
    p.add_argument("--device", choices=sorted(PLATFORMS), help="default: the best that JAX finds")
    p = commands.add_parser("evaluate", help="print the figures of a model card")
    p.add_argument("recipe", choices=MODELS)
    p.add_argument("--model", help="a folder; default: the embedded model")
    p.add_argument("--data", type=Path, default=Path("data"), help="default: %(default)s")
    p.add_argument("--whisper", type=Path, metavar="FOLDER", help="a model of faster-whisper, to compare with")
    p = commands.add_parser("new-speaker", help="make the recordings of examples/new_speaker")
    p.add_argument("voice", help="a voice of flite, such as slt")
    return top


def config_path(name: str) -> Path:
    """Return the path of a config, given a recipe's name or a path."""
    return FOLDER / f"{name}.json" if name in MODELS else Path(name)


def tasks_of_recipe() -> tasks.Tasks:
    """List the tasks that a config can name."""
    from recipes.digits.stt import DigitsConfig, train_digits
    from recipes.digits.tts import DigitsTtsConfig, train_digits_tts

    return {"digits": (DigitsConfig, train_digits), "digits-tts": (DigitsTtsConfig, train_digits_tts)}


def train(args: argparse.Namespace) -> None:
    """Train a model."""
    malloc.keep_freed()  # before JAX starts
    import jax

    malloc.set_pieces_aside_after_compiling()
    if args.device:
        jax.config.update("jax_platforms", PLATFORMS[args.device])
    jax.config.update("jax_compilation_cache_dir", str(cache_folder()))
    config, run = tasks.read_config(config_path(args.config), tasks_of_recipe())
    with terminal.messages(quiet=False, verbose=False), terminal.training_bar(quiet=False) as progress:
        model = run(config, resume=args.resume, progress=progress)
    terminal.note(f"trained: {model!r}")


def evaluate(args: argparse.Namespace) -> None:
    """Print the figures of a model card."""
    from recipes.digits.evaluate_stt import evaluate_digits
    from recipes.digits.evaluate_tts import evaluate_digits_tts

    if args.recipe == "digits":
        evaluate_digits(args.model or args.recipe, args.data, args.whisper)
    else:
        evaluate_digits_tts(args.model or args.recipe, args.whisper)


def new_speaker(args: argparse.Namespace) -> None:
    """Make recordings of a new speaker."""
    from recipes.digits.new_speaker import make_new_speaker

    make_new_speaker(args.voice, FOLDER.parents[1] / "examples/new_speaker")


COMMANDS = {"train": train, "evaluate": evaluate, "new-speaker": new_speaker}


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    args = parser().parse_args(argv)
    try:
        COMMANDS[args.command](args)
    except DsmError as error:
        print(f"recipes.digits: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

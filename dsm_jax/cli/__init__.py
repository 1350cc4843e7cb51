"""The `dsm-jax` command.

Exit codes: 0, all went well; 1, some inputs failed and the others were written; 2, usage, or a model or all inputs that
cannot be read; 130, ended by Ctrl-C.
"""

import argparse
import os
import sys

from dsm_jax.cli import terminal
from dsm_jax.cli.parser import parser
from dsm_jax.errors import DsmError

# Commands are imported once they are chosen, so that `--help` is instant.


def _transcribe(args: argparse.Namespace) -> int:
    if args.server is not None:
        from dsm_jax.cli import remote

        return remote.transcribe(args)
    from dsm_jax.cli import transcribe

    return transcribe.run(args)


def _speak(args: argparse.Namespace) -> int:
    if args.server is not None:
        from dsm_jax.cli import remote

        return remote.speak(args)
    from dsm_jax.cli import speak

    return speak.run(args)


def _serve(args: argparse.Namespace) -> int:
    from dsm_jax.cli import serve

    return serve.run(args)


def _bench_serve(args: argparse.Namespace) -> int:
    from dsm_jax.cli import remote

    return remote.bench_serve(args)


def _other(args: argparse.Namespace) -> int:
    from dsm_jax.cli import commands

    return getattr(commands, args.command)(args)


COMMANDS = {"transcribe": _transcribe, "speak": _speak, "serve": _serve, "bench_serve": _bench_serve}


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    args = parser().parse_args(argv)
    with terminal.messages(quiet=args.quiet, verbose=args.verbose), terminal.ended_by_one_interrupt():
        return _run(args)


def command() -> None:
    """Run the command line as this process, and end the process.

    After a Ctrl-C it ends without Python's own end: XLA's threads may still compile, and would use what is gone.
    """
    code = main()
    if code == terminal.INTERRUPTED:
        os._exit(code)
    sys.exit(code)


def _run(args: argparse.Namespace) -> int:
    """Run the chosen command; return the exit code."""
    try:
        code = COMMANDS.get(args.command, _other)(args)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except DsmError as error:  # its message says what to do; anything else is a bug, so let it show
        terminal.refuse(error)
        return 2
    except BrokenPipeError:  # whoever read the output has enough
        _forget_output()
        return 0
    except OSError as error:
        if error.filename is not None:  # not of the output: a bug, so let it show
            raise
        _forget_output()
        terminal.refuse(f"standard output cannot be written ({error.strerror}); send it to another place")
        return 1
    except KeyboardInterrupt:
        _forget_output()
        return terminal.INTERRUPTED


def _forget_output() -> None:
    """Drop what standard output still holds, as Python would complain about it at its end."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

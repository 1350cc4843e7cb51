"""Parse arguments as argparse does, but refuse mistakes in one sentence that says what to do.

Standard library only, so that `--help` is instant.
"""

import argparse
import difflib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, TypeVar

_Number = TypeVar("_Number", int, float)


class Parser(argparse.ArgumentParser):
    """A parser that leaves some first arguments to parsers of their own, beside positional arguments of any number.

    Attributes:
      branches: parsers, by the first argument that leads to each.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.branches: dict[str, argparse.ArgumentParser] = {}
        # In place of argparse's "invalid int value".
        self.register("type", int, lambda text: _read(int, text, "whole number"))
        self.register("type", float, lambda text: _read(float, text, "number"))

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Parse arguments; refuse those that their command does not take."""
        found, others = self.parse_known_args(sys.argv[1:] if args is None else args, namespace)
        if others:
            command = f"{self.prog} {found.command.replace('_', ' ')}"
            self.exit(2, f"{self.prog}: {_strange(others[0], command, dict(_parsers(self)))}\n")
        return found

    def error(self, message: str) -> NoReturn:
        """Refuse arguments in a sentence; argparse prints the usage before it, many lines of options."""
        self.exit(2, f"dsm-jax: {message}; {self.prog} --help lists what there is\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Parse arguments."""
        first = args[0] if args and self._subparsers is not None else ""
        if first.startswith("-") and not any(option.startswith(first) for option in self._option_string_actions):
            self.error(f"{first} comes before the command, and options follow it")
        if args and args[0] in self.branches:
            return self.branches[args[0]].parse_known_args(args[1:], namespace)
        return super().parse_known_args(args, namespace)


def _parsers(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yield a parser and those of its commands, with the words that lead to each."""
    yield parser.prog, parser
    inner = parser.branches if isinstance(parser, Parser) else {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            inner = {**action.choices, **inner}
    for each in inner.values():
        yield from _parsers(each)


def _strange(argument: str, command: str, parsers: Mapping[str, argparse.ArgumentParser]) -> str:
    """Return a sentence on an argument that a command does not take."""
    see = f"{command} --help lists what there is"
    if not argument.startswith("-"):
        takes_some = any(not action.option_strings for action in parsers[command]._actions)
        hint = "put quotes around a text or a name with spaces" if takes_some else "it takes options alone"
        return f"{argument} is one argument too many for {command}; {hint}; {see}"
    option, known = argument.partition("=")[0], parsers[command]._option_string_actions
    has = [name.partition(" ")[2] for name, parser in parsers.items() if option in parser._option_string_actions]
    near = difflib.get_close_matches(option, known, 1)
    hint = f"it is an option of dsm-jax {', '.join(has)}; " if has else f"did you mean {near[0]}? " if near else ""
    return f"{command} has no option {option}; {hint}{see}"


class Version(argparse.Action):
    """Look the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib import metadata

        print(f"dsm-jax {metadata.version('dsm_jax')}")
        parser.exit()


def _read(kind: Callable[[str], _Number], text: str, name: str) -> _Number:
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no {name}") from None


def positive(text: str) -> int:
    """Read a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)

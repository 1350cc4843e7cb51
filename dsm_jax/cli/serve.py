"""`dsm-jax serve`: a server of models for moshi-server's clients, OpenAI's clients and a browser."""

import argparse
import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsm_jax import files
from dsm_jax.cli import terminal
from dsm_jax.cli.setup import UsageError, set_up_jax

if TYPE_CHECKING:
    from dsm_jax.serving.config import ServedModel, ServerConfig
    from dsm_jax.serving.server import Server

KEYS = "DSM_JAX_API_KEYS"  # the environment's variable


def run(args: argparse.Namespace) -> int:
    """Serve as the arguments say; return the exit code."""
    try:
        from dsm_jax.serving import run as running
    except ImportError as error:
        raise UsageError(
            f"the server needs the package {error.name}; install them all: pip install 'dsm-jax[serve]'"
        ) from None
    config = settings(args)
    config.check_access()
    set_up_jax(args)
    level = logging.WARNING if args.quiet else logging.DEBUG if args.verbose else logging.INFO
    running.set_up_logs(config.log_format, level)
    if args.check:
        return running.check(config, terminal.write)

    def ready(server: "Server", url: str) -> None:
        if not args.quiet:
            page = " (open it in a browser)" if config.page else ""
            terminal.note(f"serving {', '.join(served.name for served in server.models)} at {url}{page}")

    return running.serve(config, on_ready=ready)


def settings(args: argparse.Namespace) -> "ServerConfig":
    """Return the settings of the arguments, over those of the configuration file."""
    from dsm_jax.serving.config import ServerConfig, read_config

    config = ServerConfig() if args.config is None else read_config(args.config)
    changes: dict[str, Any] = {
        name: value
        for name in ("host", "port", "max_session_s", "max_upload_mb", "min_step_ms", "drain_s", "log_format")
        if (value := getattr(args, name)) is not None
    }
    if args.origin:
        changes["origins"] = (*config.origins, *args.origin)
    changes |= {name: False for name in ("page", "metrics") if getattr(args, f"no_{name}")}
    if args.no_auth:
        changes["no_auth"] = True
    changes["keys"] = _keys(args, config.keys)
    if named := _models(args):
        changes["models"] = named
    elif not config.models:
        changes["models"] = named = _default_models(args)
    _check_used(args, [model.kind for model in named])
    return dataclasses.replace(config, **changes)


def _check_used(args: argparse.Namespace, kinds: Sequence[str]) -> None:
    """Refuse options of models of which the arguments name none: a file has its own settings of its models."""
    if args.revision is not None and len(kinds) > 1:
        raise UsageError(
            f"--revision {args.revision} is of one model, and {len(kinds)} are named; set revision in the part of each "
            "model of a --config file"
        )
    options = (
        ("--slots", "slots", args.slots, ("stt",)),
        ("--tts-slots", "slots", args.tts_slots, ("tts",)),
        ("--voice-folder", "voice_folder", args.voice_folder, ("tts",)),
        ("--dtype", "dtype", args.dtype, ("stt", "tts")),
        ("--quantize", "quantize", args.quantize, ("stt", "tts")),
        ("--revision", "revision", args.revision, ("stt", "tts")),
    )
    for option, setting, value, wanted in options:
        if value is not None and set(kinds).isdisjoint(wanted):
            names = " or ".join(f"--{kind}" for kind in wanted)
            raise UsageError(
                f"{option} {value} is for a model that {names} names, and none is named; name it, or set {setting} in "
                "the model's part of the --config file"
            )


def _models(args: argparse.Namespace) -> tuple["ServedModel", ...]:
    """Return the models that the arguments name."""
    from dsm_jax.serving.config import ServedModel, default_path

    weights = {"dtype": args.dtype, "quantize": args.quantize, "revision": args.revision}
    heard = [
        ServedModel(kind="stt", model=name, path=default_path("stt", number), slots=args.slots, **weights)
        for number, name in enumerate(args.stt)
    ]
    spoken = [
        ServedModel(
            kind="tts",
            model=name,
            path=default_path("tts", number),
            slots=args.tts_slots,
            voice_folder=args.voice_folder,
            **weights,
        )
        for number, name in enumerate(args.tts)
    ]
    return (*heard, *spoken)


def _default_models(args: argparse.Namespace) -> tuple["ServedModel", ...]:
    """Return the models that came with the library."""
    chosen = argparse.Namespace(**{**vars(args), "stt": ["digits"], "tts": ["digits-tts"]})
    return _models(chosen)


def _keys(args: argparse.Namespace, configured: Sequence[str]) -> tuple[str, ...]:
    """Return the keys of the configuration, of the environment and of a file; with --no-auth there may be none."""
    in_file = [] if args.api_key_file is None else _lines(args.api_key_file)
    places = {
        f"the configuration {args.config}": configured,
        f"the variable {KEYS}": _filled(os.environ.get(KEYS, "").split(",")),
        f"--api-key-file {args.api_key_file}": _filled(in_file),
    }
    if args.no_auth and (named := [place for place, keys in places.items() if keys]):
        raise UsageError(
            f"--no-auth lets everyone in, and keys are given by {' and '.join(named)}; leave out --no-auth or the keys"
        )
    return tuple(key for keys in places.values() for key in keys)


def _filled(keys: Sequence[str]) -> list[str]:
    return [key.strip() for key in keys if key.strip()]


def _lines(path: Path) -> list[str]:
    """Return the lines of a file of keys; one with white space may be a comment, or several keys, and is refused."""
    try:
        lines = files.read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the keys in {path} cannot be read ({error}); give a text file, one key a line") from None
    if not any(line.strip() for line in lines):
        raise UsageError(f"{path} holds no key; write one a line")
    for number, line in enumerate(lines, 1):
        if len(line.split()) > 1:  # the key itself is not printed
            raise UsageError(
                f"{path}:{number} has white space in it, which no key of a file may have; write keys alone, one a line"
            )
    return lines

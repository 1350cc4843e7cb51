"""List the arguments of `dsm-jax`. Standard library only, so that `--help` is instant."""

import argparse
import os
import sys
from pathlib import Path

from dsm_jax.cli.arguments import Parser, Version, positive

FORMATS = ("text", "json", "jsonl", "srt", "vtt", "tsv")
PLATFORMS = {"cpu": "cpu", "gpu": "cuda", "tpu": "tpu"}  # as we say it, and as JAX does


def cache_folder() -> Path:
    """Return the folder of compiled programs, unless the user names another."""
    if sys.platform == "darwin":
        base = Path.home() / "Library/Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home()))
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return base / "dsm_jax" / "compiled"


class DefaultModel(str):
    """The name of the model that a command takes where none is given: a server has its own."""

    __slots__ = ()


def parser() -> argparse.ArgumentParser:
    """Return the parser; the chosen command's name is in `command`."""
    top = Parser(prog="dsm-jax", description="Kyutai's and Sesame's speech models in JAX.")
    top.add_argument("--version", action=Version, nargs=0, help="print the version and exit")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    output = Parser(add_help=False)
    output.add_argument("--quiet", action="store_true", help="show errors alone: no bars, no warnings")
    output.add_argument("--verbose", action="store_true", help="show what is fetched, loaded and compiled")
    device = Parser(add_help=False, parents=[output])
    group = device.add_argument_group("device")
    group.add_argument("--device", choices=PLATFORMS, help="default: the best that JAX finds")
    group.add_argument(
        "--compile-cache", type=Path, metavar="FOLDER", help=f"keep compiled programs here; default: {cache_folder()}"
    )
    group.add_argument("--no-cache", action="store_true", help="compile anew, keep nothing")
    dtype = _dtype("of the weights; default: bfloat16 on GPU and TPU, float32 on CPU")
    dtype.add_argument(
        "--quantize",
        choices=("int8",),
        help="round the layers' weights: less memory, and with AVX-512 about half of the time on a CPU",
    )
    stored = _dtype("of the language model's weights; default: as they are stored")
    revision = Parser(add_help=False)
    revision.add_argument("--revision", metavar="REF", help="branch, tag or commit of the model on the hub")
    key = Parser(add_help=False)
    key.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="key for the server; default: DSM_JAX_API_KEY, if it is set"
    )
    server = Parser(add_help=False, parents=[key])
    server.add_argument("--server", metavar="URL", help="let a server do it, such as http://127.0.0.1:8080")
    model = Parser(add_help=False, parents=[device, dtype, revision])
    model.add_argument(
        "--model",
        default=DefaultModel("kyutai/stt-1b-en_fr"),
        help="a published name, a local folder in any supported layout, or digits, which came with the library "
        "(default: %(default)s)",
    )

    p = commands.add_parser("transcribe", parents=[model, server], help="turn recordings into text with word times")
    p.add_argument(
        "audio",
        nargs="*",
        help="files (wav, flac, mp3, ogg, m4a, mp4, webm and others), patterns, or - for standard input",
    )
    p.add_argument("--mic", action="store_true", help="transcribe the microphone until Ctrl-C")
    p.add_argument("--input-device", metavar="NAME", help="the microphone; default: the system's")
    p.add_argument(
        "--format", choices=FORMATS, default="text", help="jsonl prints words as they come (default: %(default)s)"
    )
    p.add_argument("--output-dir", type=Path, metavar="FOLDER", help="write a file per recording; default: print")
    p.add_argument(
        "--frames", action="store_true", help="add every frame's text token and pause probabilities to the JSON"
    )
    p.add_argument(
        "--batch-size", type=positive, default=8, metavar="N", help="recordings at a time (default: %(default)s)"
    )
    p.add_argument(
        "--temperature", type=float, metavar="T", help="of the sampling; 0 is greedy; default: the checkpoint's"
    )
    p.add_argument("--top-k", type=int, metavar="K", help="sample among K tokens, 0 for all; default: the checkpoint's")
    p.add_argument("--seed", type=int, default=0, help="seed of the sampling (default: %(default)s)")
    p.add_argument("--prompt-text", metavar="TEXT", help="words that come before the recording, in your spelling")
    p.add_argument("--prompt-audio", metavar="FILE", help="a recording that comes before the recording")
    p.add_argument("--exclude-prompt", action="store_true", help="leave the prompt out of the transcript")
    p.add_argument("--vad", action="store_true", help="mark the pauses that the model predicts in the text")
    p.add_argument(
        "--word-times",
        choices=("sound", "reference"),
        default="sound",
        help="sound: a word ends where its sound ends; reference: with the next word (default: %(default)s)",
    )
    p.set_defaults(command="transcribe")

    p = commands.add_parser("speak", parents=[device, dtype, revision, server], help="turn text into speech")
    p.add_argument(
        "text",
        help="the text, a file of it, - for standard input, or requests.jsonl: id, text and voice on each line, or for "
        "conversations id, text, speaker and context; or conversation.json in the published chat format",
    )
    p.add_argument("output", help="a wav, flac, ogg, opus or mp3 file, - to play or pipe it, or for requests a folder")
    p.add_argument(
        "--model",
        default=DefaultModel("kyutai/tts-1.6b-en_fr"),
        help="a published name, a local folder in any supported layout, or digits-tts, which came with the library "
        "(default: %(default)s)",
    )
    p.add_argument(
        "--voice",
        action="append",
        default=[],
        metavar="VOICE",
        help="one of the model's own voices, a published one's name or a voice's file; for models without speakers a "
        "recording to continue; given twice, the second is the other speaker",
    )
    p.add_argument(
        "--guidance-scale",
        type=float,
        metavar="G",
        help="how closely to follow text and voice; 1 is no guidance (default: 2)",
    )
    p.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help="of the sampling; 0 is greedy; default: the checkpoint's, or else 0.6; in conversations 0.9",
    )
    p.add_argument(
        "--top-k",
        type=int,
        metavar="K",
        help="sample among K audio tokens, 0 for all (default: 250; in conversations 50)",
    )
    p.add_argument("--seed", type=int, help="seed of the sampling (default: 0)")
    p.add_argument(
        "--codebooks", type=positive, metavar="N", help="codebooks to generate; fewer are faster; default: all"
    )
    p.add_argument("--padding-between", type=int, metavar="N", help="frames between words (default: 1)")
    p.add_argument(
        "--padding-bonus",
        type=float,
        metavar="B",
        help="score added to silence: above 0 speaks slower (default: 0)",
    )
    p.add_argument(
        "--max-frames",
        type=positive,
        metavar="N",
        help="give up after N frames (default: 30000; in conversations 1125)",
    )
    p.add_argument(
        "--on-unsayable",
        choices=("error", "skip"),
        help="refuse a text with a word that cannot be said, or leave the word out (default: error)",
    )
    talk = p.add_argument_group("conversational speech models", "such as sesame/csm-1b")
    talk.add_argument("--speaker", type=int, metavar="N", help="number of the speaker of the text (default: 0)")
    talk.add_argument(
        "--context",
        metavar="TALK.jsonl",
        help="the turns before the text: text, speaker and audio on each line; the voices are taken from them",
    )
    talk.add_argument(
        "--depth-temperature", type=float, metavar="T", help="of all codebooks but the first; default: --temperature"
    )
    talk.add_argument(
        "--depth-top-k",
        type=int,
        metavar="K",
        help="codes to sample among in all codebooks but the first; default: --top-k",
    )
    p.add_argument("--save-frames", action="store_true", help="write frames, words and times next to the recording")
    p.add_argument(
        "--batch-size", type=positive, default=8, metavar="N", help="requests at a time (default: %(default)s)"
    )
    p.set_defaults(command="speak")

    codec = commands.add_parser("codec", help="turn audio into Mimi codes and back")
    ways = codec.add_subparsers(required=True, metavar="encode|decode")
    p = ways.add_parser("encode", parents=[model], help="audio to codes")
    p.add_argument("input", help="an audio file, or - for standard input")
    p.add_argument("output", type=Path, help="a safetensors file: codes, int32 [codebooks, frames]")
    p.add_argument("--codebooks", type=positive, metavar="N", help="default: all of the codec's")
    p.set_defaults(command="codec_encode")
    p = ways.add_parser("decode", parents=[model], help="codes to audio")
    p.add_argument("input", type=Path, help="a safetensors file, as `codec encode` writes it")
    p.add_argument("output", type=Path, help="a wav, flac, ogg, opus or mp3 file")
    p.set_defaults(command="codec_decode")

    p = commands.add_parser(
        "convert",
        parents=[device, stored, revision],
        help="rewrite a checkpoint in another layout; --verbose: by tensor",
    )
    p.add_argument("source", help="a published name or a local folder, in any supported layout")
    p.add_argument("destination", type=Path, help="a folder that does not exist yet")
    to = ("orbax", "kyutai", "transformers", "sesame")
    p.add_argument("--to", choices=to, default="orbax", help="the layout; default: orbax, this library's own")
    p.add_argument("--report", type=Path, metavar="FILE", help="write what went where as JSON")
    p.set_defaults(command="convert")

    p = commands.add_parser("train", parents=[device], help="fine-tune a model on recordings")
    p.add_argument("config", type=Path, help="a JSON file: `task` (finetune) and its settings; docs/training.md")
    p.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
    p.set_defaults(command="train")

    p = commands.add_parser("evaluate", parents=[model], help="count a model's errors on recordings with known words")
    p.add_argument(
        "source",
        nargs="?",
        help="a folder of recordings with a .json or .txt next to each, a JSON Lines file of audio and text, a short "
        "name such as librispeech.clean, or ORGANISATION/NAME:CONFIG:SPLIT on the hub",
    )
    p.add_argument(
        "--normalizer",
        choices=("english", "basic", "none"),
        default="english",
        help="english: Whisper's, number words become figures; basic: for other languages, and for strings of digits; "
        "none (default: %(default)s)",
    )
    p.add_argument(
        "--streaming", action="store_true", help="feed live, one recording at a time, and measure how late words come"
    )
    p.add_argument(
        "--batch-size", type=positive, default=8, metavar="N", help="recordings at a time (default: %(default)s)"
    )
    p.add_argument("--limit", type=positive, metavar="N", help="the first N recordings only")
    p.add_argument(
        "--output",
        type=Path,
        metavar="FILE.json",
        help="write the results; rows go to FILE.rows.jsonl as recordings end",
    )
    p.add_argument("--resume", action="store_true", help="do not repeat the recordings that are in FILE.rows.jsonl")
    p.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the word error rates")
    p.add_argument(
        "--worst", type=positive, default=0, metavar="N", help="print both texts of the N worst recordings as well"
    )
    p.add_argument(
        "--compare", nargs=2, type=Path, metavar=("A.json", "B.json"), help="compare two results instead of evaluating"
    )
    p.set_defaults(command="evaluate")

    p = commands.add_parser(
        "serve",
        parents=[device, dtype],
        help="serve models to moshi-server's clients, OpenAI's clients and browsers",
        description="Serve models. Without options: digits and digits-tts, for this machine alone.",
    )
    p.add_argument("--config", type=Path, metavar="FILE.toml", help="our own configuration, or moshi-server's")
    p.add_argument("--stt", action="append", default=[], metavar="MODEL", help="a model that transcribes; repeatable")
    p.add_argument("--tts", action="append", default=[], metavar="MODEL", help="a model that speaks; repeatable")
    p.add_argument(
        "--slots",
        type=positive,
        metavar="N",
        help="sessions at a time of each --stt (default: 8 on CPU, 64 elsewhere)",
    )
    p.add_argument(
        "--tts-slots",
        type=positive,
        metavar="N",
        help="sessions at a time of each --tts (default: 8 on CPU, 64 elsewhere)",
    )
    p.add_argument("--voice-folder", type=Path, metavar="FOLDER", help="more voices for each --tts")
    p.add_argument(
        "--revision", metavar="REF", help="branch, tag or commit on the hub of the one model that --stt or --tts names"
    )
    p.add_argument("--host", help="where to listen (default: 127.0.0.1)")
    p.add_argument("--port", type=int, help="0 takes a free one (default: 8080)")
    p.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help="keys of clients, one a line; also DSM_JAX_API_KEYS, by commas",
    )
    p.add_argument("--no-auth", action="store_true", help="let everyone in, whatever the host")
    p.add_argument(
        "--origin",
        action="append",
        default=[],
        metavar="URL",
        help="a web origin that may connect, or the address of a proxy before a server without keys; repeatable",
    )
    p.add_argument(
        "--max-session", dest="max_session_s", type=float, metavar="S", help="longest session, seconds (default: 14400)"
    )
    p.add_argument(
        "--max-upload", dest="max_upload_mb", type=float, metavar="MB", help="largest recording (default: 256)"
    )
    p.add_argument("--min-step-ms", type=float, metavar="MS", help="least time from one step to the next (default: 20)")
    p.add_argument(
        "--drain-s", type=float, metavar="S", help="seconds that running sessions have after SIGTERM (default: 30)"
    )
    p.add_argument("--log-format", choices=("text", "json"), help="form of a line of the log (default: text)")
    p.add_argument("--no-page", action="store_true", help="serve no page at /")
    p.add_argument("--no-metrics", action="store_true", help="serve no /metrics")
    p.add_argument("--check", action="store_true", help="load and warm up, print whether each model keeps up, and exit")
    p.set_defaults(command="serve")

    p = commands.add_parser("bench", parents=[device, dtype], help="time the published sizes here, with random weights")
    p.add_argument("what", nargs="*", metavar="lm|mimi|stt|tts|csm", help="default: lm mimi")
    p.add_argument(
        "--size",
        nargs="+",
        default=[],
        choices=("stt-1b", "stt-2.6b", "tts-1.6b", "csm-1b"),
        help="default: stt-1b, tts-1.6b, csm-1b",
    )
    p.add_argument("--batch", nargs="+", type=positive, default=[1, 8], metavar="N", help="default: 1 8")
    p.add_argument("--steps", type=positive, default=20, help="timed steps (default: %(default)s)")
    p.epilog = "dsm-jax bench serve --help: load a server with live streams"
    p.set_defaults(command="bench")
    p.branches["serve"] = q = Parser(
        prog="dsm-jax bench serve", parents=[output, key], description="Load a server with streams in real time."
    )
    q.add_argument("--url", required=True, help="address of the server, such as http://127.0.0.1:8080")
    q.add_argument("--streams", type=positive, default=8, metavar="N", help="at once (default: %(default)s)")
    q.add_argument("--seconds", type=float, default=20.0, metavar="S", help="of each stream (default: %(default)s)")
    q.add_argument("--audio", metavar="FILE", help="what is sent, again and again; default: quiet noise")
    q.add_argument("--tts", action="store_true", help="let the server speak, in place of transcribing")
    q.add_argument("--model", metavar="NAME", help="of those that the server has; default: its first")
    q.add_argument(
        "--target-ms", type=float, default=80.0, metavar="MS", help="from a frame to its answer (default: %(default)s)"
    )
    q.add_argument(
        "--percentile",
        choices=("p50", "p95", "p99", "max"),
        default="p95",
        help="the one that has to meet the target (default: %(default)s)",
    )
    q.add_argument("--find", action="store_true", help="find the most streams, up to N, that hold the target")
    q.add_argument("--json", action="store_true", help="print one line of JSON in place of the table")
    q.set_defaults(command="bench_serve")
    return top


def _dtype(of_what: str) -> Parser:
    """Make the option --dtype, to be shared by commands."""
    parser = Parser(add_help=False)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help=f"{of_what}; the codec is always float32")
    return parser

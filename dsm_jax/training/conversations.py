"""Read training data of conversational speech: conversations whose turns have a text, a speaker and a recording.

The data is a JSON Lines file with a line for each conversation:

    {"turns": [{"text": "Hello there.", "speaker": 0, "audio": "talks/first.flac"}, ...]}

with paths relative to the file's folder. A turn may also be a message of the published chat format, and a line may be
the list of its turns. The text is that of the recording, as exactly as it is known; a speaker has one number in all
turns of a conversation. Other keys are ignored. All data is checked, and every recording decoded to its end, before
training starts.
"""

import dataclasses
import functools
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dsm_jax.csm.requests import segment_of
from dsm_jax.errors import TrainingError
from dsm_jax.training.data import lines_of, parse_json, read_examples, samples_of

_FORMAT = '{"turns": [{"text": TEXT, "speaker": NUMBER, "audio": PATH}, ...]}'


@dataclasses.dataclass(frozen=True)
class TrainingTurn:
    """A turn of a conversation.

    Attributes:
      text: the words of the recording.
      speaker: number of the speaker, from 0.
      audio: path of the recording.
      samples: length of the recording, in samples of the training audio.
    """

    text: str
    speaker: int
    audio: Path
    samples: int


@dataclasses.dataclass(frozen=True)
class TrainingConversation:
    """A conversation to train on.

    Attributes:
      turns: the turns, oldest first.
    """

    turns: tuple[TrainingTurn, ...]


def read_conversations(
    source: Path, sample_rate: int, *, check: Callable[[TrainingConversation], object], skip_bad: bool = False
) -> list[TrainingConversation]:
    """Read a file of conversations.

    Args:
      source: a JSON Lines file.
      sample_rate: sample rate of the training audio, Hz.
      check: called with each conversation; raises a DsmError for one that the model cannot learn.
      skip_bad: leave out faulty conversations, with a logged warning for each, instead of raising.

    Returns:
      The conversations, in the order of the file.

    Raises:
      TrainingError: there are no conversations, all conversations are faulty, or any is and `skip_bad` is false. The
        error counts the faulty conversations and lists the first few.
    """
    lines = list(lines_of(source, f"a JSON Lines file with rows {_FORMAT}"))
    if not lines:
        raise TrainingError(f"{source} lists no conversations; expected rows {_FORMAT}")
    readers = [(place, functools.partial(_read_line, line, source.parent, sample_rate, check)) for place, line in lines]
    return read_examples(readers, source, "conversations", skip_bad=skip_bad)


def _read_line(
    line: bytes, folder: Path, sample_rate: int, check: Callable[[TrainingConversation], object]
) -> TrainingConversation:
    values = parse_json(line, _FORMAT, line=True)
    turns = values.get("turns") if isinstance(values, Mapping) else values
    if not isinstance(turns, list) or not turns:
        raise TrainingError(f"the turns are {turns!r}; expected a list of one or more: {_FORMAT}")
    conversation = TrainingConversation(
        tuple(_read_turn(turn, number, folder, sample_rate) for number, turn in enumerate(turns, 1))
    )
    check(conversation)
    return conversation


def _read_turn(turn: Any, number: int, folder: Path, sample_rate: int) -> TrainingTurn:
    if isinstance(turn, Mapping) and "role" in turn:
        segment = segment_of(turn, number)
        text, speaker, named = segment.text, segment.speaker, segment.audio
    elif isinstance(turn, Mapping):
        text, speaker, named = (turn.get(key) for key in ("text", "speaker", "audio"))
    else:
        raise TrainingError(f"turn {number} is {turn!r}; expected text, speaker and audio: {_FORMAT}")
    if not isinstance(text, str) or not isinstance(speaker, int) or isinstance(speaker, bool):
        raise TrainingError(
            f"turn {number} has the text {text!r} and the speaker {speaker!r}; expected words and a number from 0: "
            f"{_FORMAT}"
        )
    if not isinstance(named, str):
        raise TrainingError(
            f"the audio of turn {number} is {reprlib.repr(named)}; expected the path of a recording: {_FORMAT}"
        )
    return TrainingTurn(text, speaker, folder / named, samples_of(folder / named, sample_rate))

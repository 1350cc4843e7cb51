"""From the turns of a conversation to the words and breaks that a model is to say, and those as arrays.

A word that follows a change of speaker begins with the speaker's token. Turns alternate between two speakers; an empty
first turn lets the other one begin. Of the marks of SSML one is known, `<break time="0.5s"/>`.

Shape letters: B batch rows, L entries, T tokens.
Source: kyutai-labs/moshi@e6a55d2 moshi/models/tts.py:script_to_entries.
"""

import dataclasses
import logging
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from dsm_jax.errors import SpeechError, TextError, UnsayableError
from dsm_jax.speech import no_words
from dsm_jax.tokenizers import Tokenizer

NEW_WORD = 0  # a word begins
MAIN = 1  # before the first word of a turn of the first speaker
OTHER = 2  # and of the second
PAD = 3  # nothing happens

_log = logging.getLogger("dsm_jax")

Array = Any  # of jax or numpy: the host fills scripts, the device reads them

LONGEST_PAUSE_S = 3600.0
MIN_ENTRIES, MIN_TOKENS = 1024, 4096

_EXAMPLE = '<break time="0.5s"/>'
_MARK = re.compile(r"<[^<>]*>|[<>]|\s+")
_BREAK = re.compile(r'<break\s+time="([0-9]+(?:\.[0-9]*)?)s"\s*/?>')
_REWRITTEN = str.maketrans({"’": "'", ":": " ", "(": "", ")": ""})


@dataclasses.dataclass(frozen=True)
class Entry:
    """A word, or a break, which has no tokens.

    Attributes:
      tokens: what the model is fed for it, none of them `NEW_WORD` or `PAD`.
      text: the word as it was written; empty for a break.
      padding: steps in which no other may begin: counted from its own for a break, and for a word from the one after,
        those that feed its tokens among them.
    """

    tokens: tuple[int, ...]
    text: str
    padding: int


def entries_of(
    turns: Sequence[str],
    tokenizer: Tokenizer,
    *,
    frame_rate: float,
    multi_speaker: bool,
    padding_between: int = 0,
    skip_unsayable: bool = False,
) -> list[Entry]:
    """Return the words and breaks of a script.

    Args:
      turns: what is said, one string per turn; the first belongs to the main speaker.
      tokenizer: of the model.
      frame_rate: steps of the model per second, Hz.
      multi_speaker: whether the model knows two speakers; if not, no word has a speaker's token.
      padding_between: steps to leave free between words, for a clearer speech.
      skip_unsayable: leave out words that cannot be encoded and tags that cannot be read, with a warning in the log.

    Returns:
      The entries, in the order in which they are said.

    Raises:
      SpeechError: there is no word.
      UnsayableError: a word cannot be encoded, a tag cannot be read, or a pause is longer than `LONGEST_PAUSE_S`; the
        error has the entries before it.
    """
    entries = more_entries(
        turns,
        tokenizer,
        frame_rate=frame_rate,
        multi_speaker=multi_speaker,
        padding_between=padding_between,
        skip_unsayable=skip_unsayable,
    )
    if not any(entry.tokens for entry in entries):
        raise no_words(len(turns))
    return entries


def more_entries(
    turns: Sequence[str],
    tokenizer: Tokenizer,
    *,
    frame_rate: float,
    multi_speaker: bool,
    padding_between: int = 0,
    skip_unsayable: bool = False,
    speaker: int | None = None,
) -> list[Entry]:
    """Return the words and breaks of a part of a script, in which there may be no word.

    Args:
      turns: of the part, the first of them the main speaker's.
      tokenizer: of the model.
      frame_rate: steps of the model per second, Hz.
      multi_speaker: whether the model knows two speakers.
      padding_between: steps to leave free between words.
      skip_unsayable: leave out words that cannot be encoded and tags that cannot be read.
      speaker: `MAIN` or `OTHER`, whose word came before; None at the beginning of a script.

    Raises:
      As `entries_of`, which refuses a script without words too.
    """
    if not 0 <= padding_between <= LONGEST_PAUSE_S * frame_rate:
        raise SpeechError(
            f"padding_between is {padding_between} steps, which must lie between 0 and one hour of them: try 0, 1 or 2"
        )
    entries: list[Entry] = []
    last = speaker
    for number, text in enumerate(turns, start=1):
        speaker = MAIN if number % 2 else OTHER
        for part in _parts(text.translate(_REWRITTEN)):
            try:
                seconds = _seconds(part, number) if part[0] in "<>" else None
                tokens = [] if seconds is not None else _encode(tokenizer, part, number)
            except SpeechError as error:
                if not skip_unsayable:
                    raise UnsayableError(str(error), entries) from None
                _log.warning("left out: %s", error)
                continue
            if seconds is not None:
                entries.append(Entry((), "", round(seconds * frame_rate)))
            if not tokens:
                continue
            if multi_speaker and speaker != last:
                tokens, last = [speaker, *tokens], speaker
            # The steps that feed the word are padding to the machine too.
            padding = padding_between + len(tokens) - 1 if padding_between else 0
            entries.append(Entry(tuple(tokens), part, padding))
    return entries


def _parts(text: str) -> Iterator[str]:
    """Yield the words and tags of a turn; a tag begins with "<" or is a single ">"."""
    begin = 0
    for mark in _MARK.finditer(text):
        if mark.start() > begin:
            yield text[begin : mark.start()]
        begin = mark.end()
        if not mark[0].isspace():
            yield mark[0]
    if begin < len(text):
        yield text[begin:]


def _seconds(tag: str, turn: int) -> float:
    if len(tag) == 1:
        raise SpeechError(
            f"turn {turn} has a {tag!r} that belongs to no tag, and a tag has both '<' and '>': remove it, or write a "
            f"break as {_EXAMPLE}"
        )
    if not (known := _BREAK.fullmatch(tag)):
        kind = "a break that cannot be read" if tag.startswith("<break") else "an unknown tag"
        raise SpeechError(
            f"turn {turn} has {tag!r}, {kind}, and only breaks such as {_EXAMPLE} are understood: write one so, "
            "or remove it"
        )
    if (seconds := float(known[1])) > LONGEST_PAUSE_S:
        raise SpeechError(
            f"turn {turn} has a break of {known[1]} s, and {LONGEST_PAUSE_S:.0f} s is the longest: write a shorter one"
        )
    return seconds


def _encode(tokenizer: Tokenizer, word: str, turn: int) -> list[int]:
    """Return the tokens of a word; none for one that normalises to nothing, such as a zero-width space."""
    try:
        tokens = tokenizer.encode(word)
    except TextError:
        tokens = []
    else:
        if not any(letter.isprintable() for letter in word):
            return []
    # The first ids are the machine's own, whatever pieces the tokenizer keeps there.
    if not tokens or not all(token > PAD and tokenizer.has_text(token) for token in tokens):
        raise SpeechError(
            f"turn {turn} has the word {word!r}, which {tokenizer.path.name} encodes as {tokens}, and every word must "
            "become pieces that the tokenizer knows: spell it in the letters of the model's languages"
        )
    return tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Script:
    """The words and breaks of every row, in arrays of capacities that scripts of many lengths share.

    The tokens of entry e are `tokens_BT[start_BL[e] : end_BL[e]]`, and lie after those of all entries before it. More
    entries may be added at a row's end while the row is spoken: what was there keeps its place.

    Attributes:
      tokens_BT: int32.
      start_BL: int32.
      end_BL: int32; a break's is its start.
      padding_BL: int32, as in `Entry`.
      words_before_BL: int32, the words among the entries before each.
      word_BL: int32, of the n-th word the entry that it is.
      count_B: int32, entries that are known.
      words_B: int32, words that are known.
      complete_B: bool, whether no more will come.
    """

    tokens_BT: Array
    start_BL: Array
    end_BL: Array
    padding_BL: Array
    words_before_BL: Array
    word_BL: Array
    count_B: Array
    words_B: Array
    complete_B: Array


def capacity(rows: Sequence[Sequence[Entry]]) -> tuple[int, int]:
    """Return room for the entries of some rows and for their tokens: powers of two, so that few are ever compiled."""
    E = _capacity((len(entries) for entries in rows), MIN_ENTRIES)
    return E, _capacity((sum(len(entry.tokens) for entry in entries) for entries in rows), MIN_TOKENS)


def pack(
    rows: Sequence[Sequence[Entry]],
    complete: Sequence[bool] | None = None,
    *,
    room: tuple[int, int] | None = None,
) -> Script:
    """Pack entries into arrays.

    Args:
      rows: the entries that are known of each row; a row may have none.
      complete: of each row, whether no more entries will come; None means that none will in any row.
      room: capacities of entries and tokens; None takes the `capacity` of these rows.

    Returns:
      The script, numpy arrays.
    """
    complete = [True] * len(rows) if complete is None else complete
    E, L = capacity(rows) if room is None else room
    packed = [_row(entries, known, E, L) for entries, known in zip(rows, complete, strict=True)]
    return Script(*(np.stack(arrays) for arrays in zip(*packed, strict=True)))


def _row(entries: Sequence[Entry], complete: bool, E: int, L: int) -> tuple[np.ndarray, ...]:
    """Return the fields of `Script` for one row, in their order."""
    lengths = np.array([len(entry.tokens) for entry in entries], np.int32)
    ends = np.cumsum(lengths, dtype=np.int32)
    worded = lengths > 0
    return (
        _filled([token for entry in entries for token in entry.tokens], L),
        _filled(ends - lengths, E),
        _filled(ends, E),
        _filled([entry.padding for entry in entries], E),
        _filled(np.cumsum(worded) - worded, E),
        _filled(np.flatnonzero(worded), E),
        np.array(len(entries), np.int32),
        np.array(worded.sum(), np.int32),
        np.array(complete),
    )


def _filled(values: Sequence[int] | np.ndarray, capacity: int) -> np.ndarray:
    row = np.zeros(capacity, np.int32)
    row[: len(values)] = values
    return row


def _capacity(sizes: Iterator[int], least: int) -> int:
    largest = max(sizes, default=0)
    return max(least, 1 << (largest - 1).bit_length())

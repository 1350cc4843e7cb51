"""Group words into subtitles: SubRip, WebVTT, and a table of tab-separated values.

A new cue starts
- after a silence of more than one second;
- after the end of a sentence, once the cue has lasted a second;
- where the cue would not fit two lines of 42 characters (a longer single word has a line to itself);
- where the cue would last more than 7 seconds.
A cue shows from its first word's start to its last word's end, or for 0.3 s if that is longer; it never outlasts 7 s
nor the start of the next cue, and cues start at least a millisecond apart.
"""

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dsm_jax.stt.events import Word

MAX_GAP_S = 1.0
MIN_SENTENCE_S = 1.0
MAX_LINE_CHARACTERS = 42
MAX_LINES = 2
MAX_CUE_MS = 7_000
MIN_CUE_MS = 300


@dataclass(frozen=True)
class Cue:
    """Lines of text shown together from `start_ms` to `end_ms`."""

    start_ms: int
    end_ms: int
    lines: tuple[str, ...]


def srt(words: Sequence[Word]) -> str:
    """Return SubRip subtitles of words in order."""
    return "\n".join(
        f"{number}\n{_clock(cue.start_ms, ',')} --> {_clock(cue.end_ms, ',')}\n" + "\n".join(cue.lines) + "\n"
        for number, cue in enumerate(cues(words), start=1)
    )


def vtt(words: Sequence[Word]) -> str:
    """Return WebVTT subtitles of words in order."""
    return "WEBVTT\n" + "".join(
        f"\n{_clock(cue.start_ms, '.')} --> {_clock(cue.end_ms, '.')}\n" + _escaped("\n".join(cue.lines)) + "\n"
        for cue in cues(words)
    )


def tsv(words: Sequence[Word]) -> str:
    """Return a table of words in order: start and end in milliseconds and text of each cue."""
    return "start\tend\ttext\n" + "".join(
        f"{cue.start_ms}\t{cue.end_ms}\t{' '.join(cue.lines)}\n" for cue in cues(words)
    )


def cues(words: Sequence[Word]) -> list[Cue]:
    """Group words into cues by the rules at the top of this file.

    Args:
      words: in order. White space within a word, line breaks included, becomes one space; blank words are left out.

    Returns:
      Cues that hold every word in order, do not overlap, and last at least a millisecond.
    """
    groups = list(_groups([word for word in words if word.text.strip()]))
    starts_ms = []
    for group in groups:
        # Strictly increasing, so that a cue has room to show even where a model gives several words one time.
        earliest = starts_ms[-1] + 1 if starts_ms else 0
        starts_ms.append(max(earliest, _milliseconds(group[0].start)))
    result = []
    for index, group in enumerate(groups):
        start_ms = starts_ms[index]
        latest = min([start_ms + MAX_CUE_MS, *starts_ms[index + 1 : index + 2]])
        end_ms = min(latest, max(_milliseconds(group[-1].end), start_ms + MIN_CUE_MS))
        result.append(Cue(start_ms, end_ms, tuple(_lines(group))))
    return result


def _groups(words: Sequence[Word]) -> Iterator[list[Word]]:
    group: list[Word] = []
    for word in words:
        if group and _breaks(group, word):
            yield group
            group = []
        group.append(word)
    if group:
        yield group


def _breaks(group: list[Word], word: Word) -> bool:
    first, last = group[0], group[-1]
    return (
        word.start - last.end > MAX_GAP_S
        or (_ends_sentence(last.text) and last.end - first.start >= MIN_SENTENCE_S)
        or len(_lines([*group, word])) > MAX_LINES
        or word.end - first.start > MAX_CUE_MS / 1000
    )


def _ends_sentence(text: str) -> bool:
    return text.rstrip().rstrip("\"')]»”’").endswith((".", "?", "!", "…", "。", "？", "！"))


def _lines(words: list[Word]) -> list[str]:
    text = " ".join(" ".join(word.text.split()) for word in words)
    return textwrap.wrap(text, MAX_LINE_CHARACTERS, break_long_words=False, break_on_hyphens=False)


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def _clock(milliseconds: int, point: str) -> str:
    """Format a time that is already whole milliseconds, so that rounding never shows 60 in the seconds."""
    seconds, milliseconds = divmod(milliseconds, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{seconds:02}{point}{milliseconds:03}"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")

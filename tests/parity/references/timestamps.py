"""Words and their times from text tokens, with the rules of Kyutai's script `stt_from_file_pytorch.py`."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

_FRAME_RATE = 12.5
_LONGEST_LAST_WORD = 12  # frames; the script allows 12.5, and stops with a TypeError when it comes to that
_WORD, _END, _PADDING = 0, 2, 3


def moshi_timestamped(
    tokens_T: Sequence[int], tokenizer_path: Path, offset_seconds: float
) -> list[tuple[str, float, float]]:
    """Return words of a token stream, in the order in which they were said.

    A word lies strictly between two tokens 0; what comes before the first is dropped. When several words share one
    segment, each but the last gets as many frames as it has pieces.

    Args:
        tokens_T: One text token per frame of 80 ms.
        tokenizer_path: A sentencepiece model.
        offset_seconds: Subtracted from every time: the model's delay and the silence before the audio.

    Returns:
        (text, start, end) of each word, in seconds, never below 0.
    """
    tokenizer = sentencepiece.SentencePieceProcessor(str(tokenizer_path))
    tokens = [int(token) for token in tokens_T]
    boundaries = [frame for frame, token in enumerate(tokens) if token == _WORD]
    if not boundaries:
        return []
    last = boundaries[-1] + 1
    ends = [frame for frame in range(last, len(tokens)) if tokens[frame] == _END]
    last_end = ends[0] if ends else min(len(tokens), last + _LONGEST_LAST_WORD)
    segments = [*((left + 1, right) for left, right in itertools.pairwise(boundaries)), (last, last_end)]

    def seconds(frame: int) -> float:
        return max(0.0, frame / _FRAME_RATE - offset_seconds)

    words = []
    for start, end in segments:
        text = tokenizer.decode([token for token in tokens[start:end] if token > _PADDING])
        *earlier, final = text.split() or [""]
        for word in earlier:
            word_end = start + len(tokenizer.encode(word))
            words.append((word, seconds(start), seconds(word_end)))
            start = word_end
        if final:
            words.append((final if earlier else text, seconds(start), seconds(end)))
    return words

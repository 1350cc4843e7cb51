"""From words with times to the text stream that a model learns to say: the inverse of `dsm_jax.stt.words`.

A word is a boundary token and its pieces, one a frame; every other frame is padding. The first piece stands where
`WordReader` will say that the word starts: its start time plus the delay of the text and the silence before the audio.
A word whose place is still taken, by the pieces of the one before, follows as soon as it can.

Source: Zeghidour et al. 2025 (Delayed Streams Modeling), section 3; the published models' streams.
"""

from collections.abc import Iterable, Mapping

import numpy as np

from dsm_jax.configs import LMConfig
from dsm_jax.errors import TrainingError
from dsm_jax.stt.words import Timing
from dsm_jax.tokenizers import Tokenizer
from dsm_jax.training.compose import Spoken


def pieces_of(word: str, tokenizer: Tokenizer, config: LMConfig) -> list[int]:
    """The tokens of a word.

    Raises:
      TrainingError: the tokenizer cannot spell it.
    """
    pieces = tokenizer.encode(word)
    # What it cannot spell is the unknown piece, whose id is the boundary between words.
    if not pieces or min(pieces) <= config.existing_text_padding_id:
        raise TrainingError(
            f"the word {word!r} cannot be spelt by the model's tokenizer; leave it out, or spell it in letters of the "
            "model's languages"
        )
    return pieces


def text_stream(
    words: Iterable[Spoken],
    tokenizer: Tokenizer,
    config: LMConfig,
    timing: Timing,
    *,
    frames: int,
    marks: Mapping[int, int] | None = None,
) -> np.ndarray:
    """The text tokens of a clip, as the first stream of `DelayedStreamsLM.__call__`.

    Step t has heard the frames before t, so the token that `transcribe` lists for frame i is said at step i + 1. That
    is column i + 1, less the delay that the config gives the text stream itself (0 in the published models). What step
    0 says belongs to no frame and is padding; what would stand after the last column is cut off.

    Args:
      words: in the order they are said.
      tokenizer: of the model.
      config: of the model.
      timing: where the frames lie in the audio, as for `WordReader`.
      frames: of the clip, the silence before the audio included.
      marks: tokens that come ahead of the pieces of some words, by the word's number.

    Returns:
      int32 [frames].

    Raises:
      TrainingError: words out of order, or one that the tokenizer cannot spell.
    """
    stream_T = np.full(frames, config.existing_text_padding_id, np.int32)
    column_of_frame_0 = 1 - config.delays[0]
    free, before = max(0, column_of_frame_0), -np.inf
    for number, word in enumerate(words):
        if word.start < before:
            raise TrainingError(
                f"the word {word.text!r} starts at {word.start} s, before the one ahead of it ({before} s); sort the "
                "words"
            )
        before = word.start
        pieces = pieces_of(word.text, tokenizer, config)
        if marks is not None and number in marks:
            pieces = [marks[number], *pieces]
        first = round((word.start + timing.text_offset) * timing.frame_rate) + column_of_frame_0
        boundary = max(first - 1, free)
        tokens = np.array([config.existing_text_end_padding_id, *pieces], np.int32)[: max(0, frames - boundary)]
        stream_T[boundary : boundary + len(tokens)] = tokens
        free = boundary + 1 + len(pieces)
    return stream_T

"""Turn words with times into the text streams that models are trained on.

For speech-to-text, a word is a boundary token and the word's tokens, one per frame; all other frames are padding. The
word's first token is in the frame from which `WordReader` reads the word's start: the start time plus the delay of the
text and the silence before the audio. If the tokens of the word before fill that frame, the word follows after them.

For text-to-speech, the stream is the one that the word machine of `dsm_jax.tts` feeds for a script whose words start at
the given times.

Source: Zeghidour et al. 2025 (Delayed Streams Modeling), section 3; the published models' streams.
"""

import collections
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from dsm_jax.configs import LMConfig
from dsm_jax.errors import TextError, TrainingError
from dsm_jax.models.streams import ZERO_TOKEN
from dsm_jax.stt.words import Timing
from dsm_jax.tokenizers import Tokenizer
from dsm_jax.training.data import WordSpan
from dsm_jax.tts.script import MAIN, NEW_WORD, OTHER, PAD
from dsm_jax.tts.words import WordMachine


def tokens_of(word: str, tokenizer: Tokenizer, config: LMConfig) -> list[int]:
    """Encode a word.

    Raises:
      TrainingError: the tokenizer cannot spell the word.
    """
    try:
        tokens = tokenizer.encode(word)
    except TextError:
        tokens = []
    # The tokenizer's unknown token has the id of the boundary token.
    if not tokens or min(tokens) <= config.existing_text_padding_id:
        raise TrainingError(
            f"the word {word!r} cannot be spelt by the model's tokenizer; leave it out, or spell it in letters of the "
            "model's languages"
        )
    return tokens


def text_stream(
    words: Iterable[WordSpan],
    tokenizer: Tokenizer,
    config: LMConfig,
    timing: Timing,
    *,
    frames: int,
    prefixes: Mapping[int, int] | None = None,
) -> np.ndarray:
    """Make the text stream of a clip, the first stream of `DelayedStreamsLM.__call__`.

    The inputs of step t are the frames before t, so the token that `transcribe` lists for frame i is predicted in step
    i + 1. Its column is i + 1 minus the config's delay of the text stream (0 in the published models). Column 0 belongs
    to no frame and is padding; tokens after the last column are dropped.

    Args:
      words: words in order.
      tokenizer: tokenizer of the model.
      config: config of the language model.
      timing: times of the frames, as for `WordReader`.
      frames: length of the clip, with the silence before the audio.
      prefixes: token to insert before the tokens of a word, by the word's index.

    Returns:
      Tokens, int32 [frames].

    Raises:
      TrainingError: words are out of order, or the tokenizer cannot spell a word.
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
        tokens = tokens_of(word.text, tokenizer, config)
        if prefixes is not None and number in prefixes:
            tokens = [prefixes[number], *tokens]
        first = round((word.start + timing.text_offset) * timing.frame_rate) + column_of_frame_0
        boundary = max(first - 1, free)
        free = boundary + 1 + len(tokens)
        fed = np.array([config.existing_text_end_padding_id, *tokens], np.int32)[: max(0, frames - boundary)]
        stream_T[boundary : boundary + len(fed)] = fed
    return stream_T


def script_stream(
    words: Sequence[Sequence[int]], starts: Sequence[int], machine: WordMachine, *, frames: int, end: int
) -> np.ndarray:
    """Make the text stream that the word machine feeds for a script whose words start at given steps.

    Args:
      words: tokens of each word, at least one.
      starts: step at which each word starts, rising; a word whose step is taken starts at the next free step.
      machine: the model's word machine; its padding rules are not applied.
      frames: length of the stream.
      end: step at which the script ends, which models with a second text stream have as input.

    Returns:
      Tokens, int32 [frames]; in models with a second text stream, two tokens folded into one integer.
    """
    first_T, second_T = np.full(frames, PAD, np.int32), np.full(frames, ZERO_TOKEN, np.int32)
    free, ahead = 0, machine.second_stream_ahead
    marks: dict[int, int] = {}
    for number, (tokens, start) in enumerate(zip(words, starts, strict=True)):
        mark = max(start, free)
        if mark >= frames:
            break
        marks[mark] = number
        fed = list(tokens) if ahead else [NEW_WORD, *tokens]
        first_T[mark : mark + len(fed)] = fed[: frames - mark]
        free = mark + len(fed)
    if not ahead:
        return first_T
    if len(marks) == len(words):
        marks[max(end, free)] = len(words)
    queue: collections.deque[int] = collections.deque()
    for step in range(frames):
        if step in marks:
            second_T[step] = NEW_WORD
            for tokens in words[marks[step] + ahead :][:1]:
                queue.extend(tokens)
        elif queue:
            second_T[step] = queue.popleft()
    return (second_T + 1) * machine.card + first_T


def speaker_prefixes(words: Sequence[WordSpan]) -> tuple[dict[int, int], list[str]]:
    """Find the speaker token before each word that changes the speaker, and the speakers in order of appearance.

    Raises:
      TrainingError: there are more than two speakers.
    """
    speakers = list(dict.fromkeys(word.speaker for word in words))
    if len(speakers) > 2:
        raise TrainingError(f"the speakers of one row are {', '.join(speakers)}; models know two: cut the recording")
    prefixes, last = {}, None
    for number, word in enumerate(words):
        if word.speaker != last:
            prefixes[number] = (MAIN, OTHER)[speakers.index(word.speaker)]
            last = word.speaker
    return prefixes, speakers

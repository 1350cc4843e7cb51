"""Turn words with times into the text streams that models are trained on.

For speech-to-text a word is a boundary token and the word's tokens, one in each frame; every other frame is padding.
The first token stands where `WordReader` reads the start of the word: its start time plus the delay of the text and the
silence before the audio. A word whose frame is taken by the tokens of the word before follows as soon as it can.

For text-to-speech the stream is that which the word machine of `dsm_jax.tts` feeds for a script whose words start at
their times.

Source: Zeghidour et al. 2025 (Delayed Streams Modeling), section 3; the published models' streams.
"""

import collections
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from dsm_jax.configs import LMConfig
from dsm_jax.errors import TrainingError
from dsm_jax.stt.words import Timing
from dsm_jax.tokenizers import Tokenizer
from dsm_jax.training.data import WordSpan
from dsm_jax.tts.script import MAIN, NEW_WORD, OTHER, PAD, ZERO
from dsm_jax.tts.words import WordMachine


def tokens_of(word: str, tokenizer: Tokenizer, config: LMConfig) -> list[int]:
    """Encode a word.

    Raises:
      TrainingError: the tokenizer cannot spell the word.
    """
    tokens = tokenizer.encode(word)
    # The tokenizer's unknown token has the id of the boundary between words.
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
    """Make the text stream of a clip, as the first stream of `DelayedStreamsLM.__call__`.

    Step t is fed the frames before t, so the model predicts at step i + 1 the token that `transcribe` lists for frame
    i. That token's column is i + 1, less the delay that the config gives the text stream itself (0 in the published
    models). The prediction of step 0 belongs to no frame and is padding; tokens after the last column are dropped.

    Args:
      words: in order.
      tokenizer: of the model.
      config: of the model.
      timing: places the frames in the audio, as for `WordReader`.
      frames: of the clip, the silence before the audio included.
      prefixes: tokens ahead of the tokens of some words, by the word's number.

    Returns:
      int32 [frames].

    Raises:
      TrainingError: words out of order, or a word that the tokenizer cannot spell.
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
      starts: steps at which the words start, rising; a word whose step is taken follows as soon as it can.
      machine: the rules of the model; paddings are not applied.
      frames: length of the stream.
      end: step at which the script ends, which is fed to a model with a second text stream.

    Returns:
      int32 [frames]: two tokens in one for a model with a second text stream.
    """
    first_T, second_T = np.full(frames, PAD, np.int32), np.full(frames, ZERO, np.int32)
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
    """Find the speaker tokens ahead of words at which the speaker changes, and the speakers in order of appearance.

    Raises:
      TrainingError: more than two speakers.
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

"""Write a conversation as positions of CSM: the text of each turn, its frames of audio, and a frame of zeros.

A turn is the tokens of `[speaker]text` between a token that begins and one that ends a text, then the frames of its
recording and one frame of zeros, which says that the recording has ended. Turns follow one another; the last one has no
recording, as the model goes on with it.

Shape letters: docs/axes.md; M is the streams, text first, T the positions.
Source: SesameAILabs/csm@2d72082 generator.py:Generator._tokenize_segment; transformers 5.24
models/csm/processing_csm.py and the published chat template, which give the same positions.
"""

from collections.abc import Sequence

import numpy as np

from dsm_jax.configs import CsmConfig
from dsm_jax.errors import SpeechError, TextError
from dsm_jax.models.streams import ZERO_TOKEN
from dsm_jax.tokenizers import Tokenizer

SPEAKER_DIGITS = 9  # at most: Python does not write a number of thousands of digits


def is_whole(value: object) -> bool:
    """Tell whether a value is a whole number; True and False are none."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def text_ids(config: CsmConfig, tokenizer: Tokenizer, text: str, speaker: int) -> list[int]:
    """Return the tokens of a turn's text, with those that begin and end a text.

    Args:
      config: of the language model.
      tokenizer: of the model.
      text: what is said; markers such as `<|AUDIO|>` in it are letters like any others.
      speaker: number of the speaker, from 0.

    Raises:
      SpeechError: there is no text, it has half of a character in it, the speaker is no such number, or the tokenizer
        makes a marker of a part of the text.
    """
    if not isinstance(text, str) or not text.strip():
        raise SpeechError(f"the text of a turn is {text!r}; expected some words")
    if isinstance(speaker, int | np.integer) and abs(int(speaker)) >= 10**SPEAKER_DIGITS:
        raise SpeechError(f"the speaker of {text!r} has more than {SPEAKER_DIGITS} digits; number the speakers from 0")
    if not is_whole(speaker) or speaker < 0:
        raise SpeechError(f"the speaker of {text!r} is {speaker!r}; expected a number: 0, 1 and so on")
    try:
        ids = tokenizer.encode(f"[{speaker}]{text}")
    except TextError as error:
        raise SpeechError(f"the turn cannot be said: {error}") from None
    markers = {config.begin_id, config.end_id, config.audio_id, config.audio_end_id}
    if markers & set(ids):
        raise SpeechError(f"the tokenizer makes a marker of a part of {text!r}; leave that part out")
    return [config.begin_id, *ids, config.end_id]


def turn_MT(config: CsmConfig, ids: Sequence[int], codes_QT: np.ndarray | None = None) -> np.ndarray:
    """Return the positions of a turn, int32 [M, T].

    Args:
      config: of the language model.
      ids: from `text_ids`.
      codes_QT: codes of the recording, without the frame of zeros; None for a turn that is still to be spoken.
    """
    text_MT = np.full((1 + config.n_q, len(ids)), ZERO_TOKEN, np.int32)
    text_MT[0] = ids
    if codes_QT is None:
        return text_MT
    audio_MT = np.zeros((1 + config.n_q, codes_QT.shape[1] + 1), np.int32)
    audio_MT[0] = ZERO_TOKEN
    audio_MT[1:, :-1] = codes_QT
    return np.concatenate([text_MT, audio_MT], axis=1)

"""How a recording becomes the frames that a model hears: silence, prompt, audio, and silence until the text is out.

The silences are exact in samples: int(prefix * rate) before and int((delay + 1) * rate) after, and only whole frames
are heard, as in kyutai-labs/moshi@e6a55d2 moshi/run_inference.py and transformers' feature extractor. An audio prompt
is heard before the recording, padded to a whole frame, with ten frames of silence after it.
"""

import dataclasses
from typing import cast

import numpy as np

from dsm_jax.audio import Source
from dsm_jax.configs import LMConfig, ModelConfig
from dsm_jax.errors import PromptError
from dsm_jax.stt.words import PauseRule, Timing, WordReader
from dsm_jax.tokenizers import Tokenizer

PROMPT_GAP_FRAMES = 10


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What the model is told before a recording.

    Attributes:
      text: words that it is made to say first, in its own spelling.
      audio: a recording that it hears first: a path, or samples at the model's rate.
      cut: leave out of the transcript what belongs to the prompt.
    """

    text: str | None = None
    audio: Source | None = None
    cut: bool = False


def prompt_tokens(prompt: Prompt, tokenizer: Tokenizer, lm: LMConfig) -> tuple[int, ...]:
    """The text prompt as tokens; none where there is no text.

    Raises:
      PromptError: a text without words, or one that the tokenizer cannot spell.
    """
    if prompt.text is None:
        return ()
    ids = tokenizer.encode(prompt.text)
    if not ids:
        raise PromptError("the text prompt has no words; give some, or leave it out")
    if unknown := sum(i <= lm.existing_text_padding_id for i in ids):
        raise PromptError(
            f"the text prompt {prompt.text!r} has {unknown} places that the model's tokenizer cannot spell; "
            "use letters of the model's languages"
        )
    return tuple(ids)


class Hearing:
    """Collects the samples of one recording as they come and gives them out as frames.

    The prompt's audio has been read: float samples at the model's rate.
    """

    def __init__(self, config: ModelConfig, prompt: Prompt):
        rate, stt = config.mimi.sample_rate, config.stt
        self.frame_size = config.mimi.frame_size
        self.samples = 0  # of the recording itself, so far
        self.ended = False
        self._after = np.zeros(int((stt.audio_delay_seconds + 1.0) * rate), np.float32)
        self._buffer = np.zeros(int(stt.audio_silence_prefix_seconds * rate), np.float32)
        if prompt.audio is not None:
            heard = cast(np.ndarray, prompt.audio)
            gap = -heard.size % self.frame_size + PROMPT_GAP_FRAMES * self.frame_size
            self._buffer = np.concatenate([self._buffer, heard, np.zeros(gap, np.float32)])

    def push(self, samples: np.ndarray) -> None:
        """More of the recording: float32 mono samples at the model's rate."""
        self.samples += samples.size
        self._buffer = np.concatenate([self._buffer, samples])

    def end(self) -> None:
        """The recording is over."""
        self.ended = True
        self._buffer = np.concatenate([self._buffer, self._after])

    @property
    def ready(self) -> int:
        """Whole frames that can be taken."""
        return self._buffer.size // self.frame_size

    def take(self, frames: int) -> np.ndarray:
        """The next `frames` frames, of those that are ready: [frames * frame_size]."""
        cut = frames * self.frame_size
        taken, self._buffer = self._buffer[:cut], self._buffer[cut:]
        return taken


def word_reader(
    config: ModelConfig, lm: LMConfig, tokenizer: Tokenizer, prompt: Prompt, pauses: PauseRule
) -> WordReader:
    """Reads the words of a recording that is heard through `Hearing`, timed from the recording's own start."""
    rate, frame_rate, stt = config.mimi.sample_rate, config.mimi.frame_rate, config.stt
    prefix = int(stt.audio_silence_prefix_seconds * rate) / rate
    prompt_frames = 0 if prompt.audio is None else -(-cast(np.ndarray, prompt.audio).size // config.mimi.frame_size)
    gap = PROMPT_GAP_FRAMES if prompt_frames else 0
    audio_offset = prefix + (prompt_frames + gap) / frame_rate
    # What answers an audio prompt is out once the text's delay has passed; the gap after it keeps the two apart.
    skip = prompt_frames + int((stt.audio_delay_seconds + stt.audio_silence_prefix_seconds) * frame_rate)
    return WordReader(
        tokenizer,
        Timing(frame_rate, audio_offset + stt.audio_delay_seconds, audio_offset),
        padding=lm.existing_text_padding_id,
        boundary=lm.existing_text_end_padding_id,
        pauses=pauses,
        skip=skip if prompt.cut and prompt_frames else 0,
        skip_ids=prompt_tokens(prompt, tokenizer, lm) if prompt.cut else (),
    )

"""From a recording to the frames that a model is fed: silence, prompt, audio, and silence until the text is out.

The silences are exact in samples: int(prefix * rate) before and int((delay + 1) * rate) after, and only whole frames
are used, as in kyutai-labs/moshi@e6a55d2 moshi/run_inference.py and transformers' feature extractor. An audio prompt
comes before the recording, padded to a whole frame, with ten frames of silence after it.

Shape letters: T samples.
"""

import numpy as np

from dsm_jax.configs import LMConfig, ModelConfig
from dsm_jax.errors import PromptError
from dsm_jax.stt.words import PauseRule, Timing, WordReader
from dsm_jax.tokenizers import Tokenizer

PROMPT_GAP_FRAMES = 10


def prompt_tokens(text: str | None, tokenizer: Tokenizer, lm: LMConfig) -> tuple[int, ...]:
    """Encodes a text prompt; None has no tokens.

    Raises:
      PromptError: a text without words, or one that the tokenizer cannot spell.
    """
    if text is None:
        return ()
    ids = tokenizer.encode(text)
    if not ids:
        raise PromptError("the text prompt has no words; give some, or leave it out")
    if unknown := sum(i <= lm.existing_text_padding_id for i in ids):
        raise PromptError(
            f"the text prompt {text!r} has {unknown} places that the model's tokenizer cannot spell; "
            "use letters of the model's languages"
        )
    return tuple(ids)


class FrameBuffer:
    """Collects the samples of one recording as they arrive and hands them out as whole frames.

    Args:
      config: of the model.
      prompt_T: samples of an audio prompt at the model's rate; None for none.
    """

    def __init__(self, config: ModelConfig, prompt_T: np.ndarray | None = None):
        rate, stt = config.mimi.sample_rate, config.stt
        self.frame_size = config.mimi.frame_size
        self.samples = 0  # of the recording itself, so far
        self.ended = False
        self._after = np.zeros(int((stt.audio_delay_seconds + 1.0) * rate), np.float32)
        self._buffer = np.zeros(int(stt.audio_silence_prefix_seconds * rate), np.float32)
        if prompt_T is not None:
            gap = -prompt_T.size % self.frame_size + PROMPT_GAP_FRAMES * self.frame_size
            self._buffer = np.concatenate([self._buffer, prompt_T, np.zeros(gap, np.float32)])

    def push(self, samples: np.ndarray) -> None:
        """Adds more of the recording: float32 mono samples at the model's rate."""
        self.samples += samples.size
        self._buffer = np.concatenate([self._buffer, samples])

    def end(self) -> None:
        """Ends the recording: adds the silence in which the model's last words come out."""
        self.ended = True
        self._buffer = np.concatenate([self._buffer, self._after])

    @property
    def ready(self) -> int:
        """Whole frames that can be popped."""
        return self._buffer.size // self.frame_size

    def pop_frames(self, frames: int) -> np.ndarray:
        """Returns the next `frames` of the frames that are ready: [frames * frame_size]."""
        cut = frames * self.frame_size
        popped, self._buffer = self._buffer[:cut], self._buffer[cut:]
        return popped


def word_reader(
    config: ModelConfig,
    lm: LMConfig,
    tokenizer: Tokenizer,
    *,
    pauses: PauseRule = PauseRule(),
    prompt_T: np.ndarray | None = None,
    prompt_ids: tuple[int, ...] = (),
    cut_prompt: bool = False,
) -> WordReader:
    """Makes the reader of a recording's words, timed from the recording's own start.

    Args:
      config: of the model.
      lm: its language model's config.
      tokenizer: of the model.
      pauses: when a pause is reported.
      prompt_T: samples of the audio prompt that `FrameBuffer` put before the recording.
      prompt_ids: tokens of the text prompt.
      cut_prompt: leave out the text that belongs to the prompts.
    """
    rate, frame_rate, stt = config.mimi.sample_rate, config.mimi.frame_rate, config.stt
    prefix = int(stt.audio_silence_prefix_seconds * rate) / rate
    prompt_frames = 0 if prompt_T is None else -(-prompt_T.size // config.mimi.frame_size)
    gap = PROMPT_GAP_FRAMES if prompt_frames else 0
    audio_offset = prefix + (prompt_frames + gap) / frame_rate
    # Text of the audio prompt ends `delay` frames after the prompt; the gap keeps it apart from the recording's text.
    skip = prompt_frames + int((stt.audio_delay_seconds + stt.audio_silence_prefix_seconds) * frame_rate)
    return WordReader(
        tokenizer,
        Timing(frame_rate, audio_offset + stt.audio_delay_seconds, audio_offset),
        padding=lm.existing_text_padding_id,
        boundary=lm.existing_text_end_padding_id,
        pauses=pauses,
        skip=skip if cut_prompt and prompt_frames else 0,
        skip_ids=prompt_ids if cut_prompt else (),
    )

"""Cut a recording into the frames that a model is fed: silence, prompt, audio, and silence until the text is out.

The silences are exact in samples: int(prefix * rate) before and int((delay + 1) * rate) after, and only whole frames
are used, as in kyutai-labs/moshi@e6a55d2 moshi/run_inference.py and transformers' feature extractor. An audio prompt
comes before the recording, padded to a whole frame, with ten frames of silence after it. A text prompt without audio is
said over silence before the recording, a frame for each token, so that no word of the recording is lost to it.

Shape letters: T samples.
"""

import dataclasses
from collections import deque

import numpy as np

from dsm_jax.configs import LMConfig, ModelConfig
from dsm_jax.errors import PromptError, TextError, plural
from dsm_jax.stt.levels import SoundLevels
from dsm_jax.stt.words import Timing, VadOptions, WordReader
from dsm_jax.tokenizers import Tokenizer

PROMPT_GAP_FRAMES = 10


@dataclasses.dataclass(frozen=True)
class LeadIn:
    """Input that precedes the recording itself.

    Attributes:
      prompt_T: samples of the prompt, whole frames, silent for a text prompt alone; empty for no prompt.
      ids: tokens of the text prompt.
      deadline: frame by which the tokens of the text prompt have been produced; 0 for no text prompt.
      skip: frames whose text answers the prompt.
    """

    prompt_T: np.ndarray
    ids: tuple[int, ...]
    deadline: int
    skip: int


NO_LEAD_IN = LeadIn(np.zeros(0, np.float32), (), 0, 0)


def lead_in(
    text: str | None, prompt_T: np.ndarray | None, config: ModelConfig, lm: LMConfig, tokenizer: Tokenizer
) -> LeadIn:
    """Make what comes before a recording from a prompt.

    Args:
      text: text of the prompt; None for none.
      prompt_T: samples of the audio prompt at the model's rate; None for none.
      config: config of the model.
      lm: its language model's config.
      tokenizer: tokenizer of the model.

    Raises:
      PromptError: a text without words, one that the tokenizer cannot spell, or more text than the audio prompt has
        frames.
    """
    stt, frame_size = config.stt, config.mimi.frame_size
    if text is None and prompt_T is None:
        return NO_LEAD_IN
    ids = prompt_tokens(text, tokenizer, lm)
    if prompt_T is None:
        # Each word gets its boundary, as in the text that the model was trained on.
        words = [tokenizer.encode(word) for word in (text or "").split()]
        ids = tuple(i for word in words for i in (lm.existing_text_end_padding_id, *word))
        prompt_T = np.zeros(len(ids) * frame_size, np.float32)
    frames = -(-prompt_T.size // frame_size)
    padded_T = np.zeros((frames + PROMPT_GAP_FRAMES) * frame_size, np.float32)
    padded_T[: prompt_T.size] = prompt_T
    # Text of the audio prompt ends `delay` frames after the prompt; the gap keeps it apart from the recording's text.
    skip = frames + int((stt.audio_delay_seconds + stt.audio_silence_prefix_seconds) * config.mimi.frame_rate)
    if len(ids) > skip:
        raise PromptError(
            f"the text prompt has {len(ids)} tokens, and at most {skip} can be said in the audio prompt of "
            f"{frames / config.mimi.frame_rate:.1f} s; give the text that is said in the audio"
        )
    return LeadIn(padded_T, ids, skip if ids else 0, skip)


def prompt_tokens(text: str | None, tokenizer: Tokenizer, lm: LMConfig) -> tuple[int, ...]:
    """Encode a text prompt; None has no tokens.

    Raises:
      PromptError: a text without words, or one that the tokenizer cannot spell.
    """
    if text is None:
        return ()
    try:
        ids = tokenizer.encode(text)
    except TextError as error:
        raise PromptError(f"the prompt cannot be followed: {error}") from None
    if not ids:
        raise PromptError("the text prompt has no words; give some, or leave it out")
    if unknown := sum(i <= lm.existing_text_padding_id for i in ids):
        raise PromptError(
            f"the text prompt {text!r} has {plural(unknown, 'place')} that the model's tokenizer cannot spell; "
            "use letters of the model's languages"
        )
    return tuple(ids)


class FrameBuffer:
    """Collect the samples of one recording as they arrive and hand them out as whole frames.

    Args:
      config: config of the model.
      lead: audio before the recording.
    """

    def __init__(self, config: ModelConfig, lead: LeadIn = NO_LEAD_IN):
        rate, stt = config.mimi.sample_rate, config.stt
        self.frame_size = config.mimi.frame_size
        self.samples = 0  # of the recording itself, so far
        self.total = 0  # with the silence and the prompt before it, and silence that was added
        self.ended = False
        self._after = int((stt.audio_delay_seconds + 1.0) * rate)
        self._held: deque[np.ndarray] = deque()
        self._size = 0
        self._append(np.zeros(int(stt.audio_silence_prefix_seconds * rate), np.float32))
        self._append(lead.prompt_T)

    def push(self, samples: np.ndarray) -> None:
        """Add more of the recording: float32 mono samples at the model's rate."""
        self.samples += samples.size
        self._append(samples)

    def end(self) -> None:
        """End the recording: add the silence in which the model's last words come out."""
        self.ended = True
        self.add_silence(self._after)

    def add_silence(self, samples: int) -> None:
        """Add silence that is not of the recording."""
        self._append(np.zeros(samples, np.float32))

    def _append(self, samples: np.ndarray) -> None:
        if samples.size:
            # The program joins the bytes of all slots' frames.
            self._held.append(np.ascontiguousarray(samples, np.float32))
            self._size += samples.size
            self.total += samples.size

    @property
    def ready(self) -> int:
        """Whole frames that can be popped."""
        return self._size // self.frame_size

    def pop_frames(self, frames: int) -> np.ndarray:
        """Return the next `frames` of the frames that are ready: [frames * frame_size]."""
        wanted, parts = frames * self.frame_size, []
        self._size -= wanted
        while wanted:
            part = self._held.popleft()
            if part.size > wanted:
                self._held.appendleft(part[wanted:])
                part = part[:wanted]
            parts.append(part)
            wanted -= part.size
        return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, np.float32), *parts])

    def pop_all(self) -> np.ndarray:
        """Return all samples that were not popped, with those of a frame that is not whole: [T]."""
        held, self._size = [np.zeros(0, np.float32), *self._held], 0
        self._held.clear()
        return np.concatenate(held)


def word_reader(
    config: ModelConfig,
    lm: LMConfig,
    tokenizer: Tokenizer,
    *,
    pauses: VadOptions = VadOptions(),
    lead: LeadIn = NO_LEAD_IN,
    exclude_prompt: bool = False,
    reference_times: bool = False,
) -> WordReader:
    """Make the reader of a recording's words, timed from the recording's own start.

    Args:
      config: config of the model.
      lm: its language model's config.
      tokenizer: tokenizer of the model.
      pauses: rule by which pauses are reported.
      lead: audio that `FrameBuffer` put before the recording.
      exclude_prompt: leave out the text that belongs to the prompt.
      reference_times: take the published script's times of words.
    """
    rate, frame_rate, stt = config.mimi.sample_rate, config.mimi.frame_rate, config.stt
    prefix = int(stt.audio_silence_prefix_seconds * rate) / rate
    audio_offset = prefix + lead.prompt_T.size / rate
    return WordReader(
        tokenizer,
        Timing(frame_rate, audio_offset + stt.audio_delay_seconds, audio_offset),
        padding=lm.existing_text_padding_id,
        boundary=lm.existing_text_end_padding_id,
        pauses=pauses,
        skip=lead.skip if exclude_prompt else 0,
        levels=None if reference_times else SoundLevels(config.mimi),
    )

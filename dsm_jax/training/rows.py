"""Turns recordings with words into the rows that a speech-to-text model is trained on.

A row feeds a recording as `dsm_jax.stt` does: the silence before it that the model expects, the recording, and silence
until the last of its text. A long recording is cut between words, and each part is a row of its own. The codec encodes
everything once.

In the text stream a word is a boundary token and the word's tokens, one in each frame; every other frame is padding.
The first token stands where `WordReader` reads the start of the word: its start time plus the delay of the text and the
silence before the audio. A word whose frame is taken by the tokens of the word before follows as soon as it can.

Shape letters: B rows that are encoded together, N rows, K streams (text first), Q audio streams, T samples or frames,
C audio channels.
Source: Zeghidour et al. 2025 (Delayed Streams Modeling), section 3; the published models' streams.
"""

import functools
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsm_jax import audio
from dsm_jax.checkpoints import Model
from dsm_jax.configs import LMConfig
from dsm_jax.errors import CheckpointError, TrainingError
from dsm_jax.models.lm import ZERO_TOKEN
from dsm_jax.stt.hearing import Hearing, Prompt, word_reader
from dsm_jax.stt.words import PauseRule, Timing
from dsm_jax.tokenizers import Tokenizer
from dsm_jax.training.data import Recording, WordSpan

LONGEST_WORD_S = 2


def tokens_of(word: str, tokenizer: Tokenizer, config: LMConfig) -> list[int]:
    """Encodes a word.

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
    """Makes the text stream of a clip, as the first stream of `DelayedStreamsLM.__call__`.

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


@functools.lru_cache(maxsize=8)
def encoder(mimi_def: nnx.GraphDef, codebooks: int) -> Callable[[nnx.State, jax.Array], jax.Array]:
    """Compiles a codec's encoding of whole clips: parameters and samples [B, T, C] to codes [B, Q, frames]."""
    # The graphdef is closed over and not an argument: an argument is hashed at every call.
    return jax.jit(lambda params, pcm_BTC: nnx.merge(mimi_def, params).encode(pcm_BTC, codebooks=codebooks))


def cut(words: Sequence[WordSpan], samples: int, sample_rate: int, longest: int) -> list[int]:
    """Cuts a recording into parts of at most `longest` samples: between words, unless the words overlap.

    Args:
      words: in the order of their starts. A word is taken to end two seconds after its start at the latest, as the
        words of our own transcripts last until the next one, pauses included; and after half a part at the latest.
      samples: length of the recording.
      sample_rate: of the recording, Hz.
      longest: samples of a part.

    Returns:
      Rising positions in samples, the first 0 and the last the recording's end.
    """
    most = min(LONGEST_WORD_S * sample_rate, longest // 2)
    starts = [round(word.start * sample_rate) for word in words]
    ends = [min(round(word.end * sample_rate), start + most) for word, start in zip(words, starts, strict=True)]
    cuts = [0]
    while samples - cuts[-1] > longest:
        latest, spoken_until = cuts[-1] + longest, cuts[-1]
        place = latest
        for start, end in zip(starts, ends, strict=True):
            if cuts[-1] < start < latest < end:
                place = max((min(spoken_until, start) + start + 1) // 2, start - sample_rate // 2)
                break
            spoken_until = max(spoken_until, end)
        cuts.append(place)
    return [*cuts, samples]


class SttRows:
    """Makes rows for one speech-to-text model.

    Args:
      model: a speech-to-text model.
      mesh: devices with an axis "data"; the rows that are encoded together are spread over them.
      seconds: of a recording in a row, at most.
      batch_size: rows that are encoded together, rounded up to a multiple of the devices.

    Raises:
      CheckpointError: the model does not transcribe.
    """

    def __init__(self, model: Model, mesh: Mesh, *, seconds: float, batch_size: int):
        lm, tokenizer = model.config.lm, model.tokenizer
        if lm is None or tokenizer is None or lm.dep_q:
            raise CheckpointError(
                f"{model.name} is no speech-to-text model: one has a language model and a tokenizer, and generates no "
                "audio; begin with a model such as kyutai/stt-1b-en_fr"
            )
        self.model, self.lm, self.tokenizer = model, lm, tokenizer
        self.longest = int(seconds * model.sample_rate)
        self.timing = word_reader(model.config, lm, tokenizer, Prompt(), PauseRule()).timing
        self.frames = self._framed(np.zeros(self.longest, np.float32)).ready
        self.batch_size = -(-batch_size // mesh.shape["data"]) * mesh.shape["data"]
        self._split = NamedSharding(mesh, PartitionSpec("data"))
        self._encode = encoder(model.mimi_def, lm.n_q)

    def check(self, word: str) -> None:
        """Checks that the model can spell a word.

        Raises:
          TrainingError: the model cannot.
        """
        tokens_of(word, self.tokenizer, self.lm)

    def encode(self, recordings: Sequence[Recording]) -> np.ndarray:
        """Makes the rows of recordings, in order.

        Args:
          recordings: at least one.

        Returns:
          int32 [N, K, T] for `DelayedStreamsLM.__call__`. All rows have the length of the longest possible part; text
          after the end of a part is -1, which `stt_loss` leaves out.

        Raises:
          AudioError: a recording cannot be read.
          ConfigError: the codec has fewer codebooks than the language model reads.
          TrainingError: words that the model cannot learn.
        """
        hours = sum(recording.seconds for recording in recordings) / 3600
        print(f"encoding {len(recordings)} recordings, {hours:.2f} hours", file=sys.stderr, flush=True)
        parts = (part for recording in recordings for part in self._parts(recording))
        texts, codes = [], []
        while batch := list(itertools.islice(parts, self.batch_size)):
            texts += [text_T for _, text_T in batch]
            pcm_BTC = pad_to(np.stack([pcm_T for pcm_T, _ in batch]), self.batch_size)[..., None]
            codes.append(self._encode(self.model.mimi_params, jax.device_put(pcm_BTC, self._split)))
            if len(codes) > 1:  # one behind: the device encodes while the next recordings are read
                codes[-2] = np.asarray(codes[-2])
        codes_NQT = np.concatenate([np.asarray(codes_BQT) for codes_BQT in codes])[: len(texts)]
        return np.concatenate([np.stack(texts)[:, None], codes_NQT], axis=1)

    def _parts(self, recording: Recording) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields the samples of each part, silences included, and its text stream."""
        rate = self.model.sample_rate
        pcm_T = audio.read(recording.audio, rate)
        for first, end in itertools.pairwise(cut(recording.words, pcm_T.size, rate, self.longest)):
            words = [
                WordSpan(word.text, word.start - first / rate, word.end - first / rate)
                for word in recording.words
                # A last word may be timed after the recording's end.
                if first <= round(word.start * rate) and (round(word.start * rate) < end or end == pcm_T.size)
            ]
            buffer = self._framed(pcm_T[first:end])
            frames = buffer.ready
            text_T = np.full(self.frames, ZERO_TOKEN, np.int32)
            text_T[:frames] = text_stream(words, self.tokenizer, self.lm, self.timing, frames=frames)
            yield pad_to(buffer.take(frames), self.frames * self.model.config.mimi.frame_size), text_T

    def _framed(self, pcm_T: np.ndarray) -> Hearing:
        buffer = Hearing(self.model.config, Prompt())
        buffer.push(pcm_T)
        buffer.end()
        return buffer


def pad_to(array: np.ndarray, length: int) -> np.ndarray:
    """Appends zeros to an array until its first axis has `length` entries."""
    return np.pad(array, [(0, length - len(array)), *[(0, 0)] * (array.ndim - 1)])

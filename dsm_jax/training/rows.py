"""From recordings with words to the rows that a speech-to-text model is trained on.

A recording is heard as `dsm_jax.stt` hears it: the silence that the model wants, the recording, and silence until the
text is out. A long one is cut, between words, into pieces that are heard as if each were a recording. The codec encodes
everything once.

Shape letters: B rows that are encoded together, N rows, K streams (text first), Q audio streams, T samples or frames,
C audio channels.
"""

import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsm_jax import audio
from dsm_jax.checkpoints import Model
from dsm_jax.models.family import require
from dsm_jax.models.streams import ZERO_TOKEN
from dsm_jax.stt.framing import FrameBuffer, word_reader
from dsm_jax.training.alignment import pieces_of, text_stream
from dsm_jax.training.compose import Spoken
from dsm_jax.training.manifest import Recording

LONGEST_WORD_S = 2


@functools.lru_cache(maxsize=8)
def encoder(mimi_def: nnx.GraphDef, codebooks: int) -> Callable[[nnx.State, jax.Array], jax.Array]:
    """A codec's compiled encoding: parameters and samples [B, T, C] to codes [B, Q, frames], whole clips at once."""
    # The graphdef is closed over and not an argument: an argument is hashed at every call.
    return jax.jit(lambda params, pcm_BTC: nnx.merge(mimi_def, params).encode(pcm_BTC, codebooks=codebooks))


def cut(words: Sequence[Spoken], samples: int, sample_rate: int, longest: int) -> list[int]:
    """Where to cut a recording into pieces of at most `longest` samples: between words, unless they overlap.

    Args:
      words: in the order of their starts. Where they last until the next one, pauses included, as in transcripts of our
        own, they are taken to end after two seconds; and always after half a piece.
      samples: of the recording.
      sample_rate: of the recording, Hz.
      longest: samples.

    Returns:
      Rising samples, the first 0 and the last the recording's end.
    """
    most = min(LONGEST_WORD_S * sample_rate, longest // 2)
    starts = [round(word.start * sample_rate) for word in words]
    ends = [min(round(word.end * sample_rate), start + most) for word, start in zip(words, starts, strict=True)]
    at = [0]
    while samples - at[-1] > longest:
        latest, said = at[-1] + longest, at[-1]
        place = latest
        for start, end in zip(starts, ends, strict=True):
            if at[-1] < start < latest < end:
                place = max((min(said, start) + start + 1) // 2, start - sample_rate // 2)
                break
            said = max(said, end)
        at.append(place)
    return [*at, samples]


class Rows:
    """Makes rows for one model.

    Args:
      model: a speech-to-text model.
      mesh: devices with an axis "data", over which the rows that are encoded together are spread.
      seconds: of a recording in a row, at most.
      at_once: rows that are encoded together, rounded up to a multiple of the devices.

    Raises:
      CheckpointError: the model does not transcribe.
    """

    def __init__(self, model: Model, mesh: Mesh, *, seconds: float, at_once: int):
        require(model, "stt")
        lm, tokenizer = model.config.lm, model.tokenizer
        assert lm is not None
        assert tokenizer is not None
        self.model, self.lm, self.tokenizer = model, lm, tokenizer
        self.longest = int(seconds * model.sample_rate)
        self.timing = word_reader(model.config, lm, tokenizer).timing
        self.frames = self._heard(np.zeros(self.longest, np.float32)).ready
        self.at_once = -(-at_once // mesh.shape["data"]) * mesh.shape["data"]
        self._split = NamedSharding(mesh, PartitionSpec("data"))
        self._encode = encoder(model.mimi_def, lm.n_q)

    def check(self, word: str) -> None:
        """Refuses a word that the model cannot spell.

        Raises:
          TrainingError: it is one.
        """
        pieces_of(word, self.tokenizer, self.lm)

    def encode(self, recordings: Sequence[Recording]) -> np.ndarray:
        """The rows of recordings, in order.

        Args:
          recordings: at least one.

        Returns:
          int32 [N, K, T] for `DelayedStreamsLM.__call__`. All rows are as long as the longest possible; text after what
          is heard of a piece is -1, which `stt_loss` leaves out.

        Raises:
          AudioError: a recording cannot be read.
          ConfigError: the codec has fewer codebooks than the language model hears.
          TrainingError: words that the model cannot learn.
        """
        hours = sum(recording.seconds for recording in recordings) / 3600
        print(f"encoding {len(recordings)} recordings, {hours:.2f} hours", file=sys.stderr, flush=True)
        pieces = (piece for recording in recordings for piece in self._pieces(recording))
        texts, codes = [], []
        while several := list(itertools.islice(pieces, self.at_once)):
            texts += [text_T for _, text_T in several]
            pcm_BTC = filled(np.stack([pcm_T for pcm_T, _ in several]), self.at_once)[..., None]
            codes.append(self._encode(self.model.mimi_params, jax.device_put(pcm_BTC, self._split)))
            if len(codes) > 1:  # one behind: the device encodes while the next recordings are read
                codes[-2] = np.asarray(codes[-2])
        codes_NQT = np.concatenate([np.asarray(codes_BQT) for codes_BQT in codes])[: len(texts)]
        return np.concatenate([np.stack(texts)[:, None], codes_NQT], axis=1)

    def _pieces(self, recording: Recording) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """What is heard of each piece, and its text."""
        rate = self.model.sample_rate
        pcm_T = audio.read(recording.audio, rate)
        for first, end in itertools.pairwise(cut(recording.words, pcm_T.size, rate, self.longest)):
            said = [
                Spoken(word.text, word.start - first / rate, word.end - first / rate)
                for word in recording.words
                # A last word may be timed after the recording's end.
                if first <= round(word.start * rate) and (round(word.start * rate) < end or end == pcm_T.size)
            ]
            hearing = self._heard(pcm_T[first:end])
            heard = hearing.ready
            text_T = np.full(self.frames, ZERO_TOKEN, np.int32)
            text_T[:heard] = text_stream(said, self.tokenizer, self.lm, self.timing, frames=heard)
            yield filled(hearing.pop_frames(heard), self.frames * self.model.config.mimi.frame_size), text_T

    def _heard(self, pcm_T: np.ndarray) -> FrameBuffer:
        hearing = FrameBuffer(self.model.config)
        hearing.push(pcm_T)
        hearing.end()
        return hearing


def filled(array: np.ndarray, length: int) -> np.ndarray:
    """The array with zeros after it, `length` along its first axis."""
    return np.pad(array, [(0, length - len(array)), *[(0, 0)] * (array.ndim - 1)])

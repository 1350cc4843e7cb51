"""Follow the level of a recording, to find where the sound of a word ends.

Shape letters: B slots, T samples, C audio channels, F frames, H hops of 10 ms.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dsm_jax.configs import MimiConfig

SILENCE_S = 0.25  # so long is no sound, where a word has ended: longer than the closure of a stop
MEMORY_S = 60.0  # of the levels that are kept; a word is looked for in the last seconds alone

_HOP_S = 0.01  # about, as a frame is a whole number of hops
_PEAK_S = 0.6  # the loudest part of a word lies within so much of its start
_FLOOR_S = 10.0  # the background is measured over the seconds before
_RANGE_DB = 45.0  # below its peak, a word is not heard any more
_FADE_S = 0.02
_ABOVE_FLOOR_DB = 8.0
_CONTRAST_DB = 12.0  # the least distance between the peak and what counts as silence


def hops_of_frame(config: MimiConfig) -> int:
    """Return the number of hops in a frame: 8 in the published codec."""
    most = max(1, round(1 / (config.frame_rate * _HOP_S)))
    return next(hops for hops in range(most, 0, -1) if config.frame_size % hops == 0)


def levels_of(pcm_BTC: jax.Array, config: MimiConfig) -> jax.Array:
    """Compute the level of each hop, in decibels: [B, F, H], with the hops of each frame.

    The program computes these for all slots, as a server would give the interpreter's lock up at each call of NumPy
    (docs/decisions/0022-server.md).

    Args:
      pcm_BTC: whole frames of samples.
      config: of the codec.
    """
    rows, samples, channels = pcm_BTC.shape
    hops = hops_of_frame(config)
    hop = config.frame_size // hops * channels
    power_BFH = jnp.square(pcm_BTC.reshape(rows, samples // config.frame_size, hops, hop)).mean(axis=-1)
    return 10 * jnp.log10(power_BFH + 1e-10)


class SoundLevels:
    """Keep the level of the last minute of a stream, in decibels for each hop.

    Args:
      config: of the codec.
    """

    def __init__(self, config: MimiConfig):
        self._hop_s = 1 / (config.frame_rate * hops_of_frame(config))
        self._kept_H = np.zeros(2 * self._hops(MEMORY_S), np.float32)
        self._size = 0  # hops that are kept
        self._first = 0  # hop of the stream that is the first of those kept

    def push(self, levels_H: np.ndarray) -> None:
        """Take the levels of a frame, of no more than a minute."""
        if self._size + levels_H.size > self._kept_H.size:
            dropped = self._size - self._hops(MEMORY_S)
            self._kept_H[: self._size - dropped] = self._kept_H[dropped : self._size].copy()
            self._size, self._first = self._size - dropped, self._first + dropped
        self._kept_H[self._size : self._size + levels_H.size] = levels_H
        self._size += levels_H.size

    def _hops(self, seconds: float) -> int:
        return round(seconds / self._hop_s)

    @property
    def seconds(self) -> float:
        """Seconds of the stream that were pushed."""
        return (self._first + self._size) * self._hop_s

    def end_of_sound(self, start: float, limit: float) -> tuple[float, float] | None:
        """Find where the sound of a word ends.

        Args:
          start: seconds of the stream at which the word starts.
          limit: seconds at which the next word starts, or after which nothing is known.

        Returns:
          The seconds at which the sound ends, and the seconds of silence that follow: at least `SILENCE_S`, or the time
          to `limit`. None where no sound is known between `start` and `limit`.
        """
        begin, end = self._index(start), self._index(limit)
        if begin >= end:
            return None
        levels_H = self._kept_H[begin:end]
        peak = levels_H[: self._hops(_PEAK_S)].max()
        floor = _tenth(self._kept_H[max(0, end - self._hops(_FLOOR_S)) : end])
        silent_below = min(max(peak - _RANGE_DB, floor + _ABOVE_FLOOR_DB), peak - _CONTRAST_DB)
        sounding = np.flatnonzero(levels_H >= silent_below)  # the peak is among them
        silences = np.diff(np.append(sounding, levels_H.size)) - 1
        long = np.flatnonzero(silences >= self._hops(SILENCE_S))
        last = long[0] if long.size else -1
        silence = int(silences[last])
        # The last of a sound fades below what stands out.
        faded = int(sounding[last]) + 1 + min(silence, self._hops(_FADE_S))
        return (self._first + begin + faded) * self._hop_s, silence * self._hop_s

    def _index(self, seconds: float) -> int:
        """Return the index of a time among the levels that are kept."""
        return min(max(self._hops(seconds) - self._first, 0), self._size)


def _tenth(levels_H: np.ndarray) -> float:
    """Return the level below which a tenth of the hops are: numpy.percentile takes 68 µs for it, this 6 µs."""
    place = 0.1 * (levels_H.size - 1)
    below = int(place)
    above = min(below + 1, levels_H.size - 1)
    ordered_H = np.partition(levels_H, (below, above))
    return float(ordered_H[below] + (ordered_H[above] - ordered_H[below]) * (place - below))

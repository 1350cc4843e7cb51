"""Follow the level of a recording, to find where the sound of a word ends.

Shape letters: T samples, H hops of 10 ms.
"""

import numpy as np

HOP_S = 0.01
SILENCE_S = 0.25  # so long is no sound, where a word has ended: longer than the closure of a stop
MEMORY_S = 60.0  # of the levels that are kept; a word is looked for in the last seconds alone

_PEAK_S = 0.6  # the loudest part of a word lies within so much of its start
_FLOOR_S = 10.0  # the background is measured over the seconds before
_RANGE_DB = 45.0  # below its peak, a word is not heard any more
_FADE_S = 0.02
_ABOVE_FLOOR_DB = 8.0
_CONTRAST_DB = 12.0  # the least distance between the peak and what counts as silence


class SoundLevels:
    """Keep the level of the last minute of a stream, in decibels for each hop.

    Args:
      sample_rate: sample rate of the samples, Hz.
    """

    def __init__(self, sample_rate: int):
        self._hop = round(HOP_S * sample_rate)
        self._levels_H = np.zeros(0, np.float32)
        self._first = 0  # hop of the stream that is the first of those kept
        self._rest = np.zeros(0, np.float32)

    def push(self, samples: np.ndarray) -> None:
        """Take more samples [T] of the stream."""
        samples = np.concatenate([self._rest, samples])
        whole = samples.size // self._hop * self._hop
        self._rest = samples[whole:]
        power_H = np.square(samples[:whole].reshape(-1, self._hop)).mean(axis=1)
        self._levels_H = np.concatenate([self._levels_H, 10 * np.log10(power_H + 1e-10)])
        if self._levels_H.size > 2 * MEMORY_S / HOP_S:
            dropped = self._levels_H.size - round(MEMORY_S / HOP_S)
            self._levels_H, self._first = self._levels_H[dropped:], self._first + dropped

    @property
    def seconds(self) -> float:
        """Seconds of the stream that were pushed."""
        return (self._first + self._levels_H.size) * HOP_S

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
        levels_H = self._levels_H[begin:end]
        peak = levels_H[: round(_PEAK_S / HOP_S)].max()
        floor = np.percentile(self._levels_H[max(0, end - round(_FLOOR_S / HOP_S)) : end], 10)
        silent_below = min(max(peak - _RANGE_DB, floor + _ABOVE_FLOOR_DB), peak - _CONTRAST_DB)
        sounding = np.flatnonzero(levels_H >= silent_below)  # the peak is among them
        silences = np.diff(np.append(sounding, levels_H.size)) - 1
        long = np.flatnonzero(silences >= round(SILENCE_S / HOP_S))
        last = long[0] if long.size else -1
        silence = int(silences[last])
        # The last of a sound fades below what stands out.
        faded = int(sounding[last]) + 1 + min(silence, round(_FADE_S / HOP_S))
        return (self._first + begin + faded) * HOP_S, silence * HOP_S

    def _index(self, seconds: float) -> int:
        """Return the index of a time among the levels that are kept."""
        return int(np.clip(round(seconds / HOP_S) - self._first, 0, self._levels_H.size))

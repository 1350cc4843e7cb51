"""Take sound from a microphone and play sound, through the package `sounddevice` (the extra `mic`).

Shape letters: T samples.
"""

import queue
from collections.abc import Iterator
from typing import Any

import numpy as np

from dsm_jax import audio
from dsm_jax.errors import AudioError

BLOCK_S = 0.08  # of a chunk: one frame of the models


def _sounddevice() -> Any:
    """Import `sounddevice`.

    Raises:
      AudioError: it is not installed, or finds no PortAudio.
    """
    try:
        import sounddevice  # pyright: ignore[reportMissingImports]  an extra
    except (ImportError, OSError) as error:
        raise AudioError(
            f"the microphone needs the package sounddevice, which cannot be used here ({error}); "
            "install it with pip install 'dsm-jax[mic]', and PortAudio where it is missing"
        ) from None
    return sounddevice


def find_input(device: str | None) -> Any:
    """Return what `sounddevice` knows of a microphone.

    Args:
      device: name or part of the name of an input; None takes the system's default.

    Raises:
      AudioError: there is no `sounddevice`, or no such input.
    """
    sounddevice = _sounddevice()
    try:
        return sounddevice.query_devices(device, "input")
    except (ValueError, sounddevice.PortAudioError) as error:
        known = [found["name"] for found in sounddevice.query_devices() if found["max_input_channels"] > 0]
        found = f"there is no input {device!r}" if device else f"there is no microphone ({error})"
        wanted = f"expected one of: {', '.join(known)}" if known else "this machine has none; connect one"
        raise AudioError(f"{found}; {wanted}") from None


class Microphone:
    """Record from a microphone while the block runs.

    Args:
      sample_rate: sample rate of the chunks, Hz.
      device: name or part of the name of an input; None takes the system's default.

    Raises:
      AudioError: there is no `sounddevice`, or no such input; or, as the block begins, the input cannot be opened.
    """

    def __init__(self, sample_rate: int, *, device: str | None = None):
        self._sounddevice = _sounddevice()
        self._queue: queue.Queue[np.ndarray] = queue.Queue()
        self._is_ending = False
        about = find_input(device)
        self.name = str(about["name"])
        self._rate, self._sample_rate, self._device = round(about["default_samplerate"]), sample_rate, device

    def __enter__(self) -> "Microphone":
        try:
            self._stream = self._sounddevice.InputStream(
                samplerate=self._rate,
                blocksize=round(BLOCK_S * self._rate),
                device=self._device,
                channels=1,
                dtype="float32",
                callback=self._heard,
            )
            self._stream.start()
        except self._sounddevice.PortAudioError as error:
            reason = f"{self.name} cannot be recorded from ({error})"
            raise AudioError(f"{reason}; close the programs that use it, or choose another input") from None
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.stop()
        self._stream.close()

    def _heard(self, samples_TC: np.ndarray, *_: object) -> None:
        self._queue.put(samples_TC[:, 0].copy())

    def end(self) -> None:
        """Stop the recording soon; `chunks` yields what has been recorded until then, and ends.

        It sets a flag and no more, so a handler of signals may call it.
        """
        self._is_ending = True

    def chunks(self) -> Iterator[np.ndarray]:
        """Yield float32 samples [T] at `sample_rate` as they are recorded, until `end` or until the stream stops."""
        return audio.resampled(self._recorded(), self._rate, self._sample_rate)

    def _recorded(self) -> Iterator[np.ndarray]:
        """Yield samples [T] at the microphone's own rate."""
        while True:
            if self._is_ending and self._stream.active:
                self._stream.stop()  # once the last block has come
            try:
                # A wait without an end would not be woken by Ctrl-C on every system.
                yield self._queue.get(timeout=0.2)
            except queue.Empty:
                if not self._stream.active:
                    break


def play(samples: np.ndarray, sample_rate: int) -> bool:
    """Play samples [T] and wait for their end; return False where there is no `sounddevice` or no output."""
    try:
        device = _sounddevice()
        device.play(samples, sample_rate, blocking=True)
    except Exception:  # PortAudio has errors of its own; the caller has other players
        return False
    return True

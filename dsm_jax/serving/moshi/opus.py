"""Ogg Opus, frame by frame, by `sphn`, which is optional: libsndfile cannot decode a stream that is still coming."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from dsm_jax.errors import WireError


def _sphn() -> Any:
    try:
        import sphn  # pyright: ignore[reportMissingImports]  optional
    except ImportError:
        raise WireError(
            "Ogg Opus needs the package sphn on the server (pip install 'dsm-jax[opus]'); use PcmMessagePack, or Audio"
        ) from None
    return sphn


class OpusReader:
    """Decode the pages of a stream as they arrive."""

    def __init__(self, sample_rate: int):
        self._reader = _sphn().OpusStreamReader(sample_rate)

    def read(self, pages: bytes) -> Iterator[np.ndarray]:
        """Yield the samples [T] that new pages complete.

        Raises:
          WireError: the pages are not Ogg Opus.
        """
        try:
            pcm = self._reader.append_bytes(pages)
        except Exception as error:  # the package's errors are of no class of its own
            raise WireError(
                f"the data is no Ogg Opus stream ({type(error).__name__}); send the pages in order"
            ) from None
        if pcm is not None and np.size(pcm):
            yield np.asarray(pcm, np.float32).reshape(-1)


class OpusWriter:
    """Encode a stream frame by frame.

    Attributes:
      header: pages that begin the stream.
    """

    def __init__(self, sample_rate: int):
        self._writer = _sphn().OpusStreamWriter(sample_rate)
        self.header = bytes(self._writer.append_pcm(np.zeros(0, np.float32)) or b"")

    def write(self, pcm_T: np.ndarray) -> bytes:
        """Return the pages that samples [T] complete; there may be none."""
        return bytes(self._writer.append_pcm(np.ascontiguousarray(pcm_T, np.float32)) or b"")

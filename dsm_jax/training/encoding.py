"""Encode recordings for training by a model's codec, many at a time.

Shape letters: B clips that are encoded together, N clips, Q codebooks, T samples or frames, C audio channels.
"""

import itertools
from collections.abc import Callable, Iterable

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsm_jax.checkpoints import Model
from dsm_jax.models.mimi import Mimi
from dsm_jax.runtime.compile import compiled, plain


def encoder(mimi_def: nnx.GraphDef, params: nnx.State, codebooks: int) -> Callable[[jax.Array], jax.Array]:
    """Compile the encoding of whole clips by a codec: samples [B, T, C] to codes [B, Q, frames]."""
    encode, networks = compiled(_encode, (mimi_def,), codebooks), plain(params)
    return lambda pcm_BTC: encode(networks, pcm_BTC)


def _encode(mimi: Mimi, pcm_BTC: jax.Array, codebooks: int) -> jax.Array:
    return mimi.encode(pcm_BTC, codebooks=codebooks)


def rows_place(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays whose rows are split over the mesh axis "data", if the mesh has it."""
    return NamedSharding(mesh, PartitionSpec("data" if "data" in mesh.axis_names else None))


class ClipEncoder:
    """The codec's encoder for batches of one shape, split over the devices of a mesh."""

    def __init__(self, model: Model, mesh: Mesh, *, codebooks: int, batch_size: int):
        shares = mesh.shape.get("data", 1)
        self.batch_size, self._split = -(-batch_size // shares) * shares, rows_place(mesh)
        self._encode = encoder(model.mimi_def, model.mimi_params, codebooks)

    def encode(self, clips: Iterable[np.ndarray], length: int) -> np.ndarray:
        """Encode clips of at most `length` samples to codes [N, Q, T]."""
        clips, codes, count = iter(clips), [], 0
        while batch := list(itertools.islice(clips, self.batch_size)):
            count += len(batch)
            pcm_BTC = pad_to(np.stack([pad_to(pcm_T, length) for pcm_T in batch]), self.batch_size)[..., None]
            codes.append(self._encode(jax.device_put(pcm_BTC, self._split)))
            if len(codes) > 1:  # reads back one batch late: the device encodes while the host reads recordings
                codes[-2] = np.asarray(codes[-2])
        return np.concatenate([np.asarray(codes_BQT) for codes_BQT in codes])[:count]


def pad_to(array: np.ndarray, length: int) -> np.ndarray:
    """Append zeros to an array until its first axis has `length` entries."""
    return np.pad(array, [(0, length - len(array)), *[(0, 0)] * (array.ndim - 1)])

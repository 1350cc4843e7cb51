"""Transforms of published tensors into blocks of this library's parameters and back: exact inverses, in numpy.

Shape letters: D outputs, C inputs, K taps, S stride, M taps of a kernel of two strides, E = S * D, V entries.
"""

import dataclasses
from collections.abc import Callable

import numpy as np


@dataclasses.dataclass(frozen=True)
class Transform:
    """Makes a block of a parameter out of published tensors, and these out of the block: two exact inverses."""

    load: Callable[..., np.ndarray]
    save: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    any_leading_ones: bool = False  # files disagree on axes of length 1


def _one(save: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], tuple[np.ndarray, ...]]:
    return lambda a: (save(a),)


def _load_codebook(sum_VC: np.ndarray, usage_V: np.ndarray) -> np.ndarray:
    usage_V = np.maximum(usage_V.astype(np.float32), np.float32(1e-5))
    return sum_VC.astype(np.float32) / usage_V[:, None]


IDENTITY = Transform(lambda a: a, _one(lambda a: a))
LINEAR = Transform(lambda w_DC: w_DC.T, _one(lambda w_CD: w_CD.T))
POINTWISE = Transform(lambda w_DC1: w_DC1[:, :, 0].T, _one(lambda w_CD: w_CD.T[:, :, None]))
CONV = Transform(lambda w_DCK: w_DCK.transpose(2, 1, 0), _one(lambda w_KCD: w_KCD.transpose(2, 1, 0)))
ALPHA = Transform(lambda a: a.reshape(-1), _one(lambda a_D: a_D.reshape(1, 1, -1)), any_leading_ones=True)
# Training keeps running sums; what is used is their quotient.
CODEBOOK = Transform(_load_codebook, lambda e_VC: (e_VC, np.ones(e_VC.shape[0], np.float32)))


def conv_transpose(stride: int) -> Transform:
    """[C, D, 2S] to [2, C, S * D]: tap m * S + j meets the input of m steps ago, and the oldest comes first."""

    def load(w_CDM: np.ndarray) -> np.ndarray:
        C, D, _ = w_CDM.shape
        return w_CDM.reshape(C, D, 2, stride)[:, :, ::-1].transpose(2, 0, 3, 1).reshape(2, C, stride * D)

    def save(w_MCE: np.ndarray) -> np.ndarray:
        _, C, E = w_MCE.shape
        w_2CSD = w_MCE.reshape(2, C, stride, E // stride)[::-1]
        return w_2CSD.transpose(1, 3, 0, 2).reshape(C, E // stride, 2 * stride)

    return Transform(load, _one(save))


def depthwise(stride: int) -> Transform:
    """[C, 1, 2S] to [2, S, C], the oldest input first."""

    def save(w_2SC: np.ndarray) -> np.ndarray:
        return w_2SC[::-1].transpose(2, 0, 1).reshape(-1, 1, 2 * stride)

    return Transform(lambda w_C1M: w_C1M.reshape(-1, 2, stride)[:, ::-1].transpose(1, 2, 0), _one(save))


def half_split(heads: int) -> Transform:
    """A transposed linear whose outputs are rotated in pairs (j, j + H/2) of a head in the file, (2j, 2j + 1) here."""

    def load(w_DC: np.ndarray) -> np.ndarray:
        return w_DC.reshape(heads, 2, -1, w_DC.shape[1]).swapaxes(1, 2).reshape(w_DC.shape).T

    def save(w_CD: np.ndarray) -> np.ndarray:
        w_DC = w_CD.T
        return w_DC.reshape(heads, -1, 2, w_DC.shape[1]).swapaxes(1, 2).reshape(w_DC.shape)

    return Transform(load, _one(save))


def contiguous(array: np.ndarray) -> np.ndarray:
    """The same values in C order; a transposed matrix is copied in strips that a cache holds.

    Seven times as fast as numpy's own copy: 36 ms against 256 ms for 11264 x 2048 in bfloat16.
    """
    if array.ndim != 2 or array.flags.c_contiguous:
        return np.ascontiguousarray(array)
    copy = np.empty(array.shape, array.dtype)
    for start in range(0, array.shape[1], 16):
        copy[:, start : start + 16] = array[:, start : start + 16]
    return copy

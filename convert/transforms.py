"""Transforms between published tensors and blocks of this library's parameters: pairs of exact inverses, in numpy.

Shape letters, in the files' order with outputs first: D outputs, C inputs, K taps, S stride, M taps of a kernel of two
strides, E = S * D, V entries.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Transform:
    """A pair of exact inverses: `load` computes a parameter's block from published tensors, `save` the tensors."""

    load: Callable[..., np.ndarray]
    save: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    any_leading_ones: bool = False  # accept any number of leading axes of length 1, on which files disagree


def _one(save: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], tuple[np.ndarray, ...]]:
    return lambda a: (save(a),)


def _load_codebook(sum_VC: np.ndarray, usage_V: np.ndarray) -> np.ndarray:
    usage_V = np.maximum(usage_V.astype(np.float32), np.float32(1e-5))
    return sum_VC.astype(np.float32) / usage_V[:, None]


IDENTITY = Transform(lambda a: a, _one(lambda a: a))
POINTWISE = Transform(lambda w_DC1: w_DC1[:, :, 0], _one(lambda w_DC: w_DC[:, :, None]))
STACKED = Transform(lambda w_QCD: w_QCD.swapaxes(1, 2), _one(lambda w_QDC: w_QDC.swapaxes(1, 2)))
CONV = Transform(lambda w_DCK: w_DCK.transpose(2, 1, 0), _one(lambda w_KCD: w_KCD.transpose(2, 1, 0)))
ALPHA = Transform(lambda a: a.reshape(-1), _one(lambda a_D: a_D.reshape(1, 1, -1)), any_leading_ones=True)
# The files hold the running sums of training; an entry is their quotient.
CODEBOOK = Transform(_load_codebook, lambda e_VC: (e_VC, np.ones(e_VC.shape[0], np.float32)))


def conv_transpose(stride: int) -> Transform:
    """Make the transform [C, D, 2S] to [2, C, S * D]: tap m * S + j, for the input of m steps ago, to row 1 - m."""

    def load(w_CDM: np.ndarray) -> np.ndarray:
        C, D, _ = w_CDM.shape
        return w_CDM.reshape(C, D, 2, stride)[:, :, ::-1].transpose(2, 0, 3, 1).reshape(2, C, stride * D)

    def save(w_MCE: np.ndarray) -> np.ndarray:
        _, C, E = w_MCE.shape
        w_2CSD = w_MCE.reshape(2, C, stride, E // stride)[::-1]
        return w_2CSD.transpose(1, 3, 0, 2).reshape(C, E // stride, 2 * stride)

    return Transform(load, _one(save))


def depthwise(stride: int) -> Transform:
    """Make the transform [C, 1, 2S] to [2, S, C], the oldest input first."""

    def save(w_2SC: np.ndarray) -> np.ndarray:
        return w_2SC[::-1].transpose(2, 0, 1).reshape(-1, 1, 2 * stride)

    return Transform(lambda w_C1M: w_C1M.reshape(-1, 2, stride)[:, ::-1].transpose(1, 2, 0), _one(save))


def linear(outputs: Sequence[int], inputs: Sequence[int]) -> Transform:
    """Make the transform of a matrix [all outputs, all inputs] to a weight [*outputs, *inputs]."""
    return Transform(
        lambda w_DC: w_DC.reshape(*outputs, *inputs),
        _one(lambda w: w.reshape(math.prod(outputs), math.prod(inputs))),
    )


def heads(kv_heads: int, parts: int, *, half_split: bool) -> Transform:
    """Make the transform of a projection [kv_heads * parts * H, D] to parts of a packed weight [parts, kv_heads, H, D].

    Args:
      kv_heads: number of key/value heads.
      parts: number of query heads per key/value head, adjacent in the file; 1 for keys and for values.
      half_split: whether the file rotates the pairs (j, j + H/2) of a head; this library rotates (2j, 2j + 1).
    """

    def load(w_EC: np.ndarray) -> np.ndarray:
        C = w_EC.shape[1]
        if half_split:
            w_EC = w_EC.reshape(kv_heads * parts, 2, -1, C).swapaxes(1, 2).reshape(w_EC.shape)
        return w_EC.reshape(kv_heads, parts, -1, C).swapaxes(0, 1)

    def save(w_PKHC: np.ndarray) -> np.ndarray:
        _, _, width, C = w_PKHC.shape
        w_KPHC = w_PKHC.swapaxes(0, 1)
        if half_split:
            w_KPHC = w_KPHC.reshape(kv_heads, parts, width // 2, 2, C).swapaxes(2, 3)
        return w_KPHC.reshape(kv_heads * parts * width, C)

    return Transform(load, _one(save))

"""Low-rank adapters beside the weights of a language model, merged as the weights are read: W + scaling * B @ A.

The matrix NAME.weight [out, in] has the adapters NAME.lora_A.weight [rank, in] and NAME.lora_B.weight [out, rank]. A
tensor that was trained whole is in their file under its own name, and takes the place of the model's.
Source: kyutai-labs/moshi@e6a55d2 moshi/modules/lora.py, moshi/modules/transformer.py:StreamingMultiheadAttention.
"""

import re
from collections.abc import Iterator

import numpy as np

from dsm_jax.convert.pieces import Rows, Tensor, shown

_PACKED = re.compile(r"(.+\.(?:in|out)_proj)[_.]((?:lora_[AB]\.)?weight)")
_A, _B = ".lora_A.weight", ".lora_B.weight"


def merge(
    tensors: dict[str, Tensor], adapters: dict[str, Tensor], scaling: float, sets: int
) -> tuple[dict[str, Tensor], list[str]]:
    """Merge adapters into the tensors of a language model, in float32, when the tensors are read.

    Args:
      tensors: tensors of the language model's file.
      adapters: tensors of the adapters' file.
      scaling: factor of B @ A.
      sets: number of the depformer's sets of weights, which are one tensor each in the result.

    Returns:
      tensors: the merged tensors, attention in the spelling of the current package, in the dtypes of the model.
      faults: one line for each adapter without a partner or a matrix of its shape.
    """
    merged, added = dict(_single(tensors, sets)), dict(_single(adapters, sets))
    faults = []
    for name in sorted({re.sub(r"\.lora_[AB]\.", ".", name) for name in added if name.endswith((_A, _B))}):
        stem = name.removesuffix(".weight")
        weight, a, b = merged.get(name), added.get(stem + _A), added.get(stem + _B)
        if weight and a and b and _fit(weight.shape, a.shape, b.shape):
            merged[name] = _sum(weight, a, b, scaling)
        else:
            found = ", ".join(shown(tensor.shape) for tensor in (weight, a, b) if tensor)
            faults.append(
                f"adapters: {stem} needs a matrix [out, in], lora_A [rank, in] and lora_B [out, rank], has {found}"
            )
    whole = {name: tensor for name, tensor in added.items() if not name.endswith((_A, _B))}
    return merged | whole, faults


def _fit(weight: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Return whether these are the shapes of a matrix and of its adapters."""
    return len(weight) == len(a) == 2 and a[1] == weight[1] and b == (weight[0], a[0])


def _sum(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    def read(rows: Rows | None) -> np.ndarray:
        own = weight.read(rows)
        product = b.read(rows).astype(np.float32) @ a.read(None).astype(np.float32)
        return (own.astype(np.float32) + np.float32(scaling) * product).astype(own.dtype)

    return Tensor(weight.shape, weight.dtype, read, weight.made_of + a.made_of + b.made_of)


def _single(tensors: dict[str, Tensor], sets: int) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors by name, packed ones of attention as one for each set of weights."""
    for name, tensor in tensors.items():
        match = _PACKED.fullmatch(name)
        count = sets if match and name.startswith("depformer.") else 1
        height = tensor.shape[0] // count if tensor.shape else 0
        for s in range(count):

            def read(
                rows: Rows | None, tensor: Tensor = tensor, first: int = s * height, last: int = height
            ) -> np.ndarray:
                start, stop = rows or (0, last)
                return tensor.read((first + start, first + stop))

            single = f"{match[1]}s.{s}.{match[2]}" if match else name
            part = tensor.shape if count == 1 else (height, *tensor.shape[1:])
            yield single, Tensor(part, tensor.dtype, tensor.read if count == 1 else read, (name,))

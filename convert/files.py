"""Read and write safetensors files one tensor at a time, so that memory never holds a file twice."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from dsm_jax.convert.pieces import DTYPES, Outgoing, Rows, Tensor
from dsm_jax.errors import CheckpointError
from dsm_jax.files import decode_json, read_text

INDEX_NAME = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
VOICES = "voices"  # the folder of a model's own
_OTHER_FORMATS = (".bin", ".ckpt", ".gguf", ".npz", ".pt", ".pth")  # of weights
# The remedy in errors on weights that another package has quantised.
NOT_ROUNDED = "take the model in bfloat16 or float32, and round it here with quantize='int8'"
_LFS_POINTER = b"version https://git-lfs"
_NAME_OF_DTYPE = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


def tensors_in(path: Path) -> dict[str, Tensor]:
    """List the tensors of a safetensors file; reads only the header.

    Args:
      path: the file.

    Returns:
      The tensors by name.

    Raises:
      CheckpointError: the file is missing, truncated, or not a safetensors file.
    """
    if path.suffix in _OTHER_FORMATS:
        raise CheckpointError(f"{path} is in a format that is not read; take the model as safetensors files")
    if not path.is_file():
        if others := sorted(p.name for p in path.parent.glob("*") if p.suffix in _OTHER_FORMATS):
            raise CheckpointError(
                f"{path} is missing, and {', '.join(others)} beside it cannot be read; fetch the safetensors files, or "
                "save the weights as such"
            )
        raise CheckpointError(f"{path} is missing; fetch the whole repository again")
    try:
        with safe_open(path, "np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  not a mapping
            return {
                name: Tensor(tuple(s.get_shape()), s.get_dtype(), _reader(path, name)) for name, s in slices.items()
            }
    except SafetensorError as error:
        raise CheckpointError(_unreadable(path, error)) from None
    except OSError:  # safetensors says "No such file" of one that may not be read
        raise CheckpointError(f"{path} cannot be opened; check its permissions") from None


def _reader(path: Path, name: str) -> Callable[[Rows | None], np.ndarray]:
    def read(rows: Rows | None) -> np.ndarray:
        # Opened again for each tensor, as the pages of a file that stays mapped count as memory of the process.
        with safe_open(path, "np") as file:
            return file.get_tensor(name) if rows is None else file.get_slice(name)[slice(*rows)]

    return read


def _unreadable(path: Path, error: SafetensorError) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(_LFS_POINTER))
    if start == _LFS_POINTER:
        return f"{path} is a pointer of Git LFS in place of the weights; run `git lfs pull` in its repository"
    if start[8:9] == b"{" or size < 9:
        return f"{path} is cut short or damaged: it has {size} bytes, its header announces others; fetch it again"
    return f"{path} is not a safetensors file ({error}); give the .safetensors file of a codec, or a model's folder"


def sharded_tensors_in(folder: Path, index_name: str = INDEX_NAME) -> tuple[dict[str, Tensor], list[str]]:
    """List the tensors of the files in an index, or of `model.safetensors` if there is no index.

    Args:
      folder: the checkpoint's folder.
      index_name: name of the index file.

    Returns:
      tensors: the tensors by name.
      faults: one line for each tensor that is in two files, or in another file than the index gives.

    Raises:
      CheckpointError: a file is missing or unreadable.
    """
    index_path = folder / index_name
    if not index_path.is_file():
        return tensors_in(folder / "model.safetensors"), []
    where = read_json(index_path).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise CheckpointError(f"{index_path} has no weight_map; fetch it again")
    tensors: dict[str, Tensor] = {}
    faults = []
    for file in sorted(set(where.values())):
        if index_name == INDEX_NAME and not (folder / file).is_file() and (folder / "model.safetensors").is_file():
            # transformers leaves the index of a sharded model there when it writes a smaller one over it.
            raise CheckpointError(
                f"{folder / file} is missing; fetch the whole repository again, or if model.safetensors has all "
                f"weights, remove {index_name}"
            )
        for name, tensor in tensors_in(folder / file).items():
            if name in tensors:
                faults.append(f"twice: {name} is in two files, one of them {file}")
            elif where.get(name) != file:
                faults.append(f"index: {name} is in {file}, where {index_name} says {where.get(name)}")
            tensors[name] = tensor
    return tensors, faults


_WEIGHT_NORM = re.compile(r"(.+)\.(?:weight_([gv])|parametrizations\.weight\.original([01]))")


def fold_weight_norm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Replace each pair of length g and direction v by weight = g v / |v|, with |v| over all axes but the first."""
    pairs: dict[str, dict[str, str]] = {}
    for name in tensors:
        if match := _WEIGHT_NORM.fullmatch(name):
            part = match[2] or "gv"[int(match[3])]
            pairs.setdefault(f"{match[1]}.weight", {})[part] = name
    pairs = {name: pair for name, pair in pairs.items() if len(pair) == 2 and name not in tensors}
    folded = {name: tensor for name, tensor in tensors.items() if not any(name in p.values() for p in pairs.values())}
    for name, pair in pairs.items():
        g, v = tensors[pair["g"]], tensors[pair["v"]]

        def read(rows: Rows | None, g: Tensor = g, v: Tensor = v) -> np.ndarray:
            length, direction = (t.read(rows).astype(np.float32) for t in (g, v))
            norm = np.sqrt(np.square(direction).sum(tuple(range(1, direction.ndim)), keepdims=True))
            return direction * (length.reshape(norm.shape) / norm)

        folded[name] = Tensor(v.shape, "F32", read, (pair["g"], pair["v"]))
    return folded


def write_safetensors(path: Path, tensors: list[Outgoing]) -> Iterator[Outgoing]:
    """Write a safetensors file, computing one tensor at a time.

    Args:
      path: the file to write.
      tensors: the tensors in the file's order.

    Yields:
      Each tensor after it is written.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
    offset = 0
    for tensor in tensors:
        end = offset + _bytes(tensor)
        dtype = _NAME_OF_DTYPE[np.dtype(tensor.dtype)]
        header[tensor.name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors:
            array = np.ascontiguousarray(tensor.make())
            file.write(array.reshape(-1).view(np.uint8).data)
            yield tensor


def write_sharded(folder: Path, tensors: list[Outgoing]) -> Iterator[Outgoing]:
    """Write `model.safetensors`, or several files and their index when the tensors take more than `SHARD_BYTES`."""
    shards: list[list[Outgoing]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(map(_bytes, shards[-1])) + _bytes(tensor) > SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        yield from write_safetensors(folder / "model.safetensors", tensors)
        return
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    where = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    index = {"metadata": {"total_size": sum(map(_bytes, tensors))}, "weight_map": where}
    write_json(folder / INDEX_NAME, index)
    for name, shard in zip(names, shards, strict=True):
        yield from write_safetensors(folder / name, shard)


def _bytes(tensor: Outgoing) -> int:
    return int(np.prod(tensor.shape, dtype=np.int64)) * np.dtype(tensor.dtype).itemsize


def own_voices(tokenizer: Path | None) -> list[Path]:
    """List a model's own voices: files in a folder `VOICES` beside its tokenizer.

    Args:
      tokenizer: path of the tokenizer; None for a model without one, which has no voices.
    """
    return [] if tokenizer is None else sorted((tokenizer.parent / VOICES).glob("*.safetensors"))


def copy_voices(tokenizer: Path | None, folder: Path) -> None:
    """Copy a model's own voices to a model's folder.

    Args:
      tokenizer: as for `own_voices`.
      folder: the folder of the copy.
    """
    if voices := own_voices(tokenizer):
        (folder / VOICES).mkdir()
    for voice in voices:
        shutil.copyfile(voice, folder / VOICES / voice.name)


def read_json(path: Path) -> dict:
    """Read the object in a JSON file.

    Raises:
      CheckpointError: the file is missing, unreadable, or does not hold an object.
    """
    try:
        value = decode_json(read_text(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({error}); fetch it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, expected an object; fetch it again")
    return value


def write_json(path: Path, value: dict) -> None:
    """Write an object as indented JSON."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", errors="replace")  # parts of names of folders in other encodings

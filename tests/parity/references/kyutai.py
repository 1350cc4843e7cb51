"""Writes checkpoint folders in Kyutai's published layout, built by the reference package with random weights."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from moshi.models import loaders
from safetensors.torch import load_file, save_file

from tests.helpers.tokenizer_maker import make_tokenizer
from tests.parity.references.random_weights import random_lm, random_mimi

Size = Literal["small", "stt-1b", "stt-2.6b"]
Spelling = Literal["in_proj_weight", "in_projs"]

SEED = 2  # of the first few, the one whose tokens vary most on the short recording
PUBLISHED = Path(__file__).parents[2] / "published"
MIMI_CONFIG_NAME = "mimi_config.json"

# The published structure in miniature. The context is shorter than the recording, so that it matters.
_SMALL_LM = {
    "dim": 64,
    "num_heads": 4,
    "num_layers": 3,
    "context": 40,
    "card": 128,
    "n_q": 8,
    "delays": [0] * 9,
    "text_card": 64,
    "mimi_config_name": MIMI_CONFIG_NAME,
}
_NOT_LM = (
    "model_type",
    "model_id",
    "lm_gen_config",
    "stt_config",
    "tts_config",
    "mimi_name",
    "mimi_config_name",
    "moshi_name",
    "tokenizer_name",
)
_SMALL_MIMI = {
    "seanet": {"n_filters": 8, "dimension": 64},
    "transformer": {
        "d_model": 64,
        "num_heads": 4,
        "num_layers": 2,
        "dim_feedforward": 256,
        "input_dimension": 64,
        "output_dimensions": [64],
    },
    "quantizer": {"dimension": 32, "n_q": 8, "bins": 128, "input_dimension": 64, "output_dimension": 64},
}


def make_kyutai_stt(
    folder: Path,
    *,
    size: Size = "small",
    seed: int = SEED,
    extra_heads: bool = False,
    spelling: Spelling = "in_proj_weight",
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a speech-to-text checkpoint exactly as Kyutai publishes one: config, two weight files and a tokenizer.

    Args:
        folder: Created if it is missing; files of the same names are replaced.
        size: "small" runs anywhere; the others have the published shapes (2 and 6 GB in bfloat16, twice that in
            float32, all of it in memory while it is written).
        seed: Of the codec's weights; the language model's depend on their names alone.
        extra_heads: Adds the four pause heads of the `-candle` twin, and their two config keys.
        spelling: Names of the packed attention weights: as published, or as today's `state_dict` gives them.
        dtype: Of the language model; the codec is always float32, as published.

    Returns:
        `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = stt_config(size, extra_heads=extra_heads)
    weights = random_lm(lm_shapes(config), config["n_q"], dtype)
    save_file(_respell(weights, spelling), folder / "model.safetensors")
    make_mimi(folder / config["mimi_name"], published=size != "small", seed=seed, spelling=spelling)
    if size == "small":
        (folder / MIMI_CONFIG_NAME).write_text(json.dumps(mimi_config(published=False), indent=1))
    make_tokenizer(folder / config["tokenizer_name"], config["text_card"])
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder


def make_mimi(path: Path, *, published: bool = False, seed: int = SEED, spelling: Spelling = "in_proj_weight") -> Path:
    """Write one Mimi weight file, float32: of the published shape (370 MB), or in miniature."""
    config = mimi_config(published)
    state = random_mimi(config, config["quantizer"]["n_q"], seed).state_dict()
    save_file(_respell(state, spelling), path)
    return path


def make_weight_normed_mimi(source: Path, target: Path) -> Path:
    """Rewrite a Mimi weight file with every SEANet convolution split into `weight_g` and `weight_v`.

    Training stores them so, and the Rust loader still reads it: weight = g v / |v|, the norm over all axes but the
    first, which for a transposed convolution counts input channels.

    Args:
        source: A Mimi file with plain weights.
        target: File to write.

    Returns:
        `target`.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, weight in load_file(source).items():
        if name.startswith(("encoder.", "decoder.")) and name.endswith((".conv.weight", ".convtr.weight")):
            direction_length = 0.5 + torch.rand((len(weight), 1, 1), generator=generator)
            tensors[f"{name}_g"] = weight.norm(dim=(1, 2), keepdim=True)
            tensors[f"{name}_v"] = weight * direction_length
        else:
            tensors[name] = weight
    save_file(tensors, target)
    return target


def stt_config(size: Size, *, extra_heads: bool = False) -> dict[str, Any]:
    """Content of `config.json`: as published, or the same keys with small values; with the two keys of pause heads."""
    published_name = "stt-2.6b-en" if size == "stt-2.6b" else "stt-1b-en_fr"
    config = json.loads((PUBLISHED / f"{published_name}.config.json").read_text())
    if size == "small":
        config |= _SMALL_LM
    if extra_heads:
        config |= {"extra_heads_num_heads": 4, "extra_heads_dim": 6}
    return config


def mimi_config(published: bool) -> dict[str, Any]:
    """Return Mimi's configuration as `moshi.models.loaders.get_mimi` takes it."""
    config = dict(loaders._mimi_config)
    if not published:
        config |= {part: config[part] | changes for part, changes in _SMALL_MIMI.items()}
    return config


def lm_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the part of `config.json` that `moshi.models.loaders.get_moshi_lm` takes."""
    return {key: value for key, value in config.items() if key not in _NOT_LM}


def lm_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the reference's language model; no memory is allocated for them."""
    model = loaders.get_moshi_lm(None, lm_config(config), device="meta")
    return {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}


def published_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the same tensors under the attention names of the published files."""
    return _respell(state, "in_proj_weight")


def _respell(state: dict[str, torch.Tensor], spelling: Spelling) -> dict[str, torch.Tensor]:
    if spelling == "in_projs":
        return state
    return {
        name.replace("in_projs.0.weight", "in_proj_weight").replace("out_projs.0.weight", "out_proj.weight"): tensor
        for name, tensor in state.items()
    }

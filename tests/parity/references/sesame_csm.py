"""Reads Sesame's own layout of CSM in plain torch, by torchtune's names and arithmetic, and nothing of the library's.

A few lines stand for torchtune 0.4.0, which Sesame's code needs and which does not install beside a current torch:
rotations of adjacent pairs at Llama 3's scaled rates, grouped heads, a gated feed-forward, and RMS norms.
Source: SesameAILabs/csm@2d72082 models.py; pytorch/torchtune@v0.4.0 models/llama3_1/_position_embeddings.py.

Dimensions: M streams, Q codebooks, T positions, V codes, H width of a head, K its pairs.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

_BASE, _SCALE = 500_000.0, 32.0


def sesame_csm_logits(folder: Path, tokens_MT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute teacher-forced logits of both decoders over one conversation, float32.

    Args:
        folder: Holds `model.safetensors` and a config.json whose `csm_config` gives heads and scaling.
        tokens_MT: Text first, -1 absent.

    Returns:
        The backbone's [T, V], where t predicts the first code of position t + 1; and the depth decoder's [T, Q - 1, V],
        where t predicts the codes after the first of position t, zeros where that is no frame of audio.
    """
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())["csm_config"]
    card = config["card"]
    text_T, codes_TQ = (torch.from_numpy(np.array(part)).long() for part in (tokens_MT[0], tokens_MT[1:].T))
    offsets_Q = torch.arange(codes_TQ.shape[1]) * card
    embedded_TQD = tensors["audio_embeddings.weight"][codes_TQ.clamp(min=0) + offsets_Q]
    # As S:models: text is the last of the streams, each is looked up, and the masked ones are left out of the sum.
    streams = torch.cat([embedded_TQD, tensors["text_embeddings.weight"][text_T.clamp(min=0)][:, None]], dim=1)
    mask = torch.cat([codes_TQ >= 0, (text_T >= 0)[:, None]], dim=1)
    hidden_TD = _decoder(tensors, "backbone", (streams * mask[..., None]).sum(1)[None], config["backbone"])[0]
    first_TV = hidden_TD @ tensors["codebook0_head.weight"].T
    depth_TQV = torch.zeros(len(text_T), codes_TQ.shape[1] - 1, card)
    for t in (codes_TQ[:, 0] >= 0).nonzero()[:, 0].tolist():
        inputs = torch.cat([hidden_TD[t - 1 : t], embedded_TQD[t, :-1]])[None]
        out = _decoder(tensors, "decoder", inputs @ tensors["projection.weight"].T, config["depth"])[0]
        for q in range(1, codes_TQ.shape[1]):
            depth_TQV[t, q - 1] = out[q] @ tensors["audio_head"][q - 1]
    return first_TV.numpy(), depth_TQV.numpy()


def _decoder(tensors: Mapping[str, torch.Tensor], name: str, x: torch.Tensor, config: Mapping) -> torch.Tensor:
    heads, width = config["num_heads"], config["d_model"] // config["num_heads"]
    kv_heads = heads // config["kv_repeat"]
    angles_TK = torch.arange(x.shape[1])[:, None] * _rates(width, config["rope_scaling"])
    for i in range(config["num_layers"]):
        layer = {key.removeprefix(f"{name}.layers.{i}."): t for key, t in tensors.items()}
        normed = _norm(x, layer["sa_norm.scale"])
        q, k, v = (
            (normed @ layer[f"attn.{part}_proj.weight"].T).unflatten(-1, (-1, width)).transpose(1, 2) for part in "qkv"
        )
        q, k = _turned(q, angles_TK), _turned(k, angles_TK)
        k, v = (part.repeat_interleave(heads // kv_heads, dim=1) for part in (k, v))
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + attended.transpose(1, 2).flatten(2) @ layer["attn.output_proj.weight"].T
        normed = _norm(x, layer["mlp_norm.scale"])
        gate, up = (normed @ layer[f"mlp.{part}.weight"].T for part in ("w1", "w3"))
        x = x + (torch.nn.functional.silu(gate) * up) @ layer["mlp.w2.weight"].T
    return _norm(x, tensors[f"{name}.norm.scale"])


def _norm(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * scale


def _rates(width: int, scaling: Mapping[str, float]) -> torch.Tensor:
    """Return torchtune's scaled rates [K]: by wavelength, where the library and transformers go by rate."""
    rates = []
    low, high, old = scaling["low_frequency"], scaling["high_frequency"], scaling["original_context"]
    for rate in (1.0 / _BASE ** (torch.arange(0, width, 2).float() / width)).tolist():
        wavelength = 2 * math.pi / rate
        if wavelength < old / high:
            rates.append(rate)
        elif wavelength > old / low:
            rates.append(rate / _SCALE)
        else:
            smooth = (old / wavelength - low) / (high - low)
            rates.append((1 - smooth) * rate / _SCALE + smooth * rate)
    return torch.tensor(rates)


def _turned(x: torch.Tensor, angles_TK: torch.Tensor) -> torch.Tensor:
    """Rotate the adjacent pairs of each head."""
    turns = torch.polar(torch.ones_like(angles_TK), angles_TK)
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turns).flatten(-2)

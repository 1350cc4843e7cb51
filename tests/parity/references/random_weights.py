"""Random weights for the reference's own modules, scaled so that codes and tokens vary as a trained model's do.

Default initialisation leaves a codec whose codes hardly change and a language model that repeats one token; a parity
test on those would pass with half of the arithmetic missing. Nothing is left at an identity value either: norms,
biases, layer scales and cluster usages are all drawn.

Dimensions: N frames, D width of the quantiser, S samples.
"""

import math
import zlib
from typing import Any

import numpy as np
import torch
from moshi.models import MimiModel, loaders
from moshi.modules.transformer import LayerScale
from moshi.quantization.core_vq import EuclideanCodebook
from moshi.utils.compile import no_compile
from torch import nn

from tests.parity.references.recordings import speech

_DEAD_EVERY = 16  # one codebook entry in so many was never used in training: its usage is below the clamp of 1e-5
_USAGE_FLOOR = 1e-5
_LM_GAINS = {  # deviation of a layer's output for inputs of deviation 1
    "self_attn.in_proj": 1.3,  # attention logits of deviation 1.7: neither uniform nor one-hot
    "self_attn.out_proj": 1.0,
    "gating.linear_in": 1.0,
    "gating.linear_out": 1.5,
    "text_linear": 3.0,
    "extra_heads": 2.0,
    # Of models that speak.
    "cross_attention.in_proj": 1.3,
    "cross_attention.out_proj": 1.0,
    "linear_in": 1.0,
    "linear_out": 1.5,
    "depformer_in": 0.7,
    "low_rank": 0.7,
    "out1": 0.7,
    "out2": 0.7,
    "linears": 3.0,
    "output_proj": 1.0,
}


def random_mimi(config: dict[str, Any], num_codebooks: int, seed: int) -> MimiModel:
    """Mimi of the reference package with random weights, fitted to real speech.

    Every convolution and projection is rescaled so that its output on speech has deviation 1, in the order in which
    the audio passes through them. Each codebook is then drawn from the residuals that reach it.

    Args:
        config: As `moshi.models.loaders.get_mimi` takes it.
        num_codebooks: Codebooks that the model uses when it encodes.
        seed: Of every random draw.

    Returns:
        The model, float32, on the CPU.
    """
    torch.manual_seed(seed)
    mimi = loaders.get_mimi(None, config, num_codebooks=num_codebooks)
    pcm_S = torch.from_numpy(np.concatenate([speech("librispeech"), speech("bria")[: 10 * mimi.sample_rate]]))
    with torch.no_grad(), no_compile():
        _draw_vectors(mimi)
        hooks = [layer.register_forward_hook(_to_unit_deviation) for layer in mimi.modules() if _is_linear(layer)]
        latent = mimi.encode_to_latent(pcm_S[None, None], quantize=False)
        for branch in (mimi.quantizer.rvq_first, mimi.quantizer.rvq_rest):
            residual_ND = branch.input_proj(latent)[0].T
            for layer in branch.vq.layers:
                residual_ND = _fit_codebook(layer._codebook, residual_ND)
        mimi.decode(mimi.quantizer.encode(latent))
        for hook in hooks:
            hook.remove()
        mimi.decoder.model[-1].conv.conv.weight *= 0.1  # the level of speech
    return mimi


def random_lm(
    shapes: dict[str, tuple[int, ...]], num_audio_codebooks: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Return weights for the language model whose parameters have these names and shapes.

    The rows of the text head that belong to tokens 0 (a word begins) and 3 (padding) are longer than the others, so
    that each of the two wins about one frame in four, as neither would among thousands of equal rows.

    Args:
        shapes: Shape of each parameter, under the names of `moshi.models.LMModel.state_dict`.
        num_audio_codebooks: Audio streams whose embeddings are added up.
        dtype: To which every tensor is rounded.

    Returns:
        The tensors, under the same names.

    Raises:
        ValueError: If a name is not one that a model of the family has.
    """
    tensors = {}
    for name, shape in shapes.items():
        # A tensor's draw depends on its name only, so that pause heads can be added without changing the rest.
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        tensors[name] = _lm_tensor(name, torch.randn(shape, generator=generator), num_audio_codebooks).to(dtype)
    return tensors


def _lm_tensor(name: str, normal: torch.Tensor, num_audio_codebooks: int) -> torch.Tensor:
    if name.endswith((".alpha", "norm_cross.weight")):
        return 1 + 0.2 * normal
    if name.endswith(("norm_cross.bias", "learnt_padding")):
        return 0.2 * normal
    if name in ("text_emb.weight", "depformer_text_emb.weight") or name.endswith("embed.weight"):
        return math.sqrt(0.5) * normal
    if name.startswith("depformer_emb.") and "low_rank" not in name:
        return normal
    if name.startswith("emb."):
        return math.sqrt(0.5 / num_audio_codebooks) * normal
    gain = next((gain for part, gain in _LM_GAINS.items() if part in name), None)
    if gain is None:
        raise ValueError(f"found the parameter {name}, expected one of a model of the family: give it a gain here")
    weight = normal.mul_(gain / math.sqrt(normal.shape[-1]))
    if name == "text_linear.weight":
        # The largest of n normal draws is about sqrt(2 ln n); a row longer by that much wins when it is well above 0.
        weight[[0, 3]] *= math.sqrt(2 * math.log(len(weight))) / 0.7
    return weight


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv1d | nn.ConvTranspose1d | nn.Linear)


def _draw_vectors(mimi: MimiModel) -> None:
    for layer in mimi.modules():
        if isinstance(layer, nn.LayerNorm):
            layer.weight.normal_(1, 0.2)
            layer.bias.normal_(0, 0.2)
        elif isinstance(layer, LayerScale):
            layer.scale.uniform_(0.2, 0.6)
        elif _is_linear(layer) and layer.bias is not None:
            layer.bias.normal_(0, 0.1)


def _to_unit_deviation(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    """Forward hook: divides the layer's weights by the deviation of what it has just computed."""
    deviation = output.std()
    for parameter in layer.parameters(recurse=False):
        parameter /= deviation
    return output / deviation


def _fit_codebook(codebook: EuclideanCodebook, residual_ND: torch.Tensor) -> torch.Tensor:
    """Fill one codebook with noisy residuals, scaled to take away as much as they can; return what they leave."""
    bins = codebook.codebook_size
    noise = math.sqrt(codebook.dim) / 8  # in the published 256 dimensions a stage then leaves 85 % of the residual
    picked_ND = residual_ND[torch.randint(len(residual_ND), (bins,))]
    entries = picked_ND + noise * residual_ND.std(0) * torch.randn_like(picked_ND)
    nearest_ND = entries[torch.cdist(residual_ND, entries).argmin(1)]
    entries *= (residual_ND * nearest_ND).sum() / nearest_ND.square().sum()

    usage = torch.empty(bins).uniform_(0.5, 4)
    usage[::_DEAD_EVERY] = 0
    codebook.cluster_usage.copy_(usage)
    codebook.embedding_sum.copy_(entries * usage.clamp(min=_USAGE_FLOOR)[:, None])
    codebook._initialized.fill_(1)
    return residual_ND - codebook.decode(codebook.encode(residual_ND))

"""Makes the goldens: what Kyutai's PyTorch package computes with random weights, one small safetensors file per case.

    NO_TORCH_COMPILE=1 python -m tests.goldens.make_goldens

A file holds `weights.*` under the reference's own names, `in.*` and `out.*`, and in its metadata the config of the case
and the versions that made it. Needs torch and moshi; the tests that read the files need neither.
"""

import copy
import importlib.metadata
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from moshi.conditioners import ConditionAttributes, TensorCondition
from moshi.models import LMModel, loaders
from moshi.models.lm_utils import _delay_sequence, _undelay_sequence
from moshi.modules.conv import StreamingConv1d, StreamingConvTranspose1d
from moshi.modules.resample import ConvDownsample1d, ConvTrUpsample1d
from moshi.modules.transformer import StreamingTransformer
from moshi.quantization import SplitResidualVectorQuantizer
from safetensors.numpy import save_file

from dsm_jax.configs import TransformerConfig
from dsm_jax.configs.json import to_dict
from dsm_jax.convert.kyutai_config import flat_lm
from tests.helpers import small

Arrays = dict[str, np.ndarray]
Golden = tuple[Any, Arrays]  # the config of the case, in JSON's types, and the tensors

STEPS = 14  # nearly three of the miniature windows

TRANSFORMERS = {
    "mimi": TransformerConfig(
        d_model=16, num_heads=4, num_layers=2, dim_feedforward=24, context=5, layer_scale=0.3, norm="layer_norm"
    ),
    "lm": TransformerConfig(
        d_model=16,
        num_heads=4,
        num_layers=2,
        dim_feedforward=48,
        context=5,
        max_period=100_000.0,
        gating="silu",
        norm="rms_norm_f32",
        kv_repeat=2,
    ),
    "other": TransformerConfig(
        d_model=16,
        num_heads=2,
        num_layers=2,
        dim_feedforward=64,
        context=5,
        gating="silu",
        norm="layer_norm_f32",
        positional_embedding="sin_rope",
    ),
}


def draw(module: torch.nn.Module, random: np.random.Generator) -> Arrays:
    """Give every tensor of the module random values, none left at an identity, and return them."""
    weights = {}
    for name, old in module.state_dict().items():
        shape = tuple(old.shape)
        noise = random.normal(size=shape).astype(np.float32)
        if name.endswith("_initialized"):
            new = np.ones(shape, np.float32)
        elif name.endswith("cluster_usage"):
            new = random.uniform(0.5, 2.0, shape).astype(np.float32)
            new[0] = 1e-7  # an entry that training never used: the reference divides by 1e-5
        elif name.endswith("embedding_sum"):
            new = noise
            new[0] *= 1e-5
        elif name.endswith(("alpha", "scale", "norm1.weight", "norm2.weight", "norm_cross.weight")):
            new = 1 + 0.3 * noise
        elif name.endswith("bias") or len(shape) == 1:
            new = 0.3 * noise
        else:
            fan_in = shape[0] * 2 if ".convtr." in f".{name}" else np.prod(shape[1:])
            new = noise / np.sqrt(fan_in).astype(np.float32)
        weights[f"weights.{name}"] = new.astype(np.float32)
    module.load_state_dict({name: torch.from_numpy(weights[f"weights.{name}"]) for name in module.state_dict()})
    return weights


def noise(random: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(random.normal(size=shape).astype(np.float32))


def convolution(options: dict[str, Any]) -> Callable[[np.random.Generator], Golden]:
    def make(random: np.random.Generator) -> Golden:
        module = StreamingConv1d(3, 4, causal=True, **options)
        weights, x_BCT = draw(module, random), noise(random, 2, 3, 12)
        return options, weights | {"in.x": x_BCT, "out.y": module(x_BCT)}

    return make


def downsample(random: np.random.Generator) -> Golden:
    module = ConvDownsample1d(2, 3, causal=True, learnt=True)
    weights, x_BCT = draw(module, random), noise(random, 2, 3, 12)
    return {}, weights | {"in.x": x_BCT, "out.y": module(x_BCT)}


def conv_transpose(random: np.random.Generator) -> Golden:
    module = StreamingConvTranspose1d(3, 4, kernel_size=6, stride=3, causal=True)
    weights, x_BCT = draw(module, random), noise(random, 2, 3, 7)
    return {}, weights | {"in.x": x_BCT, "out.y": module(x_BCT)}


def upsample(random: np.random.Generator) -> Golden:
    module = ConvTrUpsample1d(2, 3, causal=True, learnt=True, channel_wise=True)
    weights, x_BCT = draw(module, random), noise(random, 2, 3, 7)
    return {}, weights | {"in.x": x_BCT, "out.y": module(x_BCT)}


def transformer(config: TransformerConfig) -> Callable[[np.random.Generator], Golden]:
    """Offline, and as the reference itself streams it: by single steps, and by chunks of two."""

    def make(random: np.random.Generator) -> Golden:
        known = _known(to_dict(config))
        unused = ("input_dimension", "output_dimensions", "conv_layout")
        options = {name: value for name, value in known.items() if name not in unused}
        module = StreamingTransformer(**options)
        weights, x_BTD = draw(module, random), noise(random, 2, STEPS, config.d_model)
        arrays = weights | {"in.x": x_BTD, "out.offline": module(x_BTD)}
        for name, chunk in {"singles": 1, "pairs": 2}.items():
            with module.streaming(2):
                arrays[f"out.{name}"] = torch.cat([module(part) for part in x_BTD.split(chunk, dim=1)], dim=1)
        return known, arrays

    return make


def _known(transformer: dict) -> dict:
    """Leave out the settings that the reference does not have."""
    return {name: value for name, value in transformer.items() if name not in ("rope_scaling", "gated_width")}


def rvq(random: np.random.Generator) -> Golden:
    config = to_dict(small.MIMI.quantizer)
    module = SplitResidualVectorQuantizer(**config).eval()
    weights, x_BDT = draw(module, random), noise(random, 2, config["input_dimension"], 9)
    arrays = weights | {"in.x": x_BDT}
    for codebooks in range(1, config["n_q"] + 1):
        module.set_num_codebooks(codebooks)
        codes_BQT = module.encode(x_BDT)
        arrays |= {f"out.codes.{codebooks}": codes_BQT, f"out.decoded.{codebooks}": module.decode(codes_BQT)}
    return config, arrays


def mimi(random: np.random.Generator) -> Golden:
    config = to_dict(small.MIMI)
    config["transformer"] = _known(config["transformer"])
    module = loaders.get_mimi(None, config, num_codebooks=config["quantizer"]["n_q"])
    # Not a whole number of frames.
    weights, samples_BCT = draw(module, random), noise(random, 2, 1, 8 * small.MIMI.frame_size - 5)
    codes_BQT = module.encode(samples_BCT)
    return config, weights | {
        "in.samples": samples_BCT,
        "out.latents": module.encode_to_latent(samples_BCT, quantize=False),
        "out.codes": codes_BQT,
        "out.decoded": module.decode(codes_BQT),
    }


def stt(random: np.random.Generator) -> Golden:
    """Return the parts of `LMModel.forward` that run without a depformer; the method itself does not."""
    config = flat_lm(small.STT)
    module = _language_model(config)
    weights, codes_BKT = draw(module, random), _tokens(random, config)
    initial_BK1 = module._get_initial_token().expand(2, -1, -1)
    delayed_BKT = torch.cat([initial_BK1, _delay_sequence(config["delays"], codes_BKT, initial_BK1)], dim=2)
    hidden_BTD, logits_B1TV = module.forward_text(delayed_BKT[:, :, :-1])
    logits_B1TV, valid_B1T = _undelay_sequence(config["delays"][:1], logits_B1TV, fill_value=0.0)
    pauses_PBTO = [torch.softmax(head(hidden_BTD), dim=-1) for head in module.extra_heads]
    return config, weights | {
        "in.codes": codes_BKT,
        "in.delayed": delayed_BKT[:, :, :-1],
        "out.hidden": hidden_BTD,
        "out.text_logits": logits_B1TV[:, 0],
        "out.text_mask": (valid_B1T & (codes_BKT[:, :1] != -1))[:, 0],
        "out.pauses": torch.stack(pauses_PBTO, dim=2),
    }


def tts(random: np.random.Generator) -> Golden:
    """`LMModel.forward`, with one row told everything and one row told little."""
    config = flat_lm(small.TTS)
    module = _language_model(config)
    weights, codes_BKT = draw(module, random), _tokens(random, config)
    # Two texts in one integer; a first half of 0 is no second text.
    second_BT = torch.from_numpy(random.integers(0, config["text_card"], size=(2, STEPS)))
    codes_BKT[:, 0] = torch.where(
        codes_BKT[:, 0] >= 0, second_BT * (config["text_card"] + 1) + codes_BKT[:, 0], codes_BKT[:, 0]
    )
    voices = [TensorCondition.from_tensor(noise(random, 1, length, 10)) for length in (5, 3)]
    told = [
        ConditionAttributes(text={"cfg": "2", "control": "ok"}, tensor={"speaker_wavs": voices[0]}),
        ConditionAttributes(text={"cfg": None, "control": "ok"}, tensor={"speaker_wavs": voices[1]}),
    ]
    prepared = module.condition_provider.prepare(told)
    output = module(codes_BKT, module.condition_provider(prepared))
    values = {name: value[0] if name != "speaker_wavs" else value.tensor for name, value in prepared.items()}
    return config, weights | {f"in.values.{name}": value for name, value in values.items()} | {
        f"in.masks.{name}": value.mask for name, value in prepared.items()
    } | {
        "in.codes": codes_BKT,
        "out.text_logits": output.text_logits.nan_to_num(0.0)[:, 0],
        "out.text_mask": output.text_mask[:, 0],
        "out.audio_logits": output.logits.nan_to_num(0.0),
        "out.audio_mask": output.mask,
    }


def _language_model(config: dict[str, Any]) -> LMModel:
    # The reference writes into the config that it is given.
    return loaders.get_moshi_lm(None, copy.deepcopy(config), dtype=torch.float32)


def _tokens(random: np.random.Generator, config: dict[str, Any]) -> torch.Tensor:
    """Draw tokens [2, K, STEPS], one in ten of them -1."""
    cards = np.array([config["text_card"]] + [config["card"]] * config["n_q"])
    codes_BKT = random.integers(0, cards[:, None], size=(2, len(cards), STEPS))
    return torch.from_numpy(np.where(random.random(codes_BKT.shape) < 0.1, -1, codes_BKT))


CASES: dict[str, Callable[[np.random.Generator], Golden]] = {
    "conv_strided": convolution({"kernel_size": 6, "stride": 3}),
    "conv_dilated": convolution({"kernel_size": 3, "dilation": 2}),
    "downsample": downsample,
    "conv_transpose": conv_transpose,
    "upsample": upsample,
    "transformer_mimi": transformer(TRANSFORMERS["mimi"]),
    "transformer_lm": transformer(TRANSFORMERS["lm"]),
    "transformer_other": transformer(TRANSFORMERS["other"]),
    "rvq": rvq,
    "mimi": mimi,
    "lm_stt": stt,
    "lm_tts": tts,
}


def make(name: str, seed: int = 0) -> Golden:
    """One case, with every weight and input drawn from `seed`."""
    with torch.no_grad():
        config, arrays = CASES[name](np.random.default_rng(seed))
    made = {key: a.numpy() if isinstance(a, torch.Tensor) else a for key, a in arrays.items()}
    as_32 = {np.dtype(np.int64): np.int32}
    return config, {key: np.ascontiguousarray(a.astype(as_32.get(a.dtype, a.dtype))) for key, a in made.items()}


def main(folder: Path) -> None:
    versions = {name: importlib.metadata.version(name) for name in ("moshi", "torch", "numpy")}
    for name in CASES:
        config, arrays = make(name)
        save_file(arrays, folder / f"{name}.safetensors", {"config": json.dumps(config), **versions})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)

"""Holds this library's modules against what the reference computed: stored goldens, or cases made a moment ago.

Shape letters: B batch rows, T time steps, C channels, D model width, Q codebooks, K streams.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file

from dsm_jax.configs import MimiConfig, QuantizerConfig, TransformerConfig
from dsm_jax.configs.json import from_dict
from dsm_jax.convert import kyutai, kyutai_config, pieces, transforms
from dsm_jax.models.lm import DelayedStreamsLM
from dsm_jax.models.mimi import Mimi
from dsm_jax.nn.conv import CausalConv1d, CausalConvTranspose1d, DepthwiseUpsample
from dsm_jax.nn.rvq import SplitQuantizer
from dsm_jax.nn.transformer import Transformer
from tests.helpers import small

FOLDER = Path(__file__).parent
ROUNDING = 1e-5  # of float32, relative to the largest value: both add up the same terms, in another order

Arrays = dict[str, np.ndarray]
Module = TypeVar("Module", bound=nnx.Module)


def read(name: str) -> tuple[Any, Arrays]:
    """Return a stored golden: its config and its tensors."""
    path = FOLDER / f"{name}.safetensors"
    with safe_open(path, "np") as file:
        return json.loads(file.metadata()["config"]), load_file(path)


def filled(make: Callable[[nnx.Rngs], Module], table: pieces.Table, arrays: Arrays, root: str = "") -> Module:
    """Return a module with every weight of the reference.

    Args:
      make: builds the module from random streams.
      table: of `dsm_jax.convert`.
      arrays: of a golden.
      root: what the table writes before the names of both sides.
    """
    tensors = {
        root + name.removeprefix("weights."): pieces.Tensor(
            a.shape, "F32", lambda rows, a=a: a[slice(*rows or (None,))]
        )
        for name, a in arrays.items()
        if name.startswith("weights.")
    }
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    paths, treedef = jax.tree.flatten_with_path(state)
    specs = {root + ".".join(str(part.key) for part in path[:-1]): spec for path, spec in paths}
    claims, faults = pieces.plan(table, tensors, specs)
    assert not faults, faults
    values = {name: np.full(spec.shape, np.nan, spec.dtype) for name, spec in specs.items()}
    for claim in claims:
        if isinstance(claim.item, pieces.Piece):
            values[claim.item.target][claim.item.at] = pieces.load(claim.item, claim.names, tensors)
    return nnx.merge(graphdef, jax.tree.unflatten(treedef, map(jnp.asarray, values.values())))


def expect(claim: str, found: Any, wanted: np.ndarray) -> None:
    """Raise AssertionError unless integers and truths are equal, and floats equal to rounding."""
    found = np.asarray(found)
    assert found.shape == wanted.shape, f"{claim}: shape {found.shape}, the reference has {wanted.shape}"
    if wanted.dtype.kind != "f":
        assert (found == wanted).all(), f"{claim}: {(found != wanted).sum()} of {wanted.size} differ"
    else:
        worst = np.abs(found - wanted).max() / np.abs(wanted).max()
        assert worst <= ROUNDING, f"{claim}: off by {worst:.2g} of the largest value"


def _time_second(x_BCT: np.ndarray) -> jax.Array:
    return jnp.asarray(x_BCT).swapaxes(1, 2)


def _one_kernel(make: Callable[[nnx.Rngs], Any], table: pieces.Table, arrays: Arrays) -> None:
    expect(
        "output", filled(make, table, arrays, root=".")(_time_second(arrays["in.x"])).swapaxes(1, 2), arrays["out.y"]
    )


def convolution(config: dict[str, Any], arrays: Arrays) -> None:
    def make(rngs: nnx.Rngs) -> CausalConv1d:
        options = {"stride": config.get("stride", 1), "dilation": config.get("dilation", 1)}
        return CausalConv1d(3, 4, kernel=config["kernel_size"], **options, rngs=rngs)

    _one_kernel(make, kyutai.convolution(".conv.conv.weight", ".conv.conv.bias", "", None), arrays)


def downsample(config: dict[str, Any], arrays: Arrays) -> None:
    def make(rngs: nnx.Rngs) -> CausalConv1d:
        return CausalConv1d(3, 3, kernel=4, stride=2, bias=False, replicate=True, rngs=rngs)

    _one_kernel(make, [pieces.piece(".conv.conv.conv.weight", ".kernel_RCO", transforms.CONV)], arrays)


def conv_transpose(config: dict[str, Any], arrays: Arrays) -> None:
    table = kyutai.convolution(".convtr.convtr.weight", ".convtr.convtr.bias", "", 3)
    _one_kernel(lambda rngs: CausalConvTranspose1d(3, 4, stride=3, rngs=rngs), table, arrays)


def upsample(config: dict[str, Any], arrays: Arrays) -> None:
    table = [pieces.piece(".convtr.convtr.convtr.weight", ".kernel_RJC", transforms.depthwise(2))]
    _one_kernel(lambda rngs: DepthwiseUpsample(3, stride=2, rngs=rngs), table, arrays)


def filled_transformer(config: dict[str, Any], arrays: Arrays) -> Transformer:
    read_config = from_dict(TransformerConfig, config, "golden")
    table = kyutai.transformer_pieces(read_config, "", "")
    return filled(lambda rngs: Transformer(read_config, rngs=rngs), table, arrays, root=".")


def transformer(config: dict[str, Any], arrays: Arrays) -> None:
    module = filled_transformer(config, arrays)
    expect("offline", jax.jit(module.__call__)(arrays["in.x"]), arrays["out.offline"])
    # The reference streams as it runs offline, but for chunks of several steps once its ring is full: writing a chunk
    # overwrites keys that its first steps should still see. This library follows what it computes offline.
    window, pairs, offline = module.config.context, arrays["out.pairs"], arrays["out.offline"]
    expect("reference by single steps", arrays["out.singles"], offline)
    expect("reference by pairs, within the window", pairs[:, : window - 1], offline[:, : window - 1])
    assert np.abs(pairs[:, window + 1 :] - offline[:, window + 1 :]).max() > 1e-3


def rvq(config: dict[str, Any], arrays: Arrays) -> None:
    read_config = from_dict(QuantizerConfig, config, "golden")
    table = kyutai.mimi_table(dataclasses.replace(small.MIMI, quantizer=read_config))
    table = [item for item in table if "quantizer." in str(item)]
    quantizer = filled(lambda rngs: SplitQuantizer(read_config, rngs=rngs), table, arrays, root="quantizer.")
    for codebooks in range(1, read_config.n_q + 1):
        codes_BQT = arrays[f"out.codes.{codebooks}"]
        expect(f"{codebooks} codebooks", quantizer.encode(_time_second(arrays["in.x"]), codebooks), codes_BQT)
        decoded_BTD = quantizer.decode(jnp.asarray(codes_BQT))
        expect(f"{codebooks} decoded", decoded_BTD.swapaxes(1, 2), arrays[f"out.decoded.{codebooks}"])


def mimi(config: dict[str, Any], arrays: Arrays) -> None:
    read_config = from_dict(MimiConfig, config, "golden")
    codec = filled(lambda rngs: Mimi(read_config, rngs=rngs), kyutai.mimi_table(read_config), arrays)
    samples_BTC, codes_BQT = _time_second(arrays["in.samples"]), arrays["out.codes"]
    assert len(np.unique(codes_BQT)) > read_config.quantizer.bins / 2  # a codec that says one thing proves nothing
    expect("latents", jax.jit(codec.latents)(samples_BTC).swapaxes(1, 2), arrays["out.latents"])
    expect("codes", jax.jit(codec.encode)(samples_BTC), codes_BQT)
    expect("decoded", jax.jit(codec.decode)(jnp.asarray(codes_BQT)).swapaxes(1, 2), arrays["out.decoded"])


def _language_model(config: dict[str, Any], arrays: Arrays) -> DelayedStreamsLM:
    read_config = kyutai_config.read_lm(config, "golden")
    table = kyutai.lm_table(read_config, unpacked=True)
    return filled(lambda rngs: DelayedStreamsLM(read_config, rngs=rngs), table, arrays)


def stt(config: dict[str, Any], arrays: Arrays) -> None:
    lm = _language_model(config, arrays)
    output = jax.jit(lm.__call__)(arrays["in.codes"])
    expect("text logits", output.text_logits_BTV, arrays["out.text_logits"])
    expect("text mask", output.text_mask_BT, arrays["out.text_mask"])
    assert output.audio_logits_BQTV is None
    hidden_BTD, _ = jax.jit(lm.step)(arrays["in.delayed"], lm.init_state(2))
    expect("hidden states", hidden_BTD, arrays["out.hidden"])
    expect("pauses", lm.extra_probabilities(hidden_BTD), arrays["out.pauses"])


def tts(config: dict[str, Any], arrays: Arrays) -> None:
    lm = _language_model(config, arrays)
    values, masks = (
        {name: arrays[f"in.{kind}.{name}"] for name in config["conditioners"]} for kind in ("values", "masks")
    )
    conditions = jax.jit(lm.condition)(values, masks)
    output = jax.jit(lm.__call__)(arrays["in.codes"], conditions)
    expect("text logits", output.text_logits_BTV, arrays["out.text_logits"])
    expect("text mask", output.text_mask_BT, arrays["out.text_mask"])
    expect("audio logits", output.audio_logits_BQTV, arrays["out.audio_logits"])
    expect("audio mask", output.audio_mask_BQT, arrays["out.audio_mask"])


CASES: dict[str, Callable[[Any, Arrays], None]] = {
    "conv_strided": convolution,
    "conv_dilated": convolution,
    "downsample": downsample,
    "conv_transpose": conv_transpose,
    "upsample": upsample,
    "transformer_mimi": transformer,
    "transformer_lm": transformer,
    "transformer_other": transformer,
    "rvq": rvq,
    "mimi": mimi,
    "lm_stt": stt,
    "lm_tts": tts,
}

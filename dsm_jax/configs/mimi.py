"""The configs of the Mimi codec and its parts; the defaults are the published model's."""

import dataclasses
import math

from dsm_jax.configs.check import require, require_positive
from dsm_jax.configs.transformer import TransformerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeanetConfig:
    """SEANet, Mimi's convolutional networks. Ratios are in the decoder's order; the encoder uses them in reverse."""

    channels: int = 1
    dimension: int = 512
    n_filters: int = 64
    n_residual_layers: int = 1
    ratios: tuple[int, ...] = (8, 6, 5, 4)
    kernel_size: int = 7
    residual_kernel_size: int = 3
    last_kernel_size: int = 3
    dilation_base: int = 2
    compress: int = 2
    causal: bool = True
    activation: str = "ELU"
    norm: str = "none"  # published weights have the weight norm folded in; the loader folds it if they have not
    pad_mode: str = "constant"
    true_skip: bool = True
    disable_norm_outer_blocks: int = 0

    def __post_init__(self) -> None:
        require_positive(self, "channels", "dimension", "n_filters", "compress", "dilation_base")
        require_positive(self, "kernel_size", "residual_kernel_size", "last_kernel_size")
        require(min(self.ratios, default=1) > 0, f"seanet.ratios is {self.ratios}", "expected numbers above 0")
        fixed = {"causal": True, "activation": "ELU", "pad_mode": "constant", "true_skip": True}
        for name, value in fixed.items():
            require(getattr(self, name) == value, f"seanet.{name} is {getattr(self, name)!r}", f"Mimi has {value!r}")
        require(self.norm in ("none", "weight_norm"), f"seanet.norm is {self.norm!r}", "use 'none' or 'weight_norm'")

    @property
    def hop(self) -> int:
        """Input samples per latent."""
        return math.prod(self.ratios)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """Split residual vector quantiser: a chain of `n_q_semantic` codebooks, and a second chain of the others."""

    dimension: int = 256
    n_q: int = 32
    bins: int = 2048
    input_dimension: int = 512
    output_dimension: int = 512
    n_q_semantic: int = 1

    def __post_init__(self) -> None:
        require_positive(self, "dimension", "bins", "n_q")
        require(0 < self.n_q_semantic <= self.n_q, f"n_q_semantic is {self.n_q_semantic} of n_q {self.n_q}", "use 1")


_MIMI_TRANSFORMER = TransformerConfig(
    d_model=512,
    num_heads=8,
    num_layers=8,
    dim_feedforward=2048,
    context=250,
    layer_scale=0.01,
    input_dimension=512,
    output_dimensions=(512,),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MimiConfig:
    """The Mimi codec. The defaults are the published model's."""

    sample_rate: int = 24_000  # Hz
    frame_rate: float = 12.5  # Hz
    channels: int = 1
    seanet: SeanetConfig = SeanetConfig()
    quantizer: QuantizerConfig = QuantizerConfig()
    transformer: TransformerConfig = _MIMI_TRANSFORMER

    def __post_init__(self) -> None:
        require_positive(self, "sample_rate", "frame_rate", "channels")
        require(
            self.frame_size % self.seanet.hop == 0,
            f"one frame is {self.frame_size} samples, which the SEANet hop {self.seanet.hop} does not divide",
            "check sample_rate, frame_rate and ratios",
        )
        widths = {self.seanet.dimension, self.transformer.d_model}
        widths |= {self.quantizer.input_dimension, self.quantizer.output_dimension}
        require(len(widths) == 1, f"seanet, transformer and quantizer are {sorted(widths)} wide", "use one width")

    @property
    def frame_size(self) -> int:
        """Samples in one frame: 1920 in the published model."""
        return round(self.sample_rate / self.frame_rate)

    @property
    def resample_stride(self) -> int:
        """Latents of SEANet per frame: 2 in the published model."""
        return self.frame_size // self.seanet.hop

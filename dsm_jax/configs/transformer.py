"""The config of a causal transformer."""

import dataclasses

from dsm_jax.configs.check import require, require_positive

NORMS = ("layer_norm", "layer_norm_f32", "rms_norm", "rms_norm_f32")
POSITIONS = ("none", "rope", "sin", "sin_rope")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3's scaling of the rates of the rotary embeddings, for contexts longer than those of the first training.

    Rates whose wavelength is shorter than `original_context / high_frequency` stay as they are, rates whose wavelength
    is longer than `original_context / low_frequency` are divided by `factor`, and those between are interpolated.

    Attributes:
      factor: divisor of the slow rates.
      low_frequency: turns in the original context of the fastest rate that is divided in full.
      high_frequency: turns in the original context of the slowest rate that is not divided.
      original_context: steps.
    """

    factor: float
    low_frequency: float
    high_frequency: float
    original_context: int

    def __post_init__(self) -> None:
        require(
            0 < self.low_frequency < self.high_frequency,
            f"low_frequency is {self.low_frequency} and high_frequency {self.high_frequency}",
            "the low one must be the smaller, and above 0",
        )
        require(
            self.factor > 0 and self.original_context >= 1,
            f"factor is {self.factor} and original_context {self.original_context}",
            "both must be above 0",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """A causal transformer with a sliding window: Mimi's two, a language model's backbone, and both parts of CSM."""

    d_model: int
    num_heads: int
    num_layers: int
    dim_feedforward: int
    context: int  # a step sees itself and the context - 1 steps before it
    causal: bool = True
    layer_scale: float | None = None
    max_period: float = 10_000.0
    gating: str = "none"
    norm: str = "layer_norm"
    positional_embedding: str = "rope"
    kv_repeat: int = 1
    cross_attention: bool = False
    rope_scaling: RopeScaling | None = None
    gated_width: int | None = None  # inner width of a gated feed-forward; None derives it from dim_feedforward
    # In Mimi's file only: its widths are the model's, and the axes of its input in the reference have no effect here.
    input_dimension: int | None = None
    output_dimensions: tuple[int, ...] | None = None
    conv_layout: bool = True

    def __post_init__(self) -> None:
        require_positive(self, "d_model", "num_heads", "dim_feedforward", "context", "max_period", "kv_repeat")
        require(self.causal, "causal is false", "the library streams, so it runs causal transformers only")
        require(self.norm in NORMS, f"norm is {self.norm!r}", f"choose one of {NORMS}")
        require(self.gating in ("none", "silu"), f"gating is {self.gating!r}", "choose 'none' or 'silu'")
        require(
            self.positional_embedding in POSITIONS,
            f"positional_embedding is {self.positional_embedding!r}",
            f"choose one of {POSITIONS}",
        )
        require(
            self.d_model % self.num_heads == 0 and self.num_heads % self.kv_repeat == 0,
            f"width {self.d_model}, {self.num_heads} heads and kv_repeat {self.kv_repeat} do not divide",
            "the width must be a multiple of the heads, the heads a multiple of kv_repeat",
        )
        for name, width in (("input_dimension", self.input_dimension), ("output_dimensions", self.output_dimensions)):
            require(
                width in (None, self.d_model, (self.d_model,)),
                f"{name} is {width!r}",
                f"a transformer has no projection of its own; give the width {self.d_model}, or leave it out",
            )

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.d_model // self.num_heads

    @property
    def inner_width(self) -> int:
        """Inner width of the feed-forward."""
        if self.gating == "none":
            return self.dim_feedforward
        return self.gated_width or gating_dim(self.d_model, self.dim_feedforward)

    @property
    def num_kv_heads(self) -> int:
        """Number of key/value heads, each of which `kv_repeat` query heads share."""
        return self.num_heads // self.kv_repeat


def gating_dim(width: int, feedforward: int) -> int:
    """Compute the inner width of a gated feed-forward, as kyutai-labs/moshi@e6a55d2 moshi/modules/gating.py does."""
    return 21 * width // 8 if feedforward == 4 * width else 2 * feedforward // 3


def llama(
    *,
    width: int,
    inner: int,
    layers: int,
    heads: int,
    kv_heads: int,
    context: int,
    scaling: RopeScaling | None,
    max_period: float = 500_000.0,
) -> TransformerConfig:
    """Make the config of a transformer of Llama 3's kind: both decoders of CSM."""
    return TransformerConfig(
        d_model=width,
        num_heads=heads,
        num_layers=layers,
        dim_feedforward=inner,
        gated_width=inner,
        context=context,
        max_period=max_period,
        gating="silu",
        norm="rms_norm",
        kv_repeat=heads // kv_heads,
        rope_scaling=scaling,
    )

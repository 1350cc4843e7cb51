"""What a model is, as plain frozen data, with the field names of Kyutai's published config files.

Nothing here knows about arrays. `dsm_jax.strict` reads and writes these as JSON.
"""

import dataclasses
import json
import math
from typing import Any

from dsm_jax.errors import ConfigError

NORMS = ("layer_norm", "layer_norm_f32", "rms_norm", "rms_norm_f32")
POSITIONS = ("none", "rope", "sin", "sin_rope")


class Table(dict[str, Any]):
    """A JSON object that nobody changes, so that a config that holds one can be hashed."""

    def __hash__(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return hash(json.dumps(self, sort_keys=True))


def _require(ok: bool, found: str, remedy: str) -> None:
    if not ok:
        raise ConfigError(f"{found}; {remedy}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeanetConfig:
    """SEANet: the convolutions of Mimi. Ratios are in decoder order; the encoder walks them backwards."""

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
    norm: str = "none"  # published weights are stored with weight norm folded in; the loader folds it otherwise
    pad_mode: str = "constant"
    true_skip: bool = True
    disable_norm_outer_blocks: int = 0

    def __post_init__(self) -> None:
        fixed = {"causal": True, "activation": "ELU", "pad_mode": "constant", "true_skip": True}
        for name, value in fixed.items():
            _require(getattr(self, name) == value, f"seanet.{name} is {getattr(self, name)!r}", f"Mimi has {value!r}")
        _require(self.norm in ("none", "weight_norm"), f"seanet.norm is {self.norm!r}", "use 'none' or 'weight_norm'")

    @property
    def hop(self) -> int:
        """Input samples per latent."""
        return math.prod(self.ratios)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """A causal transformer with a sliding window: Mimi's two, and the language model's."""

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
    # Mimi's file says these too; both are the model width there.
    input_dimension: int | None = None
    output_dimensions: tuple[int, ...] | None = None
    conv_layout: bool = True

    def __post_init__(self) -> None:
        _require(self.causal, "causal is false", "the library streams, so it runs causal transformers only")
        _require(self.norm in NORMS, f"norm is {self.norm!r}", f"choose one of {NORMS}")
        _require(self.gating in ("none", "silu"), f"gating is {self.gating!r}", "choose 'none' or 'silu'")
        _require(
            self.positional_embedding in POSITIONS,
            f"positional_embedding is {self.positional_embedding!r}",
            f"choose one of {POSITIONS}",
        )
        _require(
            self.d_model % self.num_heads == 0 and self.num_heads % self.kv_repeat == 0,
            f"width {self.d_model}, {self.num_heads} heads and kv_repeat {self.kv_repeat} do not divide",
            "the width must be a multiple of the heads, the heads a multiple of kv_repeat",
        )

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.d_model // self.num_heads

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and values: each serves `kv_repeat` heads of queries."""
        return self.num_heads // self.kv_repeat


def gating_dim(width: int, feedforward: int) -> int:
    """Inner width of a gated feed-forward, as kyutai-labs/moshi@e6a55d2 moshi/modules/gating.py derives it."""
    return 21 * width // 8 if feedforward == 4 * width else 2 * feedforward // 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """Split residual vector quantiser: `n_q_semantic` codebooks beside a residual chain of the others."""

    dimension: int = 256
    n_q: int = 32
    bins: int = 2048
    input_dimension: int = 512
    output_dimension: int = 512
    n_q_semantic: int = 1


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
    """The Mimi codec. The defaults are the published model."""

    sample_rate: int = 24_000  # Hz
    frame_rate: float = 12.5  # Hz
    channels: int = 1
    seanet: SeanetConfig = SeanetConfig()
    quantizer: QuantizerConfig = QuantizerConfig()
    transformer: TransformerConfig = _MIMI_TRANSFORMER

    def __post_init__(self) -> None:
        _require(
            self.frame_size % self.seanet.hop == 0,
            f"one frame is {self.frame_size} samples, which the SEANet hop {self.seanet.hop} does not divide",
            "check sample_rate, frame_rate and ratios",
        )
        widths = {self.seanet.dimension, self.transformer.d_model}
        widths |= {self.quantizer.input_dimension, self.quantizer.output_dimension}
        _require(len(widths) == 1, f"seanet, transformer and quantizer are {sorted(widths)} wide", "use one width")

    @property
    def frame_size(self) -> int:
        """Samples in one frame: 1920 in the published model."""
        return round(self.sample_rate / self.frame_rate)

    @property
    def resample_stride(self) -> int:
        """Latents of SEANet per frame: 2 in the published model."""
        return self.frame_size // self.seanet.hop


@dataclasses.dataclass(frozen=True, kw_only=True)
class LMConfig:
    """The delayed-streams language model: one text stream and `n_q` audio streams, `dep_q` of them generated.

    The `depformer_*` fields describe the small transformer over codebooks, and mean nothing when `dep_q` is 0.
    """

    card: int
    n_q: int
    dep_q: int
    delays: tuple[int, ...]  # frames, text first
    dim: int
    text_card: int
    num_heads: int
    num_layers: int
    hidden_scale: float
    context: int
    text_card_out: int | None = None
    existing_text_padding_id: int = 3
    existing_text_end_padding_id: int = 0
    causal: bool = True
    layer_scale: float | None = None
    max_period: float = 10_000.0
    gating: str = "silu"
    norm: str = "rms_norm_f32"
    positional_embedding: str = "rope"
    kv_repeat: int = 1
    norm_emb: bool = False
    bias_proj: bool = False
    extra_heads_num_heads: int = 0
    extra_heads_dim: int = 6
    demux_second_stream: bool = False
    cross_attention: bool = False
    conditioners: Table = Table()
    fuser: Table | None = None
    depformer_dim: int = 1024
    depformer_num_heads: int = 16
    depformer_num_layers: int = 6
    depformer_dim_feedforward: int | None = None
    depformer_multi_linear: bool = True
    depformer_weights_per_step: bool = True
    depformer_weights_per_step_schedule: tuple[int, ...] | None = None
    depformer_low_rank_embeddings: int | None = None
    depformer_pos_emb: str = "none"
    depformer_gating: str = "silu"
    depformer_context: int | None = None
    depformer_max_period: float = 10_000.0
    depformer_layer_scale: float | None = None
    depformer_causal: bool = True
    depformer_norm: str | None = None

    def __post_init__(self) -> None:
        _require(
            len(self.delays) == self.n_q + 1,
            f"{len(self.delays)} delays for 1 text and {self.n_q} audio streams",
            f"give {self.n_q + 1}",
        )
        _require(0 <= self.dep_q <= self.n_q, f"dep_q is {self.dep_q} of n_q {self.n_q}", "generate at most n_q")
        schedule = self.depformer_weights_per_step_schedule
        _require(
            schedule is None or len(schedule) == self.dep_q,
            f"the depformer's schedule has {len(schedule or ())} entries",
            f"give one per generated codebook, {self.dep_q}",
        )
        _require(not self.norm_emb, "norm_emb is true", "no published model normalises its embeddings")
        _require(min(self.delays) >= 0, f"the delays are {self.delays}", "none can be negative")
        _ = self.transformer  # checks what the transformer can check

    @property
    def transformer(self) -> TransformerConfig:
        """The backbone."""
        return TransformerConfig(
            d_model=self.dim,
            num_heads=self.num_heads,
            num_layers=self.num_layers,
            dim_feedforward=int(self.hidden_scale * self.dim),
            context=self.context,
            causal=self.causal,
            layer_scale=self.layer_scale,
            max_period=self.max_period,
            gating=self.gating,
            norm=self.norm,
            positional_embedding=self.positional_embedding,
            kv_repeat=self.kv_repeat,
            cross_attention=self.cross_attention,
        )

    @property
    def text_logits(self) -> int:
        """Width of the text head."""
        return self.text_card if self.text_card_out is None else self.text_card_out

    @property
    def user_q(self) -> int:
        """Audio streams that are given, not generated."""
        return self.n_q - self.dep_q

    @property
    def depformer_schedule(self) -> tuple[int, ...]:
        """Which set of depformer weights serves each generated codebook."""
        return self.depformer_weights_per_step_schedule or tuple(range(self.dep_q))

    @property
    def depformer_feedforward(self) -> int:
        """`dim_feedforward` of the depformer, derived when the file leaves it out."""
        return self.depformer_dim_feedforward or int(self.hidden_scale * self.depformer_dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SttConfig:
    """How a speech-to-text model was trained to listen."""

    audio_delay_seconds: float = 0.0  # the text stream is this far behind the audio
    audio_silence_prefix_seconds: float = 0.0  # silence that the model wants before the first sample


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything a checkpoint says about itself, weights and tokenizer apart."""

    model_type: str
    lm: LMConfig | None = None
    mimi: MimiConfig = MimiConfig()
    stt: SttConfig = SttConfig()
    lm_gen_config: Table = Table()
    tts_config: Table = Table()
    model_id: Table = Table()

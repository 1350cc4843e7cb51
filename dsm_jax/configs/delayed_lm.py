"""The config of the delayed-streams language model and of its depformer."""

import dataclasses

from dsm_jax.configs.check import require, require_positive
from dsm_jax.configs.transformer import TransformerConfig
from dsm_jax.configs.tts import Conditioner, Fuser


@dataclasses.dataclass(frozen=True, kw_only=True)
class DepformerConfig:
    """The small transformer over the codebooks of a frame. In Kyutai's files each field has the prefix `depformer_`.

    `causal` has no effect, as in the reference: a codebook depends on those before it alone.
    """

    dim: int = 1024
    num_heads: int = 16
    num_layers: int = 6
    dim_feedforward: int | None = None
    multi_linear: bool = True
    weights_per_step: bool = True
    weights_per_step_schedule: tuple[int, ...] | None = None
    low_rank_embeddings: int | None = None
    pos_emb: str = "none"
    gating: str = "silu"
    context: int | None = None
    max_period: float = 10_000.0
    layer_scale: float | None = None
    causal: bool = True
    norm: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LMConfig:
    """The delayed-streams language model: one text stream and `n_q` audio streams, `dep_q` of them generated.

    `depformer` has no effect when `dep_q` is 0.
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
    conditioners: tuple[Conditioner, ...] = ()
    fuser: Fuser | None = None
    depformer: DepformerConfig = DepformerConfig()

    def __post_init__(self) -> None:
        require_positive(self, "card", "dim", "text_card", "hidden_scale")
        require(
            len(self.delays) == self.n_q + 1,
            f"{len(self.delays)} delays for 1 text and {self.n_q} audio streams",
            f"give {self.n_q + 1}",
        )
        require(0 <= self.dep_q <= self.n_q, f"dep_q is {self.dep_q} of n_q {self.n_q}", "generate at most n_q")
        schedule = self.depformer.weights_per_step_schedule
        require(
            schedule is None or len(schedule) == self.dep_q,
            f"the depformer's schedule has {len(schedule or ())} entries",
            f"give one per generated codebook, {self.dep_q}",
        )
        require(not self.norm_emb, "norm_emb is true", "no published model normalises its embeddings")
        require(min(self.delays) >= 0, f"the delays are {self.delays}", "none can be negative")
        names = [conditioner.name for conditioner in self.conditioners]
        require(len(set(names)) == len(names), f"the conditioners are {names}", "give each a name of its own")
        if self.fuser is not None and (unknown := sorted({*self.fuser.sum, *self.fuser.cross} - {*names})):
            require(False, f"the fuser takes {unknown} and the conditioners are {names}", "name one of these")
        if self.dep_q:
            require_positive(self.depformer, "dim", "num_heads")
            require(
                self.depformer.dim % self.depformer.num_heads == 0,
                f"the depformer's width {self.depformer.dim} and {self.depformer.num_heads} heads do not divide",
                "the width must be a multiple of the heads",
            )
        _ = self.transformer  # building its config checks the backbone's settings

    @property
    def transformer(self) -> TransformerConfig:
        """Config of the backbone."""
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
        """Number of audio streams that are inputs and not generated."""
        return self.n_q - self.dep_q

    def conditioner(self, name: str) -> Conditioner | None:
        """Return the conditioner of that name; None if the model has none."""
        return next((conditioner for conditioner in self.conditioners if conditioner.name == name), None)

    @property
    def depformer_schedule(self) -> tuple[int, ...]:
        """Index of the set of depformer weights for each generated codebook."""
        return self.depformer.weights_per_step_schedule or tuple(range(self.dep_q))

    @property
    def depformer_feedforward(self) -> int:
        """The depformer's `dim_feedforward`, derived from its width where the file omits it."""
        return self.depformer.dim_feedforward or int(self.hidden_scale * self.depformer.dim)

"""CSM in miniature."""

from dsm_jax.configs import CsmConfig, RopeScaling, TransformerConfig

# Grouped heads, and scaled rates in both decoders; 3 entries of each table are codes that the codec does not have.
CSM = CsmConfig(
    backbone=TransformerConfig(
        d_model=16,
        num_heads=4,
        num_layers=2,
        dim_feedforward=24,
        gated_width=24,
        context=64,
        max_period=500_000.0,
        gating="silu",
        norm="rms_norm",
        kv_repeat=2,
        rope_scaling=RopeScaling(factor=32.0, low_frequency=0.125, high_frequency=0.5, original_context=32),
    ),
    depth=TransformerConfig(
        d_model=8,
        num_heads=2,
        num_layers=2,
        dim_feedforward=20,
        gated_width=20,
        context=5,
        max_period=500_000.0,
        gating="silu",
        norm="rms_norm",
        kv_repeat=2,
        rope_scaling=RopeScaling(factor=32.0, low_frequency=0.002, high_frequency=0.008, original_context=16),
    ),
    n_q=4,
    card=19,
    text_card=40,
    begin_id=36,
    end_id=37,
    audio_id=38,
    audio_end_id=39,
)

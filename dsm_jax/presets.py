"""The published speech-to-text models as configs; tests hold them against the published files."""

from dsm_jax.configs import LMConfig, ModelConfig, SttConfig, Table


def _stt(*, heads: int, layers: int, context: int, text_card: int, delay: float, prefix: float) -> ModelConfig:
    lm = LMConfig(
        card=2048,
        n_q=32,
        dep_q=0,
        delays=(0,) * 33,
        dim=2048,
        text_card=text_card,
        num_heads=heads,
        num_layers=layers,
        hidden_scale=4.125,
        context=context,
        max_period=100_000.0,
    )
    stt = SttConfig(audio_delay_seconds=delay, audio_silence_prefix_seconds=prefix)
    generation = Table(temp=0.0, temp_text=0.0, top_k=250, top_k_text=50)
    return ModelConfig(model_type="stt", lm=lm, stt=stt, lm_gen_config=generation)


STT_1B = _stt(heads=16, layers=16, context=750, text_card=8000, delay=0.5, prefix=0.0)  # kyutai/stt-1b-en_fr
STT_2_6B = _stt(heads=32, layers=48, context=375, text_card=4000, delay=2.5, prefix=1.0)  # kyutai/stt-2.6b-en

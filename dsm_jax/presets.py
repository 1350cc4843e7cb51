"""The published models as configs; tests hold them against the published files."""

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

TTS_1_6B = ModelConfig(  # kyutai/tts-1.6b-en_fr
    model_type="tts",
    lm=LMConfig(
        card=2048,
        n_q=32,
        dep_q=32,
        delays=(0, 0, *[2] * 31),
        dim=2048,
        text_card=8000,
        num_heads=16,
        num_layers=16,
        hidden_scale=4.125,
        context=500,
        demux_second_stream=True,
        cross_attention=True,
        conditioners=Table(
            speaker_wavs={"type": "tensor", "tensor": {"dim": 512}},
            cfg={
                "type": "lut",
                "lut": {
                    "n_bins": 7,
                    "dim": 16,
                    "tokenizer": "noop",
                    "possible_values": ["1.0", "1.5", "2.0", "2.5", "3.0", "3.5", "4.0"],
                },
            },
            control={"type": "lut", "lut": {"dim": 2048, "n_bins": 1, "tokenizer": "noop", "possible_values": ["ok"]}},
        ),
        fuser=Table(
            cross_attention_pos_emb=True,
            cross_attention_pos_emb_scale=1,
            sum=["control", "cfg"],
            prepend=[],
            cross=["speaker_wavs"],
        ),
        depformer_dim=1024,
        depformer_num_heads=16,
        depformer_num_layers=4,
        depformer_dim_feedforward=3072,
        depformer_low_rank_embeddings=128,
        depformer_weights_per_step_schedule=(*range(8), *[8] * 8, *[9] * 8, *[10] * 8),
    ),
    tts_config=Table(audio_delay=1.28, second_stream_ahead=2),
    lm_gen_config=Table(temp=0.6, text_temp=0.6),
)

"""The configs of the published models; tests compare them with the published files."""

from dsm_jax.configs.csm import CsmConfig
from dsm_jax.configs.delayed_lm import DepformerConfig, LMConfig
from dsm_jax.configs.model import ModelConfig, SttConfig
from dsm_jax.configs.transformer import RopeScaling, llama
from dsm_jax.configs.tts import Fuser, LutConditioner, SamplingDefaults, TensorConditioner, TtsConfig


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
    sampling = SamplingDefaults(temp=0.0, temp_text=0.0, top_k=250, top_k_text=50)
    return ModelConfig(model_type="stt", lm=lm, stt=stt, sampling=sampling)


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
        conditioners=(
            TensorConditioner(name="speaker_wavs", dim=512),
            LutConditioner(
                name="cfg", n_bins=7, dim=16, possible_values=("1.0", "1.5", "2.0", "2.5", "3.0", "3.5", "4.0")
            ),
            LutConditioner(name="control", n_bins=1, dim=2048, possible_values=("ok",)),
        ),
        fuser=Fuser(sum=("control", "cfg"), cross=("speaker_wavs",), cross_attention_pos_emb=True),
        depformer=DepformerConfig(
            dim=1024,
            num_heads=16,
            num_layers=4,
            dim_feedforward=3072,
            low_rank_embeddings=128,
            weights_per_step_schedule=(*range(8), *[8] * 8, *[9] * 8, *[10] * 8),
        ),
    ),
    tts=TtsConfig(audio_delay=1.28, second_stream_ahead=2),
    sampling=SamplingDefaults(temp=0.6, text_temp=0.6),
)


CSM_1B = ModelConfig(  # sesame/csm-1b
    model_type="csm",
    csm=CsmConfig(
        backbone=llama(
            width=2048,
            inner=8192,
            layers=16,
            heads=32,
            kv_heads=8,
            context=2048,
            scaling=RopeScaling(factor=32.0, low_frequency=0.125, high_frequency=0.5, original_context=1024),
        ),
        depth=llama(
            width=1024,
            inner=8192,
            layers=4,
            heads=8,
            kv_heads=2,
            context=33,
            scaling=RopeScaling(factor=32.0, low_frequency=2**-9, high_frequency=2**-7, original_context=16),
        ),
        n_q=32,
        card=2051,
        text_card=128_256,
    ),
)

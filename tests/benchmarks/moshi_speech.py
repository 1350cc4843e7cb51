"""A frame of text to speech by Kyutai's PyTorch package: a step of `TTSModel.generate` and `simple_generate`.

The weights are random, as the package itself initialises them; its loop is written out here, because a benchmark has to
take one step at a time. The token a step decides on is the machine's, as there.

Shape letters: B batch rows, Q codebooks, X steps of a voice.
"""

from typing import Any

import torch
from moshi.conditioners import ConditionAttributes, TensorCondition
from moshi.models import LMGen, LMModel, MimiModel, loaders
from moshi.models.tts import Entry, StateMachine, TokenIds

from dsm_jax.benchmark.speaking import VOICE_STEPS
from dsm_jax.configs import ModelConfig
from dsm_jax.convert import kyutai_config
from dsm_jax.tts.voices import SLOTS
from tests.benchmarks.worker import Step
from tests.parity.references.kyutai import lm_config


def make(config: ModelConfig, batch: int, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Step:
    """Make the step of `batch` rows, for a text that does not end; the codec is float32."""
    torch.manual_seed(0)
    files = kyutai_config.Files(kyutai_config.LM_NAME, kyutai_config.MIMI_NAME, None, None)
    assert config.lm is not None
    lm = loaders.get_moshi_lm(
        None, lm_config(kyutai_config.write_config(config, config.lm, files)), device=device, dtype=dtype
    ).eval()
    codec_config = kyutai_config.write_mimi_config(config.mimi)
    mimi = loaders.get_mimi(None, codec_config, device=device, num_codebooks=lm.dep_q).eval()
    machine = StateMachine(
        TokenIds(lm.text_card + 1), second_stream_ahead=config.tts.second_stream_ahead, max_padding=8
    )
    delay_steps = int(config.tts.audio_delay * mimi.frame_rate)
    return start(lm, mimi, machine, delay_steps, batch)


def start(lm: LMModel, mimi: MimiModel, machine: StateMachine, delay_steps: int, batch: int) -> Step:
    """Run the next step, with all rows at the same step."""
    states = [machine.new_state([Entry([4, 5], "word")] * 1000) for _ in range(batch)]
    offset = 0

    def feed_text(text_B: torch.Tensor) -> None:
        fed = [machine.process(offset, state, token)[0] for state, token in zip(states, text_B.tolist(), strict=True)]
        text_B[:] = torch.tensor(fed)

    def hold_audio(codes_BQ: torch.Tensor) -> None:
        for q in range(codes_BQ.shape[1]):
            if offset < lm.delays[q + lm.audio_offset] + delay_steps:
                codes_BQ[:, q] = machine.token_ids.zero

    generator = LMGen(
        lm,
        temp=0.6,
        temp_text=0.6,
        condition_tensors=_conditions(lm, batch),
        on_text_hook=feed_text,
        on_audio_hook=hold_audio,
    )
    generator.streaming_forever(batch)
    mimi.streaming_forever(batch)
    none_BQ1 = torch.full((batch, lm.dep_q, 1), machine.token_ids.zero, device=lm.device)
    nothing_B01 = torch.zeros((batch, 0, 1), dtype=torch.long, device=lm.device)
    longest = max(lm.delays)

    def step() -> None:
        nonlocal offset
        frame = generator.step(nothing_B01, depformer_replace_tokens=none_BQ1 if offset < delay_steps else None)
        if offset >= delay_steps + longest:
            assert frame is not None
            mimi.decode(frame[:, 1:]).clip(-1, 1)
        offset += 1

    return step


def _conditions(lm: LMModel, batch: int) -> Any:
    assert lm.condition_provider is not None
    conditioners = lm.condition_provider.conditioners
    width = conditioners["speaker_wavs"].output_proj.in_features
    guidance = next(value for value in conditioners["cfg"].tokenizer.possible_values if float(value) == 2.0)
    voice = torch.randn(1, SLOTS * VOICE_STEPS, width)
    mask = torch.zeros(1, SLOTS * VOICE_STEPS, dtype=torch.bool)
    mask[:, :VOICE_STEPS] = True
    told = ConditionAttributes({"control": "ok", "cfg": guidance}, {"speaker_wavs": TensorCondition(voice, mask)})
    return lm.condition_provider.prepare_and_provide([told] * batch)

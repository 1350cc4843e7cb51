"""From recordings of digits to the embedded model that says them: `digits-tts`.

It speaks with the codec of a model that is there already. Its voices are numbers, a one for the speaker and zeros for
the others, and are stored as Kyutai's are, so that they can be blended as those can.

Shape letters: B batch rows, N rows, K streams (text first), Q codebooks, T frames, S slots of voices, C speakers.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from dsm_jax import checkpoints
from dsm_jax.configs import (
    DepformerConfig,
    Fuser,
    LMConfig,
    MimiConfig,
    ModelConfig,
    QuantizerConfig,
    SamplingDefaults,
    TensorConditioner,
    TtsConfig,
)
from dsm_jax.models.lm import DelayedStreamsLM
from dsm_jax.models.streams import ZERO_TOKEN
from dsm_jax.stt.words import Timing
from dsm_jax.tokenizers import load_tokenizer
from dsm_jax.training import digits, sounds
from dsm_jax.training.alignment import text_stream
from dsm_jax.training.compose import Delivery, Spoken, Take, string_of
from dsm_jax.training.export import in_16_bits, new_model, write_model
from dsm_jax.training.run import Run, RunConfig
from dsm_jax.training.strings import Loss, StringsStage, encode_strings, train_lm
from dsm_jax.training.tts import TtsObjective, tts_loss
from dsm_jax.training.vocabulary import write_vocabulary
from dsm_jax.tts.script import MAIN, OTHER
from dsm_jax.tts.voices import SLOTS, WAVS

NAME = "digits-tts"
DELAY = 4  # frames that the audio is behind the text
UNSEEN_STRINGS = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeakingStage(StringsStage):
    """Training of the language model that speaks."""

    strings: int = 12_000
    rows: int = 24
    run: RunConfig = RunConfig(steps=4000, log_every=50, save_every=500)
    objective: TtsObjective = TtsObjective()
    # Turns are taken in a third of the strings.
    delivery: Delivery = Delivery(lead=0.4, shortest_gap=0.05, longest_gap=0.45, taking_turns=0.3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeakingConfig:
    """The whole recipe."""

    data: str  # a folder with `fsdd`
    output: str
    codec: str = "digits"  # a model whose codec it speaks with
    seed: int = 0
    lm: SpeakingStage = SpeakingStage()


@dataclasses.dataclass(frozen=True)
class SpokenRows:
    """Strings as they are to be said: as recorded, one after another, sometimes by two in turns."""

    takes: Sequence[Take]
    stage: SpeakingStage
    mimi: MimiConfig
    seed: tuple[int, ...]

    def __len__(self) -> int:
        return digits.ROWS

    def __getitem__(self, index: int) -> tuple[np.ndarray, list[Spoken]]:
        """Samples [frames * frame size] at the codec's rate, and words with times."""
        random = np.random.default_rng((*self.seed, index))
        frames, delivery = self.stage.frames, self.stage.delivery
        seconds = frames / self.mimi.frame_rate
        words = None if random.random() < 0.5 else int(random.integers(1, 9))
        if random.random() >= 1 / 3:
            delivery = dataclasses.replace(delivery, taking_turns=0.0)
        pcm_T, spoken = string_of(random, self.takes, digits.TAKE_RATE, seconds=seconds, words=words, delivery=delivery)
        pcm_T = sounds.resample(pcm_T, digits.TAKE_RATE, self.mimi.sample_rate)
        return pcm_T[: frames * self.mimi.frame_size], spoken


def speaking_config(quantizer: QuantizerConfig, pieces: int, context: int, speakers: int) -> LMConfig:
    """The language model: the topology of tts-1.6b-en_fr without its second stream of text, small."""
    return LMConfig(
        card=quantizer.bins,
        n_q=quantizer.n_q,
        dep_q=quantizer.n_q,
        delays=(0, 0, *[2] * (quantizer.n_q - 1)),
        dim=128,
        text_card=pieces,
        num_heads=4,
        num_layers=4,
        hidden_scale=3.0,
        context=context,
        cross_attention=True,
        conditioners=(TensorConditioner(name=WAVS, dim=speakers),),
        fuser=Fuser(cross=(WAVS,), cross_attention_pos_emb=True),
        depformer=DepformerConfig(
            dim=96,
            num_heads=4,
            num_layers=2,
            dim_feedforward=288,
            weights_per_step_schedule=(0, 1, 2, *[3] * (quantizer.n_q - 3)),
        ),
    )


def marks_of(spoken: Sequence[Spoken]) -> tuple[dict[int, int], list[str]]:
    """The tokens ahead of words with which the speaker changes, and who the speakers are, the first one first."""
    order: list[str] = []
    marks, last = {}, None
    for number, word in enumerate(spoken):
        if word.speaker not in order:
            order.append(word.speaker)
        if word.speaker != last:
            marks[number] = (MAIN, OTHER)[order.index(word.speaker)]
            last = word.speaker
    return marks, order


def speaking_loss(objective: TtsObjective, speakers: int) -> Loss:
    """The loss of batches of `codes_BKT` and `voices_BS`: the number of each slot's speaker, -1 for none."""

    def loss(lm: DelayedStreamsLM, batch: dict[str, jax.Array], key: jax.Array):
        voices_BS = batch["voices_BS"]
        untold_key, key = jax.random.split(key)
        untold_B = jax.random.bernoulli(untold_key, objective.untold, voices_BS.shape[:1])
        told_BS = (voices_BS >= 0) & ~untold_B[:, None]
        conditions = lm.condition({WAVS: jax.nn.one_hot(voices_BS, speakers)}, {WAVS: told_BS})
        return tts_loss(lm, batch["codes_BKT"], conditions, untold_B, key, objective)

    return loss


def train_speaking(config: SpeakingConfig, *, resume: bool = False) -> checkpoints.Model:
    """Trains the language model and writes it, with codec and voices and in Kyutai's layout, to `output/digits-tts`.

    Args:
      config: of the recipe.
      resume: go on from the last checkpoint.

    Returns:
      The model as it was written, loaded again.

    Raises:
      AudioError: recordings are missing.
      CheckpointError: there is no model to take the codec of.
      TrainingError: the model is there already, a loss that is not finite, or a checkpoint that cannot be written or
        resumed from.
    """
    data, output, stage = Path(config.data), Path(config.output), config.lm
    output_model = new_model(output, NAME)
    takes = digits.load_takes(data / "fsdd", digits.TRAINING_TAKES)
    kept = digits.load_takes(data / "fsdd", digits.VALIDATION_TAKES)
    speakers = sorted({take.speaker for take in takes})
    listener = checkpoints.load(config.codec)
    mimi = nnx.merge(listener.mimi_def, listener.mimi_params)

    output.mkdir(parents=True, exist_ok=True)
    vocabulary = output / "tokenizer_digits.model"
    pieces = write_vocabulary(vocabulary, digits.WORDS)
    lm = speaking_config(mimi.config.quantizer, pieces, stage.context, len(speakers))
    tokenizer = load_tokenizer(vocabulary)
    rate = mimi.config.frame_rate

    def encode(takes: list[Take], draw: int, count: int) -> dict[str, np.ndarray]:
        codes_NQT, spoken = encode_strings(mimi, SpokenRows(takes, stage, mimi.config, (config.seed, draw)), count)
        codes_NKT = np.full((count, 1 + lm.n_q, stage.frames), ZERO_TOKEN, np.int16)
        codes_NKT[:, 1:, DELAY:] = codes_NQT[:, :, :-DELAY]
        voices_NS = np.full((count, SLOTS), -1, np.int16)
        timing = Timing(rate, 0.0, 0.0)
        for row, words in enumerate(spoken):
            marks, order = marks_of(words)
            codes_NKT[row, 0] = text_stream(words, tokenizer, lm, timing, frames=stage.frames, marks=marks)
            voices_NS[row, : len(order)] = [speakers.index(speaker) for speaker in order]
        return {"codes_BKT": codes_NKT, "voices_BS": voices_NS}

    trained = train_lm(
        stage,
        Run(output / "lm", stage.run),
        lm,
        speaking_loss(stage.objective, len(speakers)),
        speaking_loss(dataclasses.replace(stage.objective, untold=0.0, random_codes=0.0), len(speakers)),
        encode(takes, 0, stage.strings),
        encode(kept, 1, UNSEEN_STRINGS),
        seed=config.seed,
        resume=resume,
    )
    lm_def, lm_params = nnx.split(trained)
    whole = ModelConfig(
        model_type="tts",
        lm=lm,
        mimi=mimi.config,
        tts=TtsConfig(audio_delay=DELAY / rate),
        sampling=SamplingDefaults(temp=0.6, temp_text=0.6, top_k=250, top_k_text=25),
    )
    mimi_params = in_16_bits(listener.mimi_params)
    model = checkpoints.Model(whole, lm_def, in_16_bits(lm_params), listener.mimi_def, mimi_params, tokenizer, NAME)
    one_hot = np.eye(len(speakers), dtype=np.float32)[:, None]
    write_model(model, output_model, dict(zip(speakers, one_hot, strict=True)))
    return checkpoints.load(output_model)

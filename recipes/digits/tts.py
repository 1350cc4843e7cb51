"""Train the embedded model `digits-tts` on the codes of an existing model's codec.

A voice is a one-hot vector over the speakers, stored in Kyutai's format, so that voices can be blended.

Shape letters: B batch rows, N rows, M streams (text first), Q codebooks, T frames, S slots of voices, C speakers.
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
from dsm_jax.progress import ProgressCallback
from dsm_jax.stt.words import Timing
from dsm_jax.tokenizers import load_tokenizer
from dsm_jax.training.alignment import speaker_prefixes, text_stream
from dsm_jax.training.data import WordSpan
from dsm_jax.training.finetune import write_model
from dsm_jax.training.loop import Run, RunConfig
from dsm_jax.training.losses.tts import TtsObjective, tts_batch_loss
from dsm_jax.tts.voices import SLOTS, WAVS
from recipes.digits import augment
from recipes.digits.data import CLIP_RATE, ROWS, TRAINING_CLIPS, VALIDATION_CLIPS, WORDS, load_clips
from recipes.digits.lm import LmLoss, LmStage, encode_utterances, train_lm
from recipes.digits.release import model_dir, to_bfloat16
from recipes.digits.utterances import Clip, ProsodyConfig, concat_words
from recipes.digits.vocabulary import write_vocabulary

NAME = "digits-tts"
DELAY = 4  # delay of the audio after the text, in frames
VALIDATION_UTTERANCES = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class TtsStage(LmStage):
    """Settings of the training of the language model of `digits-tts`; a third of the utterances have two speakers."""

    utterances: int = 12_000
    batch_size: int = 24
    run: RunConfig = RunConfig(steps=4000, log_every=50, save_every=500)
    objective: TtsObjective = TtsObjective()
    prosody: ProsodyConfig = ProsodyConfig(lead=0.4, shortest_gap=0.05, longest_gap=0.45, turn_taking=0.3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DigitsTtsConfig:
    """Settings of the recipe of `digits-tts`.

    Attributes:
      data: a folder with `fsdd`.
      output: folder of the run and of the model.
      codec: a model whose codec the new model uses.
      seed: seed of all random numbers.
      lm: the stage of the language model.
    """

    data: str
    output: str
    codec: str = "digits"
    seed: int = 0
    lm: TtsStage = TtsStage()


@dataclasses.dataclass(frozen=True)
class TtsDataset:
    """Random utterances without augmentation, by one speaker or two in turns; `rows[i]` is always the same row."""

    clips: Sequence[Clip]
    stage: TtsStage
    mimi: MimiConfig
    seed: tuple[int, ...]

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> tuple[np.ndarray, list[WordSpan]]:
        """Draw samples [frames * frame size] at the codec's rate, and words with speakers."""
        random = np.random.default_rng((*self.seed, index))
        frames, prosody = self.stage.frames, self.stage.prosody
        seconds = frames / self.mimi.frame_rate
        words = None if random.random() < 0.5 else int(random.integers(1, 9))
        if random.random() >= 1 / 3:
            prosody = dataclasses.replace(prosody, turn_taking=0.0)
        pcm_T, spans = concat_words(random, self.clips, CLIP_RATE, seconds=seconds, words=words, prosody=prosody)
        pcm_T = augment.resample(pcm_T, CLIP_RATE, self.mimi.sample_rate)
        return pcm_T[: frames * self.mimi.frame_size], spans


def lm_config(quantizer: QuantizerConfig, text_card: int, context: int, speakers: int) -> LMConfig:
    """Make the language model's config: tts-1.6b-en_fr without the second text stream, with small sizes."""
    return LMConfig(
        card=quantizer.bins,
        n_q=quantizer.n_q,
        dep_q=quantizer.n_q,
        delays=(0, 0, *[2] * (quantizer.n_q - 1)),
        dim=128,
        text_card=text_card,
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


def one_hot_loss(objective: TtsObjective, speakers: int) -> LmLoss:
    """Make the loss of batches with `codes_BMT` and `voices_BS`, the index of each slot's speaker (-1 for none)."""

    def loss(lm: DelayedStreamsLM, batch: dict[str, jax.Array], key: jax.Array):
        voices_BS = batch["voices_BS"]
        values, masks = {WAVS: jax.nn.one_hot(voices_BS, speakers)}, {WAVS: voices_BS >= 0}
        return tts_batch_loss(lm, {"codes_BMT": batch["codes_BMT"], "values": values, "masks": masks}, key, objective)

    return loss


def train_digits_tts(
    config: DigitsTtsConfig, *, resume: bool = False, progress: ProgressCallback | None = None
) -> checkpoints.Model:
    """Train the language model and write it, with codec and voices and in Kyutai's layout, to `output/digits-tts`.

    Args:
      config: settings of the recipe.
      resume: whether to continue from the last checkpoint.
      progress: called after each step with the number of steps.

    Returns:
      The model, loaded from its folder.

    Raises:
      AudioError: recordings are missing.
      CheckpointError: the model with the codec cannot be loaded.
      TrainingError: the model's folder exists, a loss is not finite, or a checkpoint cannot be written or resumed from.
    """
    recordings, output, stage = Path(config.data), Path(config.output), config.lm
    output_model = model_dir(output, NAME)
    clips = load_clips(recordings / "fsdd", TRAINING_CLIPS)
    validation_clips = load_clips(recordings / "fsdd", VALIDATION_CLIPS)
    speakers = sorted({clip.speaker for clip in clips})
    source = checkpoints.load(config.codec)
    mimi = source.codec

    output.mkdir(parents=True, exist_ok=True)
    vocabulary = output / "tokenizer_digits.model"
    text_card = write_vocabulary(vocabulary, WORDS)
    lm = lm_config(mimi.config.quantizer, text_card, stage.context, len(speakers))
    tokenizer = load_tokenizer(vocabulary)
    rate = mimi.config.frame_rate

    def encode(clips: list[Clip], draw: int, count: int) -> dict[str, np.ndarray]:
        rows = TtsDataset(clips, stage, mimi.config, (config.seed, draw))
        codes_NQT, spans = encode_utterances(mimi, rows, count)
        codes_NMT = np.full((count, 1 + lm.n_q, stage.frames), ZERO_TOKEN, np.int16)
        codes_NMT[:, 1:, DELAY:] = codes_NQT[:, :, :-DELAY]
        voices_NS = np.full((count, SLOTS), -1, np.int16)
        timing = Timing(rate, 0.0, 0.0)
        for row, words in enumerate(spans):
            prefixes, present = speaker_prefixes(words)
            codes_NMT[row, 0] = text_stream(words, tokenizer, lm, timing, frames=stage.frames, prefixes=prefixes)
            voices_NS[row, : len(present)] = [speakers.index(speaker) for speaker in present]
        return {"codes_BMT": codes_NMT, "voices_BS": voices_NS}

    trained = train_lm(
        stage,
        Run(output / "lm", stage.run, progress),
        lm,
        one_hot_loss(stage.objective, len(speakers)),
        one_hot_loss(stage.objective.without_dropout(), len(speakers)),
        encode(clips, 0, stage.utterances),
        encode(validation_clips, 1, VALIDATION_UTTERANCES),
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
    mimi_params = to_bfloat16(source.mimi_params)
    model = checkpoints.Model(whole, lm_def, to_bfloat16(lm_params), source.mimi_def, mimi_params, tokenizer, NAME)
    one_hot = np.eye(len(speakers), dtype=np.float32)[:, None]
    write_model(model, output_model, dict(zip(speakers, one_hot, strict=True)))
    return checkpoints.load(output_model)

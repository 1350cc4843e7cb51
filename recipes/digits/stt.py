"""Train the embedded model `digits`: its codec in stages, then a language model on the codec's codes.

`train_digits` can be stopped at any time and resumed: each stage is a run of its own.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsm_jax import checkpoints
from dsm_jax.configs import LMConfig, MimiConfig, ModelConfig, QuantizerConfig, SamplingDefaults, SttConfig
from dsm_jax.models.mimi import Mimi
from dsm_jax.progress import ProgressCallback
from dsm_jax.stt.words import Timing
from dsm_jax.tokenizers import load_tokenizer
from dsm_jax.training.alignment import text_stream
from dsm_jax.training.finetune import write_model
from dsm_jax.training.loop import Run, RunConfig
from dsm_jax.training.losses.codec import CodecTrainee
from dsm_jax.training.losses.stt import SttObjective, stt_batch_loss
from recipes.digits.codec import (
    AUGMENTED,
    DECODER,
    OVERSAMPLED,
    TRUNCATED,
    CodecStage,
    train_codec,
    train_decoder,
)
from recipes.digits.data import (
    LABELS,
    MIMI,
    TRAINING_CLIPS,
    VALIDATION_CLIPS,
    WORDS,
    CodecDataset,
    DataMix,
    SttDataset,
    load_clips,
    load_sentences,
)
from recipes.digits.lm import LmLoss, LmStage, encode_utterances, train_lm
from recipes.digits.release import model_dir, to_bfloat16
from recipes.digits.utterances import Clip, ProsodyConfig
from recipes.digits.vocabulary import write_vocabulary

NAME = "digits"
DELAY = 8  # delay of the text after the audio in frames, longer than a digit
VALIDATION_UTTERANCES = 256  # for the language model


@dataclasses.dataclass(frozen=True, kw_only=True)
class SttStage(LmStage):
    """Settings of the training of the language model of `digits`."""

    utterances: int = 48_000
    batch_size: int = 36
    run: RunConfig = RunConfig(steps=4800, log_every=50, save_every=400)
    objective: SttObjective = SttObjective(padding_weight=2.5, text_dropout=0.1, codebook_dropout=0.5, random_codes=0.1)
    mix: DataMix = DataMix(
        sentences=0.12,
        prosody=ProsodyConfig(longest_gap=0.7, speed=0.15, tempo=0.2, truncate=0.1),
        strength=0.6,
        quietest_db=-20.0,
        oversampled=OVERSAMPLED,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DigitsConfig:
    """Settings of the recipe of `digits`.

    Attributes:
      data: a folder with `fsdd`, `kathleen` and `ljspeech`.
      output: folder of the runs and of the model.
      seed: seed of all random numbers.
      mimi: sizes of the codec.
      codec, codec_augmented, codec_truncated: the stages of the codec, in order.
      decoder: the stage of the codec's decoder.
      lm: the stage of the language model.
    """

    data: str
    output: str
    seed: int = 0
    mimi: MimiConfig = MIMI
    codec: CodecStage = CodecStage()
    codec_augmented: CodecStage = AUGMENTED
    codec_truncated: CodecStage = TRUNCATED
    decoder: CodecStage = DECODER
    lm: SttStage = SttStage()


def lm_config(quantizer: QuantizerConfig, text_card: int, context: int) -> LMConfig:
    """Make the config of the language model: the published topology with small sizes."""
    return LMConfig(
        card=quantizer.bins,
        n_q=quantizer.n_q,
        dep_q=0,
        delays=(0,) * (1 + quantizer.n_q),
        dim=192,
        text_card=text_card,
        num_heads=4,
        num_layers=4,
        hidden_scale=3.0,
        context=context,
    )


def train_digits(
    config: DigitsConfig, *, resume: bool = False, progress: ProgressCallback | None = None
) -> checkpoints.Model:
    """Train both networks and write the model, in Kyutai's layout, to `output/digits`.

    Args:
      config: settings of the recipe.
      resume: whether to continue each stage from its last checkpoint.
      progress: called after each step of a stage with the number of its steps.

    Returns:
      The model, loaded from its folder.

    Raises:
      AudioError: recordings are missing.
      TrainingError: the model's folder exists, a loss is not finite, or a checkpoint cannot be written or resumed from.
    """
    recordings, output, seed = Path(config.data), Path(config.output), config.seed
    output_model = model_dir(output, NAME)
    clips = load_clips(recordings / "fsdd", TRAINING_CLIPS)
    validation_clips = load_clips(recordings / "fsdd", VALIDATION_CLIPS)
    sizes = config.mimi
    folders = recordings / "kathleen", recordings / "ljspeech"
    sentences = [s for folder in folders for s in load_sentences(folder, sizes.sample_rate, held_out=False)]

    def rows(stage: CodecStage, draw: int) -> tuple[CodecDataset, CodecDataset]:
        # All stages are validated on the same kind of rows: complete digits of all speakers.
        whole = dataclasses.replace(stage.mix.prosody, truncate=0.0)
        only_digits = dataclasses.replace(stage.mix, sentences=0.0, noise=0.0, oversampled=(), prosody=whole)
        training = CodecDataset(clips, sentences, stage.frames, (seed, draw), stage.mix, sizes)
        return training, CodecDataset(validation_clips, sentences, stage.frames, (seed, 1), only_digits, sizes)

    initial = Mimi(sizes, block_frames=None, rngs=nnx.Rngs(seed))
    trainee = CodecTrainee(initial, LABELS, rngs=nnx.Rngs(seed + 1))
    # A number per stage, so that each draws different rows; the decoder's number is 20.
    stages = (
        (0, "codec", config.codec),
        (10, "codec_augmented", config.codec_augmented),
        (30, "codec_truncated", config.codec_truncated),
    )
    for draw, name, stage in stages:
        run = Run(output / name, stage.run, progress)
        trainee = train_codec(stage, run, trainee, *rows(stage, draw), seed=seed, resume=resume, fresh=draw == 0)
    run = Run(output / "decoder", config.decoder.run, progress)
    trained = train_decoder(config.decoder, run, trainee.mimi, *rows(config.decoder, 20), seed=seed, resume=resume)
    mimi_def, _ = nnx.split(nnx.eval_shape(lambda: Mimi(sizes, rngs=nnx.Rngs(0))))
    # The language model learns the codes of the codec as released, after rounding.
    mimi_params = to_bfloat16(nnx.state(trained))
    mimi = nnx.merge(mimi_def, jax.tree.map(lambda a: a.astype(jnp.float32), mimi_params))

    vocabulary = output / "tokenizer_digits.model"
    text_card = write_vocabulary(vocabulary, WORDS)
    tokenizer = load_tokenizer(vocabulary)
    lm = lm_config(sizes.quantizer, text_card, config.lm.context)
    whole = ModelConfig(
        model_type="stt",
        lm=lm,
        mimi=sizes,
        stt=SttConfig(audio_delay_seconds=DELAY / sizes.frame_rate),
        sampling=SamplingDefaults(temp=0.0, temp_text=0.0, top_k=0, top_k_text=0),
    )
    timing = Timing(sizes.frame_rate, DELAY / sizes.frame_rate, 0.0)

    def encode(clips: list[Clip], draw: int, count: int) -> dict[str, np.ndarray]:
        rows = SttDataset(clips, sentences, config.lm.frames, (seed, draw), config.lm.mix, sizes)
        codes_NQT, spans = encode_utterances(mimi, rows, count)
        texts = [text_stream(words, tokenizer, lm, timing, frames=config.lm.frames) for words in spans]
        return {"codes_BMT": np.concatenate([np.stack(texts).astype(np.int16)[:, None], codes_NQT], axis=1)}

    def loss(objective: SttObjective) -> LmLoss:
        return lambda lm, batch, key: stt_batch_loss(lm, batch, key, objective)

    trained = train_lm(
        config.lm,
        Run(output / "lm", config.lm.run, progress),
        lm,
        loss(config.lm.objective),
        loss(config.lm.objective.without_dropout()),
        encode(clips, 2, config.lm.utterances),
        encode(validation_clips, 3, VALIDATION_UTTERANCES),
        seed=seed,
        resume=resume,
    )

    mimi_def, _ = nnx.split(mimi)
    lm_def, lm_params = nnx.split(trained)
    model = checkpoints.Model(whole, lm_def, to_bfloat16(lm_params), mimi_def, mimi_params, tokenizer, NAME)
    write_model(model, output_model)
    return checkpoints.load(output_model)

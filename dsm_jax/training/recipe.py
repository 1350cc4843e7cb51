"""From recordings to the embedded model: a codec, then a language model over its codes, then a folder to ship.

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
from dsm_jax.stt.words import Timing
from dsm_jax.tokenizers import load_tokenizer
from dsm_jax.training import codec_stages, digits
from dsm_jax.training.alignment import text_stream
from dsm_jax.training.codec import CodecTrainee
from dsm_jax.training.codec_stages import CodecStage, train_codec, train_decoder
from dsm_jax.training.compose import Delivery, Take
from dsm_jax.training.digits import CodecRows, Mix, SpeechRows
from dsm_jax.training.export import in_16_bits, new_model, write_model
from dsm_jax.training.run import Run, RunConfig
from dsm_jax.training.strings import Loss, StringsStage, encode_strings, train_lm
from dsm_jax.training.stt import SttObjective, stt_loss
from dsm_jax.training.vocabulary import write_vocabulary

NAME = "digits"
DELAY = 8  # frames that the text is behind the audio: a digit has been said by then
UNSEEN_STRINGS = 256  # that the language model is validated on


@dataclasses.dataclass(frozen=True, kw_only=True)
class LmStage(StringsStage):
    """Training of the language model that hears."""

    strings: int = 48_000
    rows: int = 36
    run: RunConfig = RunConfig(steps=4800, log_every=50, save_every=400)
    objective: SttObjective = SttObjective(padding_weight=2.5, text_dropout=0.1, codebook_dropout=0.5, random_codes=0.1)
    mix: Mix = Mix(
        sentences=0.12,
        delivery=Delivery(longest_gap=0.7, speed=0.15, tempo=0.2, cut=0.1),
        harshness=0.6,
        quietest_db=-20.0,
        often=digits.OFTEN,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DigitsConfig:
    """The whole recipe."""

    data: str  # a folder with `fsdd`, `kathleen` and `ljspeech`
    output: str
    seed: int = 0
    mimi: MimiConfig = digits.MIMI  # sizes of the codec; the rate of samples and frames is that of the rows too
    codec: CodecStage = CodecStage()
    hardened: CodecStage = codec_stages.HARDENED
    cut: CodecStage = codec_stages.CUT
    decoder: CodecStage = codec_stages.DECODER
    lm: LmStage = LmStage()


def lm_config(quantizer: QuantizerConfig, pieces: int, context: int) -> LMConfig:
    """The language model: the published topology, small."""
    return LMConfig(
        card=quantizer.bins,
        n_q=quantizer.n_q,
        dep_q=0,
        delays=(0,) * (1 + quantizer.n_q),
        dim=192,
        text_card=pieces,
        num_heads=4,
        num_layers=4,
        hidden_scale=3.0,
        context=context,
    )


def train_digits(config: DigitsConfig, *, resume: bool = False) -> checkpoints.Model:
    """Trains both networks and writes the model, in Kyutai's layout, to `output/digits`.

    Args:
      config: of the recipe.
      resume: go on from the last checkpoint of each stage.

    Returns:
      The model as it was written, loaded again.

    Raises:
      AudioError: recordings are missing.
      TrainingError: the model is there already, a loss that is not finite, or a checkpoint that cannot be written or
        resumed from.
    """
    data, output, seed = Path(config.data), Path(config.output), config.seed
    output_model = new_model(output, NAME)
    takes = digits.load_takes(data / "fsdd", digits.TRAINING_TAKES)
    kept = digits.load_takes(data / "fsdd", digits.VALIDATION_TAKES)
    sizes = config.mimi
    folders = data / "kathleen", data / "ljspeech"
    sentences = [s for folder in folders for s in digits.load_sentences(folder, sizes.sample_rate, held_out=False)]

    def rows(stage: CodecStage, draw: int) -> tuple[CodecRows, CodecRows]:
        # Measured on digits alone, whole and everyone's alike, whatever else the stage learns from.
        whole = dataclasses.replace(stage.mix.delivery, cut=0.0)
        only_digits = dataclasses.replace(stage.mix, sentences=0.0, noise=0.0, often={}, delivery=whole)
        learnt = CodecRows(takes, sentences, stage.frames, (seed, draw), stage.mix, sizes)
        return learnt, CodecRows(kept, sentences, stage.frames, (seed, 1), only_digits, sizes)

    made = Mimi(sizes, block_frames=None, rngs=nnx.Rngs(seed))
    trainee = CodecTrainee(made, digits.LABELS, rngs=nnx.Rngs(seed + 1))
    # Each stage draws other rows, by its number: the decoder 20.
    for draw, name, stage in ((0, "codec", config.codec), (10, "hardened", config.hardened), (30, "cut", config.cut)):
        run = Run(output / name, stage.run)
        trainee = train_codec(stage, run, trainee, *rows(stage, draw), seed=seed, resume=resume, fresh=draw == 0)
    run = Run(output / "decoder", config.decoder.run)
    trained = train_decoder(config.decoder, run, trainee.mimi, *rows(config.decoder, 20), seed=seed, resume=resume)
    listening, _ = nnx.split(nnx.eval_shape(lambda: Mimi(sizes, rngs=nnx.Rngs(0))))
    # The language model learns the codes of the codec that is shipped, after rounding.
    mimi_params = in_16_bits(nnx.state(trained))
    mimi = nnx.merge(listening, jax.tree.map(lambda a: a.astype(jnp.float32), mimi_params))

    vocabulary = output / "tokenizer_digits.model"
    pieces = write_vocabulary(vocabulary, digits.WORDS)
    tokenizer = load_tokenizer(vocabulary)
    lm = lm_config(sizes.quantizer, pieces, config.lm.context)
    whole = ModelConfig(
        model_type="stt",
        lm=lm,
        mimi=sizes,
        stt=SttConfig(audio_delay_seconds=DELAY / sizes.frame_rate),
        sampling=SamplingDefaults(temp=0.0, temp_text=0.0, top_k=0, top_k_text=0),
    )
    timing = Timing(sizes.frame_rate, DELAY / sizes.frame_rate, 0.0)

    def encode(takes: list[Take], draw: int, count: int) -> dict[str, np.ndarray]:
        rows = SpeechRows(takes, sentences, config.lm.frames, (seed, draw), config.lm.mix, sizes)
        codes_NQT, spoken = encode_strings(mimi, rows, count)
        texts = [text_stream(words, tokenizer, lm, timing, frames=config.lm.frames) for words in spoken]
        return {"codes_BKT": np.concatenate([np.stack(texts).astype(np.int16)[:, None], codes_NQT], axis=1)}

    def loss(objective: SttObjective) -> Loss:
        return lambda lm, batch, key: stt_loss(lm, batch["codes_BKT"], key, objective)

    plain = SttObjective(padding_weight=config.lm.objective.padding_weight)
    trained = train_lm(
        config.lm,
        Run(output / "lm", config.lm.run),
        lm,
        loss(config.lm.objective),
        loss(plain),
        encode(takes, 2, config.lm.strings),
        encode(kept, 3, UNSEEN_STRINGS),
        seed=seed,
        resume=resume,
    )

    mimi_def, _ = nnx.split(mimi)
    lm_def, lm_params = nnx.split(trained)
    model = checkpoints.Model(whole, lm_def, in_16_bits(lm_params), mimi_def, mimi_params, tokenizer, NAME)
    write_model(model, output_model)
    return checkpoints.load(output_model)

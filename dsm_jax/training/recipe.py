"""From recordings to the embedded model: a codec, then a language model over its codes, then a folder to ship.

`train_digits` can be stopped at any time and resumed: each stage is a run of its own.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsm_jax import checkpoints
from dsm_jax.configs import LMConfig, ModelConfig, SttConfig, Table
from dsm_jax.models.mimi import Mimi
from dsm_jax.stt.words import Timing
from dsm_jax.tokenizers import load_tokenizer
from dsm_jax.training import codec, digits, step
from dsm_jax.training.alignment import text_stream
from dsm_jax.training.compose import Gaps, Take
from dsm_jax.training.digits import Mix
from dsm_jax.training.export import in_16_bits, new_model, write_model
from dsm_jax.training.run import Run, RunConfig, batches
from dsm_jax.training.step import OptimizerConfig, TrainState
from dsm_jax.training.strings import Loss, StringsStage, encode_strings, train_lm
from dsm_jax.training.stt import SttObjective, stt_loss
from dsm_jax.training.vocabulary import write_vocabulary

NAME = "digits"
DELAY = 8  # frames that the text is behind the audio: a digit has been said by then
VALIDATION_ROWS = 32  # of the codec
UNSEEN_STRINGS = 256  # that the language model is validated on


_DENSE = Mix(sentences=0.15, noise=0.05, short=0.1, gaps=Gaps(longest=0.5, lead=0.4), harshness=0.4, quietest_db=-20.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodecStage:
    """Training of the codec, mostly for what is said: dense strings, and not too much done to them.

    None is very quiet: the gradient of a string 40 dB down is twenty times that of others, as norms divide by its
    level, and once clipping has made it small enough, nothing is left of the others.
    """

    rows: int = 6  # in a batch
    frames: int = 60  # in a row
    run: RunConfig = RunConfig(steps=12_000, log_every=50, save_every=500)
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-3, warmup=200, weight_decay=0.02, b1=0.8, clip=5.0)
    objective: codec.CodecObjective = codec.CodecObjective()
    mix: Mix = _DENSE


# Once it names all that it has heard, it goes on with what is harder to name, as new recordings are.
_HARDENED = CodecStage(
    run=RunConfig(steps=10_000, log_every=50, save_every=500),
    optimizer=OptimizerConfig(learning_rate=7e-4, warmup=100, weight_decay=0.02, b1=0.8, clip=5.0),
    mix=dataclasses.replace(_DENSE, speed=0.2, tempo=0.25, harshness=0.8),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LmStage(StringsStage):
    """Training of the language model that hears."""

    strings: int = 18_000
    rows: int = 36
    run: RunConfig = RunConfig(steps=2400, log_every=50, save_every=400)
    objective: SttObjective = SttObjective(text_dropout=0.1, codebook_dropout=0.5, random_codes=0.1)
    mix: Mix = Mix(sentences=0.12, harshness=0.6, gaps=Gaps(longest=0.7), quietest_db=-20.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DigitsConfig:
    """The whole recipe."""

    data: str  # a folder with `fsdd`, `kathleen` and `ljspeech`
    output: str
    seed: int = 0
    codec: CodecStage = CodecStage()
    hardened: CodecStage = _HARDENED
    lm: LmStage = LmStage()


def lm_config(pieces: int, context: int) -> LMConfig:
    """The language model: the published topology, small."""
    quantizer = digits.MIMI.quantizer
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
    data, output = Path(config.data), Path(config.output)
    output_model = new_model(output, NAME)
    takes = digits.load_takes(data / "fsdd", digits.TRAINING_TAKES)
    kept = digits.load_takes(data / "fsdd", digits.VALIDATION_TAKES)
    rate = digits.MIMI.sample_rate
    folders = data / "kathleen", data / "ljspeech"
    sentences = [s for folder in folders for s in digits.load_sentences(folder, rate, held_out=False)]

    seed = config.seed
    made = Mimi(digits.MIMI, block_frames=None, rngs=nnx.Rngs(seed))
    trainee = codec.CodecTrainee(made, digits.LABELS, rngs=nnx.Rngs(seed + 1))
    for draw, (name, stage) in enumerate((("codec", config.codec), ("hardened", config.hardened))):
        rows = digits.CodecRows(takes, sentences, stage.frames, (seed, 10 * draw), stage.mix)
        only_digits = dataclasses.replace(stage.mix, sentences=0.0, noise=0.0)
        validation = digits.CodecRows(kept, sentences, stage.frames, (seed, 1), only_digits)
        run = Run(output / name, stage.run)
        trainee = train_codec(stage, run, trainee, rows, validation, seed=seed, resume=resume, fresh=draw == 0)
    listening, _ = nnx.split(nnx.eval_shape(lambda: Mimi(digits.MIMI, rngs=nnx.Rngs(0))))
    # The language model learns the codes of the codec that is shipped, after rounding.
    mimi_params = in_16_bits(nnx.state(trainee.mimi))
    mimi = nnx.merge(listening, jax.tree.map(lambda a: a.astype(jnp.float32), mimi_params))

    vocabulary = output / "tokenizer_digits.model"
    pieces = write_vocabulary(vocabulary, digits.WORDS)
    tokenizer = load_tokenizer(vocabulary)
    lm = lm_config(pieces, config.lm.context)
    whole = ModelConfig(
        model_type="stt",
        lm=lm,
        mimi=digits.MIMI,
        stt=SttConfig(audio_delay_seconds=DELAY / digits.MIMI.frame_rate),
        lm_gen_config=Table(temp=0.0, temp_text=0.0, top_k=0, top_k_text=0),
    )
    timing = Timing(digits.MIMI.frame_rate, DELAY / digits.MIMI.frame_rate, 0.0)

    def encode(takes: list[Take], draw: int, count: int) -> dict[str, np.ndarray]:
        rows = digits.SpeechRows(takes, sentences, config.lm.frames, (seed, draw), config.lm.mix)
        codes_NQT, spoken = encode_strings(mimi, rows, count)
        texts = [text_stream(words, tokenizer, lm, timing, frames=config.lm.frames) for words in spoken]
        return {"codes_BKT": np.concatenate([np.stack(texts).astype(np.int16)[:, None], codes_NQT], axis=1)}

    def loss(objective: SttObjective) -> Loss:
        return lambda lm, batch, key: stt_loss(lm, batch["codes_BKT"], key, objective)

    plain = dataclasses.replace(config.lm.objective, text_dropout=0.0, codebook_dropout=0.0, random_codes=0.0)
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


def train_codec(
    stage: CodecStage,
    run: Run,
    trainee: codec.CodecTrainee,
    rows: digits.CodecRows,
    validation: digits.CodecRows,
    *,
    seed: int,
    resume: bool,
    fresh: bool,
) -> codec.CodecTrainee:
    """Trains the codec for one stage; `fresh` codebooks start at the first batch's vectors."""
    graph, params, memory = codec.split(trainee, fresh=fresh)

    def loss(params: Any, memory: codec.CodecMemory, batch: Any, key: jax.Array):
        return codec.codec_loss(codec.merge(graph, params, memory), memory, batch, key, stage.objective)

    optimizer = stage.optimizer.build(stage.run.steps)
    state = step.init(params, memory, optimizer, seed)
    state = run.restore(state) if resume and run.latest() is not None else state
    held_out = stack([validation[i] for i in range(VALIDATION_ROWS)])
    measure = jax.jit(lambda state: loss(state.params, state.memory, held_out, jax.random.PRNGKey(0))[1][1])

    def evaluate(state: TrainState) -> dict[str, float]:
        figures = measure(state)
        return {f"validation_{name}": float(figures[name]) for name in ("spectral", "semantic", "named")}

    data = batches(rows, batch_size=stage.rows, seed=seed, first_step=int(state.step))
    state = run.train(step.make_step(loss, optimizer), state, data, evaluate=evaluate)
    return codec.merge(graph, state.params, state.memory)


def stack(rows: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """A batch of rows."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

"""A model ready to listen: the engine's functions, compiled once per model and setting, and the rows they run.

Shape letters: B batch rows, T samples, C audio channels, F frames, P prompt tokens.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsm_jax import audio
from dsm_jax.checkpoints import Model
from dsm_jax.errors import CheckpointError, ConfigError
from dsm_jax.stt import engine
from dsm_jax.stt.engine import FrameOutputs, Sampling, SttState
from dsm_jax.stt.hearing import Hearing, Prompt, prompt_tokens, word_reader
from dsm_jax.stt.words import PAUSE_HORIZONS, PauseRule, WordReader

_PROMPT_STEP = 64  # prompts are padded to a multiple, so that few lengths are ever compiled


@dataclasses.dataclass(frozen=True)
class _Programs:
    """The engine's functions over parameters, jitted, and the shapes for which they have been compiled."""

    init: Any
    start: Any
    advance: Any
    compiled: set[tuple[int, int, int]]  # rows, frames, prompt tokens


@functools.lru_cache(maxsize=8)
def _programs(lm_def: nnx.GraphDef, mimi_def: nnx.GraphDef, how: Sampling) -> _Programs:
    # The graphdef is closed over and not an argument: an argument is hashed at every call.
    def init(lm_params: nnx.State, mimi_params: nnx.State, batch_size: int) -> SttState:
        return engine.init_state(nnx.merge(lm_def, lm_params), nnx.merge(mimi_def, mimi_params), batch_size)

    def start(lm_params: nnx.State, state: SttState, rows_B: jax.Array, prompt_BP: jax.Array, key: jax.Array):
        return engine.start(nnx.merge(lm_def, lm_params), state, rows_B, prompt_BP, key, how)

    def advance(
        lm_params: nnx.State,
        mimi_params: nnx.State,
        state: SttState,
        pcm_BTC: jax.Array,
        frames_B: jax.Array,
        prompt_BP: jax.Array,
        key: jax.Array,
    ):
        lm, mimi = nnx.merge(lm_def, lm_params), nnx.merge(mimi_def, mimi_params)
        return engine.advance(lm, mimi, state, pcm_BTC, frames_B, prompt_BP, key, how)

    return _Programs(
        jax.jit(init, static_argnums=2), jax.jit(start, donate_argnums=1), jax.jit(advance, donate_argnums=2), set()
    )


@dataclasses.dataclass(frozen=True)
class Options:
    """How to listen.

    Attributes:
      prompt: words or a recording that steer the model.
      temperature: 0 is greedy; None takes the checkpoint's, which is 0 in the published ones.
      top_k: sample among this many tokens; None takes the checkpoint's.
      seed: of the sampling. A row's noise depends on its own progress only, never on the rows beside it.
      pauses: when the end of a turn is told, for models with pause heads.
    """

    prompt: Prompt = Prompt()
    temperature: float | None = None
    top_k: int | None = None
    seed: int = 0
    pauses: PauseRule = PauseRule()

    def sampling(self, model: Model) -> Sampling:
        """How tokens are chosen; what is None comes from the checkpoint's `lm_gen_config`.

        Raises:
          ConfigError: a temperature or a top-k below 0.
        """
        asked = model.config.lm_gen_config
        temperature = float(asked.get("temp_text", 0.0)) if self.temperature is None else self.temperature
        top_k = int(asked.get("top_k_text", 0)) if self.top_k is None else self.top_k
        if temperature < 0 or top_k < 0:
            raise ConfigError(f"temperature is {temperature} and top_k {top_k}; neither can be below 0")
        return Sampling(temperature, top_k)


class Recognizer:
    """A model and a batch of rows that start, hear and end on their own.

    Args:
      model: from `checkpoints.load`.
      batch_size: rows.
      chunk: frames that the rows hear at a time.
      options: how to listen.

    Raises:
      AudioError: the audio prompt cannot be read.
      CheckpointError: the model does not transcribe.
      PromptError: the model cannot follow the prompt.
    """

    def __init__(self, model: Model, batch_size: int, chunk: int, options: Options):
        lm, name = model.config.lm, model.name
        remedy = "load a speech-to-text model such as kyutai/stt-1b-en_fr"
        if model.lm_def is None or lm is None:
            raise CheckpointError(f"{name} is a codec without a language model; to transcribe, {remedy}")
        if model.tokenizer is None:
            raise CheckpointError(f"{name} has no tokenizer; add the published one, and name it in config.json")
        if lm.dep_q:
            raise CheckpointError(f"{name} generates {lm.dep_q} audio streams; to transcribe, {remedy}")
        if lm.n_q > model.config.mimi.quantizer.n_q:
            raise CheckpointError(
                f"{name} listens to {lm.n_q} codebooks and its codec has {model.config.mimi.quantizer.n_q}; "
                "take both from one checkpoint"
            )
        if lm.extra_heads_num_heads not in (0, len(PAUSE_HORIZONS)):
            raise CheckpointError(
                f"{name} has {lm.extra_heads_num_heads} extra heads; expected none, or {len(PAUSE_HORIZONS)}: one for "
                f"each of the pauses of {PAUSE_HORIZONS} s"
            )
        if options.prompt.audio is not None:
            heard = audio.read(options.prompt.audio, model.config.mimi.sample_rate)
            options = dataclasses.replace(options, prompt=dataclasses.replace(options.prompt, audio=heard))
        self.model, self.lm, self.tokenizer, self.options = model, lm, model.tokenizer, options
        self.batch_size, self.chunk = batch_size, chunk
        tokens = prompt_tokens(options.prompt, model.tokenizer, lm)
        padded = np.zeros(-(-len(tokens) // _PROMPT_STEP) * _PROMPT_STEP, np.int32)
        padded[: len(tokens)] = tokens
        self._prompt_BP = jnp.broadcast_to(padded, (batch_size, padded.size))
        self._key = jax.random.key(options.seed)
        self._programs = _programs(model.lm_def, model.mimi_def, options.sampling(model))
        self._compile()
        self._state = self._programs.init(model.lm_params, model.mimi_params, batch_size)

    def _compile(self) -> None:
        """Compiles before the state is there, so that the memory which that takes is not on top of it."""
        shapes = (self.batch_size, self.chunk, self._prompt_BP.shape[1])
        if shapes in self._programs.compiled:
            return
        lm, mimi, rows = self.model.lm_params, self.model.mimi_params, self.batch_size
        state = jax.eval_shape(functools.partial(self._programs.init, batch_size=rows), lm, mimi)
        pcm_BTC = np.zeros((rows, self.chunk * self.model.config.mimi.frame_size, 1), np.float32)
        self._programs.start.lower(lm, state, np.zeros(rows, bool), self._prompt_BP, self._key).compile()
        frames_B = np.zeros(rows, np.int32)
        self._programs.advance.lower(lm, mimi, state, pcm_BTC, frames_B, self._prompt_BP, self._key).compile()
        self._programs.compiled.add(shapes)

    def hearing(self) -> Hearing:
        """Collects the samples of a new recording."""
        return Hearing(self.model.config, self.options.prompt)

    def reader(self) -> WordReader:
        """Reads the words of a new recording."""
        return word_reader(self.model.config, self.lm, self.tokenizer, self.options.prompt, self.options.pauses)

    def start(self, rows: list[int]) -> None:
        """Makes rows fresh, ready for a new recording each."""
        rows_B = np.zeros(self.batch_size, bool)
        rows_B[rows] = True
        self._state = self._programs.start(self.model.lm_params, self._state, rows_B, self._prompt_BP, self._key)

    def advance(self, pcm_BT: np.ndarray, frames_B: np.ndarray) -> FrameOutputs:
        """Hears a chunk, `frames_B[b]` frames of it in row b; returns at once, with outputs still being computed."""
        outputs, self._state = self._programs.advance(
            self.model.lm_params,
            self.model.mimi_params,
            self._state,
            pcm_BT[:, :, None],
            frames_B.astype(np.int32),
            self._prompt_BP,
            self._key,
        )
        return outputs

"""A model ready to speak: the engine's loop, compiled once per model and manner, and the rows it runs.

Shape letters: B batch rows, N steps, Q codebooks, P frames of a prefix, T samples.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsm_jax import audio, codec
from dsm_jax.checkpoints import Model
from dsm_jax.errors import ConfigError, SpeechError
from dsm_jax.models.conditioning import Conditions
from dsm_jax.tts import engine, voices
from dsm_jax.tts.engine import Manner, Steps, Told, TtsState
from dsm_jax.tts.script import Entry, entries_of, pack
from dsm_jax.tts.speech import Request, Speech, SpeechOptions, words_at

MOST_STEPS = 16  # of a call: what is read back at a time
_PREFIX_STEP = 64  # prefixes are padded to a multiple, so that few lengths are ever compiled


@dataclasses.dataclass(frozen=True)
class _Programs:
    """The engine's functions over parameters, jitted."""

    init: Any
    condition: Any
    advance: Any


@functools.lru_cache(maxsize=8)
def _programs(lm_def: nnx.GraphDef, mimi_def: nnx.GraphDef, how: Manner) -> _Programs:
    # The graphdef is closed over and not an argument: an argument is hashed at every call.
    def init(lm_params: nnx.State, mimi_params: nnx.State, batch_size: int) -> TtsState:
        return engine.init_state(nnx.merge(lm_def, lm_params), nnx.merge(mimi_def, mimi_params), how, batch_size)

    def condition(lm_params: nnx.State, values: dict[str, jax.Array], masks: dict[str, jax.Array]) -> Conditions:
        return nnx.merge(lm_def, lm_params).condition(values, masks)

    def advance(
        lm_params: nnx.State, mimi_params: nnx.State, told: Told, state: TtsState, limit: jax.Array
    ) -> tuple[Steps, TtsState]:
        lm, mimi = nnx.merge(lm_def, lm_params), nnx.merge(mimi_def, mimi_params)
        return engine.advance(lm, mimi, told, state, limit, how, most=MOST_STEPS)

    return _Programs(jax.jit(init, static_argnums=2), jax.jit(condition), jax.jit(advance, donate_argnums=3))


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A request that has been read: entries, the voices' steps or the prefix's codes, and the seed."""

    entries: list[Entry]
    voices: list[np.ndarray]
    prefix_QP: np.ndarray
    seed: int


class Synthesizer:
    """A model and a batch of rows that begin together, speak, and end on their own.

    Args:
      model: from `checkpoints.load`.
      batch_size: rows.
      options: how to speak.

    Raises:
      CheckpointError: the model does not speak.
      ConfigError: it was loaded with `listen_only`.
      SpeechError: an option out of its range.
    """

    def __init__(self, model: Model, batch_size: int, options: SpeechOptions):
        self.how = options.manner(model)
        assert model.config.lm is not None
        assert model.tokenizer is not None
        if nnx.merge(model.mimi_def, model.mimi_params).decoder is None:
            raise ConfigError(f"{model.name} was loaded with listen_only=True; load it without to speak")
        self.model, self.lm, self.tokenizer = model, model.config.lm, model.tokenizer
        self.batch_size, self.options = batch_size, options
        self.distilled = bool(voices.guidance_values(self.lm))
        self._programs = _programs(model.lm_def, model.mimi_def, self.how)
        self._told: Told | None = None
        self._state: TtsState | None = None

    def prepare(self, request: Request) -> Prepared:
        """Reads a request.

        Raises:
          AudioError: a recording to go on from that cannot be read.
          CheckpointError: a voice that cannot be read.
          SpeechError: text that cannot be said, voices that the model cannot take, or a seed of more than 64 bits.
        """
        entries = self.entries(request.turns)
        seed = self.options.seed if request.seed is None else request.seed
        if not -(2**63) <= seed < 2**63:
            raise SpeechError(f"the seed is {seed}, and must fit into 64 bits: give a smaller one")
        none_QP = np.zeros((self.lm.n_q, 0), np.int32)
        if voices.has_speakers(self.lm):
            if not request.voices and (own := voices.voices_of(self.model)):
                raise SpeechError(f"{self.model.name} needs a voice, and was given none; its own are {', '.join(own)}")
            steps = [voices.read_voice(voice, self.model) for voice in request.voices]
            voices.conditions(self.lm, [steps], self._told_guidance)  # what is wrong with them is told here
            return Prepared(entries, steps, none_QP, seed)
        if len(request.voices) > 1:
            raise SpeechError(
                f"{len(request.voices)} voices were given; {self.model.name} goes on from the recording of one"
            )
        return Prepared(entries, [], self._prefix(request.voices[0]) if request.voices else none_QP, seed)

    def entries(self, turns: Sequence[str]) -> list[Entry]:
        """The words and breaks of a text, see `script.entries_of`."""
        return entries_of(
            turns,
            self.tokenizer,
            frame_rate=self.model.config.mimi.frame_rate,
            multi_speaker=voices.has_speakers(self.lm),
            padding_between=self.options.padding_between,
        )

    @property
    def _told_guidance(self) -> float | None:
        return self.options.guidance if self.distilled else None

    def _prefix(self, voice: voices.Voice) -> np.ndarray:
        """The codes [Q, P] of a recording, without its last two frames, which have not heard what follows them."""
        recording = audio.read(voice, self.model.sample_rate)
        codes_QP = codec.encode(self.model, recording, codebooks=self.lm.n_q)[:, :-2]
        if not codes_QP.shape[1]:
            seconds = recording.size / self.model.sample_rate
            raise SpeechError(f"the recording to go on from is {seconds:.2f} s long; give some seconds")
        return codes_QP

    def begin(self, rows: Sequence[Prepared], *, complete: bool = True) -> None:
        """Makes all rows fresh and gives them requests; those left over say nothing.

        Args:
          rows: at most `batch_size`, at least one; of voices of one length.
          complete: whether all of their text is known; if not, `tell` follows.

        Raises:
          SpeechError: voices of several lengths.
        """
        idle = dataclasses.replace(rows[0], entries=[])
        filled = [*rows, *[idle] * (self.batch_size - len(rows))]
        lm_params = self.model.lm_params
        conditions = None
        if self.lm.conditioners:
            values, masks = voices.conditions(self.lm, [row.voices for row in filled], self._told_guidance)
            if self.how.halves == 2:
                values, masks = voices.without(values, masks, self.lm)
            conditions = self._programs.condition(lm_params, values, masks)
        lengths = np.array([row.prefix_QP.shape[1] for row in filled], np.int32)
        room = -(-int(lengths.max()) // _PREFIX_STEP) * _PREFIX_STEP
        prefix_BQP = np.zeros((len(filled), self.lm.n_q, room), np.int32)
        for row, length, given in zip(prefix_BQP, lengths, filled, strict=True):
            row[:, :length] = given.prefix_QP
        self._told = Told(
            script=pack([row.entries for row in filled], [complete] * len(rows) + [True] * (len(filled) - len(rows))),
            conditions=conditions,
            prefix_BQP=jnp.asarray(prefix_BQP),
            prefix_B=jnp.asarray(lengths),
            bonus_B=jnp.full(len(filled), self.options.padding_bonus, jnp.float32),
            keys_B=jnp.stack([jax.random.key(row.seed) for row in filled]),
        )
        self._state = self._programs.init(lm_params, self.model.mimi_params, self.batch_size)

    def tell(self, entries: Sequence[Sequence[Entry]], *, complete: bool) -> None:
        """Gives every row its script again, with more at its end."""
        assert self._told is not None
        script = pack(entries, [complete] * len(entries))
        self._told = dataclasses.replace(self._told, script=script)

    def advance(self, limit: int) -> Steps:
        """Takes up to `limit` steps, and `MOST_STEPS`; returns what they made, read back: nothing when none is left."""
        made, self._state = self._programs.advance(
            self.model.lm_params, self.model.mimi_params, self._told, self._state, jnp.int32(limit)
        )
        count = int(made.count)
        return jax.tree.map(lambda a: np.asarray(a)[:count] if a.ndim else count, made)

    @property
    def running_B(self) -> np.ndarray:
        """Which rows have a step to take, bool [B]."""
        assert self._told is not None
        assert self._state is not None
        return np.asarray(engine.running_B(self.how, self._told, self._state))


class Row:
    """What one row has said so far."""

    def __init__(self, prepared: Prepared):
        self.prepared = prepared
        self.frames: list[np.ndarray] = []
        self.pcm: list[np.ndarray] = []
        self.taken: list[int] = []
        self.steps = 0
        self._prefix_left = prepared.prefix_QP.shape[1]

    def hear(self, made: Steps, row: int) -> np.ndarray:
        """Takes in what a call made of the row; returns its new samples [T], without those of the prefix."""
        self.frames.append(np.asarray(made.frames_NBK[made.framed_NB[:, row], row]))
        self.taken += (self.steps + np.flatnonzero(made.taken_NB[:, row])).tolist()
        self.steps += int(made.count)
        pcm_NT = np.asarray(made.pcm_NBT[made.audible_NB[:, row], row])
        skipped = min(self._prefix_left, len(pcm_NT))
        self._prefix_left -= skipped
        self.pcm.append(pcm_NT[skipped:].reshape(-1))
        return self.pcm[-1]

    def speech(self, model: Model, codebooks: int) -> Speech:
        """All of it."""
        pcm_T, prefix = np.concatenate(self.pcm), self.prepared.prefix_QP.shape[1]
        end = pcm_T.size / model.sample_rate
        words = words_at(self.prepared.entries, self.taken, prefix, model.config.mimi.frame_rate, end)
        frames_KF = np.concatenate(self.frames).T[: 1 + codebooks]
        return Speech(pcm_T, model.sample_rate, tuple(words), frames_KF, model.name)

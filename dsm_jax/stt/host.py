"""The speech-to-text program, compiled, with a model's parameters: what the host calls.

Shape letters: T samples or prompt tokens.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsm_jax.checkpoints import Model
from dsm_jax.runtime.compile import compiled_over_state, plain
from dsm_jax.runtime.slots import grow
from dsm_jax.stt.program import FrameOutputs, SttInputs, SttRequest, SttSettings, SttState, init_state, insert, step

_PROMPT_STEP = 64  # the room for prompts grows by so many tokens, so that few sizes are ever compiled


class SttProgram:
    """The program for one model, compiled, with its parameters.

    Args:
      model: a speech-to-text model.
      slots: number of slots.
      chunks: frames of a chunk, in ascending order; each call takes the least that holds the inputs of its slots.
      max_top_k: the largest top-k that any request will choose.
      prompt_tokens: room for text prompts; longer ones make the program grow, which compiles it anew.
      ahead: the most steps that one pass of the language model runs, at most the model's context.
    """

    def __init__(
        self,
        model: Model,
        slots: int,
        chunks: Sequence[int],
        *,
        max_top_k: int = 0,
        prompt_tokens: int = 0,
        ahead: int = 1,
    ):
        assert model.lm_def is not None
        assert model.lm_params is not None
        assert model.config.lm is not None
        ahead = min(ahead, model.config.lm.context)  # a pass fits into the ring
        self.slots, self.inserts, self.chunks = slots, slots, tuple(chunks)
        self._graphs: tuple[nnx.GraphDef, nnx.GraphDef] = model.lm_def, model.mimi_def
        self._params = plain(model.lm_params, model.mimi_params)
        self._frame_size = model.config.mimi.frame_size
        self._compile(SttSettings(slots, _rounded_up(prompt_tokens), max_top_k, ahead, insert_steps=chunks[0] == 1))

    def _compile(self, settings: SttSettings) -> None:
        """Compile before any state is allocated, so that the two peaks of memory do not add up."""
        functions = init, inserting, stepping = compiled_over_state(self._graphs, settings, init_state, insert, step)
        state = init.shapes(self._params)
        requests = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), state.request)
        inserting.compile(self._params, state, np.zeros(self.slots, np.int32), requests)
        for frames in self.chunks:
            stepping.compile(self._params, state, self._inputs([None] * self.slots, frames))
        # Taken over last: a compilation that fails or is interrupted leaves the program as it was.
        self.settings, (self._init, self._insert, self._step) = settings, functions

    def add_chunk(self, frames: int) -> None:
        """Compile for chunks of one more size, larger than those before."""
        self.chunks = (*self.chunks, frames)
        self._step.compile(self._params, self._init.shapes(self._params), self._inputs([None] * self.slots, frames))

    def init(self) -> SttState:
        """Make the state of slots without requests."""
        return self._init(self._params)

    def insert(self, state: SttState, slot_N: Sequence[int], requests: Sequence[SttRequest]) -> SttState:
        """Put requests into slots."""
        longest = max(request.prompt_BT.shape[0] for request in requests)
        if longest > self.settings.prompt_tokens:
            self._compile(dataclasses.replace(self.settings, prompt_tokens=_rounded_up(longest)))
            state = grow(state, self._init.shapes(self._params))
        room, spare = self.settings.prompt_tokens, self.slots - len(requests)
        rows = [_with_room(request, room) for request in [*requests, *[requests[0]] * spare]]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
        numbers = np.array([*slot_N, *[self.slots] * spare], np.int32)
        return self._insert(self._params, state, numbers, stacked)

    def step(
        self, state: SttState, parts: Sequence["Samples | None"], *, waiting: bool = False
    ) -> tuple[FrameOutputs, SttState]:
        """Transcribe a chunk; returns at once, with outputs that may still be computed."""
        longest = max((part.pcm_T.size // self._frame_size for part in parts if part is not None), default=0)
        frames = next(chunk for chunk in self.chunks if chunk >= longest)
        return self._step(self._params, state, self._inputs(parts, frames))

    def _inputs(self, parts: Sequence["Samples | None"], frames: int) -> SttInputs:
        silence_T = np.zeros(frames * self._frame_size, np.float32)
        rows = [silence_T[:0] if part is None else part.pcm_T for part in parts]
        # One copy for all rows. NumPy gives up the interpreter's lock at each row, and waits to have it back where a
        # server's event loop takes it.
        pcm = b"".join(piece.data for row_T in rows for piece in (row_T, silence_T[row_T.size :]))
        frames_B = np.array([row_T.size for row_T in rows], np.int32) // self._frame_size
        return SttInputs(np.frombuffer(pcm, np.float32).reshape(self.slots, -1, 1), frames_B)


@dataclasses.dataclass(frozen=True)
class Samples:
    """The input of one slot: whole frames of samples [T], and whether no more will come."""

    pcm_T: np.ndarray
    last: bool


def _rounded_up(tokens: int) -> int:
    return -(-tokens // _PROMPT_STEP) * _PROMPT_STEP


def _with_room(request: SttRequest, tokens: int) -> SttRequest:
    padded = np.zeros(tokens, np.int32)
    padded[: request.prompt_BT.shape[0]] = request.prompt_BT
    return dataclasses.replace(request, prompt_BT=padded)

"""The program of a conversational speech model on the host: requests in the sizes that they have, compiled functions.

Shape letters: M streams (text first), T positions of a prompt, N requests of a call.
"""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from dsm_jax.checkpoints import Model
from dsm_jax.csm.options import CsmOptions
from dsm_jax.csm.program import CsmOutputs, CsmRequest, CsmSettings, CsmState, init_state, insert, step
from dsm_jax.models.family import csm_config
from dsm_jax.models.streams import ZERO_TOKEN
from dsm_jax.nn.sampling import key_of, top_k_capacity
from dsm_jax.runtime.compile import compiled_over_state, plain
from dsm_jax.runtime.slots import grow
from dsm_jax.runtime.steps import Leave, step_limits

# Prompts are padded to a multiple of the small bucket, or of the large one if they are longer than it; the room of a
# slot grows by powers of two from the smallest room. So few sizes are ever compiled.
SMALL_BUCKET, LARGE_BUCKET, SMALLEST_ROOM = 64, 256, 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConversationRequest:
    """One request on the host.

    Attributes:
      text: of the turn to speak.
      prompt_MT: int32 positions of the conversation, the text to say last.
      options: of the sampling.
      max_frames: frames after which to give up.
    """

    text: str
    prompt_MT: np.ndarray
    options: CsmOptions
    max_frames: int

    @property
    def positions(self) -> int:
        """Positions of the conversation, prompt and answer together."""
        return self.prompt_MT.shape[1] + self.max_frames

    def fitted(self, settings: CsmSettings, context: int) -> CsmSettings:
        """Return the settings with room for this request, in a model of that context."""
        top_k = top_k_capacity(self.options.top_k, self.options.depth_sampling[1])
        return dataclasses.replace(
            settings,
            positions=max(settings.positions, room(self.positions, context)),
            max_top_k=max(settings.max_top_k, top_k),
        )

    def row(self) -> CsmRequest:
        """Return the request's choices as one row of arrays."""
        options = self.options
        depth_temperature, depth_top_k = options.depth_sampling
        return CsmRequest(
            key_B2=key_of(options.seed)[None],
            temperature_B=np.array([options.temperature], np.float32),
            top_k_B=np.array([options.top_k], np.int32),
            depth_temperature_B=np.array([depth_temperature], np.float32),
            depth_top_k_B=np.array([depth_top_k], np.int32),
            max_frames_B=np.array([self.max_frames], np.int32),
        )


def bucket(length: int, context: int) -> int:
    """Return the positions to which a prompt is padded."""
    size = SMALL_BUCKET if length <= LARGE_BUCKET else LARGE_BUCKET
    return min(-(-length // size) * size, context)


def room(positions: int, context: int) -> int:
    """Return the room of a slot for conversations of so many positions."""
    return min(max(SMALLEST_ROOM, 1 << (positions - 1).bit_length()), context)


class CsmProgram:
    """The program for one model, compiled, with its parameters.

    Args:
      model: a conversational speech model.
      settings: with room for the requests to come; larger ones make the program grow, which compiles it anew.
      limit: frames of a call at most; None for as many as there is room for.
      inserts: requests of one call of `insert` at most; None for as many as there are slots. With 1, no number of
        requests that come together compiles anything.
    """

    def __init__(self, model: Model, settings: CsmSettings, *, limit: int | None = None, inserts: int | None = None):
        assert model.lm_def is not None
        assert model.lm_params is not None
        self.slots, self.inserts = settings.slots, settings.slots if inserts is None else inserts
        self.limit = settings.steps if limit is None else limit
        self._context = csm_config(model.config).backbone.context
        self._graphs = model.lm_def, model.mimi_def
        self._params = plain(model.lm_params, model.mimi_params)
        self._compile(settings)

    def _compile(self, settings: CsmSettings) -> None:
        """Compile before any state is allocated, so that the two peaks of memory do not add up."""
        functions = init, _, stepping = compiled_over_state(self._graphs, settings, init_state, insert, step)
        limits = step_limits([None] * self.slots, self.limit, waiting=False)
        stepping.compile(self._params, init.shapes(self._params), limits)
        # Taken over last: a compilation that fails or is interrupted leaves the program as it was.
        self.settings, (self._init, self._insert, self._step) = settings, functions

    def fit(self, state: CsmState, requests: Sequence[ConversationRequest]) -> CsmState:
        """Make room for requests that are larger than those before."""
        settings = self.settings
        for request in requests:
            settings = request.fitted(settings, self._context)
        if settings == self.settings:
            return state
        self._compile(settings)
        return grow(state, self._init.shapes(self._params))

    def init(self) -> CsmState:
        """Make the state of slots without requests."""
        return self._init(self._params)

    def insert(self, state: CsmState, slot_N: Sequence[int], requests: Sequence[ConversationRequest]) -> CsmState:
        """Put requests into slots.

        Requests of one bucket run together, in groups of a power of two, so that few numbers of them are compiled.
        """
        state = self.fit(state, requests)
        by_bucket: dict[int, list[tuple[int, ConversationRequest]]] = {}
        for slot, request in zip(slot_N, requests, strict=True):
            by_bucket.setdefault(bucket(request.prompt_MT.shape[1], self._context), []).append((slot, request))
        for size, group in by_bucket.items():
            while group:
                count = 1 << (len(group).bit_length() - 1)
                state = self._prefill(state, size, group[:count])
                group = group[count:]
        return state

    def _prefill(self, state: CsmState, size: int, group: Sequence[tuple[int, ConversationRequest]]) -> CsmState:
        rows = [request.row() for _, request in group]
        prompts = [request.prompt_MT for _, request in group]
        tokens_NMT = np.stack(
            [np.pad(one, ((0, 0), (0, size - one.shape[1])), constant_values=ZERO_TOKEN) for one in prompts]
        )
        return self._insert(
            self._params,
            state,
            np.array([slot for slot, _ in group], np.int32),
            jax.tree.map(lambda *parts: np.concatenate(parts), *rows),
            tokens_NMT,
            np.array([one.shape[1] for one in prompts], np.int32),
        )

    def step(self, state: CsmState, parts: Sequence[Leave | None], *, waiting: bool) -> tuple[CsmOutputs, CsmState]:
        """Generate frames in all slots that may; return at once, with outputs that may still be computed."""
        return self._step(self._params, state, step_limits(parts, self.limit, waiting=waiting))

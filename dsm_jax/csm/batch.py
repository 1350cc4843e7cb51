"""Whole turns of conversations, any number of them, and one turn as it is made: clients of the slots."""

from collections.abc import Iterator, Sequence

import numpy as np

from dsm_jax.checkpoints import Model
from dsm_jax.csm.options import CsmOptions
from dsm_jax.csm.requests import Request
from dsm_jax.csm.synthesizer import ConversationSession, ConversationSynthesizer
from dsm_jax.errors import DsmError
from dsm_jax.options import check_batch_size, slots_for
from dsm_jax.progress import ProgressCallback
from dsm_jax.speaking import sound, speak_each
from dsm_jax.speech import Speech


def synthesize_each(
    model: Model,
    requests: Sequence[Request | DsmError],
    *,
    options: CsmOptions = CsmOptions(),
    batch_size: int = 8,
    progress: ProgressCallback | None = None,
) -> Iterator[tuple[int, Speech | DsmError]]:
    """Say several turns, `batch_size` at a time, and yield each as it ends, with its place in `requests`.

    A finished turn's slot takes the next one while the others speak. A request that cannot be said yields its error,
    and the others go on. Each gives what it gives alone.

    Args:
      model: a conversational speech model, from `dsm_jax.load`.
      requests: the turns, each with its conversation, or an error in place of one that could not be read.
      options: of requests that have none.
      batch_size: at most how many turns at a time.
      progress: called with the seconds of each speech that were made so far.
    """
    check_batch_size(batch_size)
    synthesizer = ConversationSynthesizer(model, slots_for(len(requests), batch_size))
    yield from speak_each(synthesizer, ConversationSession, requests, options, progress)


def synthesize_stream(model: Model, request: Request, *, options: CsmOptions = CsmOptions()) -> Iterator[np.ndarray]:
    """Say one turn, and yield its sound as it is made: float32 samples [T], a frame of 80 ms at a time.

    All sound joined is that of `synthesize_each`.

    Args:
      model: a conversational speech model, from `dsm_jax.load`.
      request: the turn and its conversation.
      options: of a request that has none.

    Raises:
      As the errors that `synthesize_each` yields.
    """
    synthesizer = ConversationSynthesizer(model, 1, limit=1, behind=0)
    session = ConversationSession(model, synthesizer.prepare(request, options))
    slots = synthesizer.slots_for(session.prepared)
    slots.start(session)
    yield from sound(slots, session)

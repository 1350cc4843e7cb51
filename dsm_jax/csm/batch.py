"""Whole turns of conversations, any number of them, and one turn as it is made: clients of the slots."""

import functools
from collections.abc import Iterator, Sequence

import numpy as np

from dsm_jax.checkpoints import Model
from dsm_jax.csm.conversation import Request
from dsm_jax.csm.options import CsmOptions
from dsm_jax.csm.synthesizer import ConversationSession, ConversationSynthesizer
from dsm_jax.errors import DsmError
from dsm_jax.progress import Progress, ProgressCallback
from dsm_jax.speech import Speech


def synthesize_each(
    model: Model,
    requests: Sequence[Request],
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
      requests: the turns, each with its conversation.
      options: of requests that have none.
      batch_size: at most how many turns at a time.
      progress: called with the seconds of each speech that were made so far.
    """
    # Few requests take a power of two: so that different numbers of them share a compilation.
    slots = max(1, min(batch_size, 1 << max(0, len(requests) - 1).bit_length()))
    synthesizer = ConversationSynthesizer(model, slots)

    def session(index: int) -> ConversationSession:
        try:
            prepared = synthesizer.prepare(requests[index], options)
        except DsmError as error:
            return ConversationSession(model, None, error=error, index=index)
        report = None if progress is None else functools.partial(_report, progress, index)
        return ConversationSession(model, prepared, index=index, progress=report)

    sessions = [session(index) for index in range(len(requests))]
    ready = [one.prepared for one in sessions if one.error is None]
    for done in synthesizer.slots_for(*ready).run(sessions) if ready else sessions:
        yield done.index, done.speech() if done.error is None else done.error


def _report(progress: ProgressCallback, index: int, seconds: float) -> None:
    progress(Progress(seconds, None, index))


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
    slots.admit([session])
    while not session.ended:
        slots.step()
        if (pcm_T := session.take_pcm()).size:
            yield pcm_T
    if session.error is not None:
        raise session.error

"""Live speech: sound as words arrive."""

import dataclasses
import re
from collections.abc import Iterable, Iterator

import numpy as np

from dsm_jax.checkpoints import Model
from dsm_jax.tts.speech import Request, SpeechOptions
from dsm_jax.tts.synthesizer import SpeechSession, Synthesizer
from dsm_jax.tts.voices import Voice

STEPS = 2  # of a call: what is waited for until the next piece of sound
_TAGS = re.compile(r"<[^>]*>")
_ENDS = re.compile(r"<[^>]*>|\s")  # whole tags and spaces: what is before them is whole


def synthesize_stream(
    model: Model,
    text: str | Iterable[str],
    *,
    speaker: Voice | None = None,
    options: SpeechOptions = SpeechOptions(),
) -> Iterator[np.ndarray]:
    """Says a text while it arrives; all sound joined is that of `synthesize` on all text joined.

    A word is taken as soon as it is followed by a space, and said once the words that the model reads ahead are there
    too. While there is none to say, nothing is generated: the next piece of text is waited for.

    Args:
      model: a text-to-speech model, from `dsm_jax.load`.
      text: pieces of one turn, of any size: words need not be whole.
      speaker: as for `synthesize`.
      options: how to speak.

    Yields:
      float32 samples [T], whole frames of 80 ms, as they are made.

    Raises:
      As `synthesize`; what is wrong with the text is told when it arrives.
    """
    synthesizer = Synthesizer(model, 1, [options], limit=STEPS, behind=0)
    session: SpeechSession | None = None
    voices = () if speaker is None else (speaker,)
    so_far, known = "", ""
    for piece in [text] if isinstance(text, str) else text:
        so_far += piece
        if (ready := _whole_words(so_far)) == known or not _TAGS.sub("", ready).strip():
            continue
        known = ready
        session = _with_text(synthesizer, session, Request(known, voices), options, complete=False)
        yield from _pcm(synthesizer, session)
    session = _with_text(synthesizer, session, Request(so_far, voices), options, complete=True)
    yield from _pcm(synthesizer, session)


def _with_text(
    synthesizer: Synthesizer, session: SpeechSession | None, request: Request, options: SpeechOptions, *, complete: bool
) -> SpeechSession:
    """Starts a session with the text so far, or adds to the text of the session that is running."""
    if session is None:
        session = SpeechSession(synthesizer.model, synthesizer.prepare(request, options, complete=complete))
        synthesizer.slots_for(session.prepared).admit([session])
    elif not session.ended:
        entries = synthesizer.entries(request.turns, options)
        synthesizer.extend(session, dataclasses.replace(session.prepared, entries=entries, complete=complete))
    return session


def _whole_words(text: str) -> str:
    """The text up to its last space outside of tags, or its last whole tag: what follows may still grow."""
    if (tag := text.rfind("<")) > text.rfind(">"):
        text = text[:tag]
    return text[: max((end.end() for end in _ENDS.finditer(text)), default=0)]


def _pcm(synthesizer: Synthesizer, session: SpeechSession) -> Iterator[np.ndarray]:
    """Yields sound until the session waits for text, or has ended.

    Raises:
      SpeechError: the text was not said to its end in as many frames as are allowed.
    """
    slots = synthesizer.slots_for(session.prepared)
    while not session.waits and not session.ended:
        slots.step()
        if (pcm_T := session.take_pcm()).size:
            yield pcm_T
    if session.error is not None:
        raise session.error

"""Live speech: sound as words arrive."""

import dataclasses
import re
from collections.abc import Iterable, Iterator

import numpy as np

from dsm_jax.checkpoints import Model
from dsm_jax.errors import SpeechError, StreamError, UnsayableError
from dsm_jax.speaking import sound
from dsm_jax.tts.script import Entry
from dsm_jax.tts.speech import Request, SynthesizeOptions
from dsm_jax.tts.synthesizer import SpeechSession, Synthesizer
from dsm_jax.tts.voices import Voice

STEPS = 2  # of a call: what is waited for until the next piece of sound
_TAGS = re.compile(r"<[^>]*>")
_ENDS = re.compile(r"<[^>]*>|\s")  # whole tags and spaces: what is before them is whole


class StreamingSynthesizer:
    """Say one text while it arrives.

    Args:
      model: a text-to-speech model, from `dsm_jax.load`.
      voice: as for `synthesize`.
      options: of the synthesis.

    Raises:
      As `synthesize`.
    """

    def __init__(self, model: Model, *, voice: Voice | None = None, options: SynthesizeOptions = SynthesizeOptions()):
        self._options = options
        self._voices = () if voice is None else (voice,)
        self._synthesizer = Synthesizer(model, 1, [options], limit=STEPS, behind=0)
        self._session: SpeechSession | None = None
        self._text, self._known, self._finished = "", "", False

    def feed(self, text: str) -> Iterator[np.ndarray]:
        """Take more text at once, and return an iterator over the sound that it allows, which is made as it is read.

        Args:
          text: a piece of any size: words need not be whole.

        Returns:
          float32 samples [T], whole frames of 80 ms. Sound that is not read comes with that of later calls.

        Raises:
          IncompleteSpeechError: `max_frames` were made before the text was said; raised by the iterator.
          SpeechError: the piece is no text.
          UnsayableError: a word that cannot be said; the words before it are said first; raised by the iterator.
          StreamError: the text has been finished.
        """
        if self._finished:
            raise StreamError("text was fed to a stream that has been finished; make a new StreamingSynthesizer")
        if not isinstance(text, str):
            raise SpeechError(f"a piece of the text is {type(text).__name__}; expected str")
        self._text += text
        return self._sound()

    def finish(self) -> Iterator[np.ndarray]:
        """End the text at once, and return an iterator over the rest of its sound.

        Raises:
          As `feed`.
        """
        if self._finished:
            raise StreamError("the text has been finished already; make a new StreamingSynthesizer")
        self._finished = True
        return self._sound()

    def _sound(self) -> Iterator[np.ndarray]:
        """Yield the sound that the text taken so far allows."""
        if self._finished:
            yield from self._say(self._text, complete=True)
            return
        ready = _whole_words(self._text)
        if ready != self._known and _TAGS.sub("", ready).strip():
            yield from self._say(ready, complete=False)

    def _say(self, text: str, *, complete: bool) -> Iterator[np.ndarray]:
        """Give the session the text so far, and yield its sound until it waits for more text or has ended."""
        fault: UnsayableError | None = None
        try:
            entries = self._synthesizer.entries((text,), self._options)
        except UnsayableError as error:
            # The words before the fault are said, and nothing after it.
            entries, fault, complete, self._finished = error.before, error, True, True
        self._known = text
        if any(entry.tokens for entry in entries):
            self._continue(entries, complete=complete)
            yield from self._pcm()
        if fault is not None:
            raise fault

    def _continue(self, entries: list[Entry], *, complete: bool) -> None:
        """Start the session with the words so far, or add to those of the session that is running."""
        synthesizer = self._synthesizer
        if self._session is None:
            request = Request((), self._voices)
            prepared = synthesizer.prepare(request, self._options, entries=entries, complete=complete)
            self._session = SpeechSession(synthesizer.model, prepared)
            synthesizer.slots_for(prepared).start(self._session)
        elif not self._session.ended:
            more = dataclasses.replace(self._session.prepared, entries=entries, complete=complete)
            synthesizer.extend(self._session, more)

    def _pcm(self) -> Iterator[np.ndarray]:
        """Yield sound until the session waits for text, or has ended.

        Raises:
          IncompleteSpeechError: the text was not said to its end in as many frames as are allowed.
        """
        session = self._session
        assert session is not None
        yield from sound(self._synthesizer.slots_for(session.prepared), session)


def synthesize_stream(
    model: Model,
    text: Iterable[str],
    *,
    voice: Voice | None = None,
    options: SynthesizeOptions = SynthesizeOptions(),
) -> Iterator[np.ndarray]:
    """Say a text while it arrives; all sound joined is that of `synthesize` on all text joined.

    A word is taken as soon as it is followed by a space, and said once the words that the model reads ahead are there
    too. While there is none to say, nothing is generated: the next piece of text is waited for.

    Args:
      model: a text-to-speech model, from `dsm_jax.load`.
      text: pieces of one turn, of any size: words need not be whole.
      voice: as for `synthesize`.
      options: of the synthesis.

    Yields:
      float32 samples [T], whole frames of 80 ms, as they are made.

    Raises:
      As `synthesize`; what is wrong with the text is raised once the text before it has been said.
    """
    synthesizer = StreamingSynthesizer(model, voice=voice, options=options)
    for piece in text:
        yield from synthesizer.feed(piece)
    yield from synthesizer.finish()


def _whole_words(text: str) -> str:
    """Return the text up to its last space outside of tags, or its last whole tag: what follows may still grow."""
    if (tag := text.rfind("<")) > text.rfind(">"):
        text = text[:tag]
    return text[: max((end.end() for end in _ENDS.finditer(text)), default=0)]

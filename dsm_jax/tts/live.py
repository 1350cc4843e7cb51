"""Live speech: sound as words arrive."""

import re
from collections.abc import Iterable, Iterator

import numpy as np

from dsm_jax.checkpoints import Model
from dsm_jax.errors import SpeechError
from dsm_jax.tts.speech import Request, SpeechOptions
from dsm_jax.tts.synthesizer import Row, Synthesizer
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
    synthesizer = Synthesizer(model, 1, options)
    row: Row | None = None
    voices = () if speaker is None else (speaker,)
    so_far, known = "", ""
    for piece in [text] if isinstance(text, str) else text:
        so_far += piece
        if (ready := _whole_words(so_far)) == known or not _TAGS.sub("", ready).strip():
            continue
        known = ready
        if row is None:
            row = Row(synthesizer.prepare(Request(known, voices)))
            synthesizer.begin([row.prepared], complete=False)
        else:
            synthesizer.tell([synthesizer.entries([known])], complete=False)
        yield from _hear(synthesizer, row)
    if row is None:
        row = Row(synthesizer.prepare(Request(so_far, voices)))
        synthesizer.begin([row.prepared])
    else:
        synthesizer.tell([synthesizer.entries([so_far])], complete=True)
    yield from _hear(synthesizer, row)
    if synthesizer.running_B[0]:
        raise SpeechError(
            f"the text was not said to its end in {options.max_frames} frames; allow more with max_frames, or cut it"
        )


def _whole_words(text: str) -> str:
    """The text up to its last space outside of tags, or its last whole tag: what follows may still grow."""
    if (tag := text.rfind("<")) > text.rfind(">"):
        text = text[:tag]
    return text[: max((end.end() for end in _ENDS.finditer(text)), default=0)]


def _hear(synthesizer: Synthesizer, row: Row) -> Iterator[np.ndarray]:
    """Sound until the row waits for text, or has ended."""
    most = synthesizer.options.max_frames
    while row.steps < most and (made := synthesizer.advance(min(STEPS, most - row.steps))).count:
        if (pcm_T := row.hear(made, 0)).size:
            yield pcm_T

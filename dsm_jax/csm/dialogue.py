"""A conversation that goes on turn by turn, and forgets its oldest turns when it grows too long."""

import logging
from collections.abc import Sequence

from dsm_jax.checkpoints import Model
from dsm_jax.csm.conversation import Request, Segment
from dsm_jax.csm.options import CsmOptions
from dsm_jax.csm.synthesizer import ConversationSession, ConversationSynthesizer
from dsm_jax.speech import Speech

_log = logging.getLogger("dsm_jax")


class Conversation:
    """A conversation between a model and others, whose turns are the context of the next one.

    The program stays compiled, and a recording is encoded once, however many turns follow.

    Args:
      model: a conversational speech model, from `dsm_jax.load`.
      turns: spoken turns to begin with, oldest first.
      options: of the model's turns.

    Attributes:
      turns: the turns so far, oldest first.
      forgotten: number of turns that were left out, oldest first, so that the conversation fits the model's context.

    Raises:
      ModelKindError: the model is of another family.
    """

    def __init__(self, model: Model, turns: Sequence[Segment] = (), *, options: CsmOptions = CsmOptions()):
        self._synthesizer = ConversationSynthesizer(model, 1)
        self._options, self.turns, self.forgotten = options, [], 0
        for turn in turns:
            self.add(turn)

    def add(self, turn: Segment) -> None:
        """Add a turn that somebody has spoken.

        Raises:
          AudioError: its recording cannot be read.
          SpeechError: it has no text, no recording, or no number for its speaker.
        """
        self._synthesizer.positions_of(turn)
        self.turns.append(turn)

    def say(self, text: str, speaker: int = 0, *, options: CsmOptions | None = None) -> Speech:
        """Speak the next turn and add it to the conversation.

        The oldest turns are left out, with a warning in the log, as far as it takes to leave room for `max_frames`, or
        for half of the model's context if that is less.

        Args:
          text: of the turn.
          speaker: number of its speaker.
          options: of this turn; None takes the conversation's.

        Raises:
          IncompleteSpeechError: the turn did not end in `max_frames`; it carries the part that was made, and the
            conversation is as it was.
          SpeechError: the text alone is too long, or the model ended the turn before it said anything.
        """
        options = self._options if options is None else options
        self._trim(text, speaker, options)
        synthesizer = self._synthesizer
        prepared = synthesizer.prepare(Request(text, speaker, tuple(self.turns)), options)
        session = ConversationSession(synthesizer.model, prepared)
        slots = synthesizer.slots_for(prepared)
        for done in slots.run([session]):
            if done.error is not None:
                raise done.error
        speech = session.speech()
        self.turns.append(Segment(text, speaker, speech))
        return speech

    def _trim(self, text: str, speaker: int, options: CsmOptions) -> None:
        """Forget the oldest turns until the rest leaves room for the answer."""
        context = self._synthesizer.config.backbone.context
        frames = min(options.max_frames, context // 2)
        dropped = 0
        while self.turns:
            length = self._synthesizer.prompt(Request(text, speaker, tuple(self.turns))).shape[1]
            if length + frames <= context:
                break
            self._synthesizer.forget(self.turns.pop(0))
            dropped += 1
        if dropped:
            self.forgotten += dropped
            _log.warning(
                "left out the oldest %d turns of the conversation, so that %d frames of answer fit the model's %d "
                "positions; %d turns are left",
                dropped,
                frames,
                context,
                len(self.turns),
            )

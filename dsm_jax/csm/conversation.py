"""A conversation that goes on turn by turn, and forgets its oldest turns when it grows too long."""

import logging
from collections.abc import Sequence

from dsm_jax.checkpoints import Model
from dsm_jax.csm.options import CsmOptions
from dsm_jax.csm.requests import Request, Segment, turns_of
from dsm_jax.csm.synthesizer import ConversationSession, ConversationSynthesizer
from dsm_jax.errors import ConfigError, DsmError, SpeechError, plural
from dsm_jax.speech import Speech

_log = logging.getLogger("dsm_jax")


class Conversation:
    """A conversation between a model and others, whose turns are the context of the next one.

    A recording is encoded once, however many turns follow. The program is compiled at the first turn, and again when a
    turn needs more room than those before it: for up to 256, 512, 1,024 and so on positions, prompt and `max_frames`
    together. Each prompt's bucket is compiled when it first comes. A conversation takes one turn at a time: threads
    that share it have to wait for each other; a model may be shared.

    Args:
      model: a conversational speech model, from `dsm_jax.load`.
      turns: spoken turns to begin with, oldest first.
      options: of the model's turns.

    Attributes:
      turns: the turns so far, oldest first.
      forgotten: number of turns that were left out, oldest first, so that the conversation fits the model's context.

    Raises:
      AudioError, SpeechError: as for `add`.
      ModelKindError: the model is of another family.
    """

    def __init__(self, model: Model, turns: Sequence[Segment] = (), *, options: CsmOptions = CsmOptions()):
        self._synthesizer = ConversationSynthesizer(model, 1)
        self._options, self.turns, self.forgotten = options, [], 0
        for turn in turns_of(turns):
            self.add(turn)

    def add(self, turn: Segment) -> None:
        """Add a turn that somebody has spoken.

        Raises:
          AudioError: its recording cannot be read.
          SpeechError: it has no text, no recording, or no number for its speaker.
        """
        if not isinstance(turn, Segment):
            raise SpeechError(f"a turn is {type(turn).__name__}; expected dsm_jax.csm.Segment(text, speaker, audio)")
        self._synthesizer.positions_of(turn)
        self.turns.append(turn)

    def say(self, text: str, speaker: int = 0, *, options: CsmOptions | None = None) -> Speech:
        """Speak the next turn and add it to the conversation.

        The oldest turns are left out, with a warning in the log, as many as it takes to leave room for `max_frames`, or
        for half of the model's context if that is less. After an error or Ctrl-C the conversation is as it was.

        Args:
          text: of the turn.
          speaker: number of its speaker.
          options: of this turn; None takes the conversation's.

        Raises:
          ConfigError: options of another kind of model.
          IncompleteSpeechError: the turn did not end in `max_frames`; it carries the part that was made.
          SpeechError: the text alone is too long, or the model ended the turn before it said anything.
        """
        options = self._options if options is None else options
        if not isinstance(options, CsmOptions):
            raise ConfigError(f"options are {type(options).__name__}; expected CsmOptions")
        kept = self._kept(text, speaker, options)
        synthesizer = self._synthesizer
        prepared = synthesizer.prepare(Request(text, speaker, tuple(kept)), options)
        session = ConversationSession(synthesizer.model, prepared)
        slots = synthesizer.slots_for(prepared)
        try:
            for done in slots.run([session]):
                if done.error is not None:
                    raise done.error
        except DsmError:
            slots.cancel(session)
            raise
        except BaseException:
            # Ctrl-C or an error of the device may come while no state is held: the old one is donated, and the next
            # one is not taken over yet. The next turn makes the slots anew.
            synthesizer.drop_slots()
            raise
        speech = session.speech()
        self._forget(len(self.turns) - len(kept))
        self.turns.append(Segment(text, speaker, speech))
        return speech

    def _kept(self, text: str, speaker: int, options: CsmOptions) -> list[Segment]:
        """Return the turns without the oldest ones, as many as leave room for the answer."""
        context = self._synthesizer.config.backbone.context
        kept = list(self.turns)
        while kept:
            length = self._synthesizer.prompt(Request(text, speaker, tuple(kept))).shape[1]
            if length + min(options.max_frames, context // 2) <= context:
                break
            kept.pop(0)
        return kept

    def _forget(self, count: int) -> None:
        """Leave out the oldest turns, and say so."""
        for turn in self.turns[:count]:
            self._synthesizer.forget(turn)
        self.turns = self.turns[count:]
        self.forgotten += count
        if count:
            _log.warning(
                "left out the oldest %s of the conversation and kept %s, so that the answer fits the model's %d "
                "positions",
                "turn" if count == 1 else f"{count} turns",
                plural(len(self.turns), "turn"),
                self._synthesizer.config.backbone.context,
            )

"""Turn conversations into the training rows of a conversational speech model.

A row is a whole conversation, as inference feeds it: for each turn the tokens of its text, the frames of its recording,
and the frame of zeros that ends it. The codec encodes all recordings once, before training, each of them alone.

Shape letters: N rows, M streams (text first), Q codebooks, T positions, frames or samples.
"""

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from dsm_jax import audio
from dsm_jax.checkpoints import Model
from dsm_jax.csm.prompt import text_ids, turn_MT
from dsm_jax.errors import ConfigError, SpeechError, TrainingError
from dsm_jax.models.family import csm_config, require
from dsm_jax.models.streams import ZERO_TOKEN
from dsm_jax.training.conversations import TrainingConversation, TrainingTurn, read_conversations
from dsm_jax.training.encoding import ClipEncoder

_log = logging.getLogger("dsm_jax.training")


class CsmRows:
    """The maker of training rows for one conversational speech model.

    Args:
      model: a conversational speech model.
      mesh: devices; recordings that are encoded together are split over its axis "data".
      positions: positions of a row: tokens of text, frames of audio, and one for the end of each recording. None is the
        number of the longest conversation's.
      batch_size: recordings that are encoded together, rounded up to a multiple of the devices.

    Raises:
      ConfigError: a row would have more positions than the model.
      ModelKindError: the model is of another family.
    """

    def __init__(self, model: Model, mesh: Mesh, *, positions: int | None, batch_size: int):
        require(model, "csm")
        assert model.tokenizer is not None
        self.model, self.config, self.tokenizer = model, csm_config(model.config), model.tokenizer
        context = self.config.backbone.context
        if positions is not None and positions > context:
            raise ConfigError(f"a row has {positions} positions, and {model.name} {context}; give that many at most")
        self.positions, self.frame_size = positions, model.config.mimi.frame_size
        self.longest = context if positions is None else positions
        self.encoder = ClipEncoder(model, mesh, codebooks=self.config.n_q, batch_size=batch_size)

    def read(self, source: Path, *, skip_bad: bool) -> list[TrainingConversation]:
        """Read and check conversations, as `read_conversations` does."""
        return read_conversations(source, self.model.sample_rate, check=self.check, skip_bad=skip_bad)

    def check(self, conversation: TrainingConversation) -> None:
        """Raise unless the model can learn a conversation.

        Raises:
          TrainingError: a turn has no text or no speaker, or the conversation does not fit a row.
        """
        length = 0
        for number, turn in enumerate(conversation.turns, 1):
            try:
                length += len(self._ids(turn)) + self._frames(turn) + 1
            except SpeechError as error:
                raise TrainingError(f"turn {number}: {error}") from None
        if length > self.longest:
            more = "" if self.positions is None else "set more positions, "
            raise TrainingError(
                f"the conversation takes {length} positions, one for each token of text, each frame of audio and the "
                f"end of each recording; a row has {self.longest}: {more}leave out turns, or cut it into several"
            )

    def rows(self, conversations: Sequence[TrainingConversation]) -> list[dict[str, Any]]:
        """Make the rows of conversations, in order, for `batches` and `losses.csm.csm_loss`.

        Args:
          conversations: one conversation or more, checked.

        Raises:
          AudioError: a recording cannot be read.
        """
        turns = [turn for conversation in conversations for turn in conversation.turns]
        hours = sum(turn.samples for turn in turns) / self.model.sample_rate / 3600
        _log.info("encoding %d conversations, %d turns, %.2f hours", len(conversations), len(turns), hours)
        codes = self._encode(turns)
        each = (turn_MT(self.config, self._ids(turn), codes_QT) for turn, codes_QT in zip(turns, codes, strict=True))
        written = [list(itertools.islice(each, len(conversation.turns))) for conversation in conversations]
        lengths = [[turn.shape[1] for turn in parts] for parts in written]
        length, most = self.positions or max(map(sum, lengths)), max(map(len, lengths))
        rows = []
        for parts, own in zip(written, lengths, strict=True):
            tokens_MT = np.full((1 + self.config.n_q, length), ZERO_TOKEN, np.int32)
            tokens_MT[:, : sum(own)] = np.concatenate(parts, axis=1)
            starts_N = np.full(most, -1, np.int32)
            starts_N[: len(own)] = np.cumsum([0, *own[:-1]])
            rows.append({"tokens_BMT": tokens_MT, "starts_BN": starts_N})
        return rows

    def _encode(self, turns: Sequence[TrainingTurn]) -> list[np.ndarray]:
        """Encode recordings, those of similar lengths together, to codes [Q, T] in the order of the turns."""
        frames = [self._frames(turn) for turn in turns]
        together: dict[int, list[int]] = {}
        for index, count in enumerate(frames):
            together.setdefault(min(1 << (count - 1).bit_length(), max(frames)), []).append(index)
        codes_of: dict[int, np.ndarray] = {}
        for padded, indices in together.items():
            clips = (audio.read(turns[index].audio, self.model.sample_rate, strict=True) for index in indices)
            codes_of |= zip(indices, self.encoder.encode(clips, padded * self.frame_size), strict=True)
        return [codes_of[index][:, :count] for index, count in enumerate(frames)]

    def _ids(self, turn: TrainingTurn) -> list[int]:
        return text_ids(self.config, self.tokenizer, turn.text, turn.speaker)

    def _frames(self, turn: TrainingTurn) -> int:
        return -(-turn.samples // self.frame_size)

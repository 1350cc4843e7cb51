"""Turn recordings with words into the training rows of speech-to-text and text-to-speech models.

A row holds the tokens that inference would take and generate for a recording. A long recording is cut between words,
and each part is a row. The codec encodes all parts once, before training.

For speech-to-text, a row has the same audio as in `dsm_jax.stt`: the silence that the model expects before a recording,
the recording, and silence until the end of its text. For text-to-speech, a row has the text stream of its script, and
the recording's codes, delayed by the model's audio delay; for a model without speaker conditioning the row starts with
a prefix, the beginning of another part by the same speaker.

Shape letters: B rows that are encoded together, N rows, M streams (text first), Q audio streams, T samples or frames,
C audio channels.
"""

import collections
import dataclasses
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from dsm_jax.checkpoints import Model
from dsm_jax.errors import DsmError, SpeechError, TrainingError
from dsm_jax.models.family import require
from dsm_jax.models.streams import ZERO_TOKEN, behind_text
from dsm_jax.stt.framing import FrameBuffer, word_reader
from dsm_jax.training.alignment import script_stream, speaker_prefixes, text_stream, tokens_of
from dsm_jax.training.data import Recording, WordSpan, read_examples, read_recordings
from dsm_jax.training.encoding import ClipEncoder
from dsm_jax.training.parts import parts_of, spans_of
from dsm_jax.tts import voices
from dsm_jax.tts.script import entries_of
from dsm_jax.tts.speech import SynthesizeOptions, settings_of
from dsm_jax.tts.synthesizer import CUT_FRAMES

_log = logging.getLogger("dsm_jax.training")


def _report(recordings: Sequence[Recording]) -> None:
    hours = sum(recording.seconds for recording in recordings) / 3600
    _log.info("encoding %d recordings, %.2f hours", len(recordings), hours)


class SttRows:
    """The maker of training rows for one speech-to-text model.

    Args:
      model: a speech-to-text model.
      mesh: devices; rows that are encoded together are split over its axis "data".
      seconds: longest part of a recording in a row, in seconds.
      batch_size: rows that are encoded together, rounded up to a multiple of the devices.

    Raises:
      CheckpointError: the model is not a speech-to-text model.
    """

    def __init__(self, model: Model, mesh: Mesh, *, seconds: float, batch_size: int):
        require(model, "stt")
        lm, tokenizer = model.config.lm, model.tokenizer
        assert lm is not None
        assert tokenizer is not None
        self.model, self.lm, self.tokenizer = model, lm, tokenizer
        self.longest = int(seconds * model.sample_rate)
        self.timing = word_reader(model.config, lm, tokenizer).timing
        self.frames = self._framed(np.zeros(self.longest, np.float32)).ready
        self.codec = ClipEncoder(model, mesh, codebooks=lm.n_q, batch_size=batch_size)

    def read(self, source: Path, *, skip_bad: bool) -> list[Recording]:
        """Read and check recordings, as `read_recordings` does."""
        return read_recordings(source, self.model.sample_rate, check=self.check, skip_bad=skip_bad)

    def check(self, word: str) -> None:
        """Raise unless the model can spell a word.

        Raises:
          TrainingError: the model cannot spell the word.
        """
        tokens_of(word, self.tokenizer, self.lm)

    def encode(self, recordings: Sequence[Recording]) -> np.ndarray:
        """Make the rows of recordings, in order.

        Args:
          recordings: one recording or more.

        Returns:
          Tokens, int32 [N, M, T], for `DelayedStreamsLM.__call__`. All rows have the length of the longest possible
          part; text after the end of a part is -1, which `stt_loss` masks.

        Raises:
          AudioError: a recording cannot be read.
          ConfigError: the codec has fewer codebooks than the language model reads.
          TrainingError: the model cannot learn the words.
        """
        _report(recordings)
        texts: list[np.ndarray] = []

        def clips() -> Iterator[np.ndarray]:
            for recording in recordings:
                for pcm_T, words in parts_of(recording, self.model.sample_rate, self.longest):
                    buffer = self._framed(pcm_T)
                    frames = buffer.ready
                    texts.append(np.full(self.frames, ZERO_TOKEN, np.int32))
                    texts[-1][:frames] = text_stream(words, self.tokenizer, self.lm, self.timing, frames=frames)
                    yield buffer.pop_frames(frames)

        codes_NQT = self.codec.encode(clips(), self.frames * self.model.config.mimi.frame_size)
        return np.concatenate([np.stack(texts)[:, None], codes_NQT], axis=1)

    def rows(self, recordings: Sequence[Recording]) -> list[dict[str, Any]]:
        """Make the rows of recordings for `batches` and the loss: `codes_BMT` without the batch axis."""
        return [{"codes_BMT": codes_MT} for codes_MT in self.encode(recordings)]

    def _framed(self, pcm_T: np.ndarray) -> FrameBuffer:
        buffer = FrameBuffer(self.model.config)
        buffer.push(pcm_T)
        buffer.end()
        return buffer


@dataclasses.dataclass(frozen=True)
class _Part:
    """A part of a recording: its words, timed from the part's start, the number of words before it, and its frames."""

    recording: Recording
    words: Sequence[WordSpan]
    before: int
    frames: int

    @property
    def speaker(self) -> str:
        """The speaker of the first word; of a part without words, of the next word or the last one."""
        spoken = self.recording.words
        if not spoken:
            return next((speaker for speaker, _ in self.recording.voices), "")
        return spoken[min(self.before, len(spoken) - 1)].speaker

    @property
    def is_prefix(self) -> bool:
        """Tell whether the speaker can be heard in the part, for other parts to go on from."""
        return bool(self.words) and self.frames > CUT_FRAMES


class TtsRows:
    """The maker of training rows for one text-to-speech model.

    Args:
      model: a text-to-speech model.
      mesh: devices; rows that are encoded together are split over its axis "data".
      seconds: longest part of a recording in a row, in seconds.
      batch_size: rows that are encoded together, rounded up to a multiple of the devices.
      voice: voice of speakers without a voice in the data.
      guidance: guidance value for models with distilled guidance; None draws one for each row.
      prefix_seconds: longest prefix, in seconds, for models without speaker conditioning.
      seed: seed of the guidance values.

    Raises:
      CheckpointError: the model is not a text-to-speech model, or `voice` cannot be read.
    """

    def __init__(
        self,
        model: Model,
        mesh: Mesh,
        *,
        seconds: float,
        batch_size: int,
        voice: str | None = None,
        guidance: float | None = None,
        prefix_seconds: float = 10.0,
        seed: int = 0,
    ):
        SynthesizeOptions().checked(model)
        settings = settings_of(model, slots=1)
        lm, tokenizer = model.config.lm, model.tokenizer
        assert lm is not None
        assert tokenizer is not None
        self.model, self.lm, self.tokenizer = model, lm, tokenizer
        self.machine, self.delay = settings.machine, settings.delay_steps
        self.voice, self.guidance, self.seed = voice, guidance, seed
        self.frame_rate, self.frame_size = model.config.mimi.frame_rate, model.config.mimi.frame_size
        self.longest = int(seconds * model.sample_rate)
        self.has_speakers = voices.has_speakers(lm)
        self.frames = -(-self.longest // self.frame_size)
        self.prefix_frames = 0 if self.has_speakers else int(prefix_seconds * self.frame_rate)
        self.codec = ClipEncoder(model, mesh, codebooks=lm.dep_q, batch_size=batch_size)
        self.steps: dict[str, np.ndarray] = {}  # the voices read so far, by name
        self.conditions: dict[Any, tuple[dict[str, np.ndarray], dict[str, np.ndarray]]] = {}  # by voices and guidance
        if voice is not None and self.has_speakers:
            self._read_voice(voice)

    def read(self, source: Path, *, skip_bad: bool) -> list[Recording]:
        """Read and check recordings, as `read_recordings` does, their speakers included."""
        recordings = read_recordings(
            source,
            self.model.sample_rate,
            check=self.check,
            check_recording=self.check_speakers,
            check_all=self.check_lengths,
            skip_bad=skip_bad,
        )
        # A recording that is left out may have been the only prefix of another one.
        while not self.has_speakers:
            before = len(recordings)
            recordings = self._with_prefixes(recordings, source, skip_bad)
            if len(recordings) == before:
                break
        return recordings

    def check(self, word: str) -> None:
        """Raise unless the model can speak a word.

        Raises:
          TrainingError: the model cannot spell the word.
        """
        self._tokens_of(word)

    def check_speakers(self, recording: Recording) -> None:
        """Raise unless the model can tell the speakers of a recording apart, and has their voices.

        Raises:
          CheckpointError: a voice cannot be read.
          SpeechError: a voice is of another width.
          TrainingError: a speaker has no voice, or a part has more than two speakers.
        """
        if self.lm.conditioners:
            for part in self._parts(recording):
                self._conditions(part, 0)

    def check_lengths(self, recordings: Mapping[int, Recording]) -> dict[int, DsmError]:
        """Return an error for each recording whose voices are not as long as those of most recordings."""
        lengths = {
            number: {len(self.steps[name]) for part in self._parts(recording) for name in self._voices(part)}
            for number, recording in recordings.items()
        }
        counts = collections.Counter(length for own in lengths.values() for length in own)
        usual = {length for length, _ in counts.most_common(1)}
        return {
            number: TrainingError(f"the voices are {sorted(own | usual)} steps long; give voices of one length")
            for number, own in lengths.items()
            if own != usual
        }

    def rows(self, recordings: Sequence[Recording]) -> list[dict[str, Any]]:
        """Make the rows of recordings, in order, for `batches` and `losses.tts.tts_batch_loss`.

        Args:
          recordings: one recording or more.

        Raises:
          AudioError: a recording cannot be read.
          CheckpointError: a voice cannot be read.
          TrainingError: the model cannot learn the words or voices, or a speaker has no second part to use as prefix.
        """
        for recording in recordings:
            self.check_speakers(recording)
        for error in self.check_lengths(dict(enumerate(recordings))).values():
            raise error
        _report(recordings)
        parts: list[_Part] = []

        def clips() -> Iterator[np.ndarray]:
            for recording in recordings:
                before = 0
                for pcm_T, words in parts_of(recording, self.model.sample_rate, self.longest):
                    parts.append(_Part(recording, words, before, -(-pcm_T.size // self.frame_size)))
                    before += len(words)
                    yield pcm_T

        codes_NQT = self.codec.encode(clips(), self.frames * self.frame_size)
        rows = []
        for number, part in enumerate(parts):
            try:
                prefix_QT = self._prefix(number, parts, codes_NQT)
                row: dict[str, Any] = {
                    "codes_BMT": self._streams(part.words, prefix_QT, codes_NQT[number, :, : part.frames])
                }
                if self.lm.conditioners:
                    row["values"], row["masks"] = self._conditions(part, number)
            except (SpeechError, TrainingError) as error:
                raise TrainingError(f"{part.recording.audio} cannot be trained on: {error}") from None
            if not self.has_speakers:
                row["context_B"] = np.int32(prefix_QT.shape[1] + self.delay)
            rows.append(row)
        return rows

    def _tokens_of(self, word: str) -> list[list[int]]:
        """Encode a word of the data, which the script may split into several words."""
        try:
            entries = entries_of([word], self.tokenizer, frame_rate=self.frame_rate, multi_speaker=False)
        except SpeechError:
            raise TrainingError(
                f"the word {word!r} cannot be spelt by the model's tokenizer; leave it out, or spell it in letters of "
                "the model's languages"
            ) from None
        return [list(entry.tokens) for entry in entries if entry.tokens]

    def _streams(self, words: Sequence[WordSpan], prefix_QT: np.ndarray, codes_QT: np.ndarray) -> np.ndarray:
        """Make the streams [M, T] of a row, prefix first; all rows have the length of the longest possible row."""
        prefix, frames = prefix_QT.shape[1], codes_QT.shape[1]
        tokens, starts = [], []
        speakers = speaker_prefixes(words)[0] if self.has_speakers else {}
        for number, word in enumerate(words):
            mark = [speakers[number]] if number in speakers else []
            for part in self._tokens_of(word.text):
                tokens.append([*mark, *part])
                starts.append(round(word.start * self.frame_rate))
                mark = []
        end = round(words[-1].end * self.frame_rate) if words else 0
        length = self.prefix_frames + self.frames + self.delay + max(self.lm.delays)
        codes_MT = np.full((1 + self.lm.n_q, length), ZERO_TOKEN, np.int32)
        spoken = slice(prefix, prefix + frames + self.delay)
        codes_MT[0, spoken] = script_stream(tokens, starts, self.machine, frames=frames + self.delay, end=end)
        audio_QT = np.full((self.lm.dep_q, length), ZERO_TOKEN, np.int32)
        audio_QT[:, : prefix + frames] = np.concatenate([prefix_QT, codes_QT], axis=1)
        codes_MT[1 : 1 + self.lm.dep_q] = behind_text(audio_QT, self.delay)
        return codes_MT

    def _prefix(self, number: int, parts: Sequence["_Part"], codes_NQT: np.ndarray) -> np.ndarray:
        """Take the codes [Q, T] of the next part in the data by the same speaker."""
        if self.has_speakers:
            return codes_NQT[number, :, :0]
        speaker = parts[number].speaker
        for other in (*range(number + 1, len(parts)), *range(number)):
            # As in inference, without the last frames, which were encoded without the audio after them.
            if parts[other].speaker == speaker and parts[other].is_prefix:
                return codes_NQT[other, :, : min(self.prefix_frames, parts[other].frames - CUT_FRAMES)]
        raise self._no_prefix(speaker)

    def _no_prefix(self, speaker: str) -> TrainingError:
        return TrainingError(
            f"it is all there is of the speaker {speaker!r}, and {self.model.name} is given another recording of the "
            "speaker as a prefix; add one"
        )

    def _parts(self, recording: Recording) -> list[_Part]:
        rate = self.model.sample_rate
        spans = spans_of(recording.words, round(recording.seconds * rate), rate, self.longest)
        parts, before = [], 0
        for first, end, words in spans:
            parts.append(_Part(recording, words, before, -(-(end - first) // self.frame_size)))
            before += len(words)
        return parts

    def _with_prefixes(self, recordings: Sequence[Recording], source: Path, skip_bad: bool) -> list[Recording]:
        """Return the recordings of which every part has another one to use as prefix."""
        parts = [self._parts(recording) for recording in recordings]
        prefixes = collections.Counter(part.speaker for own in parts for part in own if part.is_prefix)

        def check(recording: Recording, own: Sequence[_Part]) -> Recording:
            for part in own:
                if prefixes[part.speaker] - part.is_prefix < 1:
                    raise self._no_prefix(part.speaker)
            return recording

        readers = [
            (str(recording.audio), functools.partial(check, recording, own))
            for recording, own in zip(recordings, parts, strict=True)
        ]
        return read_examples(readers, source, "recordings", skip_bad=skip_bad)

    def _voices(self, part: "_Part") -> tuple[str, ...]:
        """Find the voices of the speakers of a part, in the order of their first words, and read them."""
        if not self.has_speakers:
            return ()
        speakers = speaker_prefixes(part.words)[1] or [part.speaker]
        return tuple(self._voice(part.recording, speaker) for speaker in speakers)

    def _voice(self, recording: Recording, speaker: str) -> str:
        """Find the voice of a speaker in a recording, and read it."""
        voice = recording.voice_of(speaker) or self.voice
        if voice is None:
            raise TrainingError(
                f"{recording.audio} names no voice for the speaker {speaker!r}, which {self.model.name} needs; add "
                '"voice" to the data, or to the config'
            )
        self._read_voice(voice)
        return voice

    def _read_voice(self, voice: str) -> None:
        """Read a voice [X, C], unless it has been read."""
        if voice not in self.steps:
            self.steps[voice] = voices.read_voice(voice, self.model)

    def _conditions(self, part: "_Part", number: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Make the conditioner values and masks of a row, as in inference; rows with the same ones share them."""
        names = self._voices(part)
        known, guidance = voices.guidance_values(self.lm), self.guidance
        if known and guidance is None:
            guidance = float(np.random.default_rng((self.seed, number)).choice(known))
        key = names, guidance if known else None
        if key not in self.conditions:
            values, masks, _ = voices.conditions(self.lm, [[self.steps[name] for name in names]], key[1])
            self.conditions[key] = {name: a[0] for name, a in values.items()}, {name: a[0] for name, a in masks.items()}
        return self.conditions[key]

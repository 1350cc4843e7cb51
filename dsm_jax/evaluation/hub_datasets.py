"""Fetch test sets of the Hugging Face hub: those of the published figures by their short names, others by theirs.

The short names, and what each stands for, are those of kyutai-labs/delayed-streams-modeling
scripts/stt_evaluate_on_dataset.py, and so are the columns in which a text is looked for.
"""

import dataclasses
import importlib
import io
import re
from typing import Any

from dsm_jax import audio
from dsm_jax.errors import EvaluationError

TEXT_COLUMNS = ("text", "sentence", "normalized_text", "transcript", "transcription")
_NAME = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(:(?P<config>[^:]*)(:(?P<split>[^:]+))?)?")


@dataclasses.dataclass(frozen=True)
class Place:
    """A data set on the hub: its repository, its configuration (None for the only one) and its split."""

    repository: str
    config: str | None = None
    split: str = "test"


_ESB = "hf-audio/esb-datasets-test-only-sorted"
ALIASES = {
    # Long recordings.
    "rev16": Place("distil-whisper/rev16", "whisper_subset"),
    "earnings21": Place("distil-whisper/earnings21", "full"),
    "earnings22": Place("distil-whisper/earnings22", "full"),
    "tedlium": Place("distil-whisper/tedlium-long-form"),
    "meanwhile": Place("distil-whisper/meanwhile"),
    # Utterances, of the Open ASR leaderboard.
    "ami": Place(_ESB, "ami"),
    "librispeech.clean": Place(_ESB, "librispeech", "test.clean"),
    "librispeech.other": Place(_ESB, "librispeech", "test.other"),
    "voxpopuli": Place(_ESB, "voxpopuli"),
    "spgispeech": Place(_ESB, "spgispeech"),
    "gigaspeech": Place(_ESB, "gigaspeech"),
    "tedlium-short": Place(_ESB, "tedlium"),
    "earnings22-short": Place(_ESB, "earnings22"),
}


@dataclasses.dataclass(frozen=True)
class HubSample:
    """One row of a data set; its recording is read when it is opened."""

    id: str
    text: str
    rows: Any
    index: int

    def open(self) -> audio.Source:
        """Open the recording, encoded as the data set has it."""
        stored = self.rows[self.index]["audio"]
        return io.BytesIO(stored["bytes"]) if stored["bytes"] is not None else stored["path"]


def find(name: str) -> Place | None:
    """Resolve a short name, or ORGANISATION/NAME, followed or not by :CONFIG and :SPLIT; None for anything else."""
    if name in ALIASES:
        return ALIASES[name]
    match = _NAME.fullmatch(name)
    if match is None or match["repository"].endswith((".jsonl", ".json")):
        return None
    return Place(match["repository"], match["config"] or None, match["split"] or "test")


def fetch(place: Place) -> list[HubSample]:
    """Fetch a data set on first use, and find it in the cache of `datasets` afterwards.

    Raises:
      EvaluationError: `datasets` is not installed; there is no such data set, or it cannot be fetched; it has no
        recordings, or no texts.
    """
    name = ":".join((place.repository, place.config or "", place.split))
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise EvaluationError(
            f"{name} is no folder or file here, and to fetch it from the hub needs a library; run: pip install datasets"
        ) from None
    try:
        rows = datasets.load_dataset(place.repository, place.config, split=place.split)
    except Exception as error:  # of the network, the disk, or the hub
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise EvaluationError(
            f"{name} is no folder or file here, and could not be fetched from the hub ({reason}); check its name, and "
            "where it is gated ask for access and run `hf auth login`"
        ) from error
    columns = list(rows.column_names)
    text = next((column for column in TEXT_COLUMNS if column in columns), None)
    if text is None or "audio" not in columns:
        raise EvaluationError(
            f"the data set {name} has the columns {', '.join(columns)}; expected audio, and one of "
            f"{', '.join(TEXT_COLUMNS)}: copy what you need into a JSON Lines file"
        )
    # Encoded, as it was stored: this library decodes it, and `datasets` needs no decoder of its own.
    rows = rows.cast_column("audio", datasets.Audio(decode=False))
    ids = [str(one) for one in rows["id"]] if "id" in columns else []
    if len(set(ids)) != len(rows):
        ids = [str(index) for index in range(len(rows))]
    return [HubSample(*pair, rows, index) for index, pair in enumerate(zip(ids, rows[text], strict=True))]

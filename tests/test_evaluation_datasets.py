"""Readers of data sets: folders, manifests, and the hub's data sets by name."""

import io
import sys
import types
from pathlib import Path

import pytest

from dsm_jax.errors import EvaluationError
from dsm_jax.evaluation import datasets, hub_datasets
from dsm_jax.evaluation.datasets import Failure


def test_a_folder_has_a_transcript_beside_each_recording(tmp_path):
    for name in ("a.wav", "b.flac", "c.ogg", "d.mp3"):
        (tmp_path / name).touch()
    (tmp_path / "a.txt").write_text("Hello there.\n", encoding="utf-8")
    (tmp_path / "b.json").write_text('{"words": [{"text": "two", "start": 0}, {"text": "words", "start": 1}]}')
    (tmp_path / "b.txt").write_text("not this one")
    (tmp_path / "c.json").write_text(
        '{"text": "Ça va", "words": [{"text": "Ça"}, {"text": "va"}]}', encoding="utf-8-sig"
    )
    (tmp_path / "lost.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("about the recordings")
    found = datasets.read(tmp_path)
    assert [(s.id, s.reference.strip(), s.open()) for s in found.samples] == [
        ("a.wav", "Hello there.", tmp_path / "a.wav"),
        ("b.flac", "two words", tmp_path / "b.flac"),
        ("c.ogg", "Ça va", tmp_path / "c.ogg"),
    ]
    assert found.failures == (
        Failure("d.mp3", "there is no d.json or d.txt next to it; write one"),
        Failure("lost.json", "there is no recording of this name next to it; add one, such as lost.wav or lost.m4a"),
    )


def test_a_manifest_has_a_line_for_each_recording(tmp_path):
    path = tmp_path / "list.jsonl"
    good = ['{"audio": "x/a.wav", "text": "one\u2028two"}', "", '{"audio": "/b.wav", "text": "", "id": 7}']
    good.append('{"audio": "c.wav", "words": [{"text": "three"}], "id": "c"}')
    path.write_text("\r\n".join(good), encoding="utf-8")
    found = datasets.read(path)
    assert [(s.id, s.reference, s.audio) for s in found.samples] == [
        ("x/a.wav", "one\u2028two", tmp_path / "x/a.wav"),
        ("7", "", Path("/b.wav")),
        ("c", "three", tmp_path / "c.wav"),
    ]
    assert found.failures == ()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"[" * 100_000, r"^this is no JSON \(it is nested too deeply at column 1\); expected"),
        (b"nothing", r"^this is no JSON \(.* at column 1\); expected \{\"audio\": PATH, \"text\": TEXT\}$"),
        (b"[1]", r"^this is '\[1\]'; expected \{"),
        (b'{"text": "a"}', r"^the key 'audio' is None; expected the path of a recording"),
        (b'{"audio": "a.wav", "id": [1], "text": "a"}', r"^the key 'id' is \[1\]; expected a name$"),
        (b'{"audio": "a.wav"}', r"^there is no text and there are no words; give the transcript as 'text'$"),
        (b'{"audio": "a.wav", "words": [1]}', r"^a word has no text; expected"),
        (
            b'{"audio": "a.wav", "text": "a b", "words": [{"text": "a"}, {"text": "c"}]}',
            r"^the text is 'a b' and its words are 'a c'; was only one of them corrected\? Leave the wrong one out$",
        ),
        (b'{"audio": "a.wav", "text": "\xe9"}', r"^this is not text in UTF-8 \(.*\); save it as UTF-8$"),
    ],
)
def test_a_bad_line_of_a_manifest_costs_only_itself(tmp_path, line, reason):
    path = tmp_path / "list.jsonl"
    path.write_bytes(b'{"audio": "good.wav", "text": "good"}\n' + line + b"\n")
    found = datasets.read(path)
    assert [sample.id for sample in found.samples] == ["good.wav"]
    (failure,) = found.failures
    assert failure.id == "list.jsonl line 2"
    with pytest.raises(EvaluationError, match=reason):
        raise EvaluationError(failure.reason)


def test_a_transcript_that_is_no_json_is_told_with_its_line(tmp_path):
    for name in ("a.wav", "b.wav"):
        (tmp_path / name).touch()
    (tmp_path / "a.json").write_text('{"text": "one"}')
    (tmp_path / "b.json").write_text('{"text":\n  two}')
    (failure,) = datasets.read(tmp_path).failures
    assert failure.reason.startswith("b.json: this is no JSON (Expecting value at line 2, column 3); expected {")


def test_two_recordings_of_one_name_have_ids_of_their_own(tmp_path):
    path = tmp_path / "list.jsonl"
    path.write_text('{"audio": "a.wav", "text": "one"}\n' * 2)
    found = datasets.read(path)
    assert len(found.samples) == 1
    assert found.failures == (Failure("a.wav", "another recording before it has this id; give each its own"),)


def test_what_is_no_data_set_names_what_is(tmp_path):
    with pytest.raises(EvaluationError, match=r"^nosuch is no folder, no file, and no data set; .* one of rev16, earn"):
        datasets.read("nosuch")
    with pytest.raises(EvaluationError, match=r" has no recordings; expected a folder of them, or lines \{"):
        datasets.read(tmp_path)


class Rows:
    """Stands in for a data set of the library `datasets`: a column by name, a row by number."""

    def __init__(self, columns: dict[str, list], *, decoded: bool = True):
        self.columns, self.decoded, self.column_names = columns, decoded, list(columns)

    def __len__(self) -> int:
        return len(self.columns["audio"])

    def __getitem__(self, key):
        assert not self.decoded, "audio is to be decoded by this library"
        return (
            self.columns[key] if isinstance(key, str) else {name: values[key] for name, values in self.columns.items()}
        )

    def cast_column(self, name, feature):
        assert (name, feature) == ("audio", "encoded")
        return Rows(self.columns, decoded=False)


@pytest.fixture
def hub(monkeypatch):
    """Return a library `datasets` that knows one set of rows; what it was asked for."""
    asked: list[tuple] = []
    hub = types.SimpleNamespace(asked=asked, columns={"audio": [], "text": []})

    def load_dataset(name, config, *, split):
        asked.append((name, config, split))
        if name == "no/such":
            raise FileNotFoundError("there is no such data set\nand more")
        return Rows(hub.columns)

    library = types.SimpleNamespace(load_dataset=load_dataset, Audio=lambda decode: None if decode else "encoded")
    monkeypatch.setitem(sys.modules, "datasets", library)
    return hub


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("rev16", ("distil-whisper/rev16", "whisper_subset", "test")),
        ("earnings21", ("distil-whisper/earnings21", "full", "test")),
        ("earnings22", ("distil-whisper/earnings22", "full", "test")),
        ("tedlium", ("distil-whisper/tedlium-long-form", None, "test")),
        ("meanwhile", ("distil-whisper/meanwhile", None, "test")),
        ("ami", ("hf-audio/esb-datasets-test-only-sorted", "ami", "test")),
        ("librispeech.clean", ("hf-audio/esb-datasets-test-only-sorted", "librispeech", "test.clean")),
        ("librispeech.other", ("hf-audio/esb-datasets-test-only-sorted", "librispeech", "test.other")),
        ("voxpopuli", ("hf-audio/esb-datasets-test-only-sorted", "voxpopuli", "test")),
        ("spgispeech", ("hf-audio/esb-datasets-test-only-sorted", "spgispeech", "test")),
        ("gigaspeech", ("hf-audio/esb-datasets-test-only-sorted", "gigaspeech", "test")),
        ("tedlium-short", ("hf-audio/esb-datasets-test-only-sorted", "tedlium", "test")),
        ("earnings22-short", ("hf-audio/esb-datasets-test-only-sorted", "earnings22", "test")),
        ("google/fleurs:fr_fr:validation", ("google/fleurs", "fr_fr", "validation")),
        ("google/fleurs::train", ("google/fleurs", None, "train")),
        ("some/set", ("some/set", None, "test")),
    ],
)
def test_names_are_resolved_as_the_published_script_does(hub, name, place):
    hub.columns = {"audio": [{"bytes": b"sound", "path": "a.wav"}], "sentence": ["hello"]}
    found = datasets.read(name)
    assert hub.asked == [place]
    assert len(hub_datasets.ALIASES) == 13
    assert [(s.id, s.reference) for s in found.samples] == [("0", "hello")]
    opened = found.samples[0].open()
    assert isinstance(opened, io.BytesIO)
    assert opened.read() == b"sound"


def test_rows_of_the_hub_keep_their_ids_where_these_are_names(hub):
    hub.columns = {"audio": [{"bytes": None, "path": p} for p in "xy"], "transcript": ["t", "u"], "id": ["i", "j"]}
    assert [(s.id, s.reference, s.open()) for s in datasets.read("a/b").samples] == [("i", "t", "x"), ("j", "u", "y")]
    hub.columns["transcript"] = ["t", None]
    assert datasets.read("a/b").failures == (datasets.Failure("j", "it has no text"),)
    hub.columns["transcript"] = ["t", "u"]
    hub.columns["id"] = ["i", "i"]
    assert [s.id for s in datasets.read("a/b").samples] == ["0", "1"]


def test_the_text_is_looked_for_in_the_order_of_the_published_script(hub):
    audio = {"audio": [{"bytes": b"", "path": None}]}
    columns = ("transcription", "transcript", "normalized_text", "sentence", "text")
    for column in columns:
        hub.columns = {**audio, **hub.columns, column: [column]}
        hub.columns["audio"] = audio["audio"]
        hub.columns = {name: values for name, values in hub.columns.items() if values}
        assert datasets.read("a/b").samples[0].reference == column


def test_faults_of_the_hub_are_sentences(hub, monkeypatch):
    hub.columns = {"audio": [], "label": []}
    with pytest.raises(
        EvaluationError, match=r"^the data set a/b::test has the columns audio, label; expected audio, and"
    ):
        datasets.read("a/b")
    with pytest.raises(
        EvaluationError,
        match=r"^no/such::test is no folder .* fetched from the hub \(there is no such data set\); check",
    ):
        datasets.read("no/such")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        EvaluationError,
        match=r"ami:test is no folder or file here, and to fetch .* a library; run: pip install datasets$",
    ):
        datasets.read("ami")

"""Training data: both layouts are read alike, and every fault is an error with its place before training."""

import json
from pathlib import Path

import numpy as np
import pytest

from dsm_jax import audio
from dsm_jax.errors import TrainingError
from dsm_jax.stt.events import Pause, Word
from dsm_jax.stt.transcript import Transcript
from dsm_jax.training.data import Recording, WordSpan, read_recordings

RATE = 8_000
HELLO = {"text": "hello", "start": 0.25, "end": 0.5}
WORLD = {"text": "world", "start": 0.6, "end": 0.9}
WORDS = (WordSpan("hello", 0.25, 0.5), WordSpan("world", 0.6, 0.9))


@pytest.fixture
def data(tmp_path) -> Path:
    """Make a folder with one recording of a second, `talks/good.wav`."""
    (tmp_path / "talks").mkdir()
    audio.write(tmp_path / "talks/good.wav", 0.1 * np.sin(np.arange(RATE)), RATE)
    return tmp_path


def write(data: Path, *rows: object) -> Path:
    """Write a manifest, with rows that are not strings as JSON."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path = data / "data.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def row(*words: object, audio: str = "talks/good.wav", **others: object) -> dict[str, object]:
    return {"audio": audio, "words": list(words), **others}


def test_a_manifest_is_read_with_paths_from_its_own_folder(data):
    absolute = str(data / "talks/good.wav")
    path = write(data, row(HELLO, WORLD, topic="weather"), "", row(audio=absolute))
    good = data / "talks/good.wav"
    assert read_recordings(path, RATE) == [
        Recording(good, WORDS, 1.0),
        Recording(good, (), 1.0),
    ]


def test_a_folder_is_read_like_a_manifest(data):
    talks = data / "talks"
    (talks / "good.json").write_text(json.dumps(row(HELLO, WORLD, audio="elsewhere.wav")))
    (talks / "notes.txt").write_text("not a recording")
    assert read_recordings(talks, RATE) == [Recording(talks / "good.wav", WORDS, 1.0)]


@pytest.mark.parametrize("suffix", [".flac", ".ogg", ".WAV"])
def test_a_folder_may_hold_any_kind_of_recording(data, suffix):
    folder = data / "mixed"
    folder.mkdir()
    audio.write(folder / f"talk{suffix}", 0.1 * np.sin(np.arange(RATE)), RATE)
    (folder / "talk.json").write_text(json.dumps({"words": [HELLO]}))
    (only,) = read_recordings(folder, RATE)
    assert only.words == WORDS[:1]
    assert only.seconds == pytest.approx(1.0, abs=0.03)  # Vorbis has blocks


def test_transcripts_of_this_library_can_be_trained_on(data):
    words = (Word("hello", 0.25, 0.5, 0.9), Word("world", 0.6, 0.9, 0.8))
    transcript = Transcript("hello world", words, (Pause(0.95, 2.0, 0.7),), 1.0, audio="talks/good.wav", model="some")
    (data / "talks/good.json").write_text(transcript.render("json"), encoding="utf-8")
    as_folder = read_recordings(data / "talks", RATE)
    as_lines = read_recordings(write(data, transcript.to_dict()), RATE)
    assert as_folder == as_lines == [Recording(data / "talks/good.wav", WORDS, 1.0)]


def test_a_byte_order_mark_is_no_fault(data):
    (data / "data.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(row(HELLO)).encode() + b"\r\n")
    assert len(read_recordings(data / "data.jsonl", RATE)) == 1


FAULTS = {
    "no times": (row({"text": "hello"}), r"word 1, 'hello', goes from None to None; expected two times in seconds"),
    "text alone": ({"audio": "talks/good.wav", "text": "hello"}, "the transcript has no words with times"),
    "text without words": (row(text="hello"), "the transcript has no words with times"),
    "no end": (row(HELLO, {"text": "world", "start": 0.6}), "word 2, 'world', goes from 0.6 to None"),
    "not a number": (row({**HELLO, "start": "0.25"}), "goes from '0.25' to 0.5; expected two times"),
    "true": (row({**HELLO, "start": True, "end": True}), "goes from True to True"),
    "NaN": (row({**HELLO, "end": float("nan")}), "goes from 0.25 to nan"),
    "negative": (row({**HELLO, "start": -1}), "goes from -1 to 0.5"),
    "endless": (row({**HELLO, "end": float("inf")}), "goes from 0.25 to inf"),
    "backwards": (
        row({**HELLO, "end": 0.1}),
        "goes from 0.25 to 0.1; expected two times in seconds, the end not before",
    ),
    "no text": (row({**HELLO, "text": " "}), "word 1 is .*, without text; expected"),
    "a word that is none": (row("hello"), "word 1 is 'hello', without text"),
    "out of order": (row(WORLD, HELLO), r"word 2, 'hello', starts at 0\.25 s, before the one ahead of it \(0\.6 s\)"),
    "deep JSON": ("[" * 100_000, r"this is no JSON \(it is nested too deeply at column 1\)"),
    "a long number": ('{"audio": ' + "9" * 5000, r"this is no JSON \(a number has too many digits at column 1\)"),
    "no JSON": ('{"audio": "talks/good.wav", ', r"this is no JSON \(.* at column 29\)"),
    "no object": ("[1, 2]", "the key 'audio' is None; expected the path of a recording"),
    "no audio": ({"words": [HELLO]}, "the key 'audio' is None; expected the path of a recording"),
    "missing audio": (row(HELLO, audio="talks/lost.wav"), r"talks/lost\.wav does not exist"),
    "no sound": (row(HELLO, audio="data.jsonl"), "data.jsonl is not audio that can be decoded"),
    "another's": (
        row(HELLO, {"text": "late", "start": 7.5, "end": 8}),
        r"'late' starts at 7\.5 s and .* ends at 1\.00 s",
    ),
    "milliseconds": (row({"text": "hello", "start": 0, "end": 320}), r"'hello' ends at 320\.0 s and .*ends at 1\.00 s"),
    "no real times": (
        row(*({"text": text, "start": 0.5, "end": 0.5} for text in "abc")),
        r"its 3 words start at 0\.5 s to 0\.5 s, which is faster than speech; give each word its own start",
    ),
    "times of another unit": (
        row(*({"text": "a", "start": start, "end": start} for start in (0, 0.01, 0.079))),
        r"its 3 words start at 0\.0 s to 0\.079 s, which is faster than speech",
    ),
    "cannot be spelt": (row({**HELLO, "text": "語"}), "cannot spell 語"),
}


def spell(word: str) -> None:
    if not word.isascii():
        raise TrainingError(f"cannot spell {word}")


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_row_is_named_by_its_line_and_skip_bad_leaves_only_it_out(data, caplog, name):
    bad, message = FAULTS[name]
    path = write(data, row(HELLO), bad, row(WORLD))
    with pytest.raises(TrainingError, match=r"1 of the 3 recordings of .* set skip_bad") as caught:
        read_recordings(path, RATE, check=spell)
    _, told = str(caught.value).split("\n  ")
    assert told.startswith("data.jsonl line 2: ")
    caught.match(message)
    assert [r.words for r in read_recordings(path, RATE, check=spell, skip_bad=True)] == [WORDS[:1], WORDS[1:]]
    assert caplog.messages == [f"left out: {told}"]


def test_a_word_a_little_after_the_end_is_no_fault(data):
    late = {"text": "late", "start": 1.9, "end": 2.5}
    (only,) = read_recordings(write(data, row(late)), RATE)
    assert only.words == (WordSpan("late", 1.9, 2.5),)


@pytest.mark.parametrize(
    "times", [[(0, 0), (0, 0.5), (0.4, 0.4)], [(0.5, 1), (0.5, 3)], [(0, 0.1), (0.04, 2.9), (0.08, 1)]]
)
def test_words_may_start_at_0_and_together_and_last_into_each_other_or_no_time(data, times):
    (only,) = read_recordings(write(data, row(*({"text": "a", "start": s, "end": e} for s, e in times))), RATE)
    assert [(word.start, word.end) for word in only.words] == times


def test_a_truncated_recording_is_an_error(data):
    pcm = np.random.default_rng(0).normal(size=4 * RATE) * 0.1
    audio.write(data / "talks/short.flac", pcm, RATE)
    whole = (data / "talks/short.flac").read_bytes()
    (data / "talks/short.flac").write_bytes(whole[: len(whole) // 2])
    path = write(data, row(HELLO), row(HELLO, audio="talks/short.flac"))
    with pytest.raises(TrainingError, match=r"line 2: .*short\.flac lacks .* s of its 4\.0 s"):
        read_recordings(path, RATE)
    assert len(read_recordings(path, RATE, skip_bad=True)) == 1


def test_the_faults_of_a_folder_are_named_by_file(data):
    talks = data / "talks"
    audio.write(talks / "alone.wav", np.ones(100), RATE)
    (talks / "good.json").write_text('{\n  "words": [,]\n}')
    (talks / "orphan.json").write_text("{}")
    (talks / "latin.json").write_bytes('{"words": "é"}'.encode("latin-1"))
    audio.write(talks / "latin.wav", np.ones(100), RATE)
    with pytest.raises(TrainingError, match="4 of the 4 recordings") as caught:
        read_recordings(talks, RATE)
    caught.match(r"alone\.wav: there is no alone\.json next to it; write one")
    caught.match(r"good\.json: this is no JSON \(.* at line 2, column 13\)")
    caught.match(r"orphan\.json: there is no recording of this name next to it; add one")
    caught.match(r"latin\.json: this is not text in UTF-8")


def test_many_faults_are_counted_and_the_first_listed(data):
    path = write(data, *["no JSON"] * 8, row(HELLO))
    with pytest.raises(TrainingError) as caught:
        read_recordings(path, RATE)
    lines = str(caught.value).split("\n  ")
    assert lines[0].startswith("8 of the 9 recordings")
    assert [line.partition(":")[0] for line in lines[1:-1]] == [f"data.jsonl line {i}" for i in range(1, 6)]
    assert lines[-1] == "and 3 more"
    with pytest.raises(TrainingError) as caught:
        read_recordings(write(data, *["no JSON"] * 5, row(HELLO)), RATE)
    assert len(str(caught.value).split("\n  ")) == 6, "none is more"


def test_data_without_a_valid_recording_is_an_error_even_with_skip_bad(data):
    with pytest.raises(TrainingError, match=r"1 of the 1 recordings of .* cannot be trained on; fix them:"):
        read_recordings(write(data, "no JSON"), RATE, skip_bad=True)


def test_empty_data_is_an_error(data):
    (data / "empty").mkdir()
    for source in (write(data), data / "empty"):
        with pytest.raises(TrainingError, match="lists no recordings; expected rows"):
            read_recordings(source, RATE)
    with pytest.raises(TrainingError, match=r"lost\.jsonl cannot be read \(No such file.*\); give a JSON Lines file"):
        read_recordings(data / "lost.jsonl", RATE)


def test_speakers_and_voices_are_read_and_voice_files_are_relative_to_the_data(data):
    (data / "ann.safetensors").write_bytes(b"")
    spoken = [HELLO, WORLD]
    path = write(
        data,
        row(*spoken, voice="ann.safetensors"),
        row(spoken[0], spoken[1] | {"speaker": "bob"}, speaker="ann", voices={"ann": "ann.safetensors", "bob": "theo"}),
        row(*spoken),
    )
    alone, both, neither = read_recordings(path, RATE)
    file = str(data / "ann.safetensors")
    assert alone.voice_of("") == alone.voice_of("anyone") == file
    assert [w.speaker for w in both.words] == ["ann", "bob"]
    assert (both.voice_of("ann"), both.voice_of("bob"), both.voice_of("cid")) == (file, "theo", None)
    assert neither.voice_of("") is None
    assert [w.speaker for w in neither.words] == ["", ""]


@pytest.mark.parametrize("voice", ["v" * 5_000, "a\0b"])
def test_a_voice_that_no_file_can_be_called_stays_a_name(data, voice):
    (recording,) = read_recordings(write(data, row(HELLO, voice=voice)), RATE)
    assert recording.voice_of("") == voice


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"voice": 3},
            r"the voices are \{'': 3\}; expected \"voice\": VOICE, or \"voices\": \{SPEAKER: VOICE, \.\.\.\}",
        ),
        ({"voices": ["theo"]}, r"the voices are \['theo'\]; expected"),
        ({"voice": "theo", "voices": {"ann": "eve"}}, 'both "voice" and "voices" are given; give the voice of all'),
        ({"speaker": 3}, "word 1, 'hello', has the speaker 3; expected a name"),
    ],
)
def test_voices_and_speakers_of_a_wrong_type_are_refused(data, keys, message):
    with pytest.raises(TrainingError, match=message):
        read_recordings(write(data, row(HELLO, **keys)), RATE)

"""Evaluation without a model: counting errors, intervals, journals, comparisons, reports."""

import dataclasses
import json
import os
import random
import subprocess
import sys
import types
from pathlib import Path

import jiwer
import numpy as np
import pytest
from matplotlib import image

from dsm_jax import cli
from dsm_jax.audio import Recorded
from dsm_jax.errors import AudioError, ConfigError, EvaluationError
from dsm_jax.evaluation import command, comparison, metrics, normalizers, report, results, transcription
from dsm_jax.evaluation.datasets import Failure, Sample
from dsm_jax.evaluation.metrics import Errors
from dsm_jax.evaluation.results import Evaluation, FileResult
from dsm_jax.evaluation.run import evaluate
from dsm_jax.evaluation.transcription import TimedTranscript
from dsm_jax.stt.options import Prompt

MODEL = types.SimpleNamespace(name="a model", dtype="float32", quantize=None, fingerprint="f00d")
WORDS = ("one", "two", "three", "four", "fort", "for", "l'été", "x")


def pairs(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Return references of one word or more, and transcripts of any number."""
    draw = random.Random(seed)

    def text(least: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(least, 9)))

    return [(text(1), text(0)) for _ in range(count)]


def distance(a: list[str], b: list[str]) -> int:
    """Return Levenshtein's distance, by the textbook."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def row(name: str, reference: str, transcribed: str, *, duration: float = 2.0, latencies=()) -> FileResult:
    timed = TimedTranscript(transcribed, duration, 0.5, tuple(latencies), tuple(latencies), 1 if latencies else 0)
    return FileResult(name, reference, reference, transcribed, metrics.score(reference, transcribed), timed)


def evaluation(*rows: FileResult, **changes) -> Evaluation:
    return Evaluation(
        **{"model": "m", "source": "s", "normalizer": "basic", "streaming": False, "files": rows, **changes}
    )


@pytest.fixture
def transcribed(monkeypatch):
    """Stand in for the transcription: what each recording says, by its name; count what it was asked for."""
    transcripts: dict[str, object] = {}
    asked: list[str] = []

    def transcribe(model, samples, options, *, batch_size):
        for index in reversed(range(len(samples))):  # a short recording ends before the one ahead of it
            asked.append(samples[index].id)
            what = transcripts[samples[index].id]
            if isinstance(what, KeyboardInterrupt):
                raise what
            yield index, what if isinstance(what, Exception) else TimedTranscript(str(what), 2.0, 0.25)

    monkeypatch.setattr(transcription, "transcribe", transcribe)
    return transcripts, asked


def samples(**texts: str) -> list[Sample]:
    return [Sample(name, text, Path(name)) for name, text in texts.items()]


# Errors


def test_errors_are_those_of_jiwer_and_of_the_textbook_on_1000_pairs():
    for reference, transcript in pairs(1000):
        found = metrics.score(reference, transcript)
        assert found.wer == jiwer.wer(reference, transcript)
        assert found.cer == jiwer.cer(reference, transcript)
        assert found.words == len(reference.split())
        assert found.total == distance(reference.split(), transcript.split())
        assert found.cer == pytest.approx(distance(list(reference), list(transcript)) / len(reference))
        assert found.inserted - found.deleted == len(transcript.split()) - len(reference.split())


def test_figures_are_those_of_the_published_script():
    """kyutai-labs/delayed-streams-modeling scripts/stt_evaluate_on_dataset.py, `AsrMetrics`."""
    errors_sum = total_words_sum = 0
    wers, cers = [], []
    for reference, transcript in pairs(200, seed=1):
        measures = jiwer.process_words(reference, transcript)
        errors_sum += measures.substitutions + measures.deletions + measures.insertions
        total_words_sum += measures.substitutions + measures.deletions + measures.hits
        wers.append(jiwer.wer(reference, transcript))
        cers.append(jiwer.cer(reference, transcript))
    found = evaluation(*(row(str(i), *pair) for i, pair in enumerate(pairs(200, seed=1))))
    assert found.corpus_wer == errors_sum / total_words_sum
    assert found.mean_wer == pytest.approx(np.mean(wers), rel=1e-12)  # sums in another order
    assert found.cer == pytest.approx(np.mean(cers), rel=1e-12)
    assert abs(found.corpus_wer - found.mean_wer) > 0.01, "the two figures must be told apart"


@pytest.mark.parametrize(
    ("transcript", "edits"),
    [
        ("seven four one", (0, 0, 0)),
        ("seven five one", (1, 0, 0)),
        ("seven four four one", (0, 1, 0)),
        ("seven one", (0, 0, 1)),
        ("", (0, 0, 3)),
        ("eight four one one", (1, 1, 0)),
    ],
)
def test_a_planted_fault_is_counted_as_what_it_is(transcript, edits):
    found = metrics.score("seven four one", transcript)
    assert (found.substituted, found.inserted, found.deleted) == edits
    assert found.wer == sum(edits) / 3


def test_a_reference_without_words_cannot_be_scored():
    with pytest.raises(EvaluationError, match=r"^the reference has no words, .*; leave the recording out$"):
        metrics.score(" ", "one")


# Normalizers


def test_english_is_whispers():
    normalize = normalizers.normalizer("english")
    assert normalize("Mr. Smith's colour isn't twenty-one, um, (aside) 3.5%!") == "mister smith is color is not 21 3.5%"
    assert normalize("two seven one") == "271"


def test_basic_keeps_words_and_accents():
    assert normalizers.normalizer("basic")("Ça, c'est L'ÉTÉ: two seven!").strip() == "ça c est l été two seven"


def test_none_changes_nothing():
    assert normalizers.normalizer("none")("Ça, OK!  x") == "Ça, OK!  x"


def test_an_unknown_normalizer_names_the_known_ones():
    with pytest.raises(EvaluationError, match=r"^the normalizer is 'french'; choose one of english, basic, none$"):
        normalizers.normalizer("french")


@pytest.mark.parametrize("name", normalizers.NAMES)
def test_what_the_published_script_leaves_out_does_not_count(name):
    normalize = normalizers.normalizer(name)
    assert not any(normalizers.counts(normalize(t)) for t in ("", " ", "ignore_time_segment_in_scoring"))
    assert normalizers.counts(normalize("ignore the time"))


# Intervals


@pytest.mark.slow
def test_the_interval_holds_the_true_rate_as_often_as_it_says():
    draw, true, held = np.random.default_rng(0), 0.1, 0
    for seed in range(200):
        wrong = draw.binomial(20, true, size=60)
        errors = [Errors(20, int(w), 0, 0, w / 20, w / 20) for w in wrong]
        found = metrics.intervals(errors, resamples=300, seed=seed)
        held += found.corpus_wer.low <= true <= found.corpus_wer.high
    assert 0.90 <= held / 200 <= 0.99  # 0.95, give or take three standard deviations of 200 draws


def test_the_interval_is_as_wide_as_theory_has_it():
    wrong = np.random.default_rng(0).binomial(20, 0.1, size=400)
    errors = [Errors(20, int(w), 0, 0, w / 20, w / 10) for w in wrong]
    found = metrics.intervals(errors, resamples=2000, seed=0)
    for interval, rates in ((found.corpus_wer, wrong / 20), (found.mean_wer, wrong / 20), (found.cer, wrong / 10)):
        normal = 2 * 1.96 * rates.std() / 20  # of the mean of 400
        assert interval.high - interval.low == pytest.approx(normal, rel=0.08)  # one of 90 % is 16 % narrower
        assert (interval.high + interval.low) / 2 == pytest.approx(rates.mean(), rel=0.02)


def test_the_interval_depends_on_the_seed_alone():
    errors = [metrics.score(*pair) for pair in pairs(50)]
    found = [metrics.intervals(errors, resamples=100, seed=seed) for seed in (3, 3, 4)]
    assert found[0] == found[1] != found[2]
    assert found[0].mean_wer.low < metrics.mean_wer(errors) < found[0].mean_wer.high
    assert found[0].cer.low < metrics.mean_cer(errors) < found[0].cer.high


def test_there_is_no_interval_of_one_recording_or_without_resamples():
    errors = [metrics.score(*pair) for pair in pairs(2)]
    assert metrics.intervals(errors[:1], resamples=10, seed=0) is None
    assert metrics.intervals(errors, resamples=0, seed=0) is None
    assert metrics.paired_interval(errors[:1], errors[:1], resamples=10, seed=0) is None
    assert metrics.paired_interval(errors, errors, resamples=0, seed=0) is None


def test_correct_words_are_found_in_both_texts():
    found = metrics.correct_words(["one", "two", "three", "four"], ["one", "three", "three", "four", "five"])
    assert list(found) == [(0, 0), (2, 2), (3, 3)]
    assert list(metrics.correct_words(["one"], [])) == list(metrics.correct_words([], ["one"])) == []


# Runs


def test_figures_of_a_run(transcribed):
    transcripts, _ = transcribed
    transcripts.update(a="One, two!", b="three", c="x")
    data = samples(a="one two", b="three four", c="x", empty="...", marked="ignore_time_segment_in_scoring")
    found = evaluate(MODEL, data, normalizer="basic")
    assert [f.id for f in found.files] == ["a", "b", "c"]
    assert (found.corpus_wer, found.mean_wer) == (1 / 5, 0.5 / 3)
    assert found.files[0].hypothesis == "One, two!"
    assert found.files[0].normalized_hypothesis.split() == ["one", "two"]
    assert found.skipped == ("empty", "marked")
    assert (found.audio_seconds, found.processing_seconds) == (6.0, 0.75)
    assert (found.real_time_factor, found.speed) == (0.125, 8.0)
    assert found.latency is None
    assert found.intervals is not None
    assert [f.id for f in found.worst(9)] == ["b"]


def test_a_bad_recording_costs_only_itself(transcribed):
    transcripts, _ = transcribed
    transcripts.update(a="one", bad=AudioError("bad is cut short; fetch it again"), c="two")
    progress = []
    found = evaluate(MODEL, samples(a="one", bad="x", c="two"), progress=lambda p: progress.append((p.done, p.total)))
    assert [f.id for f in found.files] == ["a", "c"]
    assert found.failed == (Failure("bad", "bad is cut short; fetch it again"),)
    assert progress == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(EvaluationError, match=r"^no recording of samples could be evaluated; bad: bad is cut short;"):
        evaluate(MODEL, samples(bad="x"))
    with pytest.raises(EvaluationError, match=r"could be evaluated; no reference has words once normalized$"):
        evaluate(MODEL, samples(a="[laughs]"))


def test_a_limit_counts_what_is_scored(transcribed):
    transcripts, asked = transcribed
    transcripts.update(a="one", b="two")
    found = evaluate(MODEL, samples(empty="", a="one", b="two", c="three", late=""), limit=2)
    assert sorted(asked) == ["a", "b"]
    assert found.skipped == ("empty",)


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("limit", 0), ("bootstrap", -1)])
def test_sizes_that_are_too_small_are_refused(name, value):
    with pytest.raises(ConfigError, match=rf"^{name} is {value}; give [01] or more$"):
        evaluate(MODEL, samples(a="one"), **{name: value})


def test_a_stopped_run_leaves_its_rows_and_the_next_one_goes_on(transcribed, tmp_path):
    transcripts, asked = transcribed
    journal = tmp_path / "rows.jsonl"
    data = samples(a="one", b="two", c="three", d="four")
    transcripts.update(d="four", c="tree", b=KeyboardInterrupt(), a="one")
    with pytest.raises(KeyboardInterrupt):
        evaluate(MODEL, data, resume=journal)
    first, *rows = map(json.loads, journal.read_text(encoding="utf-8").splitlines())
    assert first["model"] == "a model"
    assert [(row["id"], row["hypothesis"], row["wer"]) for row in rows] == [("d", "four", 0.0), ("c", "tree", 1.0)]
    transcripts["b"] = "two"
    with journal.open("ab") as file:
        file.write(b'{"id": "b", "hypo')  # killed while it wrote
    asked.clear()
    progress = []
    found = evaluate(MODEL, data, resume=journal, progress=lambda p: progress.append((p.done, p.total)))
    assert asked == ["b", "a"]
    assert progress == [(3, 4), (4, 4)]
    del transcripts["a"]
    again = evaluate(MODEL, data, resume=journal)
    assert asked == ["b", "a"], "what is finished is not repeated"
    assert again == found
    assert [f.id for f in found.files] == ["a", "b", "c", "d"]
    assert found.corpus_wer == 0.25
    assert found.processing_seconds == 1.0, "the time of the stopped run counts too"


def test_names_and_texts_that_are_not_utf_8_are_written_and_read_back(transcribed, tmp_path):
    transcripts, asked = transcribed
    name, other = os.fsdecode(b"caf\xe9.wav"), "café.wav"
    transcripts.update({name: "caf\udce9", other: "é"})
    data = samples(**{name: "caf\udce9 one", other: "é"})
    found = evaluate(MODEL, data, normalizer="none", resume=tmp_path / "rows")
    again = evaluate(MODEL, data, normalizer="none", resume=tmp_path / "rows")
    assert asked == [other, name], "the rows are found again by their names"
    found.save(tmp_path / "results.json")
    assert results.load(tmp_path / "results.json") == again == found
    assert "café" in (tmp_path / "results.json").read_text(encoding="utf-8")


def test_rows_are_scored_anew_with_the_texts_of_today(transcribed, tmp_path):
    transcripts, asked = transcribed
    transcripts["a"] = "One!"
    evaluate(MODEL, samples(a="two"), resume=tmp_path / "rows")
    found = evaluate(MODEL, samples(a="one"), normalizer="none", resume=tmp_path / "rows")
    assert asked == ["a"]
    assert found.corpus_wer == 1.0  # "One!" is not "one" where nothing is normalized
    assert evaluate(MODEL, samples(a="one"), resume=tmp_path / "rows").corpus_wer == 0.0


def test_rows_of_another_run_are_refused(transcribed, tmp_path):
    transcripts, _ = transcribed
    transcripts["a"] = "one"
    path = tmp_path / "rows"
    evaluate(MODEL, samples(a="one"), resume=path)
    other = types.SimpleNamespace(**{**vars(MODEL), "name": "another"})
    with pytest.raises(
        EvaluationError, match=r"rows of another run, whose model was 'a model' and not 'another'; give a"
    ):
        evaluate(other, samples(a="one"), resume=path)
    with pytest.raises(EvaluationError, match="whose options was "):
        evaluate(MODEL, samples(a="one"), resume=path, options=transcription.TranscribeOptions(seed=1))
    other = types.SimpleNamespace(**{**vars(MODEL), "fingerprint": "beef"})
    with pytest.raises(EvaluationError, match="rows of another run, whose weights was 'f00d' and not 'beef'; "):
        evaluate(other, samples(a="one"), resume=path)
    other = types.SimpleNamespace(**{**vars(MODEL), "dtype": "bfloat16"})
    with pytest.raises(EvaluationError, match="rows of another run, whose dtype was 'float32' and not 'bfloat16'; "):
        evaluate(other, samples(a="one"), resume=path)
    path.write_text("my only copy, without an end of line")
    with pytest.raises(EvaluationError, match=r"rows has no whole line of results; delete it, or give another file$"):
        evaluate(MODEL, samples(a="one"), resume=path)
    assert path.read_text() == "my only copy, without an end of line"
    path.write_text("[" * 100_000 + "\n")
    with pytest.raises(EvaluationError, match=r"line 1 is no JSON \(.*\); delete the line, or start again$"):
        evaluate(MODEL, samples(a="one"), resume=path)
    path.write_text("nonsense\n")
    with pytest.raises(EvaluationError, match=r"line 1 is no JSON \(.*\); delete the line, or start again$"):
        evaluate(MODEL, samples(a="one"), resume=path)
    with pytest.raises(EvaluationError, match=r"cannot be read or written \(Is a directory\); give another place$"):
        evaluate(MODEL, samples(a="one"), resume=tmp_path)


@pytest.mark.parametrize("wrap", [lambda pcm: pcm, lambda pcm: Recorded(pcm, 400), lambda pcm: {"array": pcm}])
def test_rows_with_another_prompt_of_as_many_samples_are_refused(transcribed, tmp_path, wrap):
    transcripts, asked = transcribed
    transcripts["a"] = "one"
    pcm_T = np.zeros(5_000, np.float32)

    def run():
        prompt = Prompt(text="one", audio=wrap(pcm_T))
        options = transcription.TranscribeOptions(prompt=prompt)
        evaluate(MODEL, samples(a="one"), resume=tmp_path / "rows", options=options)

    run()
    run()
    assert asked == ["a"]
    pcm_T[2_500] = 0.5  # which `repr` leaves out
    with pytest.raises(EvaluationError, match="whose options was "):
        run()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": 5}, "id is 5; expected str"),
        ({"hypothesis": ["one"]}, r"hypothesis is \['one'\]; expected str"),
        ({"duration": "2"}, "duration is '2'; expected float"),
        ({"end_latencies": None}, "end_latencies is None; expected list"),
        ({"start_latencies": ["x"]}, "start_latencies is 'x'; expected float"),
        ({"flushed": True}, "flushed is True; expected int"),
    ],
)
def test_rows_of_a_wrong_type_are_refused_at_the_start(transcribed, tmp_path, changes, message):
    transcripts, asked = transcribed
    transcripts["a"] = "one"
    found = evaluate(MODEL, samples(a="one"), resume=tmp_path / "rows")
    first, one = (tmp_path / "rows").read_text().splitlines()
    (tmp_path / "rows").write_text(f"{first}\n{json.dumps(json.loads(one) | changes)}\n")
    with pytest.raises(
        EvaluationError, match=rf"rows line 2 is no row of results \({message}\); delete the line, or g"
    ):
        evaluate(MODEL, samples(a="one"), resume=tmp_path / "rows")
    assert asked == ["a"]
    values = found.to_dict()
    values["files"][0] |= changes
    (tmp_path / "results.json").write_text(json.dumps(values))
    with pytest.raises(EvaluationError, match=rf"is no result of an evaluation \(TypeError: {message}\); give what"):
        results.load(tmp_path / "results.json")


def test_a_sample_whose_id_or_reference_is_no_string_is_refused():
    with pytest.raises(EvaluationError, match=r"^the id of a sample is 5; expected a string$"):
        Sample(5, "one", "a.wav")
    with pytest.raises(EvaluationError, match=r"^the reference of a sample is None; expected a string$"):
        Sample("a", None, "a.wav")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (5, "the data set is 5; expected its name, a folder, a file, or samples"),
        (["a.wav"], r"samples hold 'a\.wav'; expected dsm_jax\.evaluation\.Sample\(id, reference, audio\)"),
    ],
    ids=["number", "names"],
)
def test_what_holds_no_samples_is_refused(source, message):
    with pytest.raises(EvaluationError, match=f"^{message}$"):
        evaluate(MODEL, source)


def test_a_missing_library_is_an_error_of_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(EvaluationError, match=r"^evaluation needs jiwer, .*; run: pip install 'dsm-jax\[evaluate\]'$"):
        evaluate(MODEL, samples(a="one"), normalizer="none")
    normalizers.normalizer.cache_clear()
    monkeypatch.setitem(sys.modules, "whisper_normalizer.english", None)
    with pytest.raises(
        EvaluationError, match=r"^evaluation needs whisper_normalizer\.english, which is not installed; run"
    ):
        evaluate(MODEL, samples(a="one"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(EvaluationError, match=r"^evaluation needs matplotlib\.figure, which is not installed"):
        report.check_plot(Path("a.png"))


# Results


def test_results_are_read_back_as_they_were_written(tmp_path):
    errors = [metrics.score(*pair) for pair in pairs(2)]
    intervals = metrics.intervals(errors, resamples=10, seed=0)
    written = evaluation(
        row("a", "l'été", "l'été", latencies=(0.5, 0.75)),
        row("b", "two", "three"),
        skipped=("c",),
        failed=(Failure("d", "why"),),
        intervals=intervals,
        streaming=True,
    )
    written.save(tmp_path / "results.json")
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"], "nothing is left beside it"
    assert results.load(tmp_path / "results.json") == written
    values = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert values["corpus_wer"] == 0.5
    assert values["intervals"]["corpus_wer"].keys() == {"low", "high"}
    assert values["latency"]["end_95"] == pytest.approx(0.7375)
    assert {"id", "reference", "hypothesis", "normalized_reference", "wer", "cer", "duration"} <= values["files"][
        0
    ].keys()


def test_there_is_no_latency_where_the_wait_for_starts_or_ends_is_not_known():
    known = row("a", "one", "one", latencies=(0.5,))
    more = dataclasses.replace(known.transcript, start_latencies=(0.5, 0.5))
    assert evaluation(dataclasses.replace(known, transcript=more)).latency.words == 1, "of whose ends it is known"
    for name in ("start_latencies", "end_latencies"):
        partly = dataclasses.replace(known.transcript, **{name: ()})
        assert evaluation(dataclasses.replace(known, transcript=partly)).latency is None


def test_the_worst_are_those_with_the_highest_rates():
    half, whole, long = row("half", "a b", "a"), row("whole", "a", "b"), row("long", "a b", "c d")
    many = row("many", "a b c d", "a b x y")
    found = evaluation(half, row("right", "a", "a"), whole, many, long)
    assert found.worst(9) == (long, whole, many, half)
    assert found.worst(1) == (long,)
    assert found.worst(0) == ()


def test_results_that_fail_while_they_are_written_leave_the_old_ones(tmp_path):
    path = tmp_path / "results.json"
    evaluation(row("a", "one", "one")).save(path)
    before = path.read_text()
    broken = evaluation(row("a", "one", "two"), model={1})  # which JSON does not know
    with pytest.raises(TypeError):
        broken.save(path)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(
        EvaluationError, match=r"results.json cannot be written \(No such file or directory\); give anoth"
    ):
        evaluation(row("a", "one", "two")).save(tmp_path / "nosuch/results.json")


@pytest.mark.parametrize("text", ["nothing", "[]", "{}", '{"files": 1}', "[" * 100_000, "1" * 5_000])
def test_what_is_no_result_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(
        EvaluationError, match=r"a.json is no result of an evaluation \(.*\); give what --output wrote$"
    ):
        results.load(tmp_path / "a.json")
    with pytest.raises(EvaluationError, match=r"b.json cannot be read \(No such file or directory\)"):
        results.load(tmp_path / "b.json")


def test_the_figures_of_a_file_come_from_its_rows(tmp_path):
    # A file of an earlier version holds the speed as `real_time_factor`.
    found = evaluation(row("a", "one two", "one"))
    values = found.to_dict()
    former = {"real_time_factor": values.pop("speed"), "inverse_real_time_factor": values["real_time_factor"]}
    (tmp_path / "former.json").write_text(json.dumps(values | former), encoding="utf-8")
    read = results.load(tmp_path / "former.json")
    assert (read.real_time_factor, read.speed) == (found.real_time_factor, found.speed) == (0.25, 4.0)
    values["files"][0]["duration"] = 2
    (tmp_path / "whole.json").write_text(json.dumps(values), encoding="utf-8")
    assert results.load(tmp_path / "whole.json") == found, "a whole number is a number of seconds"
    for wrong in (1.5, True, "2"):
        values["files"][0]["words"] = wrong
        (tmp_path / "wrong.json").write_text(json.dumps(values), encoding="utf-8")
        with pytest.raises(EvaluationError, match=rf"TypeError: words is {wrong!r}; expected int"):
            results.load(tmp_path / "wrong.json")


def test_the_table_and_the_summary_have_every_figure():
    found = evaluation(row("a", "one two", "one"), row("long name", "x", "x y", latencies=(0.5,)), skipped=("c",))
    assert found.table().splitlines() == [
        "recording  length       WER  errors",
        "a          2.00 s   50.00 %  1 of 2: 1 deleted",
        "long name  2.00 s  100.00 %  1 of 1: 1 inserted",
    ]
    summary = dataclasses.replace(found, intervals=metrics.intervals(found.errors, resamples=9, seed=0)).summary()
    assert "1 recording without words in the reference left out\n" in summary
    assert (
        "corpus WER         66.67 %  95 %: 50.00 to 100.00 %; of 3 words: 0 substituted, 1 inserted, 1 deleted"
        in summary
    )
    assert "speed                 4.00  seconds of audio per second of processing" in summary
    assert "real-time factor    0.2500  seconds of processing per second of audio" in summary
    assert (
        "start latency       0.50 s  after a word began: median of 1 words, 0.50 s at 95 %; 1 reported after the audio"
        in summary
    )


def test_the_worst_are_printed_with_both_texts():
    found = evaluation(row("a", "one two", "one"), row("silent", "x y", ""), row("right", "x", "x"))
    lines = command.text(found, worst=2).splitlines()
    assert lines[5:11] == ["silent", "  reference   x y", "  hypothesis  (nothing)", "", "a", "  reference   one two"]
    assert command.text(found, worst=0) == found.table() + "\n\n" + found.summary()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wer.png", "wer.svg", "wer.pdf"])
def test_the_plot_is_drawn(tmp_path, name):
    rows = [row(str(i), *pair) for i, pair in enumerate(pairs(50))]
    report.plot(evaluation(*rows, source="$odd_name$ caf\udce9"), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).stat().st_size > 3000
    if name == "wer.png":
        pixels = image.imread(tmp_path / name)[..., :3]
        blue = (pixels[..., 2] - pixels[..., 0] > 0.1).mean()
        assert blue > 0.05, "the rates are filled areas"


def test_a_plot_of_another_kind_is_refused():
    with pytest.raises(EvaluationError, match=r"^wer.doc is no plot that can be drawn; name it .png, .svg, .pdf$"):
        report.check_plot(Path("wer.doc"))


# Comparisons


def test_a_comparison_finds_what_changed():
    before = evaluation(
        row("a", "one two", "one two"), row("b", "three", "four"), row("c", "x", "x"), row("only", "x", "x")
    )
    after = evaluation(row("c", "x", "x"), row("b", "three", "three"), row("a", "one two", "one"), model="n")
    found = comparison.compare(before, after)
    assert (found.before.corpus_wer, found.after.corpus_wer, found.difference) == (0.25, 0.25, 0.0)
    assert [change.before.id for change in found.better(5)] == ["b"]
    assert [change.before.id for change in found.worse(5)] == ["a"]
    assert found.left_out == 1
    table = found.table()
    assert table.startswith("3 recordings in both, 1 in one only\n")
    assert "corpus WER  25.00 %  25.00 %     +0.00 %" in table
    assert "; 0 is inside: it may be chance\n" in table
    assert found.to_dict()["recordings"] == 3


def test_the_largest_changes_come_first_and_a_change_of_all_is_not_chance():
    hypotheses = {"p": ("a b x", "a b c"), "q": ("a x x", "a b c"), "r": ("a b c", "a b x"), "s": ("a b c", "x x c")}
    before, after = (
        evaluation(row("same", "a b c", "a b x"), *(row(name, "a b c", both[at]) for name, both in hypotheses.items()))
        for at in (0, 1)
    )
    found = comparison.compare(dataclasses.replace(before, intervals="stale"), after)
    assert [change.before.id for change in found.better(5)] == ["q", "p"]
    assert [change.before.id for change in found.worse(5)] == ["s", "r"]
    assert [found.better(1)[0].before.id, found.worse(1)[0].before.id] == ["q", "s"]
    assert found.before.intervals is None, "it is of other recordings"
    improved = [row(str(n), "a b c", "a x c", duration=2.0) for n in range(9)]
    right = [row(str(n), "a b c", "a b c", duration=1.0) for n in range(9)]
    for pair in ((improved, right), (right, improved)):
        assert "; 0 is outside\n" in comparison.compare(*(evaluation(*rows) for rows in pair)).table()
    assert "0.50 times" in comparison.compare(evaluation(*improved), evaluation(*right)).table()


def test_the_paired_interval_sees_a_small_change_that_two_intervals_do_not():
    draw = np.random.default_rng(0)
    before, after = [], []
    for _ in range(200):
        wrong = int(draw.integers(0, 10))  # recordings are of very different difficulty
        less = max(0, wrong - int(draw.random() < 0.3))
        before.append(Errors(10, wrong, 0, 0, wrong / 10, 0.0))
        after.append(Errors(10, less, 0, 0, less / 10, 0.0))
    apart = [metrics.intervals(one, resamples=500, seed=0).corpus_wer for one in (before, after)]
    assert apart[1].high > apart[0].low, "each by itself, they overlap"
    found = metrics.paired_interval(before, after, resamples=500, seed=0)
    assert found.low < metrics.corpus_wer(after) - metrics.corpus_wer(before) < found.high < 0


def test_what_cannot_be_compared_is_refused():
    one = evaluation(row("a", "one", "one"))
    with pytest.raises(EvaluationError, match=r"^s and s have no recording in common; evaluate both on the same data$"):
        comparison.compare(one, evaluation(row("b", "one", "one")))
    with pytest.raises(
        EvaluationError, match=r"^the references of a differ, 'one' and 'two'; evaluate both on the same"
    ):
        comparison.compare(one, evaluation(row("a", "two", "one")))
    with pytest.raises(
        EvaluationError, match=r"^the normalizers are 'basic' and 'none'; evaluate both with one of them$"
    ):
        comparison.compare(one, evaluation(row("a", "one", "one"), normalizer="none"))


# The command


def test_the_command_compares(capsys, tmp_path):
    for name, transcribed in (("a", "one"), ("b", "two")):
        evaluation(row("x", "one", transcribed), row("y", "two", "two")).save(tmp_path / f"{name}.json")
    assert cli.main(["evaluate", "--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    out = capsys.readouterr().out
    assert "2 recordings in both, 0 in one only" in out
    assert out.splitlines()[-1].split() == ["x", "0.00", "%", "100.00", "%", "+100.00", "%"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is nothing to evaluate; give recordings, or --compare A.json B.json"),
        (["x", "--compare", "a", "b"], "--compare reads results that are there, and a source was given too; leave one"),
        (
            [
                "--compare",
                "a",
                "b",
                "--output",
                "z.json",
                "--plot",
                "z.png",
                "--streaming",
                "--limit",
                "1",
                "--no-cache",
            ],
            "--compare prints what it finds in two results, and does nothing with --no-cache, --streaming, --limit, "
            "--output, --plot; leave that out",
        ),
        (
            ["--compare", "nosuch.json", "b"],
            "nosuch.json cannot be read (No such file or directory); give what --output",
        ),
        (["x", "--resume"], "--resume continues from the rows next to the results; add --output RESULTS.json"),
        (["x", "--output", "a.csv"], "--output is a.csv; name a .json file"),
        (
            ["x", "--output", "nosuch/a.json"],
            "nosuch/a.json cannot be written: there is no folder nosuch; make it first",
        ),
        (["x/y/z"], "x/y/z is no folder, no file, and no data set; give one of them"),
        (
            [__file__],
            f"no recording of {__file__} has a transcript that can be read; test_evaluation.py line 1: this is no",
        ),
        (["a.rows.jsonl", "--output", "a.json"], "a.rows.jsonl is the source, and would be overwritten; name another"),
        (["a.json", "--output", "a.json"], "a.json is the source, and would be overwritten; name another file"),
        (["x", "--plot", "a.doc"], "a.doc is no plot that can be drawn; name it .png, .svg, .pdf"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused_before_the_model_is_loaded(capsys, arguments, message):
    assert cli.main(["evaluate", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"dsm-jax: {message}")


def test_help_is_instant():
    code = """
import sys
from dsm_jax import cli
try:
    cli.main(["evaluate", "--help"])
except SystemExit as stop:
    assert stop.code == 0
print(sorted({"jax", "numpy", "jiwer", "matplotlib", "rich"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: dsm-jax evaluate")
    assert done.stdout.endswith("[]\n")

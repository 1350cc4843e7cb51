"""The benchmarks' arithmetic: rows, ratios, tables and the search for what fits. What takes time is not tested here."""

import json
import math
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import dsm_jax
from dsm_jax.benchmark import run
from dsm_jax.configs import presets
from dsm_jax.serving.load import Report, Tail
from tests.benchmarks import __main__ as runner
from tests.benchmarks import gpu, gpu_serving, gpu_worker, ours, rows, table, tasks, worker

ABOUT = {"device": "A CPU", "threads": 2, "date": "2026-01-02", "versions": {"jax": "0.10.0", "moshi": None}}
README = table.ROOT / "README.md"
PUBLISHED = table.ROOT / "tests" / "published"


def measured(p50_ms: float, peak_rss_mb: float = 100.0, others_cores: float = 0.0) -> rows.Row:
    times = {"p50_ms": p50_ms, "p99_ms": 2 * p50_ms, "steps": 5}
    return times | {"peak_rss_mb": peak_rss_mb, "others_cores": others_cores}


def run_of(task: str, figures: dict[str, rows.Row]) -> list[rows.Row]:
    found = [rows.contender_row(task, contender, [figure], ABOUT) for contender, figure in figures.items()]
    return found + rows.ratio_rows(task, found)


# Steps of the library.

TINY = {
    "stt-tiny": gpu_worker.tiny_config(),
    "tts-tiny": ours.TINY_TTS,
    "csm-tiny": ours.TINY_CSM,
}


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "quantize"), [("float32", None), ("bfloat16", None), ("float32", "int8")])
def test_every_kind_of_step_runs_in_every_form_of_its_weights(
    monkeypatch: pytest.MonkeyPatch, dtype: str, quantize: str
):
    monkeypatch.setattr(run, "SIZES", TINY)
    kinds = [kind for kind in run.KINDS if kind != "mimi"]  # whose only size is the published one
    found = list(run.run(kinds, batches=(2,), dtype=dtype, quantize=quantize, steps=2))
    names = [
        "lm_step stt-tiny",
        "stt_step stt-tiny",
        "tts_frame tts-tiny",
        "csm_prefill csm-tiny",
        "csm_frame csm-tiny",
    ]
    assert [one["bench"] for one in found] == names
    for one in found:
        assert (one["batch"], one["dtype"], one["quantize"], one["steps"]) == (2, dtype, quantize, 2)
        assert one["p50_ms"] > 0
        assert ("keeps_up" in one) == ("prefill" not in one["bench"])  # a prompt has no sound to keep up with


def test_a_kind_is_timed_with_its_first_size_unless_another_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    timed = []
    monkeypatch.setattr(run, "time_steps", lambda step, state, steps, warm_up: timed.append((step, warm_up)) or [1.0])
    made = run.Timed(lambda config, *_: (config, None))
    makers = {kind: {f"{kind}_step": made} for kind in ("lm", "stt", "tts")}
    steps = {kind: (run.STEPS[kind][0], made) for kind, made in makers.items()}
    monkeypatch.setattr(run, "STEPS", steps)
    list(run.run(["lm", "stt", "tts"], sizes=["stt-2.6b"], batches=[1]))
    assert [step for step, _ in timed] == [presets.STT_2_6B, presets.STT_2_6B, presets.TTS_1_6B]
    timed.clear()
    list(run.run(["stt"], sizes=["stt-2.6b", "stt-1b"], batches=[1]))
    assert [step for step, _ in timed] == [presets.STT_1B, presets.STT_2_6B]


def test_the_command_offers_every_size_and_kind():
    shown = subprocess.run(
        [sys.executable, "-m", "dsm_jax", "bench", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert f"{{{','.join(run.SIZES)}}}" in shown
    assert "|".join(run.KINDS) in shown
    assert {kind for kind in run.KINDS if kind != "mimi"} == set(run.STEPS)


def test_a_frame_of_speech_is_timed_when_it_is_whole():
    tts = presets.TTS_1_6B
    assert tts.tts is not None
    assert tts.lm is not None
    behind = tts.tts.audio_delay * tts.mimi.frame_rate + max(tts.lm.delays)
    assert run.STEPS["tts"][1]["tts_frame"].warm_up >= behind
    assert tasks.TASKS["tts_frame_b1"].warm_up >= behind


# Rows and ratios.


def test_a_row_is_the_median_over_rounds():
    row = rows.contender_row("lm_step_b1", "ours", [measured(3.0), measured(1.0), measured(2.0)], ABOUT)
    assert (row["p50_ms"], row["p99_ms"], row["rounds"], row["device"]) == (2.0, 4.0, 3, "A CPU")


def test_a_round_that_failed_is_marked_in_the_row():
    row = rows.contender_row("lm_step_b1", "moshi", [measured(1.0), {"error": "exit code 1"}], ABOUT)
    assert row["error"] == "exit code 1"
    assert "p50_ms" not in row


def test_a_ratio_is_to_the_best_of_the_others():
    found = run_of("lm_step_b1", {"ours": measured(60), "moshi": measured(160), "transformers": measured(100)})
    assert (found[-1]["ratio"], found[-1]["best_peer"], found[-1]["met"]) == (0.6, "transformers", True)
    assert (found[-1]["task"], found[-1]["measure"], found[-1]["target"]) == ("lm_step_b1", "p50_ms", 0.65)


def test_int8_layers_are_shown_beside_float32_and_are_no_peer():
    found = run_of("lm_step_b1", {"ours": measured(60), "ours-int8": measured(30), "moshi": measured(160)})
    assert (found[-1]["ratio"], found[-1]["best_peer"]) == (0.375, "moshi")
    head, _, line, *_ = table.cpu_table(found).splitlines()
    assert head.startswith("| median ms (99 %) | dsm_jax | with int8 layers | moshi |")
    assert line.startswith("| `lm_step_b1` | 60 (120) | 30 (60) | 160 (320) |")


def test_a_disturbed_figure_meets_no_target():
    ratio = run_of("lm_step_b1", {"ours": measured(60), "moshi": measured(160, others_cores=0.5)})[-1]
    assert (ratio["ratio"], ratio["disturbed"], ratio["met"]) == (0.375, True, False)


def test_memory_has_a_best_and_a_target_of_its_own():
    figures = {"ours": measured(50, 120), "moshi": measured(100, 110), "transformers": measured(90, 300)}
    time, memory = rows.ratio_rows("transcribe_45s", run_of("transcribe_45s", figures))
    assert (time["best_peer"], time["met"]) == ("transformers", True)
    assert (memory["best_peer"], memory["ratio"], memory["met"]) == ("moshi", 1.091, False)


@pytest.mark.parametrize(
    "figures, error",
    [
        ({"ours": measured(1), "moshi": {"error": "moshi is not installed"}}, "no figure of any peer, so no ratio"),
        ({"ours": measured(1), "ours-int8": measured(1)}, "no figure of any peer, so no ratio"),
        ({"ours": {"error": "it broke"}, "moshi": measured(1)}, "no figure of ours, so no ratio"),
    ],
)
def test_without_two_figures_there_is_no_ratio(figures: dict[str, rows.Row], error: str):
    ratio = run_of("lm_step_b1", figures)[-1]
    assert ratio["error"] == error
    assert "ratio" not in ratio


def test_a_contender_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(tasks.PACKAGES, "moshi", "no_such_package")
    assert tasks.missing("moshi") == "no_such_package is not installed"
    assert tasks.missing("ours") is None


def test_checkpoints_are_made_only_for_tasks_that_read_them():
    assert not runner.checkpoints_needed(["train_lm_step", "train_codec_step"], list(tasks.PACKAGES))
    assert runner.checkpoints_needed(["train_lm_step", "transcribe_45s"], ["ours"])
    assert not runner.checkpoints_needed(["lm_step_b1"], ["ours", "ours-int8"])


def test_a_processor_is_named_with_its_family_and_widest_vectors_as_they_decide_which_products_are_fast():
    head = "processor\t: 0\nmodel name\t: AMD EPYC\nflags\t\t: fpu "
    assert rows.cpu_name(head + "avx avx2 avx512f avx512bw") == "AMD EPYC with AVX-512"
    assert rows.cpu_name(head + "avx avx2") == "AMD EPYC with AVX2"
    assert rows.cpu_name(head + "avx") == "AMD EPYC"
    assert rows.cpu_name("cpu family\t: 25\n" + head + "avx2 avx512f") == "AMD EPYC of family 25 with AVX-512"
    assert rows.cpu_name("")


def test_a_device_becomes_part_of_a_file_name():
    assert rows.slug("AMD EPYC 9B14 (96-Core)") == "amd-epyc-9b14-96-core"


# Workers.


def test_warm_up_is_not_timed():
    calls = []
    assert len(worker.time_steps(lambda: calls.append(1), 3, 2)) == 2
    assert len(calls) == 5


def test_figures_are_in_milliseconds_and_megabytes():
    found = worker.figures([0.001, 0.002, 0.003])
    assert (found["p50_ms"], found["steps"]) == (2.0, 3)
    assert found["p50_ms"] < found["p99_ms"] <= 3.0
    assert 10 < found["peak_rss_mb"] < 100_000


def run_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, timeout_s: float = 60) -> rows.Row:
    (tmp_path / "script.py").write_text(script)
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    return runner.run_worker(["script"], threads=2, timeout_s=timeout_s)


def test_the_last_line_of_a_worker_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script = "import json, os; print('hello'); print(json.dumps({'threads': os.environ['OMP_NUM_THREADS']}))"
    found = run_script(tmp_path, monkeypatch, script)
    assert found["threads"] == "2"
    assert found["others_cores"] >= 0


@pytest.mark.parametrize(
    "script, timeout_s, error",
    [
        ("raise ValueError('no\\n  1: backtrace')", 60, "exit code 1: ValueError: no"),
        ("import time; time.sleep(60)", 0.2, "took longer than 0 s"),
    ],
)
def test_a_worker_that_fails_has_its_reason_in_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, timeout_s: float, error: str
):
    assert run_script(tmp_path, monkeypatch, script, timeout_s) == {"error": error}


def test_processor_time_of_others_is_all_but_idle_time_and_our_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ticks = os.sysconf("SC_CLK_TCK")
    (tmp_path / "stat").write_text("cpu  " + " ".join(str(1000 * n * ticks) for n in range(1, 11)) + "\ncpu0 1\n")
    own = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    found = runner.others_seconds(tmp_path / "stat")
    assert found == pytest.approx(1000 * (1 + 2 + 3 + 6 + 7 + 8) - own, abs=1)
    assert runner.others_seconds(tmp_path / "no such file") == 0


# Tables.


def results(root: Path, found: Sequence[rows.Row], name: str = "cpu.jsonl") -> str:
    (root / name).write_text("".join(json.dumps(row) + "\n" for row in found))
    return name


FOUND = run_of("lm_step_b1", {"ours": measured(60), "moshi": measured(160), "transformers": {"error": "it broke"}})


def test_the_table_shows_every_contender_the_ratio_and_what_failed(tmp_path: Path):
    shown = table.block([results(tmp_path, FOUND)], tmp_path)
    assert "| `lm_step_b1` | 60 (120) | – | 160 (320) | – | – | **0.38** of moshi | 0.65 |" in shown
    assert "lm_step_b1: transformers: it broke" in shown
    assert "A CPU, 2 threads, float32, 2026-01-02; jax 0.10.0;" in shown


def test_the_table_marks_a_busy_machine(tmp_path: Path):
    busy = run_of("lm_step_b1", {"ours": measured(60), "moshi": measured(160, others_cores=0.5)})
    note = "other programs were running during lm_step_b1"
    assert note in table.block([results(tmp_path, busy)], tmp_path)
    assert note not in table.block([results(tmp_path, FOUND)], tmp_path)


def test_a_task_that_was_run_again_shows_its_last_figures(tmp_path: Path):
    again = run_of("lm_step_b1", {"ours": measured(60), "transformers": measured(120)})
    shown = table.block([results(tmp_path, FOUND + again)], tmp_path)
    assert "| `lm_step_b1` | 60 (120) | – | 160 (320) | 120 (240) | – | **0.50** of transformers | 0.65 |" in shown
    assert "it broke" not in shown


def test_peak_memory_has_a_line(tmp_path: Path):
    found = run_of("transcribe_45s", {"ours": measured(50, 120), "moshi": measured(100, 100)})
    shown = table.block([results(tmp_path, found)], tmp_path)
    assert "| `transcribe_45s`, peak MB | 120 | – | 100 | – | – | **1.20** of moshi | 1.00 |" in shown


def test_the_gpu_table_pairs_a_conversations_steps_with_those_of_transformers(tmp_path: Path):
    found = [
        {"bench": f"csm_{step}", "size": "csm-1b", "who": who, "batch": 8, **ABOUT} | gpu_worker.timing([seconds], 8)
        for step, who, seconds in (
            *(("frame", "ours", 0.1), ("frame", "transformers", 0.4)),
            *(("prefill", "ours", 0.03), ("prefill", "transformers", 0.02), ("frame", "moshi", 0.1)),
        )
    ]
    *_, prefill, frame = table.gpu_table(found).splitlines()
    assert prefill == "| csm-1b, a prompt of 64, 8 | 30 (30) | 20 (20) | **1.50** of transformers | – | – |"
    assert frame == "| csm-1b, 8 | 100 (100) | 400 (400) | **0.25** of transformers | no | – |"


def test_the_gpu_table_pairs_ours_and_moshi(tmp_path: Path):
    head = {"bench": "stt_step", "size": "stt-1b", "share_of_limit": 0.5, **ABOUT}
    ours, moshi = ({"who": who} | head | gpu_worker.timing([s], 1) for who, s in (("ours", 0.01), ("moshi", 0.04)))
    found = [ours | {"batch": batch} for batch in (1, 64)] + [moshi | {"batch": 1}]
    found += [head | {"who": "moshi", "batch": 64, "error": "full"}, {"part": "check", "error": "late"}]
    shown = table.block([results(tmp_path, found)], tmp_path)
    assert "| stt-1b, 1 | 10 (10) | 40 (40) | **0.25** of moshi | yes | 50 % |" in shown
    assert "| stt-1b, 64 | 10 (10) | – | – | yes | 50 % |" in shown
    assert "\n\nA dash marks what was not measured.\n" in shown


@pytest.mark.parametrize("found", [[], [FOUND[0] | {"tiny": True}]])
def test_a_run_of_miniature_models_makes_no_table(tmp_path: Path, found: list[rows.Row]):
    with pytest.raises(ValueError, match=r"of miniature models or none; give a full run"):
        table.block([results(tmp_path, found)], tmp_path)


def test_only_what_is_between_the_markers_is_rewritten(tmp_path: Path):
    text = f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n"
    assert table.rewrite(text, "new") == f"before\n{table.BEGIN}\nnew\n{table.END}\nafter\n"
    with pytest.raises(ValueError, match=r"found 0 .* expected one of each: add them"):
        table.rewrite("no markers", "new")


def test_a_changed_table_and_changed_results_are_noticed(tmp_path: Path):
    name = results(tmp_path, FOUND)
    text = table.rewrite(f"{table.BEGIN}{table.END}", table.block([name], tmp_path))
    assert table.is_current(text, tmp_path)
    assert not table.is_current(text.replace("0.38", "0.18"), tmp_path)
    assert not table.is_current(table.rewrite(text, "| numbers | from nowhere |"), tmp_path)
    results(tmp_path, FOUND[:1])
    assert not table.is_current(text, tmp_path)


def test_the_table_may_be_empty_until_there_are_results(tmp_path: Path):
    (tmp_path / table.RESULTS).mkdir(parents=True)
    assert table.is_current("no markers", tmp_path)
    assert table.is_current(f"{table.BEGIN}\n{table.END}", tmp_path)
    results(tmp_path / table.RESULTS, FOUND)
    assert not table.is_current(f"{table.BEGIN}\n{table.END}", tmp_path)


def test_the_table_in_the_readme_is_what_the_stored_results_give():
    assert table.is_current(README.read_text())


# The GPU script.


def attempts(capacity: int, broken_at: int | None = None) -> tuple[list[int], rows.Row]:
    def attempt(batch: int) -> rows.Row:
        if batch == broken_at:
            return {"batch": batch, "error": "no time left"}
        return {"batch": batch} | ({} if batch <= capacity else {"error": "out of memory"})

    *tried, summary = gpu.largest(attempt, 1024, 64)
    return [row["batch"] for row in tried], summary


@pytest.mark.parametrize(
    "capacity, tried, fits, fails",
    [
        (1300, [1024, 2048, 1536, 1280, 1408, 1344], 1280, 1344),
        (700, [1024, 512, 768, 640, 704], 640, 704),
        (10, [1024, 512, 256, 128, 64], 0, 64),
        (10**9, [1024, 2048, 4096, 8192, 16384], 16384, None),
    ],
)
def test_the_largest_batch_is_bracketed(capacity: int, tried: list[int], fits: int, fails: int | None):
    assert attempts(capacity) == (tried, {"bench": "largest", "fits": fits, "does_not_fit": fails})


def test_an_attempt_that_failed_otherwise_ends_the_search():
    tried, summary = attempts(1300, broken_at=1536)
    assert tried == [1024, 2048, 1536]
    assert (summary["fits"], summary["does_not_fit"]) == (1024, 2048)


@pytest.mark.parametrize("slowest_s, streams", [(0.079, 64), (0.5, 0)])
def test_streams_keep_up_when_the_slowest_frames_do(slowest_s: float, streams: int):
    assert gpu_worker.timing([0.01] * 98 + [slowest_s] * 2, 64)["streams"] == streams


def test_the_first_batch_that_does_not_fit_is_the_last(capsys: pytest.CaptureFixture[str]):
    def run(batch: int) -> rows.Row:
        if batch == 2:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
        return {"p50_ms": 1.0}

    gpu_worker.each_batch({"size": "stt-1b"}, [1, 2, 3], run)
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert found == [
        {"size": "stt-1b", "batch": 1, "p50_ms": 1.0},
        {"size": "stt-1b", "batch": 2, "error": "out of memory"},
    ]


def test_the_check_of_a_device_catches_a_wrong_code_a_wrong_sample_and_a_wrong_token():
    codes, pcm = np.arange(160).reshape(1, 4, 40), np.linspace(-1, 1, 64)
    wrong_codes, wrong_pcm = codes.copy(), pcm.copy()
    wrong_codes[0, 3, 7] = 0
    wrong_pcm[5] += 2e-4
    pair = {"cpu": codes, "device": codes}
    assert gpu_worker.codec_row("miniature", pair, {"cpu": pcm, "device": pcm})["passed"]
    assert not gpu_worker.codec_row("miniature", pair | {"device": wrong_codes}, {"cpu": pcm, "device": pcm})["passed"]
    assert not gpu_worker.codec_row("miniature", pair, {"cpu": pcm, "device": wrong_pcm})["passed"]
    assert gpu_worker.lm_row(pair)["passed"]
    assert not gpu_worker.lm_row(pair | {"device": wrong_codes})["passed"]


@pytest.mark.parametrize(
    ("p99", "errors", "dropped", "streams"), [(79, 0, 0, 4), (81, 0, 0, 0), (79, 1, 0, 0), (79, 0, 1, 0)]
)
def test_a_server_holds_its_streams_where_every_frame_is_answered_in_time(
    p99: float, errors: int, dropped: int, streams: int
):
    none, tail = Tail.of([]), Tail(p50=10, p95=20, p99=p99, max=500)
    failed = {"full": errors} if errors else {}
    report = Report(4, 20, 1000, dropped, failed, tail, none, none, none, Tail(p50=1, p95=1, p99=1, max=1))
    found = gpu_serving.row(report)
    assert found == {
        **{"batch": 4, "p50_ms": 10, "p95_ms": 20, "p99_ms": p99, "frames": 1000, "busy": False},
        **{"dropped": dropped, "errors": errors, "streams": streams},
    }
    shown = table.gpu_table([{"bench": "serve", "size": "stt-1b", "who": "ours"} | ABOUT | found])
    assert shown.endswith(f"| stt-1b served, 4 | 10 ({p99}) | – | – | {'yes' if streams else 'no'} | – |")


@pytest.mark.slow
def test_random_weights_are_saved_as_a_model_that_a_server_loads(tmp_path: Path):
    digits = dsm_jax.load("digits")
    model = dsm_jax.load(gpu_serving.save_random(digits.config, tmp_path, "bfloat16"), dtype="bfloat16")
    assert (model.config, model.num_parameters, model.dtype) == (digits.config, digits.num_parameters, "bfloat16")
    assert model.tokenizer is not None
    assert model.tokenizer.size == model.config.lm.text_card


@pytest.mark.slow
def test_the_bytes_of_a_step_are_weights_without_tables_and_keys_and_values():
    half, full = (gpu_worker.bytes_per_step(presets.STT_1B, 1, itemsize) for itemsize in (2, 4))
    keys_values = 750 * 16 * 2 * 2048
    assert gpu_worker.bytes_per_step(presets.STT_1B, 3, 2) - half == 2 * 2 * keys_values
    tensors = [line.split("\t") for line in (PUBLISHED / "stt-1b-en_fr.tensors.tsv").read_text().splitlines()]
    weights = sum(math.prod(map(int, shape.split("x"))) for name, _, shape in tensors if "emb." not in name)
    assert (full - half) // 2 - keys_values == weights
    # What is left is Mimi's, in float32: less than its whole file, more than its 32 codebooks.
    assert 32 * 2048 * 256 * 4 < half - 2 * (weights + keys_values) < 370e6

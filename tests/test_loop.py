"""A training run in its folder: metrics, checkpoints, plot, and resuming."""

import dataclasses
import itertools
import json
import logging
import os
import re
from pathlib import Path

import numpy as np
import pytest

from dsm_jax.errors import ConfigError, TrainingError
from dsm_jax.progress import Progress
from dsm_jax.training.loop import Run, RunConfig
from dsm_jax.training.step import TrainState
from tests.helpers.small_run import CONFIG, STEP, assert_same, checkpoints, data, evaluate, metrics, start, stopped


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, TrainState]:
    """Run without a stop."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, Run(folder, CONFIG).train(STEP, start(), data(), evaluate=evaluate)


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "saved"), [(4, 4), (7, 4), (9, 8)])
def test_a_resumed_run_ends_bit_for_bit_like_one_that_never_stopped(tmp_path, whole, steps, saved):
    run = stopped(tmp_path, steps)
    assert run.latest() == saved
    state = run.restore(start())
    assert int(state.step) == saved
    state = run.train(STEP, state, data(saved), evaluate=evaluate)
    assert_same(state, whole[1])
    assert metrics(tmp_path) == metrics(whole[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", [b"caf\xe9", b"$x^$ [1]"])
def test_a_run_lies_in_a_folder_of_any_name(tmp_path, whole, name):
    folder = tmp_path / os.fsdecode(name)
    run = stopped(folder, 4)
    assert_same(run.train(STEP, run.restore(start()), data(4), evaluate=evaluate), whole[1])
    assert (folder / "curve.png").is_file()


@pytest.mark.slow
def test_metrics_after_the_last_checkpoint_are_dropped_on_resume(tmp_path):
    run = stopped(tmp_path, 7)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # truncated as by a full disk
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows[:-1]] == [2, 4, 6]
    run.train(STEP, run.restore(start()), data(4))
    assert [row["step"] for row in metrics(tmp_path)] == [2, 4, 6, 8, 10]


@pytest.mark.slow
@pytest.mark.parametrize("line", [b"[1]", b'{"loss": 1}', b'{"step": "2"}', b"3", b"\xff"])
def test_lines_that_are_no_records_are_dropped_on_resume(tmp_path, line):
    run = stopped(tmp_path, 5)
    wanted = metrics(tmp_path)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(line + b"\n")
    run.train(STEP, run.restore(start()), data(4))
    assert metrics(tmp_path)[: len(wanted)] == wanted
    assert [row["step"] for row in metrics(tmp_path)] == [2, 4, 6, 8, 10]


@pytest.mark.slow
def test_a_run_writes_metrics_the_last_checkpoints_and_a_plot(whole):
    folder, state = whole
    rows = metrics(folder)
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10]
    assert all({"loss", "gradient_norm"} <= row.keys() for row in rows)
    assert [row["step"] for row in rows if "validation_w" in row] == [4, 8, 10]
    assert rows[-1]["validation_w"] == pytest.approx(evaluate(state)["validation_w"])
    assert checkpoints(folder) == ["10", "8"]
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert sorted(p.name for p in folder.iterdir()) == ["checkpoints", "curve.png", "metrics.jsonl"]
    assert_same(Run(folder, CONFIG).restore(start()), state)


@pytest.mark.slow
def test_a_record_is_the_mean_of_the_steps_since_the_last_record(tmp_path):
    losses, state = [], start()
    for batch in itertools.islice(data(), 10):
        state, found = STEP(state, batch)
        losses.append(float(found["loss"]))
    Run(tmp_path, dataclasses.replace(CONFIG, log_every=3)).train(STEP, start(), data())
    spans = [(0, 3), (3, 4), (4, 6), (6, 8), (8, 9), (9, 10)]
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == [end for _, end in spans]
    assert [row["loss"] for row in rows] == pytest.approx([np.mean(losses[a:b]) for a, b in spans], rel=1e-6)


@pytest.mark.slow
def test_a_run_that_is_stopped_in_an_evaluation_keeps_the_record_of_its_checkpoint(tmp_path, whole):
    def interrupted(state: TrainState) -> dict[str, float]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Run(tmp_path, CONFIG).train(STEP, start(), data(), evaluate=interrupted)
    run = Run(tmp_path, CONFIG)
    run.train(STEP, run.restore(start()), data(4), evaluate=evaluate)
    wanted = metrics(whole[0])
    del wanted[1]["validation_w"]
    assert metrics(tmp_path) == wanted


def test_metrics_that_are_not_finite_are_null(tmp_path):
    run = Run(tmp_path, dataclasses.replace(CONFIG, steps=4))
    run.train(STEP, start(), data(), evaluate=lambda state: {"validation_x": float("nan")})
    assert [row.get("validation_x", 0) for row in metrics(tmp_path)] == [0, None]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_resuming_a_finished_run_returns_its_state(tmp_path):
    run = Run(tmp_path, CONFIG)
    state = run.train(STEP, start(), data())
    before = metrics(tmp_path)
    assert_same(run.train(STEP, run.restore(start()), data(10)), state)
    assert (metrics(tmp_path), checkpoints(tmp_path)) == (before, ["10", "8"])


def test_a_folder_with_a_later_checkpoint_is_refused(tmp_path):
    stopped(tmp_path, 5)
    before = metrics(tmp_path)
    with pytest.raises(TrainingError, match=r"holds a checkpoint of step 4, and this run would begin at step 0"):
        Run(tmp_path, CONFIG).train(STEP, start(), data())
    assert (metrics(tmp_path), checkpoints(tmp_path)) == (before, ["4"])


@pytest.mark.slow
@pytest.mark.parametrize(("keep", "left"), [(1, ["10"]), (3, ["10", "4", "8"])])
def test_the_last_keep_checkpoints_are_kept(tmp_path, keep, left):
    Run(tmp_path, dataclasses.replace(CONFIG, keep=keep)).train(STEP, start(), data())
    assert checkpoints(tmp_path) == left


@pytest.mark.parametrize("name", ["steps", "log_every", "save_every", "keep"])
def test_settings_of_a_run_below_1_are_refused(name):
    with pytest.raises(ConfigError, match=f"{name} of a run is 0; give 1 or more"):
        RunConfig(**{"steps": 1, name: 0})


@pytest.mark.slow
def test_each_record_is_logged_and_nothing_is_printed(tmp_path, capsys, caplog):
    with caplog.at_level(logging.INFO, "dsm_jax"):
        Run(tmp_path / "digits", CONFIG).train(STEP, start(), data(), evaluate=evaluate)
    assert capsys.readouterr() == ("", "")
    lines = [record.getMessage() for record in caplog.records if record.name == "dsm_jax.training"]
    assert [line.split(": ")[1] for line in lines] == [f"step {step} of 10" for step in (2, 4, 6, 8, 10)]
    number = r"[\d.e+-]+"
    values = f"loss {number}, gradient_norm {number}, seconds_per_step {number}, validation_w {number}"
    assert re.fullmatch(f"digits: step 4 of 10: {values}", lines[1])


@pytest.mark.slow
def test_every_step_is_reported_with_those_before_a_resumption(tmp_path):
    reports: list[Progress] = []
    stopped(tmp_path, 5, reports.append)
    assert reports == [Progress(step, 10) for step in range(6)]
    del reports[:]
    run = Run(tmp_path, CONFIG, reports.append)
    state = run.train(STEP, run.restore(start()), data(4))
    assert reports == [Progress(step, 10) for step in range(4, 11)]
    Run(tmp_path, CONFIG).train(STEP, state, iter(()))
    assert reports[-1] == Progress(10, 10)
    assert len(reports) == 7, "a run without a callback reports to nobody"

"""Failures of a training run: each is a clear error, and the saved checkpoints are kept."""

import dataclasses
import errno
import itertools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest

from dsm_jax import audio
from dsm_jax.errors import AudioError, TrainingError
from dsm_jax.progress import Progress
from dsm_jax.training.loop import Run
from dsm_jax.training.step import TrainState, init
from tests.helpers.small_run import (
    BAD_STEP,
    CONFIG,
    STEP,
    Rows,
    assert_same,
    checkpoints,
    data,
    evaluate,
    metrics,
    start,
    stopped,
)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_step(tmp_path, bad):
    config = dataclasses.replace(CONFIG, save_every=BAD_STEP - 1, log_every=100)
    match = rf"not finite at step {BAD_STEP} \(loss {bad}\); that step was not taken.* the last one is of step "
    with pytest.raises(TrainingError, match=match + str(BAD_STEP - 1)):
        Run(tmp_path, config).train(STEP, start(), data(rows=Rows(bad)))
    wanted = start()
    for batch in itertools.islice(data(), BAD_STEP - 1):
        wanted, _ = STEP(wanted, batch)
    assert_same(Run(tmp_path, config).restore(start()), wanted)


def test_a_recording_that_is_cut_short_ends_the_run_with_its_name(tmp_path):
    path = tmp_path / "word.flac"
    audio.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 24_000), 24_000)
    path.write_bytes(path.read_bytes()[:20_000])
    run = Run(tmp_path, dataclasses.replace(CONFIG, save_every=BAD_STEP - 1))
    with pytest.raises(AudioError, match=r"word.flac"):
        run.train(STEP, start(), data(rows=Rows(lambda: audio.read(path, strict=True))))
    assert int(run.restore(start()).step) == BAD_STEP - 1


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error", "word.flac"), RuntimeError("word.flac: error")]
)
def test_a_row_that_cannot_be_read_ends_the_run_and_names_the_step(tmp_path, error):
    def fail() -> None:
        raise error

    run = Run(tmp_path, dataclasses.replace(CONFIG, save_every=BAD_STEP - 1))
    match = rf"the batch of step {BAD_STEP} could not be read \(.*flac.*\); fix that, then continue with --resume. "
    with pytest.raises(TrainingError, match=match + f"Of the checkpoints, the last one is of step {BAD_STEP - 1}"):
        run.train(STEP, start(), data(rows=Rows(fail)))
    assert int(run.restore(start()).step) == BAD_STEP - 1


def test_a_full_disk_while_saving_leaves_the_checkpoints_before(tmp_path, monkeypatch):
    run = stopped(tmp_path, 4)
    before, wanted = run.restore(start()), run.restore(start())

    def save(_, folder: Path, state: TrainState) -> None:
        part = folder.with_name(f"{folder.name}.orbax-checkpoint-tmp")
        part.mkdir(parents=True)
        (part / "_METADATA").write_text("{")
        raise OSError(errno.ENOSPC, "No space left on device", str(part))

    monkeypatch.setattr(orbax.checkpoint.StandardCheckpointer, "save", save)
    with pytest.raises(TrainingError) as caught:
        run.train(STEP, before, data(4))
    monkeypatch.undo()
    assert str(caught.value) == (
        f"the checkpoint of step 8 could not be written to {tmp_path}/checkpoints (No space left on device); the last "
        "one is of step 4. Fix that, then continue with --resume"
    )
    assert checkpoints(tmp_path) == ["4"]
    assert_same(run.restore(start()), wanted)


def test_a_checkpoint_larger_than_the_free_disk_is_not_started(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 3))
    with pytest.raises(TrainingError, match=r"\(it needs 0 MB and the disk has 0 MB free\); there is none before it"):
        Run(tmp_path, CONFIG).train(STEP, start(), data())
    assert checkpoints(tmp_path) == []


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (3, "there is none before it; start again"),
        (6, "the last one is of step 4; continue with --resume"),
    ],
)
def test_a_run_that_is_stopped_by_hand_says_how_to_go_on(tmp_path, caplog, step, message):
    def interrupted(progress: Progress) -> None:
        if progress.done == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Run(tmp_path, CONFIG, interrupted).train(STEP, start(), data())
    assert caplog.messages[-1] == f"{tmp_path.name}: stopped at step {step}. Of the checkpoints, {message}"


def test_a_run_that_fails_before_its_first_checkpoint_is_to_start_again(tmp_path):
    with pytest.raises(TrainingError, match=r"then start again\. Of the checkpoints, there is none before it$"):
        Run(tmp_path, dataclasses.replace(CONFIG, save_every=10)).train(STEP, start(), data(rows=Rows(float("nan"))))


CHILD = """
import os, resource, signal, sys
from pathlib import Path
from tests.helpers import small_run as t

def fault(state):
    if sys.argv[2] == "limit":  # writing beyond this file size fails, as on a full disk
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
    else:  # the process dies where Orbax would give the finished folder its name
        os.rename = os.replace = lambda *_, **__: os._exit(9)
    return {"validation_w": t.evaluate(state)["validation_w"]}

t.Run(Path(sys.argv[1]), t.CONFIG).train(t.STEP, t.start(), t.data(), evaluate=fault)
"""


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["limit", "kill"])
def test_a_process_that_dies_while_saving_is_resumed_from_the_checkpoint_before(tmp_path, fault):
    root = Path(__file__).resolve().parents[1]
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path), fault], cwd=root, capture_output=True, text=True, timeout=300
    )
    if fault == "limit":
        assert child.returncode == 1
        wanted = (
            r"TrainingError: the checkpoint of step 8 could not be written .*\(.*File too large.*\); the last one is"
        )
        assert re.search(wanted, child.stderr), child.stderr
        assert checkpoints(tmp_path) == ["4"]
    else:
        assert child.returncode == 9, child.stderr
        left = [name for name in checkpoints(tmp_path) if name != "4"]
        assert len(left) == 1, "the folder was not whole yet"
        assert not left[0].isdecimal()
    run = Run(tmp_path, CONFIG)
    assert run.latest() == 4
    never_died = Run(tmp_path / "whole", CONFIG).train(STEP, start(), data(), evaluate=evaluate)
    assert_same(run.train(STEP, run.restore(start()), data(4), evaluate=evaluate), never_died)
    assert (metrics(tmp_path), checkpoints(tmp_path)) == (metrics(tmp_path / "whole"), ["10", "8"])


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    run = Run(tmp_path, CONFIG)
    with pytest.raises(TrainingError, match=r"holds no checkpoint to resume from; start without --resume"):
        run.restore(start())
    run.save(start())
    of_this_run, other = start(), init({"w_D": jnp.ones(3)}, optax.sgd(0.1), 0, aux={"mean": jnp.zeros(())})
    for like, fault in (
        (start(width=4), r"optimizer.*mu.w_D is float32 \[3\], expected float32 \[4\], and 2 more"),
        (other, r"optimizer.* is int32 \[\], expected nothing, and 3 more"),
        (
            dataclasses.replace(of_this_run, params={"w_D": jnp.ones(3, jnp.bfloat16)}),
            r"params.w_D is float32 \[3\], expected bfloat16 \[3\]",
        ),
        (
            dataclasses.replace(of_this_run, aux={"of": jnp.zeros(())}),
            r"aux.mean is float32 \[\], expected nothing, and 1 more",
        ),
    ):
        match = rf"{tmp_path}/checkpoints/0 does not fit this run \({fault}\); resume with the config that it was made"
        with pytest.raises(TrainingError, match=match):
            run.restore(like)
    with pytest.raises(
        TrainingError, match=r"step 0 could not be written .*already exists.*; the last one is of step 0"
    ):
        run.save(start())
    assert_same(run.restore(start()), start())


def test_a_damaged_checkpoint_is_an_error_that_names_it(tmp_path):
    run = stopped(tmp_path, 8)
    for path in (tmp_path / "checkpoints/8").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    with pytest.raises(
        TrainingError, match=r"checkpoints/8 cannot be read \(.+\); remove it to resume from the one before"
    ):
        run.restore(start())
    shutil.rmtree(tmp_path / "checkpoints/8")
    assert int(run.restore(start()).step) == 4


@pytest.mark.parametrize("name", ["grain", "matplotlib", "PIL"])
def test_a_library_that_is_missing_is_named_before_the_first_step(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        TrainingError, match=rf"^training needs {name}, which is not installed; run: pip install 'dsm-j"
    ):
        Run(tmp_path / "run", CONFIG)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_metrics_and_plots_that_cannot_be_written_are_errors(tmp_path):
    def fill_disk(_: TrainState) -> dict[str, float]:
        (tmp_path / "metrics.jsonl").unlink()
        (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
        return {}

    run = Run(tmp_path, CONFIG)
    match = r"metrics.jsonl could not be written \(No space left on device\); fix that, then continue with --resume"
    with pytest.raises(TrainingError, match=match):
        run.train(STEP, start(), data(), evaluate=fill_disk)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "curve.png").symlink_to("/dev/full")
    with pytest.raises(TrainingError, match=r"curve.png could not be written \(No space left on device\)"):
        run.train(STEP, run.restore(start()), data(4))
    assert run.latest() == 10
    (tmp_path / "file").touch()
    with pytest.raises(TrainingError, match=r"file/run cannot be made \(Not a directory\); choose another folder"):
        Run(tmp_path / "file/run", CONFIG)


def test_a_run_in_a_folder_with_brackets_in_its_name_is_resumed(tmp_path):
    run = Run(tmp_path / "run [1]", dataclasses.replace(CONFIG, save_every=2, steps=2))
    trained = run.train(STEP, start(), data())
    assert_same(Run(tmp_path / "run [1]", CONFIG).restore(start()), trained)

"""`dsm-jax train`: a task and its settings from a JSON file, and errors in one line."""

import json
import logging
import re
from pathlib import Path

import pytest
import rich.console

from dsm_jax import cli, tasks
from dsm_jax.cli import terminal
from dsm_jax.errors import ConfigError
from dsm_jax.progress import ProgressCallback
from dsm_jax.tasks import library_tasks, read_config
from dsm_jax.training.finetune import FinetuneConfig, finetune
from dsm_jax.training.loop import Run
from dsm_jax.training.lora import LoraConfig
from tests.helpers.small_run import CONFIG, STEP, data, start


def write(folder: Path, text: str) -> Path:
    path = folder / "train.json"
    path.write_text(text, encoding="utf-8")
    return path


def test_settings_are_read_and_paths_are_relative_to_the_file(tmp_path):
    values = {"task": "finetune", "data": "a", "output": "b", "run": {"steps": 3}, "lora": {"rank": 2}}
    config, run = read_config(write(tmp_path, json.dumps(values)), library_tasks())
    assert run is finetune
    assert isinstance(config, FinetuneConfig)
    assert (config.data, config.output) == (str(tmp_path / "a"), str(tmp_path / "b"))
    assert (config.run.steps, config.lora) == (3, LoraConfig(rank=2))


def test_a_path_in_the_home_folder_is_not_relative_to_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    values = {"task": "finetune", "data": "~/a", "output": "~/b", "run": {"steps": 3}}
    config, _ = read_config(write(tmp_path, json.dumps(values)), library_tasks())
    assert (config.data, config.output) == (str(tmp_path / "home/a"), str(tmp_path / "home/b"))


def test_a_config_given_in_part_takes_the_defaults_of_the_task(tmp_path):
    values = {"task": "finetune", "data": "a", "output": "b", "run": {"steps": 3}, "optimizer": {"clip": 0.5}}
    config, _ = read_config(write(tmp_path, json.dumps(values)), library_tasks())
    assert config.optimizer.learning_rate == 5e-5  # the default of fine-tuning, not that of `OptimizerConfig`


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"train.json: this is no JSON \(.* at line 1, column 2\); expected \{\"task\": TASK, ...\}$"),
        ("[" * 100_000, r"train.json: this is no JSON \(it is nested too deeply at "),
        (
            '{"task": ' + "1" * 5_000 + "}",
            r"train.json: this is no JSON \(a number has too many digits at ",
        ),
        ('{"task": ["finetune"]}', r"train.json: the task is \['finetune'\]; choose one of"),
        (
            f'{{"task": "finetune", "data": "a", "output": "b", "run": {{"steps": 3}}, "seconds": {10**400}}}',
            r"seconds is too large",
        ),
        ("[]", r"train.json: the task is \[\]; choose one of \['finetune'\]"),
        ('{"data": "a"}', r"the task is None; choose one of"),
        ('{"task": "cook"}', r"the task is 'cook'; choose one of"),
        (
            '{"task": "finetune", "data": "a", "output": "b", "run": {"steps": 3}, "sed": 1}',
            r"unknown keys \['sed'\]; remove them, or use",
        ),
        (
            '{"task": "finetune", "data": "a", "output": "b", "run": {"keep": 1}}',
            r"run: the keys \['steps'\] are missing; RunConfig needs them",
        ),
        ('{"task": "finetune", "data": "a"}', r"the keys \['output', 'run'\] are missing; FinetuneConfig needs them"),
        ('{"task": "finetune", "data": "a", "output": "b", "run": {"steps": "x"}}', r"steps is 'x'; expected int"),
    ],
)
def test_a_faulty_config_file_is_an_error(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read_config(write(tmp_path, text), library_tasks())


def test_the_command_line_prints_an_error_in_one_line(tmp_path, capsys):
    assert cli.main(["train", str(tmp_path / "gone.json"), "--no-cache"]) == 2
    assert "gone.json cannot be read (No such file or directory); give a JSON file" in capsys.readouterr().err


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """Return a function that runs `dsm-jax train` on a regression of ten steps, and returns standard error."""

    def regression(config: FinetuneConfig, *, resume: bool, progress: ProgressCallback) -> str:
        logging.getLogger("dsm_jax").info("compiled a step")
        logging.getLogger("dsm_jax").warning("a recording is short")
        Run(tmp_path / "digits", CONFIG, progress).train(STEP, start(), data())
        return "the model"

    monkeypatch.setattr(tasks, "library_tasks", lambda: {"finetune": (FinetuneConfig, regression)})
    path = write(tmp_path, json.dumps({"task": "finetune", "data": "a", "output": "b", "run": {"steps": 10}}))

    def run(*options: str) -> str:
        assert cli.main(["train", str(path), "--no-cache", *options]) == 0
        out, err = capsys.readouterr()
        assert out == ""
        return err

    return run


STEPS = [f"dsm-jax: digits: step {step} of 10" for step in (2, 4, 6, 8, 10)]


@pytest.mark.slow
def test_off_a_terminal_the_records_are_lines(train):
    lines = train().splitlines()
    assert [line.partition(": loss ")[0] for line in lines] == [
        "dsm-jax: a recording is short",
        *STEPS,
        "trained: 'the model'",
    ]


@pytest.mark.slow
def test_verbose_adds_what_is_compiled(train):
    lines = train("--verbose").splitlines()
    assert lines[:2] == ["dsm-jax: compiled a step", "dsm-jax: a recording is short"]
    assert [line.partition(": loss ")[0] for line in lines[2:7]] == STEPS


def test_quiet_leaves_errors_alone_and_the_log_as_it_was(train):
    log = logging.getLogger("dsm_jax")
    before = log.level, list(log.handlers)
    assert train("--quiet") == ""
    assert (log.level, log.handlers) == before


@pytest.fixture
def on_a_terminal(monkeypatch):
    """Let standard error be a terminal, for which rich looks once."""
    monkeypatch.setattr(rich.console.Console, "is_terminal", True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    terminal.console.cache_clear()
    yield
    terminal.console.cache_clear()


@pytest.mark.slow
@pytest.mark.usefixtures("on_a_terminal")
def test_on_a_terminal_there_is_a_bar_and_the_records_are_lines_above_it(train):
    shown = re.sub(r"\x1b\[[\d;]*m", "", train())  # without colours
    assert "training" in shown
    assert "10 steps" in shown
    for step in STEPS:
        assert re.search(rf"(^|\n|\r\x1b\[2K){step}: loss [^\n]*\n", shown), step


@pytest.mark.slow
@pytest.mark.usefixtures("on_a_terminal")
def test_quiet_shows_no_bar(train):
    assert train("--quiet") == ""

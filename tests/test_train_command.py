"""`dsm-jax train`: a task and its settings from a JSON file, and errors in one line."""

import json
from pathlib import Path

import pytest

from dsm_jax import cli
from dsm_jax.errors import ConfigError
from dsm_jax.tasks import library_tasks, read_config
from dsm_jax.training.finetune import FinetuneConfig, finetune
from dsm_jax.training.lora import LoraConfig


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


def test_a_config_given_in_part_takes_the_defaults_of_the_task(tmp_path):
    values = {"task": "finetune", "data": "a", "output": "b", "run": {"steps": 3}, "optimizer": {"clip": 0.5}}
    config, _ = read_config(write(tmp_path, json.dumps(values)), library_tasks())
    assert config.optimizer.learning_rate == 5e-5  # the default of fine-tuning, not that of `OptimizerConfig`


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"train.json is not JSON \(.*\); fix it"),
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

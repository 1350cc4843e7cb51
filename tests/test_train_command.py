"""`dsm-jax train`: a task and its settings from a JSON file, or a sentence that says what is wrong with it."""

import dataclasses
import json
from pathlib import Path

import pytest

from dsm_jax import cli
from dsm_jax.errors import ConfigError
from dsm_jax.training.command import read_config
from dsm_jax.training.finetune import FinetuneConfig, finetune
from dsm_jax.training.lora import LoraConfig
from dsm_jax.training.recipe import DigitsConfig, train_digits
from dsm_jax.training.speaking import train_speaking

ROOT = Path(__file__).resolve().parents[1]


def write(folder: Path, text: str) -> Path:
    path = folder / "train.json"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_recipe_of_digits_is_read():
    config, run = read_config(ROOT / "recipes/digits.json")
    assert run is train_digits
    assert isinstance(config, DigitsConfig)
    assert Path(config.output).resolve() == ROOT / "out/digits"


def test_the_recipe_of_the_model_that_speaks_is_read():
    config, run = read_config(ROOT / "recipes/digits-tts.json")
    assert run is train_speaking
    assert Path(config.output).resolve() == ROOT / "out/digits-tts"


def test_settings_are_read_and_paths_are_relative_to_the_file(tmp_path):
    values = {"task": "finetune", "data": "a", "output": "b", "run": {"steps": 3}, "lora": {"rank": 2}}
    config, run = read_config(write(tmp_path, json.dumps(values)))
    assert run is finetune
    assert isinstance(config, FinetuneConfig)
    assert (config.data, config.output) == (str(tmp_path / "a"), str(tmp_path / "b"))
    assert (config.run.steps, config.lora) == (3, LoraConfig(rank=2))


def test_a_config_given_in_part_is_for_the_rest_that_of_the_task(tmp_path):
    values = {"task": "digits", "data": "a", "output": "b", "hardened": {"run": {"steps": 20}, "mix": {"often": {}}}}
    config, _ = read_config(write(tmp_path, json.dumps(values)))
    hardened = DigitsConfig(data="a", output="b").hardened
    run, mix = dataclasses.replace(hardened.run, steps=20), dataclasses.replace(hardened.mix, often={})
    assert mix != hardened.mix
    assert config.hardened == dataclasses.replace(hardened, run=run, mix=mix)
    values = {"task": "finetune", "data": "a", "output": "b", "run": {"steps": 3}, "optimizer": {"clip": 0.5}}
    config, _ = read_config(write(tmp_path, json.dumps(values)))
    assert config.optimizer.learning_rate == 5e-5  # of fine-tuning, not that of `OptimizerConfig`


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"train.json is not JSON \(.*\); mend it"),
        ("[]", r"train.json: the task is \[\]; choose one of \['digits', 'digits-tts', 'finetune'\]"),
        ('{"data": "a"}', r"the task is None; choose one of"),
        ('{"task": "cook"}', r"the task is 'cook'; choose one of"),
        (
            '{"task": "digits", "data": "a", "output": "b", "sed": 1}',
            r"unknown keys \['sed'\]; remove them, or use",
        ),
        (
            '{"task": "finetune", "data": "a", "output": "b", "run": {"keep": 1}}',
            r"run: the keys \['steps'\] are missing; RunConfig needs them",
        ),
        ('{"task": "finetune", "data": "a"}', r"the keys \['output', 'run'\] are missing; FinetuneConfig needs them"),
        ('{"task": "digits", "data": "a", "output": "b", "seed": "x"}', r"seed is 'x'; expected int"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read_config(write(tmp_path, text))


def test_the_command_line_says_it_in_one_line(tmp_path, capsys):
    assert cli.main(["train", str(tmp_path / "gone.json"), "--no-cache"]) == 2
    assert "gone.json cannot be read (No such file or directory); give a JSON file" in capsys.readouterr().err

"""`python -m recipes.digits`: recipes by name or from a file, and errors in one line."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from dsm_jax.tasks import read_config
from recipes.digits import __main__ as command
from recipes.digits.stt import DigitsConfig, train_digits
from recipes.digits.tts import DigitsTtsConfig, train_digits_tts

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("name", "kind", "run"), [("digits", DigitsConfig, train_digits), ("digits-tts", DigitsTtsConfig, train_digits_tts)]
)
def test_a_recipe_is_found_by_its_name(name, kind, run):
    config, found = read_config(command.config_path(name), command.tasks_of_recipe())
    assert found is run
    assert isinstance(config, kind)
    assert Path(config.data).resolve() == ROOT / "data"
    assert Path(config.output).resolve() == ROOT / "out" / name


def test_a_config_given_in_part_takes_the_defaults_of_the_recipe(tmp_path):
    values = {
        "task": "digits",
        "data": "a",
        "output": "b",
        "codec_augmented": {"run": {"steps": 20}, "mix": {"oversampled": []}},
    }
    (tmp_path / "recipe.json").write_text(json.dumps(values))
    config, _ = read_config(command.config_path(str(tmp_path / "recipe.json")), command.tasks_of_recipe())
    stage = DigitsConfig(data="a", output="b").codec_augmented
    run, mix = dataclasses.replace(stage.run, steps=20), dataclasses.replace(stage.mix, oversampled=())
    assert mix != stage.mix
    assert config.codec_augmented == dataclasses.replace(stage, run=run, mix=mix)


@pytest.mark.slow
def test_missing_recordings_are_one_line_and_exit_code_2(tmp_path):
    values = {"task": "digits-tts", "data": "nowhere", "output": "out"}
    (tmp_path / "recipe.json").write_text(json.dumps(values))
    done = subprocess.run(
        [sys.executable, "-m", "recipes.digits", "train", str(tmp_path / "recipe.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("recipes.digits: ")
    assert "nowhere/fsdd holds no clips DIGIT_SPEAKER_NUMBER.flac" in line

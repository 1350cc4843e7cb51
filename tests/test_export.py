"""Writing a trained model: an error leaves nothing behind."""

import numpy as np
import pytest

import dsm_jax
from dsm_jax.errors import TrainingError
from dsm_jax.training import finetune
from tests.helpers import tts_model


@pytest.mark.slow
def test_write_model_leaves_nothing_behind_if_the_voices_cannot_be_written(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(finetune, "write_voices", full)
    model = dsm_jax.load(tts_model.make_checkpoint(tmp_path))
    with pytest.raises(
        TrainingError, match=r"could not be written \(.*No space left on device\); its parameters are in"
    ):
        finetune.write_model(model, tmp_path / "out", {"ann": np.zeros((1, 2), np.float32)})
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".model.*"))

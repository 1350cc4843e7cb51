"""Voices and guidance, as a model is told them. That the reference tells the same is in tests/parity/test_tts.py.

Shape letters: B batch rows, X steps of a voice, C its width, S slots.
"""

import dataclasses

import huggingface_hub
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from dsm_jax.checkpoints import Model
from dsm_jax.configs import Fuser, ModelConfig, ModelId
from dsm_jax.errors import CheckpointError, SpeechError
from dsm_jax.tts import voices
from tests.helpers import small

WIDTH, STEPS = 10, 3
MODEL_ID = ModelId(sig="abc123", epoch=7)
CONFIG = small.TTS
# As of a model that goes on from a recording.
SPEAKERLESS = dataclasses.replace(CONFIG, conditioners=CONFIG.conditioners[2:], fuser=Fuser(sum=("control",)))


def model(model_id: ModelId | None = None) -> Model:
    """As much of a model as a voice needs to know."""
    config = ModelConfig(model_type="tts", model_id=model_id)
    return Model(config, None, None, nnx.split(nnx.Module())[0], nnx.State({}), None, "none")


def voice(seed: int, steps: int = STEPS, width: int = WIDTH) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(steps, width)).astype(np.float32)


@pytest.fixture
def file(tmp_path):
    """Write a voice's file, or another of one tensor."""

    def write(tensor: np.ndarray, name: str = voices.WAVS):
        path = tmp_path / "voice.safetensors"
        save_file({name: np.ascontiguousarray(tensor)}, path)
        return path

    return write


@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_a_voice_is_read_from_a_file_steps_first(file, kind):
    path = file(voice(0).T[None].astype(kind))
    for given in (path, str(path)):
        read_XC = voices.read_voice(given, model())
        np.testing.assert_array_equal(read_XC, voice(0).astype(kind))
        assert read_XC.dtype == np.float32


def test_voices_that_were_written_are_read_again(tmp_path):
    voices.write_voices(tmp_path / "voices", {"anna": voice(0), "berta": voice(1, 4)})
    for name, written_XC in (("anna", voice(0)), ("berta", voice(1, 4))):
        read_XC = voices.read_voice(tmp_path / f"voices/{name}.safetensors", model())
        np.testing.assert_array_equal(read_XC, written_XC)


def test_a_file_of_the_home_folder_is_read(file, monkeypatch):
    monkeypatch.setenv("HOME", str(file(voice(0).T[None]).parent))
    np.testing.assert_array_equal(voices.read_voice("~/voice.safetensors", model()), voice(0))


def test_an_array_is_a_voice_already():
    read_XC = voices.read_voice(voice(0).astype(np.float64), model(MODEL_ID))
    np.testing.assert_array_equal(read_XC, voice(0))
    assert read_XC.dtype == np.float32


@pytest.mark.parametrize(
    ("given", "model_id"),
    [
        ("gone.safetensors", MODEL_ID),
        ("expresso/calm.wav", None),
        ("/gone/calm.wav", MODEL_ID),
        ("a" * 300, None),
    ],
)
def test_a_voice_that_is_not_there_is_refused(given, model_id):
    with pytest.raises(CheckpointError, match=f"^the voice {given} is not a file; give a voice's safetensors file$"):
        voices.read_voice(given, model(model_id))


def test_a_folder_is_no_voice(tmp_path):
    with pytest.raises(CheckpointError, match=f"^the voice {tmp_path} is not a file; give a voice's safetensors file$"):
        voices.read_voice(tmp_path, model(MODEL_ID))


def test_a_published_voice_is_fetched_by_its_name_for_the_model(file, monkeypatch):
    asked = []

    def download(*what: str) -> str:
        asked.append(what)
        return str(file(voice(0).T[None]))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    np.testing.assert_array_equal(voices.read_voice("expresso/calm.wav", model(MODEL_ID)), voice(0))
    assert asked == [("kyutai/tts-voices", "expresso/calm.wav.abc123@7.safetensors")]


def test_the_error_of_a_published_voice_without_network_names_the_network(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    message = (
        r"^kyutai/tts-voices/expresso/calm.wav.abc123@7.safetensors is not in the local cache and could not be "
        r"fetched: there is no network, or HF_HUB_OFFLINE or local_files_only is set; give a local file$"
    )
    with pytest.raises(CheckpointError, match=message):
        voices.read_voice("expresso/calm.wav", model(MODEL_ID))


@pytest.mark.parametrize(
    ("name", "shape", "found"),
    [
        ("weight", (4, 3), r"\['weight'\]"),
        (voices.WAVS, (4, 3), r"\['speaker_wavs'\] of shape \[4, 3\]"),
        (voices.WAVS, (2, 4, 3), r"\['speaker_wavs'\] of shape \[2, 4, 3\]"),
    ],
)
def test_a_file_of_other_tensors_is_refused(file, name, shape, found):
    message = f"voice.safetensors holds {found}; a voice holds speaker_wavs \\[1, width, steps\\]$"
    with pytest.raises(CheckpointError, match=message):
        voices.read_voice(file(np.ones(shape, np.float32), name), model())


def test_the_error_for_a_model_in_place_of_a_voice_names_a_few_tensors(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({f"emb.{q}.weight": np.zeros((2, 2), np.float32) for q in range(9)}, path)
    match = r"holds \['emb.0.weight', 'emb.1.weight', 'emb.2.weight'\] and 6 more; a voice holds speaker_wavs"
    with pytest.raises(CheckpointError, match=match):
        voices.read_voice(path, model())


@pytest.mark.parametrize("content", [b"", b"RIFF\x24\x00\x00\x00WAVEfmt "])
def test_a_recording_is_no_voice(tmp_path, content):
    (tmp_path / "me.wav").write_bytes(content)
    message = r"me.wav is not a safetensors file .*; models that go on from a recording have no speakers$"
    with pytest.raises(CheckpointError, match=message):
        voices.read_voice(tmp_path / "me.wav", model(MODEL_ID))


@pytest.mark.parametrize(
    ("steps", "shape"),
    [
        (np.ones((2, 3, 4)), r"\[2, 3, 4\]"),
        (np.ones(3), r"\[3\]"),
        (np.ones((0, WIDTH)), r"\[0, 10\]"),
        (np.array([[1.0, np.nan]]), r"\[1, 2\]"),
        (np.array([[1.0], [np.inf]]), r"\[2, 1\]"),
    ],
)
def test_numbers_that_are_no_voice_are_refused(steps, shape):
    message = rf"^the voice given is float64 {shape}; expected finite numbers \[steps, width\]$"
    with pytest.raises(SpeechError, match=message):
        voices.read_voice(steps, model())


@pytest.mark.parametrize("steps", [np.ones((2, WIDTH), np.int16), np.full((2, WIDTH), "a")])
def test_an_array_of_other_things_than_fractions_is_refused(steps):
    message = rf"^the voice given is {steps.dtype} \[2, 10\]; expected finite numbers \[steps, width\]$"
    with pytest.raises(SpeechError, match=message):
        voices.read_voice(steps, model())


def test_a_file_with_what_is_no_number_is_refused(file):
    broken = voice(0)
    broken[1, 2] = np.nan
    message = r"^the voice .*voice.safetensors is float32 \[3, 10\]; expected finite numbers \[steps, width\]$"
    with pytest.raises(SpeechError, match=message):
        voices.read_voice(file(broken.T[None]), model())


def test_a_blend_is_the_weighted_mean():
    a, b = voice(0), voice(1)
    np.testing.assert_allclose(voices.blend([a, b]), (a + b) / 2, rtol=1e-6)
    np.testing.assert_allclose(voices.blend([a, b], [1, 3]), a / 4 + 3 * b / 4, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(voices.blend([a, b], [0, 2]), b)
    np.testing.assert_array_equal(voices.blend([a]), a)
    assert voices.blend([a, b], [1, 3]).dtype == np.float32


@pytest.mark.parametrize(
    ("given", "weights", "message"),
    [
        ([], None, r"^voices to blend have the shapes \[\]; give voices of one shape$"),
        ([voice(0), voice(1, 4)], None, r"^voices to blend have the shapes \[\(3, 10\), \(4, 10\)\]; give"),
        ([voice(0)], [1, 2], r"^1 voices have the weights \[1, 2\]; give one each, 0 or more, not all 0$"),
        ([voice(0), voice(1)], [2, -1], r"^2 voices have the weights \[2, -1\]"),
        ([voice(0), voice(1)], [0, 0], r"^2 voices have the weights \[0, 0\]"),
        ([voice(0)], [], r"^1 voices have the weights \[\]"),
        ([voice(0)], [float("nan")], r"^1 voices have the weights \[nan\]"),
    ],
)
def test_voices_that_cannot_be_blended_are_refused(given, weights, message):
    with pytest.raises(SpeechError, match=message):
        voices.blend(given, weights)


def test_a_guidance_value_is_the_condition_of_its_place_among_the_known_values():
    assert voices.guidance_values(CONFIG) == [1.0, 2.0, 3.0]
    for place, guidance in enumerate([1.0, 2.0, 3.0]):
        values, masks, _ = voices.conditions(CONFIG, [[voice(0)], [voice(1)]], guidance)
        assert values["cfg"].tolist() == [[place]] * 2
        assert masks["cfg"].tolist() == [[True]] * 2
        assert values["cfg"].dtype == np.int32


def test_guidance_that_is_left_out_is_the_tables_last_entry_and_masked():
    values, masks, _ = voices.conditions(CONFIG, [[voice(0)]], None)
    assert (values["cfg"].tolist(), masks["cfg"].tolist()) == ([[3]], [[False]])
    assert (values["control"].tolist(), masks["control"].tolist()) == ([[0]], [[True]])


def test_voices_of_several_lengths_have_room_for_the_longest():
    rows = [[voice(0)], [voice(1, 5), voice(2, 5)]]
    values, masks, length_B = voices.conditions(CONFIG, rows, None)
    assert values[voices.WAVS].shape == (2, 5 * 5, WIDTH)
    assert length_B.tolist() == [5 * STEPS, 5 * 5]
    np.testing.assert_array_equal(values[voices.WAVS][0, :STEPS], voice(0))
    assert not values[voices.WAVS][0, STEPS:].any()
    assert masks[voices.WAVS].sum(1).tolist() == [STEPS, 2 * 5]


def test_guidance_that_the_model_does_not_know_is_refused():
    with pytest.raises(SpeechError, match=r"^the guidance is 2\.5; this model knows 1, 2, 3$"):
        voices.conditions(CONFIG, [[voice(0)]], 2.5)


def test_voices_fill_the_slots_in_their_order():
    rows = [[voice(0), voice(1)], [voice(2)], [voice(seed) for seed in range(5)]]
    values, masks, _ = voices.conditions(CONFIG, rows, None)
    value_BSXC = np.asarray(values[voices.WAVS]).reshape(3, 5, STEPS, WIDTH)
    mask_BSX = np.asarray(masks[voices.WAVS]).reshape(3, 5, STEPS)
    assert values[voices.WAVS].shape == (3, 5 * STEPS, WIDTH)
    assert (values[voices.WAVS].dtype, mask_BSX.dtype) == (np.float32, bool)
    for row, given in enumerate(rows):
        np.testing.assert_array_equal(value_BSXC[row, : len(given)], given)
        assert (value_BSXC[row, len(given) :] == 0).all()
        assert mask_BSX[row].tolist() == [[slot < len(given)] * STEPS for slot in range(5)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[voice(0)], []], r"^a request has 0 voices; this model needs 1 to 5: give a voice$"),
        ([[voice(0)] * 6], r"^a request has 6 voices; this model needs 1 to 5"),
        ([[voice(0), voice(1, 4)]], r"^the voices of a request are \[3, 4\] steps long; give voices of one length$"),
        ([[voice(0), voice(1, STEPS, 9)]], r"^a voice is 9 numbers wide; this model's are 10: take one made for it$"),
    ],
)
def test_voices_that_do_not_fit_the_model_are_refused(rows, message):
    with pytest.raises(SpeechError, match=message):
        voices.conditions(CONFIG, rows, None)


def test_a_model_without_speakers_has_only_its_own_conditions():
    assert voices.has_speakers(CONFIG)
    assert not voices.has_speakers(SPEAKERLESS)
    assert voices.guidance_values(SPEAKERLESS) == []
    values, masks, _ = voices.conditions(SPEAKERLESS, [[], []], None)
    assert values.keys() == masks.keys() == {"control"}
    assert (values["control"].tolist(), masks["control"].tolist()) == ([[0], [0]], [[True], [True]])


def test_the_unconditional_half_has_as_many_rows_without_conditions():
    values, masks, _ = voices.conditions(CONFIG, [[voice(0)], [voice(1), voice(2)]], 3.0)
    twice, both = voices.with_unconditional(values, masks, CONFIG)
    for name, value in values.items():
        assert twice[name].dtype == value.dtype
        np.testing.assert_array_equal(twice[name][:2], value)
        np.testing.assert_array_equal(both[name][:2], masks[name])
        assert not np.asarray(both[name][2:]).any()
        assert both[name].shape == (4, *masks[name].shape[1:])
    assert (twice["cfg"][2:].tolist(), twice["control"][2:].tolist()) == ([[3]] * 2, [[1]] * 2)
    assert (np.asarray(twice[voices.WAVS][2:]) == 0).all()

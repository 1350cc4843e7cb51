"""From the settings of a served model to its service, without a model."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from dsm_jax.csm import CsmOptions
from dsm_jax.errors import ConfigError
from dsm_jax.serving import services
from dsm_jax.stt import TranscribeOptions
from dsm_jax.tts import SynthesizeOptions
from tests.helpers.serving import served


def model(model_type: str = "stt", platform: str = "cpu", delay_s: float = 0.5) -> SimpleNamespace:
    config = SimpleNamespace(
        model_type=model_type,
        stt=SimpleNamespace(audio_delay_seconds=delay_s),
        mimi=SimpleNamespace(frame_rate=12.5),
    )
    return SimpleNamespace(name="talker", config=config, devices=[SimpleNamespace(platform=platform)])


@pytest.fixture(autouse=True)
def made(monkeypatch):
    """Note the services that are made, in place of making them."""
    noted: list[tuple] = []
    for name in ("HearingService", "ScriptService", "TurnService"):
        monkeypatch.setattr(services, name, lambda *args, name=name, **more: noted.append((name, *args[1:], more)))
    return noted


def test_each_family_gets_its_service_with_all_that_was_asked_for(made):
    voices = {"voice_folder": Path("v"), "default_voice": "anna"}
    asked = {"temperature": 0.5, "guidance_scale": 1.5, "padding_between": 2, "padding_bonus": 0.25, "codebooks": 3}
    services.service_of(served("stt", "digits", slots=3, temperature=0.25), model())
    services.service_of(served("tts", "digits-tts", slots=3, **voices, **asked), model("tts"))
    services.service_of(served("tts", "csm", slots=3, **voices, temperature=0.0), model("csm"))
    named = {"folder": Path("v"), "default_voice": "anna"}
    assert made == [
        ("HearingService", 3, {"options": TranscribeOptions(temperature=0.25)}),
        ("ScriptService", 3, {"options": SynthesizeOptions(**asked), **named}),
        ("TurnService", 3, {"options": CsmOptions(temperature=0.0), **named}),
    ]


def test_what_was_not_asked_for_is_the_familys_default_and_slots_are_of_the_device(made):
    for platform in ("cpu", "gpu"):
        services.service_of(served("tts", "digits-tts", slots=None), model("tts", platform))
    default = {"options": SynthesizeOptions(), "folder": None, "default_voice": None}
    assert made == [("ScriptService", 8, default), ("ScriptService", 64, default)]


@pytest.mark.parametrize(
    ("kind", "family", "settings"),
    [
        ("stt", "stt", {"guidance_scale": 2.0, "padding_bonus": 0.5}),
        ("stt", "stt", {"codebooks": 3}),
        ("stt", "stt", {"padding_between": 1}),
        ("stt", "stt", {"default_voice": "nobody", "voice_folder": Path("v")}),
        ("tts", "tts", {"asr_delay_in_tokens": 6}),
        ("tts", "csm", {"asr_delay_in_tokens": 6, "codebooks": 3}),
    ],
)
def test_a_setting_that_a_family_does_not_have_is_refused(made, kind, family, settings):
    named = ", ".join(sorted(settings))
    with pytest.raises(ConfigError, match=f"{named} was set for talker, which does not have it; remove it"):
        services.service_of(served(kind, "talker", **settings), model(family))
    assert made == []


@pytest.mark.parametrize(("delay_s", "right"), [(0.5, (6, 7)), (0.48, (5, 6)), (2.5, (31, 32))])
def test_a_delay_that_is_not_the_models_is_refused(made, delay_s, right):
    for asked in range(right[0] - 2, right[1] + 3):
        settings = served("stt", "digits", asr_delay_in_tokens=asked)
        if asked in right:
            services.service_of(settings, model(delay_s=delay_s))
            continue
        late = f"the text of talker is {delay_s * 12.5:.1f} frames late: remove it"
        with pytest.raises(ConfigError, match=f"asr_delay_in_tokens is {asked}; {late}"):
            services.service_of(settings, model(delay_s=delay_s))
    assert len(made) == 2


def test_a_model_is_loaded_in_the_form_of_its_settings(monkeypatch):
    loaded = []
    kinds = {"digits": "stt", "digits-tts": "tts"}
    monkeypatch.setattr(services, "load", lambda name, **more: loaded.append((name, more)) or model(kinds[name]))
    monkeypatch.setattr(services, "require", lambda model, kind: None)
    services.load_settings(served("stt", "digits", dtype="bfloat16"))
    services.load_settings(served("tts", "digits-tts", quantize="int8", revision="v2"))
    assert loaded == [
        ("digits", {"dtype": "bfloat16", "quantize": None, "stt_only": True, "revision": None}),
        ("digits-tts", {"dtype": None, "quantize": "int8", "stt_only": False, "revision": "v2"}),
    ]


@pytest.mark.parametrize(
    ("kind", "is_a", "wanted"),
    [("stt", "stt", "stt"), ("tts", "tts", "tts"), ("tts", "csm", "csm"), ("stt", "csm", "stt")],
)
def test_a_loaded_model_must_be_of_the_kind_of_its_settings(monkeypatch, kind, is_a, wanted):
    asked = []
    monkeypatch.setattr(services, "load", lambda name, **more: model(is_a))
    monkeypatch.setattr(services, "require", lambda model, kind: asked.append(kind))
    services.load_settings(served(kind, "talker"))
    assert asked == [wanted]

"""A folder in which a page's examples run word for word: recordings, and miniatures under published names."""

import dataclasses
import os
import re
import shutil
import sys
from pathlib import Path

import soundfile

from dsm_jax import checkpoints
from tests.helpers import csm_model, stt_model, tts_model

ROOT = Path(__file__).resolve().parents[2]
VOICE = Path("expresso/ex03-ex01_happy_001_channel1_334s.wav")
OTHER_VOICE = Path("expresso/ex03-ex02_narration_001_channel1_674s.wav")


def blocks(text: str, language: str) -> list[str]:
    """Return the code blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def make_desk(desk: Path) -> dict[str, str]:
    """Fill an empty folder; return the environment in which the examples run there."""
    pcm = stt_model.recording()[:48_000]
    soundfile.write(desk / "talk.mp3", pcm, 24_000)
    soundfile.write(desk / "note.flac", pcm[10_000:], 24_000)
    shutil.copytree(ROOT / "examples/audio", desk / "examples/audio")
    shutil.copytree(ROOT / "examples/new_speaker/test", desk / "recordings")
    shutil.copytree(ROOT / "examples/new_speaker/test", desk / "examples/new_speaker/test")
    _publish(desk, "stt-1b-en_fr", stt_model.CHECKPOINT)
    (desk / "speaking").mkdir()
    # Enough pieces for the tokenizer to have one for every byte, and so for any letter.
    config = dataclasses.replace(tts_model.SPEAKERS, text_card=1000)
    checkpoints.save(tts_model.random_model(desk / "speaking", config), desk / "speaking/model")
    _publish(desk, "tts-1.6b-en_fr", desk / "speaking/model")
    (desk / "hub-voices" / VOICE.parent).mkdir(parents=True)
    for seed, voice in enumerate((VOICE, OTHER_VOICE)):
        tts_model.write_voice(desk / f"hub-voices/{voice}.0a1b2c3d@7.safetensors", tts_model.voice(seed))
    _publish(desk, "tts-voices", desk / "hub-voices")
    tts_model.write_requests(desk, {"id": "one", "text": "Good morning.", "voice": str(VOICE)})
    (desk / "talking").mkdir()
    # As much context as the published model has, so that turns have room to end.
    csm = dataclasses.replace(csm_model.CSM, backbone=dataclasses.replace(csm_model.CSM.backbone, context=2048))
    checkpoints.save(csm_model.random_model(desk / "talking", csm), desk / "talking/model")
    _publish(desk, "csm-1b", desk / "talking/model", "sesame")
    return {
        **os.environ,
        "HF_HUB_CACHE": str(desk / "hub"),
        "HF_HUB_OFFLINE": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }


def _publish(desk: Path, name: str, folder: Path, organisation: str = "kyutai") -> None:
    """Put a folder into the hub's cache."""
    repository = desk / f"hub/models--{organisation}--{name}"
    shutil.copytree(folder, repository / "snapshots/0123abc")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0123abc")

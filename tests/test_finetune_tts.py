"""Fine-tuning text-to-speech in miniature: rows equal the inputs of inference, and a trained model speaks its rows.

Shape letters: M streams (text first), Q codebooks, T frames, N rows.
"""

import dataclasses
import json
import runpy
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

import dsm_jax
from dsm_jax import audio, checkpoints, codec
from dsm_jax.errors import CheckpointError, ConfigError, TrainingError
from dsm_jax.evaluation import transcription
from dsm_jax.evaluation.transcription import TimedTranscript
from dsm_jax.training.alignment import script_stream
from dsm_jax.training.data import Recording, WordSpan, read_recordings
from dsm_jax.training.finetune import FinetuneConfig, finetune
from dsm_jax.training.loop import RunConfig
from dsm_jax.training.lora import LoraConfig
from dsm_jax.training.losses.stt import SttObjective
from dsm_jax.training.losses.tts import TtsObjective
from dsm_jax.training.rows import TtsRows
from dsm_jax.training.step import OptimizerConfig
from dsm_jax.tts import Request, Speech, SpokenWord, SynthesizeOptions, synthesize_each, voices
from dsm_jax.tts.script import MAIN, OTHER
from tests.helpers import tts_model
from tests.helpers.checkpoint_maker import arrays_of, assert_same_weights
from tests.helpers.tts_model import CODEBOOKS, DELAY_STEPS, FRAME, LAST_DELAY

pytestmark = pytest.mark.slow

RATE = 1600
EXAMPLE = Path(__file__).parents[1] / "examples/finetune_tts.py"
MESH = Mesh(jax.devices()[:1], ("data",))
TEXT = ("on", "a", "we")
# The first word starts at step 2, as in inference.
STARTS = (2, 6, 9)
SECONDS = 2.0
NO_DROPOUT = TtsObjective(unconditional=0.0, random_codes=0.0)


def write_recording(folder: Path, name: str, seed: int, **keys: object) -> Path:
    """Write a recording of three words and its transcript."""
    path = folder / f"{name}.wav"
    audio.write(path, 0.3 * np.random.default_rng(seed).normal(size=round(SECONDS * RATE)), RATE)
    spans = [
        {"text": text, "start": step / 12.5, "end": (step + 2) / 12.5} for text, step in zip(TEXT, STARTS, strict=True)
    ]
    path.with_suffix(".json").write_text(json.dumps({"words": spans, **keys}))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Write a folder with one recording and a voice."""
    folder = tmp_path_factory.mktemp("data")
    write_recording(folder, "first", 1, voice="ann.safetensors")
    tts_model.write_voice(folder / "ann.safetensors", tts_model.voice(0))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Write a model with voices, guidance values and a second text stream: tts-1.6b-en_fr."""
    return tts_model.make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def prefix_checkpoint(tmp_path_factory) -> Path:
    """Write a model that continues a recording: tts-0.75b-en-public."""
    folder = tmp_path_factory.mktemp("prefix")
    checkpoints.save(tts_model.random_model(folder, tts_model.PREFIX), folder / "speaker")
    return folder / "speaker"


def settings(
    checkpoint: Path, data: Path, output: Path, *, steps: int, lora: LoraConfig | None, prefixed: bool = False
) -> FinetuneConfig:
    special = {"prefix_seconds": 1.0} if prefixed else {"guidance": 2.0}
    return FinetuneConfig(
        data=str(data),
        output=str(output),
        model=str(checkpoint),
        run=RunConfig(steps=steps, log_every=1, save_every=max(1, steps // 2)),
        seconds=SECONDS,
        batch_size=2,
        encode_batch=2,
        optimizer=OptimizerConfig(learning_rate=2e-2, warmup=5),
        tts=NO_DROPOUT,
        lora=lora,
        **special,
    )


def test_a_row_has_the_script_codes_and_conditions_of_inference(checkpoint, tmp_path):
    model = dsm_jax.load(checkpoint)
    path = write_recording(tmp_path, "talk", 3)
    spans = [WordSpan(text, step / 12.5, 0.0, speaker) for text, step, speaker in zip(TEXT, STARTS, "aba", strict=True)]
    names = {speaker: str(tmp_path / f"{speaker}.safetensors") for speaker in "ab"}
    steps = {speaker: tts_model.voice(seed) for seed, speaker in enumerate("ab")}
    for speaker, name in names.items():
        tts_model.write_voice(Path(name), steps[speaker])
    maker = TtsRows(model, MESH, seconds=3.0, batch_size=1, guidance=3.0)
    (row,) = maker.rows([Recording(path, tuple(spans), SECONDS, tuple(names.items()))])

    codes_QT = codec.encode(model, audio.read(path, RATE), codebooks=CODEBOOKS)
    frames = codes_QT.shape[1]
    assert frames == SECONDS * RATE / FRAME
    codes_MT = row["codes_BMT"]
    assert codes_MT.shape == (3, 38 + DELAY_STEPS + LAST_DELAY), "room for 3 s, the audio's delay and the codebooks'"
    assert (codes_MT[1:, :DELAY_STEPS] == -1).all()
    np.testing.assert_array_equal(codes_MT[1:, DELAY_STEPS : DELAY_STEPS + frames], codes_QT)
    assert (codes_MT[:, DELAY_STEPS + frames :] == -1).all()
    marks = [[MAIN], [OTHER], [MAIN]]
    tokens = [[*mark, *model.tokenizer.encode(text)] for mark, text in zip(marks, TEXT, strict=True)]
    stream_T = script_stream(tokens, STARTS, maker.machine, frames=DELAY_STEPS + frames, end=0)
    np.testing.assert_array_equal(codes_MT[0, : DELAY_STEPS + frames], stream_T)

    values, masks, _ = voices.conditions(model.config.lm, [[steps["a"], steps["b"]]], 3.0)
    for found, wanted in ((row["values"], values), (row["masks"], masks)):
        assert found.keys() == wanted.keys()
        for name, array in wanted.items():
            np.testing.assert_array_equal(found[name], np.asarray(array)[0])
    assert "context_B" not in row


def test_without_a_guidance_value_each_row_draws_one(checkpoint, data):
    model = dsm_jax.load(checkpoint)
    recordings = read_recordings(data, RATE) * 20
    drawn = [
        [
            int(row["values"]["cfg"][0])
            for row in TtsRows(model, MESH, seconds=2.0, batch_size=4, seed=seed).rows(recordings)
        ]
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == len(voices.guidance_values(model.config.lm))


def test_a_row_of_a_model_without_voices_starts_with_another_part_of_the_speaker(prefix_checkpoint, tmp_path):
    model = dsm_jax.load(prefix_checkpoint)
    files = [write_recording(tmp_path, name, seed) for seed, name in enumerate(("x1", "y1", "x2", "y2"))]
    recordings = [
        Recording(path, tuple(WordSpan(text, 0.2, 0.3, path.stem[0]) for text in TEXT[:1]), SECONDS) for path in files
    ]
    rows = TtsRows(model, MESH, seconds=SECONDS, batch_size=3, prefix_seconds=1.0).rows(recordings)
    codes = [codec.encode(model, audio.read(path, RATE), codebooks=CODEBOOKS) for path in files]
    prefix = int(1.0 * 12.5)
    for number, other in enumerate((2, 3, 0, 1)):
        codes_MT, context = rows[number]["codes_BMT"], prefix + DELAY_STEPS
        assert rows[number]["context_B"] == context
        np.testing.assert_array_equal(codes_MT[1:, DELAY_STEPS:context], codes[other][:, :prefix])
        np.testing.assert_array_equal(codes_MT[1:, context : context + 25], codes[number])
        assert (codes_MT[0, :prefix] == -1).all(), "the script starts after the prefix"
        assert (codes_MT[0, prefix : context + 25] >= 0).all()
    with pytest.raises(TrainingError, match=r"x1.wav cannot be trained on: it is all there is of the speaker 'x', and"):
        TtsRows(model, MESH, seconds=SECONDS, batch_size=3).rows(recordings[:2])


@pytest.mark.parametrize("prefixed", [False, True], ids=["voice", "prefix"])
def test_a_model_trained_on_a_recording_speaks_it(prefixed, checkpoint, prefix_checkpoint, data, tmp_path):
    folder, voice = data, tts_model.voice(0)
    if prefixed:
        folder, checkpoint = tmp_path / "data", prefix_checkpoint
        folder.mkdir()
        _, second = (write_recording(folder, name, seed) for seed, name in enumerate(("first", "second"), 1))
        voice = audio.read(second, RATE)[: (int(1.0 * 12.5) + 2) * FRAME]
    config = settings(checkpoint, folder, tmp_path / "run", steps=200, lora=None, prefixed=prefixed)
    finetune(config)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.05 < losses[0]

    model = dsm_jax.load(tmp_path / "run/model")
    maker = TtsRows(model, MESH, seconds=SECONDS, batch_size=2, guidance=2.0, prefix_seconds=1.0)
    row = maker.rows(read_recordings(folder, RATE))[0]["codes_BMT"]
    options = SynthesizeOptions(
        temperature=0.0, guidance_scale=1.0 if prefixed else 2.0, padding_between=0, max_padding=20, final_padding=1
    )
    ((_, speech),) = synthesize_each(model, [Request(" ".join(TEXT), (voice,))], options=options)
    frames = speech.frames.shape[1]
    prefix = int(1.0 * 12.5) if prefixed else 0
    # The script ends two steps after the last word starts; one step of padding follows.
    assert frames == prefix + STARTS[-1] + 2 + DELAY_STEPS + 1 - LAST_DELAY
    np.testing.assert_array_equal(speech.frames, row[:, :frames])


def test_adapters_train_resume_bit_for_bit_and_are_merged_into_a_model_with_voices(checkpoint, data, tmp_path):
    config = dataclasses.replace(
        settings(checkpoint, data, tmp_path / "whole", steps=4, lora=LoraConfig(rank=4)),
        tts=TtsObjective(),
        guidance=None,
        validation=str(data),
        voice=str(data / "ann.safetensors"),
    )
    whole = finetune(config)
    before, after = arrays_of(dsm_jax.load(checkpoint)), arrays_of(whole)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed
    assert all("self_attn" in name or "feedforward" in name for name in changed)
    records = [json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    assert records[3]["validation_loss"] < records[1]["validation_loss"]
    written = dsm_jax.load(tmp_path / "whole/model")
    assert_same_weights(written, whole)
    np.testing.assert_array_equal(voices.read_voice("ann", written), tts_model.voice(0))

    part = dataclasses.replace(config, output=str(tmp_path / "part"))
    (tmp_path / "part").mkdir()
    (tmp_path / "whole/checkpoints/4").rename(tmp_path / "later")
    (tmp_path / "whole/checkpoints").rename(tmp_path / "part/checkpoints")
    assert_same_weights(finetune(part, resume=True), whole)


def test_speakers_without_a_voice_and_voices_of_two_lengths_are_refused_before_encoding(checkpoint, data, tmp_path):
    path = write_recording(tmp_path, "talk", 3)
    config = settings(checkpoint, tmp_path, tmp_path / "run", steps=2, lora=None)
    with pytest.raises(
        TrainingError, match=r"talk.wav names no voice for the speaker '', which .* needs; add \"voice\""
    ):
        finetune(config)
    tts_model.write_voice(tmp_path / "long.safetensors", tts_model.voice(0, steps=3))
    both = [
        Recording(path, (), SECONDS, (("", str(folder / f"{name}.safetensors")),))
        for folder, name in ((data, "ann"), (tmp_path, "long"))
    ]
    with pytest.raises(TrainingError, match=r"the voices are \[2, 3\] steps long; give voices of one length"):
        TtsRows(dsm_jax.load(checkpoint), MESH, seconds=SECONDS, batch_size=1).rows(both)


@pytest.mark.parametrize(
    ("prefixed", "changes", "message"),
    [
        (True, {"voice": "ann"}, "voice is 'ann', and speaker takes no voices; leave it out"),
        (True, {"guidance": 2.0}, "guidance is 2.0, and speaker has no distilled guidance; leave it out"),
        (False, {"guidance": 9.0}, "guidance is 9.0, and speaker knows 1.0, .*; give one of these"),
        (False, {"prefix_seconds": 3.0}, "prefix_seconds is 3.0, and speaker takes voices, no prefixes; leave it out"),
    ],
)
def test_settings_that_the_model_would_ignore_are_refused(
    checkpoint, prefix_checkpoint, data, tmp_path, prefixed, changes, message
):
    folder = prefix_checkpoint if prefixed else checkpoint
    config = settings(folder, data, tmp_path / "run", steps=2, lora=None, prefixed=prefixed)
    with pytest.raises(ConfigError, match=f"^{message}$"):
        finetune(dataclasses.replace(config, **changes))


def test_recordings_whose_speakers_do_not_fit_are_left_out_before_encoding(checkpoint, data, tmp_path, caplog):
    """One recording of each fault among good ones; the good ones are kept."""
    for name, shape in (("long", {"steps": 3}), ("ann", {})):
        tts_model.write_voice(tmp_path / f"{name}.safetensors", tts_model.voice(0, **shape))
    tts_model.write_voice(tmp_path / "wide.safetensors", np.ones((2, tts_model.WIDTH + 1), np.float32))
    ann = {"voice": "ann.safetensors"}
    write_recording(tmp_path, "a", 0, **ann)
    write_recording(tmp_path, "b", 1)
    for name in ("long", "wide", "gone"):
        write_recording(tmp_path, name, 2, voice=f"{name}.safetensors")
    path = write_recording(tmp_path, "three", 3, **ann)
    words = json.loads(path.with_suffix(".json").read_text())["words"]
    spoken = [word | {"speaker": name} for word, name in zip(words, "xyz", strict=True)]
    path.with_suffix(".json").write_text(json.dumps({"words": spoken, **ann}))
    write_recording(tmp_path, "z", 4, **ann)

    model = dsm_jax.load(checkpoint)
    maker = TtsRows(model, MESH, seconds=SECONDS, batch_size=1)
    with pytest.raises(TrainingError, match=r"5 of the 7 recordings of .* cannot be trained on; fix them, or set skip"):
        maker.read(tmp_path, skip_bad=False)
    kept = maker.read(tmp_path, skip_bad=True)
    assert [recording.audio.stem for recording in kept] == ["a", "z"]
    faults = [message.partition(": ")[2].partition(".json: ")[::2] for message in caplog.messages]
    for name, message in (
        ("b", "names no voice for the speaker ''"),
        ("gone", "gone.safetensors is not a file"),
        ("long", "the voices are [2, 3] steps long"),
        ("three", "the speakers of one row are x, y, z"),
        ("wide", f"a voice is {tts_model.WIDTH + 1} numbers wide"),
    ):
        assert message in dict(faults)[name]
    assert maker.rows(kept)[0]["values"] is not None


def test_the_length_of_most_voices_is_kept_wherever_another_one_stands(checkpoint, tmp_path, caplog):
    """Leave out the first two recordings only: neither a refused nor an odd one decides for the others."""
    for name, steps in (("ann", 2), ("long", 3)):
        tts_model.write_voice(tmp_path / f"{name}.safetensors", tts_model.voice(0, steps=steps))
    path = write_recording(tmp_path, "a", 0)
    words = json.loads(path.with_suffix(".json").read_text())["words"]
    spoken = [word | {"speaker": name} for word, name in zip(words, "xyy", strict=True)]
    path.with_suffix(".json").write_text(json.dumps({"words": spoken, "voices": {"x": "long.safetensors"}}))
    write_recording(tmp_path, "b", 1, voice="long.safetensors")
    for name in "cd":
        write_recording(tmp_path, name, 2, voice="ann.safetensors")
    maker = TtsRows(dsm_jax.load(checkpoint), MESH, seconds=SECONDS, batch_size=1)
    kept = maker.read(tmp_path, skip_bad=True)
    assert [recording.audio.stem for recording in kept] == ["c", "d"]
    assert "a.json: " in caplog.messages[0]
    assert "names no voice for the speaker 'y'" in caplog.messages[0]
    assert "b.json: the voices are [2, 3] steps long; give voices of one length" in caplog.messages[1]
    assert len(caplog.messages) == 2


def silent_in_the_middle(folder: Path, **keys: object) -> Path:
    """Write a recording of 6 s whose only words, by ann, are in its first and last two seconds."""
    path = folder / "pause.wav"
    audio.write(path, 0.3 * np.random.default_rng(0).normal(size=6 * RATE), RATE)
    spans = [{"text": "on", "start": start, "end": start + 0.3, "speaker": "ann"} for start in (0.5, 5.0)]
    path.with_suffix(".json").write_text(json.dumps({"words": spans, **keys}))
    return path


def test_a_part_without_words_has_the_voice_of_the_recordings_speaker(checkpoint, tmp_path):
    tts_model.write_voice(tmp_path / "ann.safetensors", tts_model.voice(0))
    ann = {"voices": {"ann": "ann.safetensors"}}
    silent_in_the_middle(tmp_path, **ann)
    write_recording(tmp_path, "wordless", 1, **ann).with_suffix(".json").write_text(json.dumps({"words": [], **ann}))
    maker = TtsRows(dsm_jax.load(checkpoint), MESH, seconds=SECONDS, batch_size=4, guidance=2.0)
    rows = maker.rows(maker.read(tmp_path, skip_bad=False))
    assert len(rows) == 4
    for row in rows:
        np.testing.assert_array_equal(row["values"][voices.WAVS], rows[0]["values"][voices.WAVS])


def test_a_part_without_words_has_a_prefix_and_is_none(prefix_checkpoint, tmp_path):
    silent_in_the_middle(tmp_path)
    maker = TtsRows(dsm_jax.load(prefix_checkpoint), MESH, seconds=SECONDS, batch_size=4, prefix_seconds=1.0)
    first, silent, last = (row["codes_BMT"] for row in maker.rows(maker.read(tmp_path, skip_bad=False)))
    prefix = slice(DELAY_STEPS, DELAY_STEPS + maker.prefix_frames)
    np.testing.assert_array_equal(first[1, prefix], silent[1, prefix])  # both go on from the last part
    assert not np.array_equal(first[1, prefix], last[1, prefix])


def test_a_voice_of_the_config_that_cannot_be_read_is_one_error(checkpoint):
    with pytest.raises(CheckpointError, match=r"^the voice nosuch\.safetensors is not a file"):
        TtsRows(dsm_jax.load(checkpoint), MESH, seconds=SECONDS, batch_size=1, voice="nosuch.safetensors")


def test_recordings_without_a_prefix_are_left_out_before_encoding(prefix_checkpoint, tmp_path, caplog):
    """Leave out the only recording of a speaker, and then those for which it was the only prefix."""
    for seed, (name, speakers) in enumerate({"a": "xxx", "b": "xxx", "c": "yyy", "d": "zzz"}.items()):
        path = write_recording(tmp_path, name, seed)
        words = json.loads(path.with_suffix(".json").read_text())["words"]
        spoken = [word | {"speaker": own} for word, own in zip(words, speakers, strict=True)]
        path.with_suffix(".json").write_text(json.dumps({"words": spoken}))
    maker = TtsRows(dsm_jax.load(prefix_checkpoint), MESH, seconds=SECONDS, batch_size=1, prefix_seconds=1.0)
    with pytest.raises(
        TrainingError, match=r"2 of the 4 recordings .* or set skip_bad(.|\n)*c.wav: it is all there is"
    ):
        maker.read(tmp_path, skip_bad=False)
    kept = maker.read(tmp_path, skip_bad=True)
    assert [recording.audio.stem for recording in kept] == ["a", "b"]
    assert len(caplog.messages) == 2
    assert len(maker.rows(kept)) == 2


def test_rows_with_the_same_conditions_share_them(checkpoint, data):
    recordings = read_recordings(data, RATE) * 3
    first, *others = TtsRows(dsm_jax.load(checkpoint), MESH, seconds=SECONDS, batch_size=3, guidance=2.0).rows(
        recordings
    )
    name = next(name for name, value in first["values"].items() if value.ndim == 2)
    assert all(np.shares_memory(row["values"][name], first["values"][name]) for row in others)


def test_words_that_cannot_be_spelt_and_models_of_other_families_are_refused(checkpoint, data, tmp_path):
    model = dsm_jax.load(checkpoint)
    maker = TtsRows(model, MESH, seconds=SECONDS, batch_size=1)
    maker.check("on")
    with pytest.raises(TrainingError, match="the word '語' cannot be spelt by the model's tokenizer"):
        maker.check("語")
    config = settings(checkpoint, data, tmp_path / "run", steps=2, lora=None)
    with pytest.raises(
        ConfigError, match=r"stt is SttObjective.*, and .* is a text-to-speech model, which has no such setting"
    ):
        finetune(dataclasses.replace(config, stt=SttObjective(text_dropout=0.5)))
    config = dataclasses.replace(model.config, model_type="hibiki", tts=None)
    checkpoints.save(dataclasses.replace(model, config=config), tmp_path / "other")
    with pytest.raises(
        CheckpointError, match="other is of type 'hibiki', and stt, tts, csm models can be fine-tuned; start"
    ):
        finetune(settings(tmp_path / "other", data, tmp_path / "run", steps=2, lora=None))


def test_the_example_learns_a_voice_and_counts_errors(checkpoint, data, tmp_path, monkeypatch, capsys):
    def speeches(model, requests, **_):
        for number, request in enumerate(requests):
            assert voices.read_voice(request.voices[0], model).shape == (2, tts_model.WIDTH)
            words = tuple(SpokenWord(text, 0.1 * i, 0.1 * i + 0.1) for i, text in enumerate(request.text.split()))
            yield number, Speech(np.zeros(RATE, np.float32), RATE, words, np.zeros((3, 1), np.int32), model.name)

    def transcribe(model, samples, options, *, batch_size):
        yield from ((index, TimedTranscript("one", 1.0, 0.1)) for index in range(len(samples)))

    with_voice = shutil.copytree(checkpoint, tmp_path / "with_voice")
    (with_voice / "voices").mkdir()
    tts_model.write_voice(with_voice / "voices/bea.safetensors", tts_model.voice(1))
    monkeypatch.setattr("dsm_jax.tts.synthesize_each", speeches)
    monkeypatch.setattr(transcription, "transcribe", transcribe)
    arguments = {
        "--validation": data,
        "--model": with_voice,
        "--voice": data / "ann.safetensors",
        "--output": tmp_path / "run",
        "--steps": 2,
        "--rank": 4,
        "--sentences": 3,
        "--orders": 2,
    }
    flat = [str(part) for pair in arguments.items() for part in pair]
    monkeypatch.setattr(sys, "argv", ["finetune_tts.py", str(data), *flat])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    out = capsys.readouterr().out
    assert out.startswith("the speaker's recordings, after the codec: digits on samples, normalizer basic\ncorpus WER ")
    before, after = (part.splitlines()[1] for part in out.split("before: ")[1].split("after: "))
    assert before.startswith("corpus WER ")
    assert after == before, "the same three texts, each transcribed as one word"
    assert {path.stem for path in (tmp_path / "run/model/voices").iterdir()} == {"ann", "bea"}
    lines = [json.loads(line) for line in (tmp_path / "run-strings/recordings.jsonl").read_text().splitlines()]
    assert [Path(line["voice"]).stem for line in lines] == ["ann", "ann", "bea", "bea"]
    (recording,) = read_recordings(data, RATE)
    spoken = audio.read(recording.audio, RATE)
    clips = {w.text: spoken[round(w.start * RATE) : round(w.end * RATE)] for w in recording.words}
    for line in lines[:2]:
        cut = audio.read(line["audio"], RATE)
        assert len(line["words"]) == len(recording.words)
        for word in line["words"]:
            found = cut[round(word["start"] * RATE) : round(word["end"] * RATE)]
            np.testing.assert_allclose(found, clips[word["text"]], atol=2**-15)
    assert all(word["text"] in clips for line in lines for word in line["words"])

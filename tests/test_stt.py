"""Speech to text: equal to the reference, however it is cut, batched, streamed, prompted or sampled."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dsm_jax
from dsm_jax import audio
from dsm_jax.configs import ModelConfig, SttConfig
from dsm_jax.errors import AudioError, BatchError, CheckpointError, ConfigError, PromptError
from dsm_jax.sharding import Sharding
from dsm_jax.stt import Prompt, TranscribeOptions, WordEnded, WordStarted, transcribe_each
from dsm_jax.stt.transcriber import Transcriber
from dsm_jax.tts import SynthesizeOptions
from tests.helpers import stt_model

pytestmark = pytest.mark.slow

SAMPLED = TranscribeOptions(temperature=1.0, top_k=20, seed=3)


@pytest.fixture(scope="module")
def model():
    return stt_model.model()


@pytest.fixture(scope="module")
def whole(model):
    return dsm_jax.transcribe(model, stt_model.recording(), frames=True)


def clips() -> list[np.ndarray]:
    """Return recordings of five lengths, none of them a whole number of frames."""
    pcm = stt_model.recording()
    return [pcm[:70_001], pcm[30_000:], pcm[60_000:61_111], pcm[10_000:100_003], pcm[:5]]


def tokens(transcript) -> tuple[int, ...]:
    return transcript.frames.text_tokens


def test_tokens_and_pauses_equal_the_reference(whole):
    expected = stt_model.expected()
    np.testing.assert_array_equal(whole.frames.text_tokens, expected["tokens_T"])
    assert len(set(whole.frames.text_tokens)) > 20, "a constant output would prove nothing"
    # float32 against float32: two orders of summation.
    np.testing.assert_allclose(whole.frames.pause_probabilities, expected["pauses_TH"], rtol=0, atol=1e-5)


def test_words_by_reference_times_equal_the_reference_rules(model, whole):
    sound, options = whole, TranscribeOptions(word_times="reference")
    whole = dsm_jax.transcribe(model, stt_model.RECORDING, options=options)
    assert [word.text for word in whole.words] == [word.text for word in sound.words]
    # Ours also has what comes before the first boundary, and all pieces of the last word.
    ours = [(w.text, w.start, w.end) for w in whole.words]
    theirs = stt_model.expected_words()
    start = len(ours) - len(theirs)
    assert 0 <= start <= 1
    assert [w for w, _, _ in ours[start:-1]] == [w for w, _, _ in theirs[:-1]]
    np.testing.assert_allclose([t for _, *t in ours[start:-1]], [t for _, *t in theirs[:-1]], atol=1e-6)
    assert ours[-1][0].startswith(theirs[-1][0])


def test_duration_and_probabilities_make_sense(whole):
    assert whole.duration == pytest.approx(stt_model.recording().size / 24_000)
    assert all(0 < word.probability <= 1 for word in whole.words)
    assert "".join(word.text for word in whole.words) == whole.text.replace(" ", "")


@pytest.mark.parametrize("options", [TranscribeOptions(), SAMPLED], ids=["greedy", "sampled"])
def test_each_of_a_ragged_batch_equals_itself_alone(model, options):
    alone = [dsm_jax.transcribe(model, [clip], options=options, frames=True)[0] for clip in clips()]
    # Two rows for five recordings: rows are refilled while the other runs on.
    together = dsm_jax.transcribe(model, clips(), options=options, batch_size=2, frames=True)
    assert [tokens(t) for t in together] == [tokens(t) for t in alone]
    assert [t.duration for t in together] == [clip.size / 24_000 for clip in clips()]
    assert len({tokens(t) for t in together}) == len(together)


@pytest.mark.parametrize("size", [1, 1_919, 5_000, 200_000])
def test_streaming_equals_transcribing(model, size):
    pcm = stt_model.recording()[: 2_500 if size == 1 else None]
    events = list(dsm_jax.transcribe_stream(model, (pcm[i : i + size] for i in range(0, pcm.size, size))))
    expected = dsm_jax.transcribe(model, pcm)
    assert expected.words
    stt_model.check_same([e.word for e in events if isinstance(e, WordEnded)], expected.words)
    stt_model.check_same([e for e in events if not isinstance(e, (WordEnded, WordStarted))], expected.pauses)


@pytest.fixture
def compilations():
    """Count programs compiled while a test runs."""
    names = []

    def listen(event: str, _seconds: float, **_facts) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def test_ten_files_of_ten_lengths_compile_nothing_new(model, compilations):
    pcm = stt_model.recording()
    files = [pcm[: 20_000 + 7_001 * i] for i in range(10)]
    dsm_jax.transcribe(model, files[:3], batch_size=4)
    warm = len(compilations)
    dsm_jax.transcribe(model, files, batch_size=4)
    assert len(compilations) == warm
    jax.jit(lambda x: x * 2 + warm)(jnp.zeros((3, warm + 1)))
    assert len(compilations) > warm, "the counter counts"


def test_a_long_recording_is_never_held_whole(model, monkeypatch):
    from dsm_jax.stt.framing import FrameBuffer

    held = []
    pop_frames = FrameBuffer.pop_frames

    def spy(self: FrameBuffer, frames: int) -> np.ndarray:
        held.append(self.ready * self.frame_size)
        return pop_frames(self, frames)

    monkeypatch.setattr(FrameBuffer, "pop_frames", spy)
    dsm_jax.transcribe(model, np.tile(stt_model.recording(), 8))
    assert max(held) < 15 * 24_000 < 8 * stt_model.recording().size


def test_the_words_of_a_text_prompt_come_first_and_in_order(model):
    prompt = Prompt(text="the quick fox")
    wanted = model.tokenizer.encode(prompt.text)
    said = tokens(
        dsm_jax.transcribe(model, stt_model.recording(), options=TranscribeOptions(prompt=prompt), frames=True)
    )
    pieces = [t for t in said if t > 3]
    assert pieces[: len(wanted)] == wanted
    free = tokens(dsm_jax.transcribe(model, stt_model.recording(), frames=True))
    assert said != free


def test_a_cut_text_prompt_leaves_no_word_of_it(model):
    prompt = Prompt(text="the quick fox", exclude_from_output=True)
    whole = dsm_jax.transcribe(
        model,
        stt_model.recording(),
        options=TranscribeOptions(prompt=dataclasses.replace(prompt, exclude_from_output=False)),
    )
    cut = dsm_jax.transcribe(model, stt_model.recording(), options=TranscribeOptions(prompt=prompt))
    said = model.tokenizer.decode(model.tokenizer.encode("the quick fox"))
    assert whole.text.startswith(said)
    assert cut.text
    assert whole.text.replace(" ", "") == (said + cut.text).replace(" ", "")


def test_an_audio_prompt_precedes_the_recording_and_is_cut_in_frames(model):
    pcm = stt_model.recording()
    heard, rest = pcm[:48_001], pcm[48_001:]
    options = TranscribeOptions(prompt=Prompt(audio=heard, exclude_from_output=True))
    prompted = dsm_jax.transcribe(model, rest, options=options, frames=True)
    frames = -(-heard.size // 1_920)
    silence = np.zeros(frames * 1_920 - heard.size + 10 * 1_920, np.float32)
    joined = dsm_jax.transcribe(model, np.concatenate([heard, silence, rest]), frames=True)
    assert tokens(prompted) == tokens(joined)
    skipped = frames + int(0.5 * 12.5)
    assert prompted.text == model.tokenizer.decode([t for t in tokens(joined)[skipped:] if t > 3]).strip()
    assert prompted.duration == pytest.approx(rest.size / 24_000)
    shift = (frames + 10) / 12.5
    late = [w for w in joined.words if w.start > shift + 1]
    np.testing.assert_allclose([w.start for w in prompted.words][-len(late) :], [w.start - shift for w in late])


@pytest.mark.parametrize(
    ("text", "message"), [("  ", "has no words"), ("語", "cannot spell"), ("one \udcff", "half of a")]
)
def test_a_prompt_that_cannot_be_followed_is_refused_with_the_reason(model, text, message):
    with pytest.raises(PromptError, match=message):
        dsm_jax.transcribe(model, stt_model.recording(), options=TranscribeOptions(prompt=Prompt(text=text)))


def test_sampling_depends_on_the_seed_alone(model):
    runs = [tokens(dsm_jax.transcribe(model, clips()[0], options=SAMPLED, frames=True)) for _ in range(2)]
    other = tokens(dsm_jax.transcribe(model, clips()[0], options=dataclasses.replace(SAMPLED, seed=4), frames=True))
    assert runs[0] == runs[1] != other


def test_any_iterable_is_a_batch_and_recordings_are_taken_as_slots_become_free(model):
    wanted = dsm_jax.transcribe(model, clips())
    assert [t.text for t in dsm_jax.transcribe(model, (clip for clip in clips()))] == [t.text for t in wanted]
    assert dsm_jax.transcribe(model, []) == []

    class Counted(list):
        taken = 0

        def __iter__(self):
            for clip in super().__iter__():
                self.taken += 1
                yield clip

    many = Counted(clips() * 4)
    results = transcribe_each(model, many, batch_size=2)
    next(results)
    assert many.taken < len(many) / 2
    assert len(list(results)) == len(many) - 1


def test_one_bad_file_costs_only_itself(model, tmp_path):
    (tmp_path / "talk.wav").write_text("not audio")
    sources = [stt_model.RECORDING, tmp_path / "talk.wav", tmp_path / "missing.flac", clips()[0]]
    with pytest.raises(BatchError, match=r"2 of 4 inputs failed.*talk\.wav.*missing\.flac") as caught:
        dsm_jax.transcribe(model, sources)
    good = dsm_jax.transcribe(model, [sources[0], sources[3]])
    for found, wanted in zip((caught.value.results[0], caught.value.results[3]), good, strict=True):
        assert found.text == wanted.text
        stt_model.check_same(found.words, wanted.words)
    assert sorted(caught.value.errors) == [1, 2]
    results = dict(transcribe_each(model, sources))
    assert isinstance(results[1], AudioError)
    assert results[0].text == good[0].text
    stt_model.check_same(results[0].words, good[0].words)


def test_options_that_cannot_be_read_cost_only_their_recording(model):
    bad = [TranscribeOptions(prompt=prompt) for prompt in (Prompt(audio="missing.wav"), Prompt(text="語"))]
    sources = [clips()[0], *clips()[2:]]
    with pytest.raises(BatchError, match=r"2 of 4 inputs failed") as caught:
        dsm_jax.transcribe(model, sources, options=[None, bad[0], SAMPLED, bad[1]])
    assert "missing.wav does not exist" in str(caught.value.errors[1])
    assert "cannot spell" in str(caught.value.errors[3])
    for index, options in ((0, TranscribeOptions()), (2, SAMPLED)):
        assert caught.value.results[index].text == dsm_jax.transcribe(model, sources[index], options=options).text
    with pytest.raises(AudioError, match=r"missing\.wav does not exist"):
        dsm_jax.transcribe(model, sources, options=bad[0])
    with pytest.raises(AudioError, match=r"missing\.wav does not exist"):
        dsm_jax.StreamingTranscriber(model, options=bad[0])


def test_a_single_bad_file_raises_its_own_error(model, tmp_path):
    with pytest.raises(AudioError, match="missing"):
        dsm_jax.transcribe(model, tmp_path / "missing.flac")


def test_nothing_to_do_is_nothing(model):
    assert dsm_jax.transcribe(model, []) == []


def test_models_that_do_not_transcribe_are_refused(model):
    config = ModelConfig(model_type="mimi", mimi=model.config.mimi)
    codec = dataclasses.replace(model, config=config, lm_def=None, lm_params=None, tokenizer=None, name="some-codec")
    message = (
        "some-codec is a codec without a language model; to transcribe, load a speech-to-text model such as kyutai/"
    )
    with pytest.raises(CheckpointError, match=f"^{message}"):
        dsm_jax.transcribe(codec, stt_model.recording())
    message = (
        "digits-tts is a text-to-speech model; to transcribe, load a speech-to-text model such as kyutai/stt-1b-en_fr"
    )
    with pytest.raises(CheckpointError, match=f"^{message}$"):
        dsm_jax.transcribe(dsm_jax.load("digits-tts"), stt_model.recording())
    lm = dataclasses.replace(model.config.lm, dep_q=4)
    speaker = dataclasses.replace(model, config=dataclasses.replace(model.config, lm=lm))
    with pytest.raises(ConfigError, match="model_type is 'stt' and dep_q 4; such a model generates no audio: 0"):
        dsm_jax.transcribe(speaker, stt_model.recording())


@pytest.mark.parametrize("options", [SynthesizeOptions(), [SynthesizeOptions()], {"seed": 1}])
def test_options_of_another_class_are_refused(model, options):
    kind = type(options[0] if isinstance(options, list) else options).__name__
    message = f"^options are {kind}; {model.name} takes TranscribeOptions$"
    with pytest.raises(ConfigError, match=message):
        dsm_jax.transcribe(model, stt_model.recording(), options=options)
    if not isinstance(options, list):
        with pytest.raises(ConfigError, match=message):
            dsm_jax.StreamingTranscriber(model, options=options)


def test_nothing_is_no_recording(model):
    with pytest.raises(AudioError, match=r"^audio was given as NoneType; expected a path"):
        dsm_jax.transcribe(model, None)


def test_models_that_are_not_whole_are_refused(model):
    with pytest.raises(CheckpointError, match="has no tokenizer; add the published one"):
        dsm_jax.transcribe(dataclasses.replace(model, tokenizer=None), stt_model.recording())
    lm = dataclasses.replace(model.config.lm, extra_heads_num_heads=2)
    odd = dataclasses.replace(model, config=dataclasses.replace(model.config, lm=lm))
    with pytest.raises(CheckpointError, match="has 2 extra heads; expected none, or 4"):
        dsm_jax.transcribe(odd, stt_model.recording())


def test_the_batch_is_never_larger_than_asked(model, monkeypatch):
    made = []
    init = Transcriber.__init__

    def spy(self: Transcriber, model, slots: int, *rest, **options) -> None:
        made.append((slots, options["ahead"]))
        init(self, model, slots, *rest, **options)

    monkeypatch.setattr(Transcriber, "__init__", spy)
    results = dsm_jax.transcribe(model, [stt_model.recording()[: 9_000 + i] for i in range(5)], batch_size=3)
    assert len(results) == 5
    dsm_jax.transcribe(model, stt_model.recording()[:9_000])
    assert made == [(3, 1), (1, 4)], "few recordings take few slots, and what is left of a pass looks ahead"
    with pytest.raises(ConfigError, match="batch_size is 0; expected 1 or more"):
        next(transcribe_each(model, [], batch_size=0))


def test_each_recording_has_options_progress_and_events_of_its_own(model):
    recordings = [stt_model.RECORDING, *(stt_model.recording()[: 20_000 + 4_000 * i] for i in range(2))]
    each = [TranscribeOptions(), SAMPLED, dataclasses.replace(SAMPLED, seed=4)]
    seen, events = [], []
    found = dsm_jax.transcribe(model, recordings, options=each, frames=True, progress=seen.append)
    for recording, options, transcript in zip(recordings, each, found, strict=True):
        assert tokens(dsm_jax.transcribe(model, recording, options=options, frames=True)) == tokens(transcript)
    last = {progress.item: (progress.done, progress.total) for progress in seen}
    totals = [pytest.approx(found[0].duration), None, None]  # a file's is known before it is read
    assert last == {index: (pytest.approx(found[index].duration), total) for index, total in enumerate(totals)}
    assert [transcript.audio for transcript in found] == [str(stt_model.RECORDING), None, None]
    again = dict(transcribe_each(model, iter(recordings), options=each, on_event=lambda *event: events.append(event)))
    for index, transcript in again.items():
        assert transcript.text == found[index].text
        words = [event.word for place, event in events if place == index and isinstance(event, WordEnded)]
        assert words == list(transcript.words)
    for several in (recordings, iter(recordings)):
        with pytest.raises(ConfigError, match="3 recordings have 2 options; give one for all, or one each"):
            dsm_jax.transcribe(model, several, options=each[:2])


def test_a_silence_prefix_is_exact_in_samples_and_not_part_of_the_times(model):
    pcm = stt_model.recording()[:60_007]
    config = dataclasses.replace(model.config, stt=SttConfig(audio_delay_seconds=2.5, audio_silence_prefix_seconds=1.0))
    prefixed = dsm_jax.transcribe(dataclasses.replace(model, config=config), pcm, frames=True)
    padded = np.concatenate([np.zeros(24_000, np.float32), pcm, np.zeros(48_000, np.float32)])
    plain = dsm_jax.transcribe(model, padded, frames=True)
    assert tokens(prefixed) == tokens(plain)  # 1.5 s of the 3.5 s at the end come from the plain config
    shift = 1.0 + 2.5 - 0.5
    late = [w for w in plain.words if w.start > shift]
    assert late
    np.testing.assert_allclose([w.start for w in prefixed.words][-len(late) :], [w.start - shift for w in late])


def test_bfloat16_runs_and_streams():
    narrow = dsm_jax.load(stt_model.CHECKPOINT, dtype="bfloat16")
    whole = dsm_jax.transcribe(narrow, stt_model.recording(), frames=True)
    same = np.mean(np.array(tokens(whole)) == stt_model.expected()["tokens_T"])
    assert same > 0.2, "an eighth of the digits decide a random model's tokens often enough"
    words = [e.word for e in dsm_jax.transcribe_stream(narrow, [stt_model.recording()]) if isinstance(e, WordEnded)]
    assert len(words) > 5


def test_a_model_spread_over_devices_gives_the_same_words_and_compiles_once(whole, compilations):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("model",))
    spread = dsm_jax.load(stt_model.CHECKPOINT, sharding=Sharding(mesh))
    assert tokens(dsm_jax.transcribe(spread, stt_model.recording(), frames=True)) == tokens(whole)
    warm = len(compilations)
    dsm_jax.transcribe(spread, stt_model.recording()[:50_000])
    assert len(compilations) == warm


def test_an_audio_prompt_may_be_a_file_or_samples_of_any_kind(model, tmp_path):
    pcm = stt_model.recording()
    audio.write(tmp_path / "prompt.wav", pcm[:24_000], 24_000)
    samples = audio.read(tmp_path / "prompt.wav")
    prompts = [tmp_path / "prompt.wav", samples, np.round(samples * 32_768).astype(np.int16)]
    said = [
        tokens(dsm_jax.transcribe(model, pcm[:30_000], options=TranscribeOptions(prompt=Prompt(audio=p)), frames=True))
        for p in prompts
    ]
    assert said[0] == said[1] == said[2]
    with pytest.raises(AudioError, match="NaN"):
        dsm_jax.transcribe(
            model, pcm, options=TranscribeOptions(prompt=Prompt(audio=np.full(9_000, np.nan, np.float32)))
        )


def test_a_negative_temperature_is_refused(model):
    with pytest.raises(ConfigError, match=r"temperature is -1; expected a number from 0"):
        dsm_jax.transcribe(model, stt_model.recording(), options=TranscribeOptions(temperature=-1))

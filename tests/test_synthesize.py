"""Text to speech as a caller meets it: words and their times, voices, batches, live text.

The model is random: what the loop makes is compared with the reference in tests/parity.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import dsm_jax
from dsm_jax import audio, codec
from dsm_jax.errors import AudioError, BatchError, ConfigError, SpeechError
from dsm_jax.models.streams import ZERO_TOKEN
from dsm_jax.speech import SpokenWord
from dsm_jax.tts import Dialogue, IncompleteSpeechError, Request, SynthesizeOptions, Turn, synthesize_each
from dsm_jax.tts.script import MAIN, OTHER, Entry
from dsm_jax.tts.speech import words_at
from dsm_jax.tts.synthesizer import Synthesizer
from tests.helpers import tts_model
from tests.helpers.tts_model import CODEBOOKS, DELAY_STEPS, FRAME, LAST_DELAY

pytestmark = pytest.mark.slow

GREEDY = SynthesizeOptions(temperature=0.0)
SAMPLED = SynthesizeOptions(temperature=0.8, codebooks=1, seed=3)
TEXT = "good morning everyone"
BROKEN = 'good <break time="0.5s"/>morning at<break time="0.24s"/> the station'
FRAME_RATE = 12.5
VOICE, OTHER_VOICE = tts_model.voice(0), tts_model.voice(1)
ROUNDING = 1e-5  # of samples whose sums are in another order, as programs for other batches have it


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tts_model.random_model(tmp_path_factory.mktemp("speakers"))


@pytest.fixture(scope="module")
def prefix_model(tmp_path_factory):
    return tts_model.random_model(tmp_path_factory.mktemp("prefix"), tts_model.PREFIX)


@pytest.fixture(scope="module")
def speech(model):
    return dsm_jax.synthesize(model, TEXT, voice=VOICE, options=GREEDY)


def first_tokens(speech) -> np.ndarray:
    """Return the text that was fed, without that of the words ahead."""
    text_F = speech.frames[0]
    return np.where(text_F == ZERO_TOKEN, ZERO_TOKEN, text_F % (tts_model.SPEAKERS.text_card + 1))


def word_columns(speech) -> np.ndarray:
    """Return the steps at which words begin, and the script ends: the second token is then 0."""
    return np.flatnonzero(speech.frames[0] // (tts_model.SPEAKERS.text_card + 1) == 1)


def assert_same(found, expected) -> None:
    np.testing.assert_array_equal(found.frames, expected.frames)
    np.testing.assert_allclose(found.pcm, expected.pcm, rtol=0, atol=ROUNDING)
    arrays = {"pcm": None, "frames": None}
    assert vars(found) | arrays == vars(expected) | arrays


def recording(frames: int) -> np.ndarray:
    return np.random.default_rng(5).uniform(-0.5, 0.5, frames * FRAME).astype(np.float32)


def test_words_follow_each_other_and_begin_where_they_are_fed(model, speech):
    assert [word.text for word in speech.words] == TEXT.split()
    assert [word.end for word in speech.words] == [*[word.start for word in speech.words[1:]], speech.duration]
    assert speech.words[0].start == GREEDY.initial_padding / FRAME_RATE
    np.testing.assert_allclose([word.start for word in speech.words], word_columns(speech)[:-1] / FRAME_RATE)
    assert model.tokenizer.decode([token for token in first_tokens(speech) if token > 3]) == TEXT


def test_frames_and_samples_are_as_long_as_promised(model, speech):
    assert (speech.pcm.dtype, speech.frames.dtype) == (np.float32, np.int32)
    streams, frames = speech.frames.shape
    assert streams == 1 + CODEBOOKS
    assert frames == word_columns(speech)[-1] + DELAY_STEPS + GREEDY.final_padding - LAST_DELAY
    assert (speech.frames[1:, :DELAY_STEPS] == ZERO_TOKEN).all()
    assert (speech.frames[1:, DELAY_STEPS:] >= 0).all()
    assert len(np.unique(speech.frames[1:])) > 6, "a constant output would prove nothing"
    assert speech.pcm.shape == ((frames - DELAY_STEPS) * FRAME,)
    assert 0.1 < np.abs(speech.pcm).max() <= 1
    assert (speech.sample_rate, speech.model) == (model.sample_rate, model.name)
    assert speech.duration == speech.pcm.size / model.sample_rate


def test_json_has_what_was_promised(speech):
    read = json.loads(json.dumps(speech.to_dict()))
    assert list(read) == ["model", "duration", "text", "words"]
    assert (read["model"], read["text"]) == ("random", TEXT)
    assert read["duration"] == round(speech.duration, 3)
    assert read["words"][1] == {
        "text": "morning",
        "start": round(speech.words[1].start, 3),
        "end": read["words"][2]["start"],
    }


def test_a_break_is_a_pause_and_no_word(model):
    words = dsm_jax.synthesize(model, BROKEN, voice=VOICE, options=GREEDY).words
    assert [word.text for word in words] == ["good", "morning", "at", "the", "station"]
    long = dsm_jax.synthesize(model, BROKEN.replace("0.5s", "4s"), voice=VOICE, options=GREEDY).words
    assert long[0] == dataclasses.replace(words[0], end=long[1].start)
    assert long[1].start - long[0].start >= 4 > words[1].start - words[0].start


def test_two_speakers_take_turns(model):
    turns = ("good morning", "thank you", "the station")
    said = dsm_jax.synthesize(model, Request(turns, (VOICE, OTHER_VOICE)), options=GREEDY)
    assert [word.text for word in said.words] == " ".join(turns).split()
    tokens = first_tokens(said)
    assert tokens[np.isin(tokens, [MAIN, OTHER])].tolist() == [MAIN, OTHER, MAIN]
    second = dsm_jax.synthesize(model, Request(("", *turns), (VOICE, OTHER_VOICE)), options=GREEDY)
    tokens = first_tokens(second)
    assert tokens[np.isin(tokens, [MAIN, OTHER])].tolist() == [OTHER, MAIN, OTHER]
    swapped = dsm_jax.synthesize(model, Request(turns, (OTHER_VOICE, VOICE)), options=GREEDY)
    doubled = dsm_jax.synthesize(model, Request(turns, (VOICE, VOICE)), options=GREEDY)
    assert len({swapped.pcm.tobytes(), doubled.pcm.tobytes(), said.pcm.tobytes()}) == 3


def test_a_dialogue_is_its_turns_by_voice(model):
    turns = [Turn("good morning", VOICE), Turn("thank you", OTHER_VOICE), Turn("the", OTHER_VOICE), Turn("fox", VOICE)]
    said = dsm_jax.synthesize(model, Dialogue(iter(turns)), options=GREEDY)
    whole = Request(("good morning", "thank you the", "fox"), (VOICE, OTHER_VOICE))
    assert_same(said, dsm_jax.synthesize(model, whole, options=GREEDY))
    alone = dsm_jax.synthesize(model, Dialogue([Turn("good"), Turn("morning")]), voice=VOICE, options=GREEDY)
    assert_same(alone, dsm_jax.synthesize(model, "good morning", voice=VOICE, options=GREEDY))


def test_a_turn_has_its_own_voice_and_otherwise_the_one_that_is_given():
    turns = [Turn("a"), Turn("b", "anna"), Turn("c")]
    assert Request.of(Dialogue(turns), "berta", GREEDY) == Request(("a", "b", "c"), ("berta", "anna"), options=GREEDY)
    mixed = Request.of(Dialogue([Turn("a", "anna"), Turn("b", VOICE), Turn("c", "anna"), Turn("d", VOICE)]))
    assert (mixed.text, mixed.voices[0], mixed.voices[1] is VOICE) == (("a", "b", "c", "d"), "anna", True)
    with pytest.raises(SpeechError, match="the dialogue has 3 voices; the models know two speakers"):
        Request.of(Dialogue([*turns, Turn("d", VOICE)]), "berta")
    with pytest.raises(SpeechError, match="a dialogue was made of nothing; expected one or more Turn"):
        Dialogue([])


def test_a_request_has_its_own_options_and_otherwise_those_that_are_given():
    assert Request.of(Request("a"), None, GREEDY) == Request("a", options=GREEDY)
    assert Request.of(Request("a", options=SAMPLED), None, GREEDY) == Request("a", options=SAMPLED)


def test_words_end_where_the_next_one_begins_and_no_word_ends_before_its_start():
    entries = [Entry((4,), "a", 0), Entry((), "", 3), Entry((5,), "b", 0), Entry((6,), "never begun", 0)]
    # The sound of the last word had not been made when the frames came to their end.
    assert words_at(entries, [4, 6, 9], 2, 12.5, 0.4) == [SpokenWord("a", 0.16, 0.56), SpokenWord("b", 0.56, 0.56)]


def test_each_option_reaches_the_program_under_its_own_name(model, prefix_model):
    options = SynthesizeOptions(
        guidance_scale=3.0, temperature=0.0, top_k=70, top_k_text=9, seed=4, codebooks=1, padding_bonus=0.5,
        initial_padding=1, max_padding=5, final_padding=6, max_frames=77,
    )  # fmt: skip
    other = dataclasses.replace(options, guidance_scale=1.0, top_k=3, top_k_text=2)
    shared = {
        "temperature": 0.0, "top_k_audio": 70, "top_k_text": 9, "seed": 4, "codebooks": 1, "padding_bonus": 0.5,
        "initial_padding": 1, "max_padding": 5, "final_padding": 6, "max_steps": 77,
    }  # fmt: skip
    for spoken_by, voice, guided, told in (
        (model, VOICE, False, {"guidance": 1.0, "condition_guidance": 3.0}),
        (prefix_model, recording(10), True, {"guidance": 3.0, "condition_guidance": None}),
    ):
        synthesizer = Synthesizer(spoken_by, 1, [other, options])
        prepared = vars(synthesizer.prepare(Request(TEXT, (voice,)), options))
        assert {name: prepared[name] for name in shared | told} == shared | told
        room = synthesizer._settings
        assert (room.guided, room.max_top_k_text, room.max_top_k_audio) == (guided, 16, 128)
        assert synthesizer.prepare(Request(TEXT, (voice,), seed=0), options).seed == 0, "and not that of the options"


def test_any_iterable_is_a_batch_with_voices_and_options_of_its_own(model, speech):
    other = dsm_jax.synthesize(model, "thank you", voice=OTHER_VOICE, options=SAMPLED)
    texts = (text for text in (TEXT, "thank you"))
    first, second = dsm_jax.synthesize(model, texts, voice=[VOICE, OTHER_VOICE], options=[GREEDY, SAMPLED])
    assert_same(first, speech)
    assert_same(second, other)
    assert dsm_jax.synthesize(model, []) == []
    with pytest.raises(BatchError, match="1 of 2 inputs failed") as failed:
        dsm_jax.synthesize(model, [TEXT, "a ÿ"], voice=VOICE, options=GREEDY)
    assert_same(failed.value.results[0], speech)
    assert failed.value.results[1] is None
    for wrong, message in (
        ({"voice": [VOICE]}, "2 texts have 1 voice; give one for all, or one each"),
        ({"options": [GREEDY] * 3}, "2 texts have 3 options; give one for all, or one each"),
    ):
        with pytest.raises(ConfigError, match=message):
            dsm_jax.synthesize(model, [TEXT, TEXT], **wrong)


@pytest.mark.parametrize("max_frames", [1, 30])
def test_a_text_that_is_cut_off_has_the_speech_before_the_cut(model, speech, max_frames):
    short = dataclasses.replace(GREEDY, max_frames=max_frames)
    with pytest.raises(IncompleteSpeechError, match=f"was not said to its end in {max_frames} frames") as cut:
        dsm_jax.synthesize(model, TEXT, voice=VOICE, options=short)
    said = cut.value.speech
    assert not said.complete
    np.testing.assert_allclose(said.pcm, speech.pcm[: said.pcm.size], rtol=0, atol=ROUNDING)
    assert (said.pcm.size > 0) == (max_frames > 1)
    assert [word.text for word in said.words] == TEXT.split()[: len(said.words)]


def test_a_speech_is_saved_by_its_suffix(speech, tmp_path):
    speech.save(tmp_path / "a.flac")
    np.testing.assert_allclose(audio.read(tmp_path / "a.flac", speech.sample_rate), speech.pcm, atol=1 / 32_768)
    with pytest.raises(AudioError, match=r"expected one of \.wav"):
        speech.save(tmp_path / "a.txt")


def test_words_before_an_unsayable_one_are_synthesized_and_skipping_goes_on(model):
    pieces = ["good mor", "ning ÿ ", "station"]
    live = dsm_jax.synthesize_stream(model, iter(pieces), voice=VOICE, options=GREEDY)
    heard = []
    with pytest.raises(SpeechError, match="turn 1 has the word 'ÿ'"):
        heard.extend(live)
    np.testing.assert_array_equal(
        np.concatenate(heard), dsm_jax.synthesize(model, "good morning", voice=VOICE, options=GREEDY).pcm
    )
    skipping = dataclasses.replace(GREEDY, on_unsayable="skip")
    rest = np.concatenate(list(dsm_jax.synthesize_stream(model, iter(pieces), voice=VOICE, options=skipping)))
    np.testing.assert_array_equal(
        rest, dsm_jax.synthesize(model, "good morning station", voice=VOICE, options=GREEDY).pcm
    )


def test_a_voice_may_be_a_file_or_an_array(model, speech, tmp_path):
    path = tts_model.write_voice(tmp_path / "voice.safetensors", VOICE)
    for given_as in (path, str(path), VOICE, jnp.asarray(VOICE)):
        np.testing.assert_array_equal(dsm_jax.synthesize(model, TEXT, voice=given_as, options=GREEDY).pcm, speech.pcm)
    other = dsm_jax.synthesize(model, TEXT, voice=OTHER_VOICE, options=GREEDY)
    assert other.pcm.tobytes() != speech.pcm.tobytes()


def test_sampling_depends_on_the_seed_alone(model):
    runs = [dsm_jax.synthesize(model, TEXT, voice=VOICE, options=SAMPLED) for _ in range(2)]
    other = dsm_jax.synthesize(model, TEXT, voice=VOICE, options=dataclasses.replace(SAMPLED, seed=4))
    np.testing.assert_array_equal(runs[0].pcm, runs[1].pcm)
    assert runs[0].frames.shape[0] == 2, "of the codebooks one was asked for"
    assert runs[0].frames[1].tobytes() != other.frames[1].tobytes()


@pytest.mark.parametrize("options", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_each_of_a_batch_equals_itself_alone_and_a_bad_one_costs_only_itself(model, options):
    good = {
        0: Request(TEXT, (VOICE,), seed=5),
        2: Request(("thank you", "for coming to the station"), (VOICE, OTHER_VOICE)),
        4: Request(BROKEN, (OTHER_VOICE,), seed=7),
    }
    requests = [good[0], Request(" ", (VOICE,)), good[2], Request(("zoo", "a ÿ"), (VOICE,)), good[4]]
    results = dict(synthesize_each(model, requests, options=options, batch_size=2))
    assert sorted(results) == [0, 1, 2, 3, 4]
    with pytest.raises(SpeechError, match="has no word in it"):
        raise results[1]
    with pytest.raises(SpeechError, match="turn 2 has the word 'ÿ'"):
        raise results[3]
    for index, request in good.items():
        seeded = options if request.seed is None else dataclasses.replace(options, seed=request.seed)
        assert_same(results[index], dsm_jax.synthesize(model, request, options=seeded))


def test_texts_in_voices_of_two_lengths_are_both_synthesized(model, speech):
    # Loud, so that the greedy codes of a random model differ, however this text is cut into tokens.
    long, other = 5 * tts_model.voice(0, steps=3), 5 * OTHER_VOICE
    requests = [Request(TEXT, (voice,)) for voice in (VOICE, long, other, VOICE)]
    results = dict(synthesize_each(model, requests, options=GREEDY, batch_size=2))
    assert [[word.text for word in results[index].words] for index in range(4)] == [TEXT.split()] * 4
    assert_same(results[0], speech)
    assert_same(results[3], speech)
    assert len({results[index].pcm.tobytes() for index in range(3)}) == 3


@pytest.mark.parametrize(("requests", "asked", "rows"), [(3, 8, 4), (9, 8, 8), (9, 3, 3), (1, 8, 1), (0, 8, 1)])
def test_the_batch_is_no_larger_than_asked_or_needed(model, monkeypatch, requests, asked, rows):
    made = []
    init = Synthesizer.__init__

    def spy(self: Synthesizer, model, slots: int, options) -> None:
        made.append(slots)
        init(self, model, slots, options)

    monkeypatch.setattr(Synthesizer, "__init__", spy)
    results = dict(synthesize_each(model, [Request("")] * requests, options=GREEDY, batch_size=asked))
    assert len(results) == requests
    assert made == [rows]


def test_a_program_has_room_for_the_options_of_all_requests_that_it_can_say(model, monkeypatch):
    made, error = [], SpeechError("no text")
    monkeypatch.setattr("dsm_jax.tts.batch.Synthesizer", lambda model, slots, options: made.append(options))
    monkeypatch.setattr("dsm_jax.tts.batch.speak_each", lambda _, session, read, *rest: [read[-1]])
    default, own, unfit = (SynthesizeOptions(**options) for options in ({"seed": 1}, {"top_k": 3}, {"codebooks": 99}))
    for requests, wanted in (
        (["one"], [default]),
        ([Request.of("one", None, own)], [own]),
        ([Request.of("one", None, own), "two", Request.of("one", None, unfit)], [default, own]),
        ([Request.of("one", None, unfit), error], [default]),
    ):
        (last,) = synthesize_each(model, requests, options=default)
        assert made.pop() == wanted
    assert last is error
    with pytest.raises(ConfigError, match="batch_size is 0; expected 1 or more"):
        list(synthesize_each(model, [], batch_size=0))


def test_progress_counts_the_seconds_there_are(model, speech):
    seen = []
    dsm_jax.synthesize(model, TEXT, voice=VOICE, options=GREEDY, progress=lambda p: seen.append(p.done))
    assert len(seen) > 1
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(speech.duration)


@pytest.fixture(scope="module")
def say(model):
    """Say pieces of text live; a function, as a failing example is shown with all of a fixture's value."""
    return lambda pieces: np.concatenate(
        list(dsm_jax.synthesize_stream(model, pieces, voice=VOICE, options=GREEDY))
    ).tobytes()


@pytest.fixture(scope="module")
def broken_said(model):
    return lambda: dsm_jax.synthesize(model, BROKEN, voice=VOICE, options=GREEDY).pcm.tobytes()


@settings(max_examples=12, deadline=None)
@given(cuts=st.lists(st.integers(0, len(BROKEN)), max_size=8))
@example(cuts=list(range(len(BROKEN))))
@example(cuts=[BROKEN.index(" time")])
@example(cuts=[BROKEN.index("morning")])
def test_a_text_cut_anywhere_gives_the_speech_of_the_whole(say, broken_said, cuts):
    ends = [*sorted(cuts), len(BROKEN)]
    pieces = [BROKEN[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
    assert "".join(pieces) == BROKEN
    assert say(pieces) == broken_said()


def test_a_live_text_may_begin_with_a_pause(model, say):
    pieces = ['<break time="0.5s"/> ', "good ", "morning"]
    whole = dsm_jax.synthesize(model, "".join(pieces), voice=VOICE, options=GREEDY)
    assert say(pieces) == whole.pcm.tobytes()


def test_sound_comes_while_text_is_still_to_come(model, speech):
    given_out = []

    def pieces():
        for word in TEXT.split() * 3:
            given_out.append(word)
            yield f"{word} "

    heard = dsm_jax.synthesize_stream(model, pieces(), voice=VOICE, options=GREEDY)
    first = next(heard)
    assert len(given_out) < 6
    assert first.dtype == np.float32
    assert all(piece.size % FRAME == 0 for piece in [first, *heard])
    whole = list(dsm_jax.synthesize_stream(model, TEXT, voice=VOICE, options=GREEDY))
    np.testing.assert_array_equal(np.concatenate(whole), speech.pcm)
    assert len(whole) > 4


@pytest.mark.parametrize("length", [3, 10, 70])
def test_a_recording_is_continued_and_not_repeated(prefix_model, length):
    # Two frames are left out: they have not heard what follows them.
    heard_QP = codec.encode(prefix_model, recording(length), codebooks=CODEBOOKS)[:, :-2]
    after = length - 2
    said = dsm_jax.synthesize(prefix_model, TEXT, voice=recording(length))
    np.testing.assert_array_equal(said.frames[1:, DELAY_STEPS : DELAY_STEPS + after], heard_QP)
    assert (said.frames[0, :after] == ZERO_TOKEN).all()
    assert [word.text for word in said.words] == TEXT.split()
    assert said.words[0].start == SynthesizeOptions().initial_padding / FRAME_RATE
    np.testing.assert_allclose([w.start for w in said.words], (word_columns(said)[:-1] - after) / FRAME_RATE)
    assert said.words[-1].end == said.duration
    mimi = prefix_model.codec
    pcm_T = np.clip(jax.jit(mimi.decode)(said.frames[None, 1:, DELAY_STEPS:])[0, :, 0], -1, 1)
    np.testing.assert_allclose(said.pcm, pcm_T[after * FRAME :], rtol=0, atol=ROUNDING)
    streamed = dsm_jax.synthesize_stream(prefix_model, TEXT, voice=recording(length))
    np.testing.assert_array_equal(np.concatenate(list(streamed)), said.pcm)

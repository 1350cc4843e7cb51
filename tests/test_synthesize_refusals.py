"""Text to speech that cannot be: models that do not speak, voices, texts and options that they cannot take."""

import dataclasses

import numpy as np
import pytest

import dsm_jax
from dsm_jax.configs import ModelConfig
from dsm_jax.errors import AudioError, CheckpointError, ConfigError, DsmError, SpeechError, StreamError
from dsm_jax.tts import Dialogue, Request, SynthesizeOptions, Turn
from tests.helpers import tts_model
from tests.helpers.tts_model import FRAME, voice

pytestmark = pytest.mark.slow

GREEDY = SynthesizeOptions(temperature=0.0)
LONG = "to be at the old city"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tts_model.make_checkpoint(tmp_path_factory.mktemp("speakers"))


@pytest.fixture(scope="module")
def model(checkpoint):
    return dsm_jax.load(checkpoint)


@pytest.fixture(scope="module")
def prefix_model(tmp_path_factory):
    return tts_model.random_model(tmp_path_factory.mktemp("prefix"), tts_model.PREFIX)


def refused_alike(model, error, message, text="good", **more) -> None:
    """Check that the whole text and live text are refused with the same message."""
    with pytest.raises(error, match=message):
        dsm_jax.synthesize(model, text, **more)
    with pytest.raises(error, match=message):
        list(dsm_jax.synthesize_stream(model, text, **more))


def test_a_model_that_only_listens_is_refused():
    refused_alike(
        dsm_jax.load("digits"), CheckpointError, "^digits is a speech-to-text model; to speak, load a text-to-"
    )


def test_the_kind_of_the_model_comes_before_arguments_of_another_kind():
    listener = dsm_jax.load("digits")
    for sound in (dsm_jax.synthesize, lambda *args, **more: next(dsm_jax.synthesize_stream(*args, **more))):
        with pytest.raises(CheckpointError, match=r"^digits is a speech-to-text model; to speak, load a text-to-"):
            sound(listener, "good", speaker=0)


def test_a_codec_alone_is_refused(model):
    config = ModelConfig(model_type="mimi", mimi=model.config.mimi)
    alone = dataclasses.replace(model, config=config, lm_def=None, lm_params=None, tokenizer=None, name="some-codec")
    refused_alike(alone, CheckpointError, "^some-codec is a codec without a language model; to speak, load a text-to-")


def test_a_model_without_its_decoder_is_refused(checkpoint):
    deaf = dsm_jax.load(checkpoint, stt_only=True)
    refused_alike(
        deaf,
        ConfigError,
        "^speaker has no decoder of sound: it was loaded with stt_only=True, or made with decoder=False. Load or make",
    )


def test_a_model_without_a_tokenizer_is_refused(model):
    dumb = dataclasses.replace(model, tokenizer=None)
    refused_alike(dumb, CheckpointError, "speaker has no tokenizer; add the published one, and name it in config.json")


def test_a_model_of_two_streams_is_refused(model):
    settings = dataclasses.replace(model.config.tts, multistream=True)
    config = dataclasses.replace(model.config, tts=settings)
    refused_alike(
        dataclasses.replace(model, config=config), CheckpointError, "two speakers in streams of their own, which is not"
    )


@pytest.mark.parametrize(
    ("speaker", "error", "message"),
    [
        ((), SpeechError, "has 0 voices; this model needs 1 to 5: give a voice"),
        (tuple(voice(n) for n in range(6)), SpeechError, "has 6 voices; this model needs 1 to 5"),
        (
            (voice(0), voice(0, steps=3)),
            SpeechError,
            r"the voices of a request are \[2, 3\] steps long; give voices of one length",
        ),
        ((voice(0, width=7),), SpeechError, "a voice is 7 numbers wide; this model's are 10: take one made for it"),
        (
            ("expresso/nobody.wav",),
            CheckpointError,
            r"^kyutai/tts-voices/expresso/nobody\.wav\.0a1b2c3d@7\.safetensors is not in the local cache and could not",
        ),
        (
            ("nobody.safetensors",),
            CheckpointError,
            "the voice nobody.safetensors is not a file; give a voice's safetensors",
        ),
    ],
    ids=["none", "six", "lengths", "width", "unknown", "missing"],
)
def test_voices_that_the_model_cannot_take(model, speaker, error, message):
    with pytest.raises(error, match=message):
        dsm_jax.synthesize(model, Request("good", speaker), options=GREEDY)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"the text \(1 turn\) has no word in it"),
        (' \n<break time="1s"/>', r"the text \(1 turn\) has no word in it"),
        ("good \udcff", r"turn 1 has the word '\\udcff', which words.model encodes as"),
        ("good ÿ morning", "turn 1 has the word 'ÿ', which words.model encodes as"),
        ("good < morning", "turn 1 has a '<' that belongs to no tag"),
        ("good > morning", "turn 1 has a '>' that belongs to no tag"),
        ("good <b>morning</b>", "turn 1 has '<b>', an unknown tag"),
        ('good <break time="soon"/>', "a break that cannot be read"),
    ],
)
def test_unsayable_texts_are_refused(model, text, message):
    refused_alike(model, SpeechError, message, text, voice=voice(0), options=GREEDY)


def test_faults_of_live_text_are_raised_when_it_arrives(model):
    heard = dsm_jax.synthesize_stream(model, iter(["good ", "<b> ", "never asked for"]), voice=voice(0), options=GREEDY)
    with pytest.raises(SpeechError, match="turn 1 has '<b>', an unknown tag"):
        list(heard)


@pytest.mark.parametrize("text", [Dialogue([Turn("good")]), [1, 2], None])
def test_live_text_is_one_turn_of_text(model, text):
    kind = "int" if isinstance(text, list) else type(text).__name__
    with pytest.raises(SpeechError, match=f"^the text of a stream has a value of type {kind}; expected one text: a"):
        list(dsm_jax.synthesize_stream(model, text, voice=voice(0), options=GREEDY))
    with pytest.raises(SpeechError, match=f"^a piece of the text is {type(text).__name__}; expected str$"):
        dsm_jax.StreamingSynthesizer(model, voice=voice(0), options=GREEDY).feed(text)


def test_options_of_another_class_are_refused(model):
    with pytest.raises(ConfigError, match=f"^options are NoneType; {model.name} takes SynthesizeOptions$"):
        dsm_jax.StreamingSynthesizer(model, options=None)


def test_a_text_that_has_ended_takes_no_more(model):
    finished = dsm_jax.StreamingSynthesizer(model, voice=voice(0), options=GREEDY)
    assert list(finished.feed("good")) == []
    assert list(finished.finish())
    faulty = dsm_jax.StreamingSynthesizer(model, voice=voice(0), options=GREEDY)
    with pytest.raises(SpeechError, match="turn 1 has the word 'ÿ'"):
        list(faulty.feed("ÿ "))
    for live in (finished, faulty):
        with pytest.raises(StreamError, match="text was fed to a stream that has been finished; make a new Streaming"):
            list(live.feed("good "))
        with pytest.raises(StreamError, match="the text has been finished already; make a new StreamingSynthesizer"):
            list(live.finish())


@pytest.mark.parametrize(
    ("text", "kind"), [(3.0, "float"), (None, "NoneType"), (b"good", "bytes"), (["good", 3], "int")]
)
def test_a_stream_says_one_text_or_pieces_of_it(model, text, kind):
    with pytest.raises(
        SpeechError, match=f"^the text of a stream has a value of type {kind}; expected one text: a str"
    ):
        list(dsm_jax.synthesize_stream(model, text, voice=voice(0), options=GREEDY))


def test_live_text_is_taken_whether_or_not_its_sound_is_read(model):
    live = dsm_jax.StreamingSynthesizer(model, voice=voice(0), options=GREEDY)
    live.feed("good morn")
    live.feed("ing everyone ")
    rest = live.finish()
    with pytest.raises(StreamError, match="the text has been finished already; make a new StreamingSynthesizer"):
        live.finish()
    with pytest.raises(StreamError, match="text was fed to a stream that has been finished; make a new Streaming"):
        live.feed("again")
    whole = dsm_jax.synthesize(model, "good morning everyone ", voice=voice(0), options=GREEDY)
    np.testing.assert_array_equal(np.concatenate(list(rest)), whole.pcm)


def test_a_text_that_does_not_fit_into_the_frames_is_refused(model):
    def say(max_frames: int) -> dsm_jax.Speech:
        options = dataclasses.replace(GREEDY, max_frames=max_frames)
        return dsm_jax.synthesize(model, LONG, voice=voice(0), options=options)

    enough = say(1000)
    exactly = enough.frames.shape[1] + tts_model.LAST_DELAY
    np.testing.assert_array_equal(say(exactly).pcm, enough.pcm)
    with pytest.raises(SpeechError, match=f"to its end in {exactly - 1} frames: 6 of its 6 words and breaks were;"):
        say(exactly - 1)
    begun = sum(round(word.start * 12.5) < 20 for word in enough.words)
    assert 0 < begun < 6
    with pytest.raises(SpeechError, match=f"20 frames: {begun} of its 6 words and breaks were; allow more with max"):
        say(20)
    live = dsm_jax.synthesize_stream(model, LONG, voice=voice(0), options=dataclasses.replace(GREEDY, max_frames=20))
    heard = []
    with pytest.raises(SpeechError, match=rf"in 20 frames: {begun} of its \d words and breaks were; allow more"):
        heard.extend(live)
    sounding = 20 - tts_model.DELAY_STEPS - tts_model.LAST_DELAY
    np.testing.assert_array_equal(np.concatenate(heard), enough.pcm[: sounding * FRAME])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": 1.7}, r"the guidance is 1\.7; this model knows 1, 2, 3$"),
        ({"guidance_scale": 0.5}, r"guidance_scale is 0\.5; expected 1 or more"),
        ({"temperature": -0.1}, r"temperature is -0\.1; expected a number from 0"),
        ({"temperature": float("nan")}, "temperature is nan; expected a number from 0"),
        ({"top_k_text": -1}, "top_k_text is -1; expected 0, which keeps all tokens, or more"),
        ({"top_k": -1}, "top_k is -1; expected 0"),
        ({"final_padding": -1}, "final_padding is -1; expected 0 or more"),
        ({"initial_padding": -1}, "initial_padding is -1; expected 0 or more"),
        ({"max_padding": -1}, "max_padding is -1; expected 0 or more"),
        ({"padding_between": -1}, "padding_between is -1; expected 0 or more"),
        ({"padding_bonus": float("nan")}, "padding_bonus is nan; expected a finite number"),
        ({"max_frames": 0}, "max_frames is 0; expected 1 or more"),
        ({"seed": 2**63}, "the seed is 9223372036854775808; expected a number of 64 bits"),
        ({"codebooks": 3}, "^3 codebooks are to be generated; speaker makes 1 to 2$"),
        ({"codebooks": 0}, "codebooks is 0; expected 1 or more"),
        ({"on_unsayable": "drop"}, "on_unsayable is 'drop'; expected 'error' or 'skip'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_options_out_of_their_range(model, options, message):
    with pytest.raises(ValueError, match=message) as refused:
        dsm_jax.synthesize(model, "good", voice=voice(0), options=SynthesizeOptions(**options))
    assert isinstance(refused.value, DsmError)


def test_one_text_has_one_voice_and_one_of_the_options(model):
    with pytest.raises(ConfigError, match="one text has a list of options; give one SynthesizeOptions, or a list of"):
        dsm_jax.synthesize(model, "one", options=[SynthesizeOptions()])
    with pytest.raises(ConfigError, match="one text has a list of voices; give one voice, or a Dialogue whose turns"):
        dsm_jax.synthesize(model, "one", voice=["one", "other"])
    with pytest.raises(SpeechError, match=r"^the voice given is int64 \[\]; expected finite numbers \[steps, width\]$"):
        dsm_jax.synthesize(model, "one", voice=5)


def test_two_recordings_to_go_on_from_are_refused(prefix_model):
    one = np.zeros(20 * FRAME, np.float32)
    with pytest.raises(SpeechError, match="2 voices were given; random goes on from the recording of one"):
        dsm_jax.synthesize(prefix_model, Request("good", (one, one)))


def test_a_recording_that_leaves_nothing_to_go_on_from_is_refused(prefix_model):
    short = np.zeros(2 * FRAME, np.float32)
    refused_alike(
        prefix_model, SpeechError, r"the recording to go on from is 0\.16 s long; give some seconds", voice=short
    )


def test_a_recording_that_cannot_be_read_is_refused(prefix_model, tmp_path):
    (tmp_path / "talk.wav").write_text("not audio")
    refused_alike(prefix_model, AudioError, "talk.wav is not audio", voice=tmp_path / "talk.wav")
    refused_alike(prefix_model, AudioError, "missing.wav does not exist", voice="missing.wav")

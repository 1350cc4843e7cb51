"""Conversational speech that cannot be: every fault is a sentence, and costs only the request that has it."""

import dataclasses
import math

import numpy as np
import pytest

import dsm_jax
from dsm_jax import csm
from dsm_jax.csm import CsmOptions, Request, Segment
from dsm_jax.csm.batch import synthesize_each
from dsm_jax.errors import AudioError, BatchError, ConfigError, ModelKindError, SpeechError
from tests.helpers import tts_model
from tests.helpers.csm_model import CSM, random_model
from tests.helpers.tts_model import FRAME

GREEDY = CsmOptions(temperature=0.0, max_frames=16)
PCM = np.random.default_rng(0).normal(scale=0.1, size=5 * FRAME).astype(np.float32)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("csm"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("request_of", "error", "message"),
    [
        (lambda: Request(""), SpeechError, "^the text of a turn is ''; expected some words$"),
        (lambda: Request(" \n"), SpeechError, "^the text of a turn is ' .n'; expected some words$"),
        (lambda: Request("a \ud800"), SpeechError, "^the turn cannot be said: the text has half of a character at 5"),
        (lambda: Request("a", "0"), SpeechError, "^the speaker of 'a' is '0'; expected a number: 0, 1 and so on$"),
        (lambda: Request("a", -1), SpeechError, "^the speaker of 'a' is -1; expected a number"),
        (lambda: Request("a", True), SpeechError, "^the speaker of 'a' is True; expected a number"),
        (lambda: Request("a", 0, [Segment("b")]), SpeechError, "^the context's turn 'b' has no audio; give its record"),
        (lambda: Request("a", 0, [Segment("", 0, PCM)]), SpeechError, "^the text of a turn is ''"),
        (
            lambda: Request("a", 0, [Segment("b", 0, PCM[:0])]),
            AudioError,
            r"^the context's turn 'b': the array is empty \(shape \(0,\)\); expected at least one sample",
        ),
        (
            lambda: Request("a", 0, [Segment("b", 0, "/no/such/file.wav")]),
            AudioError,
            "^the context's turn 'b': .*/no/such/file.wav",
        ),
        (
            lambda: Request("a", 0, [Segment("b", 0, np.zeros((100, 2), np.float32))]),
            AudioError,
            r"^the context's turn 'b': the array has shape \(100, 2\); expected \[samples\], or \[channels, samples\]",
        ),
        (
            lambda: Request("a", 0, [Segment("b", 0, np.full(100, np.nan, np.float32))]),
            AudioError,
            "^the context's turn 'b': the array holds NaN",
        ),
        (
            lambda: Request("a", 0, [Segment("b", 0, np.tile(PCM, 110))]),
            SpeechError,
            "^the conversation takes 563 positions, one for each token of text and each frame of audio; random has "
            "512, the answer included: leave out its oldest turns, or shorten them$",
        ),
    ],
)
def test_a_fault_costs_only_its_own_request(model, request_of, error, message):
    results = dict(synthesize_each(model, [Request("z", 1), request_of(), Request("z", 1)], options=GREEDY))
    assert isinstance(results[1], error)
    with pytest.raises(error, match=message):
        raise results[1]
    for index in (0, 2):
        assert isinstance(results[index], dsm_jax.Speech)
    with pytest.raises(dsm_jax.BatchError, match="1 of 2 inputs failed") as caught:
        dsm_jax.synthesize(model, [Request("z", 1), request_of()], options=GREEDY)
    assert isinstance(caught.value.results[0], dsm_jax.Speech)


@pytest.mark.slow
def test_a_conversation_of_another_form_costs_only_itself(model):
    good = [{"role": "0", "content": "hello"}]
    texts = [good, [{"role": "zero", "content": "hello"}], "no", 3.0]
    with pytest.raises(dsm_jax.BatchError, match="2 of 4 inputs failed") as caught:
        dsm_jax.synthesize(model, texts, options=GREEDY)
    assert "has the role 'zero'; expected the number of a speaker" in str(caught.value.errors[1])
    assert "the text is float; expected a str, a conversation" in str(caught.value.errors[3])
    assert [result is None for result in caught.value.results] == [False, True, False, True]


@pytest.mark.slow
def test_a_watermark_that_does_not_fit_one_speech_costs_only_that(model):
    def short_of_the_second(pcm_T, sample_rate):
        lengths.append(pcm_T.size)
        return pcm_T[:-1] if len(lengths) == 2 else pcm_T

    lengths: list[int] = []
    texts = ["hello there.", "what?", "z"]
    with pytest.raises(dsm_jax.BatchError) as caught:
        dsm_jax.synthesize(model, texts, options=GREEDY, batch_size=1, watermark=short_of_the_second)
    made = [number for number, error in caught.value.errors.items() if "the watermark made" in str(error)]
    assert made == [1]


def test_stereo_and_other_rates_are_taken_as_everywhere(model, tmp_path):
    stereo, fast = tmp_path / "stereo.wav", tmp_path / "fast.wav"
    channels, doubled = np.stack([PCM, PCM[::-1]]), np.repeat(PCM, 2)
    dsm_jax.audio.write(stereo, channels, model.sample_rate)
    dsm_jax.audio.write(fast, doubled, 2 * model.sample_rate)
    synthesizer = csm.synthesizer.ConversationSynthesizer(model, 1)

    def positions(recording) -> np.ndarray:
        return synthesizer.positions_of(Segment("b", 0, recording))

    plain = positions(channels.mean(0))
    assert plain.shape[1] == len("[0]b") + 2 + 5 + 1
    np.testing.assert_array_equal(positions(channels), plain)
    np.testing.assert_array_equal(positions(stereo), positions(dsm_jax.audio.read(stereo, model.sample_rate)))
    resampled = np.concatenate([*dsm_jax.audio.resampled([doubled], 2 * model.sample_rate, model.sample_rate)])
    np.testing.assert_array_equal(positions(dsm_jax.Recorded(doubled, 2 * model.sample_rate)), positions(resampled))
    said = dsm_jax.Speech(doubled, 2 * model.sample_rate, (), np.zeros((model.config.csm.n_q, 3)), "another model")
    np.testing.assert_array_equal(positions(said), positions(resampled))
    np.testing.assert_array_equal(positions(fast), positions(dsm_jax.audio.read(fast, model.sample_rate)))
    assert not np.array_equal(positions(channels), positions(PCM)), "one channel alone is another recording"


def part(**audio) -> dict:
    return {"type": "audio"} | audio


TEXT = {"type": "text", "text": "hi"}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "^the conversation has no messages; expected one or more like "),
        (["hi"], "^message 1 has str; expected a message like "),
        ([{"role": "0"}], r"^message 1 has \['role'\]; expected a message like "),
        (
            [{"role": "user", "content": [TEXT]}],
            "^message 1 has the role 'user'; expected the number of a speaker, such ",
        ),
        ([{"role": True, "content": [TEXT]}], "^message 1 has the role True; expected the number of a speaker, such "),
        ([{"role": "00", "content": [TEXT]}], "^message 1 has the role '00'; expected the number of a speaker, such "),
        ([{"role": "٣", "content": [TEXT]}], "^message 1 has the role '٣'; expected the number of a speaker, such "),
        ([{"role": "²", "content": [TEXT]}], "^message 1 has the role '²'; expected the number of a speaker, such "),
        (
            [{"role": "7" * 5_000, "content": [TEXT]}],
            r"^message 1 has the role '7+\.\.\.7+'; expected the number of a speaker, such as '0'$",
        ),
        ([{"role": "0", "content": 3}], "^message 1 has the content 3; expected a list of objects, as in "),
        (
            [{"role": "0", "content": [TEXT, TEXT]}],
            "^message 1 has 2 texts and 0 recordings; expected one text, and one",
        ),
        ([{"role": "0", "content": [part(array=PCM)]}], "^message 1 has 0 texts and 1 recordings; expected one text"),
        (
            [{"role": "0", "content": [TEXT, part(array=PCM), part(array=PCM)]}, {"role": "0", "content": [TEXT]}],
            "^message 1 has 1 texts and 2 recordings; expected one text, and one recording at most$",
        ),
        (
            [{"role": "0", "content": [TEXT, part(array=PCM, sampling_rate="fast")]}, {"role": "0", "content": [TEXT]}],
            r"^message 1 has audio with the sampling_rate 'fast'; expected a number of Hz$",
        ),
        ([{"role": "0", "content": [{"type": "text"}]}], "^message 1 has the text None; expected words$"),
        ([{"role": "0", "content": [{"type": "text", "text": 5}]}], "^message 1 has the text 5; expected words$"),
        (
            [{"role": "0", "content": [TEXT, part(path="hi.wav", sampling_rate=1600)]}, {"role": "0", "content": "a"}],
            "^message 1 has a sampling_rate beside a file, which has its own; leave the sampling_rate out$",
        ),
        (
            [{"role": "0", "content": [TEXT, part(array=[10**400])]}, {"role": "0", "content": "a"}],
            r"^message 1 has audio that is a list of other things than numbers; give samples$",
        ),
        (
            [{"role": "0", "content": [TEXT, part(array=PCM, sampling_rate=-1)]}, {"role": "0", "content": "a"}],
            r"^message 1 has audio with the sampling_rate -1; expected a number of Hz$",
        ),
        (
            [{"role": "0", "content": [TEXT, part(array=PCM, sampling_rate=math.nan)]}, {"role": "0", "content": "a"}],
            r"^message 1 has audio with the sampling_rate nan; expected a number of Hz$",
        ),
        (
            [{"role": "0", "content": [TEXT, part(array=PCM, path="a.wav")]}, {"role": "0", "content": [TEXT]}],
            r"^message 1 has audio with \['array', 'path', 'type'\]; expected one of path, audio, array$",
        ),
        (
            [{"role": "0", "content": [TEXT, part(array=[[1], "a"])]}, {"role": "0", "content": [TEXT]}],
            r"^message 1 has audio that is a list of other things than numbers; give samples$",
        ),
        (
            [{"role": "0", "content": [{"type": ["text"]}]}],
            r"^message 1 has a part of type \['text'\]; expected 'text' or",
        ),
        ([{"role": "0", "content": [{"type": "image"}]}], "^message 1 has a part of type 'image'; expected 'text' or"),
        (
            [{"role": "0", "content": [TEXT, part(array=PCM)]}],
            "^the last message, 'hi', has audio; it is the one to speak: leave its audio out, or add a message",
        ),
        (
            [{"role": "0", "content": [TEXT]}, {"role": "0", "content": [TEXT]}],
            "^message 1 has no audio; every message but the last one needs its recording$",
        ),
        (
            [{"role": "0", "content": [TEXT, part(url="https://example.com/a.wav")]}, {"role": "0", "content": [TEXT]}],
            "^message 1 names the address https://example.com/a.wav; download it, and give the file$",
        ),
        (
            [{"role": "0", "content": [TEXT, part(bytes=b"")]}, {"role": "0", "content": [TEXT]}],
            r"^message 1 has audio with \['bytes', 'type'\]; expected one of path, audio, array$",
        ),
        (
            [{"role": "0", "content": [TEXT, part(audio={"bytes": b""})]}, {"role": "0", "content": [TEXT]}],
            r"^message 1 has audio with \['bytes'\]; expected array and sampling_rate$",
        ),
    ],
)
def test_a_conversation_of_another_form_is_refused(messages, message):
    with pytest.raises(SpeechError, match=message):
        Request.of_messages(messages)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"text": "a", "voice": "theo"}, ConfigError, "^voice was given, which random does not take; give context, in"),
        (
            {"text": "a", "options": dsm_jax.SynthesizeOptions()},
            ConfigError,
            "^options are SynthesizeOptions; random takes CsmOptions$",
        ),
        ({"text": 3.0}, SpeechError, "^the text is float; expected a str, a conversation, or several of these$"),
        ({"text": "a", "speaker": "0"}, SpeechError, r"^the speaker of 'a' is '0'; expected a number: 0, 1 and so on$"),
        (
            {"text": "a", "speaker": 10**5_000},
            SpeechError,
            "^the speaker of 'a' has more than 9 digits; number the speak",
        ),
        (
            {"text": [{"role": -(10**9), "content": "a"}]},
            SpeechError,
            "^the speaker of 'a' has more than 9 digits; num",
        ),
        (
            {"text": {"role": "0", "content": "a"}},
            SpeechError,
            "^the text is one message of a conversation; give the conversation, a list of its messages$",
        ),
        ({"text": b"hello"}, SpeechError, "^the text is bytes; expected a str, a conversation, or several of these$"),
        (
            {"text": iter([{"role": "0", "content": "a"}])},
            BatchError,
            "the text is one message of a conversation; give the conversation, a list of its messages",
        ),
        ({"text": ["a", 3]}, BatchError, "the text is int; expected a str, a conversation, or several of these$"),
        ({"text": ["a", "b"], "speaker": [0]}, ConfigError, "^2 texts have 1 speaker; give one for all, or one each$"),
        ({"text": ["a"], "context": [[], []]}, ConfigError, "^1 text has 2 contexts; give one for all, or one each$"),
        ({"text": "a", "speaker": range(1)}, ConfigError, "^one text has a list of speakers or options; give one of"),
        ({"text": "a", "speaker": [0]}, ConfigError, "^one text has a list of speakers or options; give one of each"),
        (
            {"text": "a", "context": Segment("b", 0, PCM)},
            SpeechError,
            "^the context is one Segment; give a list of them$",
        ),
        (
            {"text": "a", "context": [dsm_jax.Segment("b", 0.0, 1.0)]},
            SpeechError,
            r"^the context holds a dsm_jax.stt.*Segment; expected dsm_jax.csm.Segment\(text, speaker, audio\)$",
        ),
        (
            {"text": Request("a"), "speaker": 1},
            ConfigError,
            "^a speaker or a context was given beside a conversation that has its own; give them once$",
        ),
        (
            {"text": "a", "context": 5},
            SpeechError,
            r"^the context is 5; expected a list of dsm_jax\.csm\.Segment\(text",
        ),
        (
            {"text": "a", "watermark": 3},
            ConfigError,
            "^the watermark is 3; expected a function of samples and their rate$",
        ),
        (
            {"text": "z" * 507},
            SpeechError,
            "^the conversation takes 512 positions, .*; random has 512, the answer included: cut the text$",
        ),
        ({"text": ["a"], "batch_size": 1.5}, ConfigError, r"^batch_size is 1\.5; expected a whole number$"),
        ({"text": ["a"], "batch_size": 0}, ConfigError, "^batch_size is 0; expected 1 or more$"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(model, arguments, error, message):
    with pytest.raises(error, match=message):
        dsm_jax.synthesize(model, **arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (3.0, "^the text is float; expected a str, a conversation, or several of these$"),
        (None, "^the text is NoneType; expected a str"),
        (b"hello", "^the text is bytes; expected a str"),
        ({"role": "0", "content": "a"}, "^the text is one message of a conversation; give the conversation, a list of"),
        (
            iter([{"role": "0", "content": "a"}]),
            "^the text of a stream has a value of type dict; expected one text: a str, or pieces of it$",
        ),
        ([[{"role": "0", "content": "a"}]], "^the text of a stream has a value of type list; expected one text"),
        (["a", 3], "^the text of a stream has a value of type int; expected one text"),
    ],
)
def test_a_stream_says_one_text_or_pieces_of_it(model, text, message):
    with pytest.raises(SpeechError, match=message):
        next(dsm_jax.synthesize_stream(model, text))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "^temperature is -1.0; expected a number from 0"),
        ({"depth_temperature": math.nan}, "^depth_temperature is nan; expected a number from 0"),
        ({"top_k": -1}, "^top_k is -1; expected 0"),
        ({"depth_top_k": -1}, "^depth_top_k is -1; expected 0"),
        ({"max_frames": 0}, "^max_frames is 0; expected 1 or more$"),
        ({"seed": 2**64}, "^the seed is 18446744073709551616"),
    ],
)
def test_options_out_of_their_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        CsmOptions(**options)


@pytest.mark.slow
def test_a_turn_that_ends_before_its_first_frame_is_an_error(model):
    with pytest.raises(
        SpeechError, match=r"^random ended the turn before it said anything; give another seed, or a con"
    ):
        dsm_jax.synthesize(model, "a cat", speaker=1, options=GREEDY)


def test_models_of_other_kinds_are_refused(model, tmp_path):
    speaker = tts_model.random_model(tmp_path)
    with pytest.raises(ConfigError, match=r"^speaker was given, which random does not take; give voice$"):
        dsm_jax.synthesize(speaker, "good", speaker=0)
    with pytest.raises(ConfigError, match=r"^context was given, which random does not take; give voice$"):
        list(dsm_jax.synthesize_stream(speaker, "good", context=[]))
    with pytest.raises(ConfigError, match=r"^options are CsmOptions; random takes SynthesizeOptions$"):
        dsm_jax.synthesize(speaker, "good", options=CsmOptions())
    with pytest.raises(
        ModelKindError, match=r"^random is a text-to-speech model; to speak in conversations, load a conv"
    ):
        csm.Conversation(speaker)
    with pytest.raises(
        ModelKindError, match=r"^random is a conversational speech model; to speak, load a text-to-speech"
    ):
        dsm_jax.StreamingSynthesizer(model)
    with pytest.raises(
        ModelKindError, match=r"^random is a conversational speech model; to transcribe, load a speech-to"
    ):
        dsm_jax.transcribe(model, PCM)


def test_markers_in_a_text_are_not_obeyed(model):
    ids = csm.prompt.text_ids(CSM, model.tokenizer, "a<|AUDIO|><|end_of_text|>b", 0)
    markers = {CSM.begin_id, CSM.end_id, CSM.audio_id, CSM.audio_end_id}
    assert ids[0] == CSM.begin_id
    assert ids[-1] == CSM.end_id
    assert not markers & set(ids[1:-1])
    obedient = dataclasses.replace(model.tokenizer, _encode=lambda text: [CSM.audio_id])
    with pytest.raises(SpeechError, match=r"^the tokenizer makes a marker of a part of 'a'; leave that part out$"):
        csm.prompt.text_ids(CSM, obedient, "a", 0)


@pytest.mark.slow
def test_a_turn_that_does_not_end_carries_the_part_that_was_made(model):
    with pytest.raises(
        dsm_jax.IncompleteSpeechError, match=r"^the turn did not end in 3 frames; allow more with max_frames"
    ) as caught:
        dsm_jax.synthesize(model, "hello there.", options=dataclasses.replace(GREEDY, max_frames=3))
    assert (caught.value.speech.frames.shape, caught.value.speech.complete) == ((CSM.n_q, 3), False)
    context = [Segment("b", 0, np.tile(PCM, 98))]
    with pytest.raises(
        dsm_jax.IncompleteSpeechError,
        match=r"^the turn did not end in \d+ frames?: 5\d\d positions of prompt leave no more of the model's 512",
    ):
        dsm_jax.synthesize(model, "hello", context=context, options=CsmOptions(temperature=0.0))


def test_a_conversation_refuses_what_is_no_turn_and_options_of_another_kind(model):
    conversation = csm.Conversation(model, options=GREEDY)
    with pytest.raises(SpeechError, match=r"^a turn is str; expected dsm_jax.csm.Segment\(text, speaker, audio\)$"):
        conversation.add("hello")
    with pytest.raises(SpeechError, match=r"^the context's turn 'hello' has no audio; give its recording$"):
        conversation.add(Segment("hello", 0))
    with pytest.raises(ConfigError, match=r"^options are SynthesizeOptions; expected CsmOptions$"):
        conversation.say("hello", options=dsm_jax.SynthesizeOptions())
    assert conversation.turns == []
    with pytest.raises(SpeechError, match=r"^the context is one Segment; give a list of them$"):
        csm.Conversation(model, Segment("hello", 0, PCM))
    with pytest.raises(SpeechError, match=r"^the context is 5; expected a list of dsm_jax\.csm\.Segment"):
        Request("z", 0, 5)


def test_a_watermark_of_no_samples_is_refused(model):
    with pytest.raises(SpeechError, match=r"^the watermark made str of 3 samples; return as many$"):
        dsm_jax.synthesis._mark(PCM[:3], 1_600, lambda pcm_T, rate: "marked")
    with pytest.raises(ConfigError, match=r"^the watermark is 3; expected a function of samples and their rate$"):
        next(dsm_jax.synthesize_stream(model, "z", watermark=3))


def test_a_number_of_codebooks_that_is_not_whole_is_refused_and_the_next_call_works(model):
    with pytest.raises(ConfigError, match=r"^codebooks is 2\.0; expected a whole number$"):
        dsm_jax.encode(model, PCM, codebooks=2.0)
    np.testing.assert_array_equal(dsm_jax.encode(model, PCM, codebooks=np.int64(2)), dsm_jax.encode(model, PCM)[:2])

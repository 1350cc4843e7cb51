"""A client's text in a slot: sound as `synthesize` has it, for both families of models, and text that is refused."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

import dsm_jax
from dsm_jax import csm, synthesis
from dsm_jax.csm.synthesizer import ConversationSession
from dsm_jax.errors import ConfigError, SpeechError
from dsm_jax.runtime.compile import compilations
from dsm_jax.serving import turns
from dsm_jax.serving.engine import Engine
from dsm_jax.serving.outbox import Ended, Outbox, Started, put_all
from dsm_jax.serving.scripts import LiveSpeech, ScriptService
from dsm_jax.serving.services import service_of
from dsm_jax.serving.speaking import LAG_S, Said, Sound
from dsm_jax.serving.turns import LiveTurn, TurnService
from dsm_jax.tts.synthesizer import SpeechSession
from tests.helpers import csm_model, tts_model
from tests.helpers.serving import served

pytestmark = pytest.mark.slow
TALK = csm.CsmOptions(temperature=0.0, max_frames=16)


def engine_of(service) -> Engine:
    return Engine("speaker", service.groups, post=put_all, urgent=False)


def run(engine: Engine) -> None:
    while engine.turn() == 0:
        pass


def begin(engine: Engine, session) -> None:
    engine.hold(session)
    engine.start(session)


def messages(session) -> list:
    return list(session.outbox._waiting)


def sound(session) -> np.ndarray:
    return np.concatenate([message.pcm_T for message in messages(session) if isinstance(message, Sound)])


@pytest.fixture(scope="module")
def voices(tmp_path_factory):
    folder = tmp_path_factory.mktemp("voices")
    for seed, name in enumerate(("anna", "berta")):
        tts_model.write_voice(folder / f"{name}.safetensors", tts_model.voice(seed))
    return folder


@pytest.fixture(scope="module")
def script_service(tmp_path_factory, voices):
    model = dsm_jax.load(tts_model.make_checkpoint(tmp_path_factory.mktemp("tts")))
    return ScriptService(model, 2, folder=voices, options=dsm_jax.SynthesizeOptions(temperature=0.0, max_frames=400))


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    return csm_model.random_model(tmp_path_factory.mktemp("csm"))


@pytest.fixture(scope="module")
def turn_service(talker, tmp_path_factory):
    folder = tmp_path_factory.mktemp("speakers")
    pcm = np.random.default_rng(0).normal(scale=0.1, size=5 * tts_model.FRAME).astype(np.float32)
    dsm_jax.audio.write(folder / "carla.wav", pcm, talker.sample_rate)
    (folder / "carla.txt").write_text("so so.\n")
    return TurnService(talker, 2, options=TALK, folder=folder)


TEXT = "abc de f gh"


@pytest.mark.parametrize("pieces", [[TEXT], TEXT.split(), ["abc de", "f", "gh"]])
def test_sound_and_words_are_those_of_synthesize_however_the_text_is_cut(script_service, voices, pieces):
    options = dataclasses.replace(script_service.options, seed=5)
    reference = dsm_jax.synthesize(script_service.model, TEXT, voice=voices / "berta.safetensors", options=options)
    engine, before = engine_of(script_service), compilations()
    beside = script_service.session(Outbox(), voice="anna")
    session = script_service.session(Outbox(), voice="berta", seed=5)
    for one in (beside, session):
        for piece in pieces:
            one.say(piece)
            if piece == pieces[0]:
                begin(engine, one)
            run(engine)
        one.finish()
    run(engine)
    assert compilations() == before
    np.testing.assert_allclose(sound(session), reference.pcm, atol=2e-6)
    said = [message for message in messages(session) if isinstance(message, Said)]
    assert [(one.text, one.start, one.stop) for one in said] == [(w.text, w.start, w.end) for w in reference.words]
    assert (messages(session)[0], messages(session)[-1]) == (Started(), Ended())
    assert engine.used == 0


def test_a_voice_of_the_clients_own_is_taken_before_the_first_word(script_service):
    reference = dsm_jax.synthesize(script_service.model, TEXT, voice=tts_model.voice(9), options=script_service.options)
    session = script_service.session(Outbox())
    session.use_voice(tts_model.voice(9))
    session.say(TEXT)
    session.use_voice(tts_model.voice(10))  # too late to count
    session.finish()
    engine = engine_of(script_service)
    begin(engine, session)
    run(engine)
    np.testing.assert_allclose(sound(session), reference.pcm, atol=2e-6)


def test_sound_after_a_recording_is_that_of_synthesize(tmp_path):
    model, lengths = tts_model.random_model(tmp_path, tts_model.PREFIX), {"dora": 70, "emil": 5}
    for name, frames in lengths.items():
        pcm_T = np.random.default_rng(frames).normal(scale=0.1, size=frames * tts_model.FRAME).astype(np.float32)
        dsm_jax.audio.write(tmp_path / f"{name}.wav", pcm_T, model.sample_rate)
    options = dsm_jax.SynthesizeOptions(temperature=0.0, max_frames=400)
    service = ScriptService(model, 2, folder=tmp_path, options=options)
    engine, before = engine_of(service), compilations()
    sessions = {name: service.session(Outbox(), voice=name) for name in lengths}
    for session in sessions.values():
        session.say(TEXT)
        session.finish()
        begin(engine, session)
    run(engine)
    assert compilations() == before
    for name, session in sessions.items():
        reference = dsm_jax.synthesize(model, TEXT, voice=tmp_path / f"{name}.wav", options=options)
        np.testing.assert_allclose(sound(session), reference.pcm, atol=2e-6)
        said = [message for message in messages(session) if isinstance(message, Said)]
        assert [(one.text, one.start, one.stop) for one in said] == [(w.text, w.start, w.end) for w in reference.words]


def test_voices_that_the_server_cannot_take_are_refused(script_service):
    session = script_service.session(Outbox())
    with pytest.raises(SpeechError, match="the voice has 200 steps; this server takes 125: give a shorter one"):
        session.use_voice(tts_model.voice(0, steps=200))
    with pytest.raises(SpeechError, match="numbers wide"):
        session.use_voice(tts_model.voice(0, width=tts_model.WIDTH + 1))
    with pytest.raises(SpeechError, match=r"the voice 'nobody' is unknown; .* has anna, berta"):
        script_service.session(Outbox(), voice="nobody")
    with pytest.raises(SpeechError, match=r"the voice '\.\./anna' is unknown"):
        script_service.session(Outbox(), voice="../anna")


def test_a_voice_of_the_folder_that_would_make_the_program_grow_is_refused(script_service, monkeypatch, tmp_path):
    path = tts_model.write_voice(tmp_path / "long.safetensors", tts_model.voice(0, steps=200))
    monkeypatch.setattr(script_service, "_files", {"long": path})
    monkeypatch.setattr(script_service, "_bases", {})
    with pytest.raises(SpeechError, match="the voice has 200 steps; this server takes 125: give a shorter one"):
        script_service.session(Outbox(), voice="long")


def test_a_recording_is_gone_on_from_as_synthesize_does(tmp_path):
    model = tts_model.random_model(tmp_path, tts_model.PREFIX)
    folder, options = tmp_path / "recordings", dsm_jax.SynthesizeOptions(temperature=0.0, max_frames=400)
    folder.mkdir()
    pcm = np.random.default_rng(5).uniform(-0.5, 0.5, 10 * tts_model.FRAME).astype(np.float32)
    dsm_jax.audio.write(folder / "dora.wav", pcm, model.sample_rate)
    (folder / "notes.txt").write_text("this is no voice")
    service = ScriptService(model, 1, folder=folder, options=options)
    assert (service.voices, service.default_voice, service.knows("expresso/calm.wav")) == (["dora"], "dora", False)
    session, engine = service.session(Outbox()), engine_of(service)
    with pytest.raises(SpeechError, match="random takes no vectors as a voice; choose one by its name"):
        session.use_voice(tts_model.voice(0))
    session.say(TEXT)
    session.finish()
    begin(engine, session)
    run(engine)
    reference = dsm_jax.synthesize(model, TEXT, voice=folder / "dora.wav", options=options)
    np.testing.assert_allclose(sound(session), reference.pcm, atol=2e-6)
    said = [message for message in messages(session) if isinstance(message, Said)]
    assert [(one.text, one.start, one.stop) for one in said] == [(w.text, w.start, w.end) for w in reference.words]


def test_published_voices_of_a_folder_are_named_as_kyutai_names_them(script_service, tmp_path):
    model_id = dsm_jax.configs.model.ModelId(sig="0123abcd", epoch=7)
    config = dataclasses.replace(script_service.model.config, model_id=model_id)
    model = dataclasses.replace(script_service.model, config=config)
    (tmp_path / "expresso").mkdir()
    tts_model.write_voice(tmp_path / "expresso/calm.wav.0123abcd@7.safetensors", tts_model.voice(0))
    tts_model.write_voice(tmp_path / "expresso/calm.wav.89abcdef@3.safetensors", tts_model.voice(1))  # of another model
    service = ScriptService(model, 1, folder=tmp_path)
    assert service.voices == ["expresso/calm.wav"]
    assert service.default_voice == "expresso/calm.wav"


def test_a_model_without_any_voice_is_refused_at_the_start(script_service, tmp_path):
    config = dataclasses.replace(script_service.model.config, model_id=None)
    unpublished = dataclasses.replace(script_service.model, config=config)
    with pytest.raises(ConfigError, match="needs voices and has none of its own; give a folder of them"):
        ScriptService(unpublished, 1)
    with pytest.raises(ConfigError, match=r"the folder of voices .* does not exist"):
        ScriptService(script_service.model, 1, folder=tmp_path / "none")


def test_a_listener_that_lags_stops_its_own_session_alone(script_service):
    engine = engine_of(script_service)
    lagging, other = (script_service.session(Outbox()) for _ in range(2))
    lagging.outbox.put([None] * (math.ceil(LAG_S * script_service.model.config.mimi.frame_rate) + 1))
    for session in (lagging, other):
        session.say(TEXT)
        session.finish()
        begin(engine, session)
    run(engine)
    assert messages(other)[-1] == Ended()
    assert not [message for message in messages(lagging) if isinstance(message, Sound)]
    lagging.outbox._waiting.clear()  # the listener has caught up
    run(engine)
    assert messages(lagging)[-1] == Ended()
    np.testing.assert_array_equal(sound(lagging), sound(other))


def test_text_without_words_or_of_too_many_is_refused(script_service):
    session, pause = script_service.session(Outbox()), '<break time="1s"/>'
    for wordless in ("  ", pause):
        session.say(wordless)
        assert not session.can_start
        with pytest.raises(SpeechError, match="the text has no word in it; send one before its end"):
            session.finish()
    session.say("a")
    session.say(pause)
    assert session.can_start
    session.finish()
    for text in ("a " * 1024, f"{'ab' * 50} " * 25):  # too many words, and too many tokens
        long = script_service.session(Outbox())
        long.say(text)
        with pytest.raises(SpeechError, match="this server takes up to 1024, of 4096, in one session"):
            long.say(text)


@pytest.mark.parametrize("voice", ["carla", None])
def test_a_turn_is_that_of_synthesize_with_its_voice_as_context(turn_service, voice):
    engine, before = engine_of(turn_service), compilations()
    sessions = [turn_service.session(Outbox(), voice=voice) for _ in range(2)]
    for session in sessions:
        session.say("hello")
        session.say("there.")
        assert not session.can_start
        session.finish()
        begin(engine, session)
    run(engine)
    assert compilations() == before
    context = turn_service._contexts["carla"]
    assert [(segment.text, segment.speaker) for segment in context] == [("so so.", 0)]
    assert turn_service.session(Outbox(), seed=9)._options == dataclasses.replace(TALK, seed=9)
    wanted = synthesis.synthesize_each(turn_service.model, [csm.Request("hello there.", 0, context, TALK)])
    (_, speech) = next(iter(wanted))
    speech = speech.speech if isinstance(speech, dsm_jax.IncompleteSpeechError) else speech
    for session in sessions:
        assert isinstance(messages(session)[-1], Ended)
        np.testing.assert_allclose(sound(session), speech.pcm, atol=2e-6)


@pytest.mark.parametrize("name", ["script_service", "turn_service"])
def test_the_wait_for_a_slot_is_no_part_of_the_time_to_the_first_sound(request, monkeypatch, name):
    service, ticks = request.getfixturevalue(name), itertools.count()
    monkeypatch.setattr(service, "clock", lambda: next(ticks))
    engine, session = engine_of(service), service.session(Outbox())
    session.say(TEXT)
    session.finish()
    for _ in range(100):  # no slot was free so long
        next(ticks)
    begin(engine, session)
    run(engine)
    assert session.first_sound == 1  # the clock was read at the start and at the first sound, and not since
    assert sound(session).size


def test_a_turn_that_does_not_fit_is_refused(turn_service):
    session = turn_service.session(Outbox())
    session.say("a " * (turn_service.longest_prompt // 2 + 10))
    with pytest.raises(SpeechError, match=r"the turn and its voice take .* positions; this server takes up to"):
        session.finish()
    with pytest.raises(SpeechError, match="the turn has 10002 characters; this server takes up to 10000: cut it"):
        turn_service.session(Outbox()).say("ab" * 5001)


def test_a_voice_without_its_words_is_refused(talker, tmp_path):
    dsm_jax.audio.write(tmp_path / "dora.wav", np.full(2000, 0.1, np.float32), talker.sample_rate)
    with pytest.raises(ConfigError, match=r"has no words; write what is said in it to dora.txt beside it"):
        TurnService(talker, 1, folder=tmp_path)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("café".encode("latin-1"), r"dora\.txt cannot be read as text \(.*0xe9.*\); write it in UTF-8"),
        (b"\xef\xbb\xbf \n", r"dora\.txt is empty; write what is said in dora\.wav to it"),
        (
            b"b" * 300,
            r"the voice .*dora\.wav takes 317 positions with the shortest turn, one for each token of text and each "
            "frame of audio; random takes up to 256: cut the recording and its words",
        ),
    ],
)
def test_words_of_a_voice_that_cannot_be_are_refused_before_anything_is_compiled(
    talker, tmp_path, monkeypatch, written, message
):
    dsm_jax.audio.write(tmp_path / "dora.wav", np.full(5 * tts_model.FRAME, 0.1, np.float32), talker.sample_rate)
    (tmp_path / "dora.txt").write_bytes(written)
    monkeypatch.setattr(turns.ConversationSynthesizer, "slots_for", None)
    with pytest.raises(ConfigError, match=message):
        TurnService(talker, 1, folder=tmp_path)


def test_two_recordings_of_one_voice_are_refused(talker, tmp_path):
    for name in ("dora.flac", "dora.wav"):
        dsm_jax.audio.write(tmp_path / name, np.full(2000, 0.1, np.float32), talker.sample_rate)
    (tmp_path / "dora.txt").write_text("so so.")
    with pytest.raises(ConfigError, match=r"dora\.wav has the name of .*dora\.flac; rename one, or remove it"):
        TurnService(talker, 1, folder=tmp_path)


def test_a_byte_order_mark_is_no_word_of_a_voice(tmp_path, talker):
    dsm_jax.audio.write(tmp_path / "dora.wav", np.full(2000, 0.1, np.float32), talker.sample_rate)
    (tmp_path / "dora.txt").write_bytes("\ufeffso so.\n".encode())
    ((segment,),) = turns._segments(tmp_path).values()
    assert segment.text == "so so."


def test_the_family_of_a_model_decides_on_its_service_and_on_its_settings(script_service, talker, voices):
    def session(model, **settings):
        return service_of(served("tts", "a model", slots=1, **settings), model).session(Outbox())

    assert isinstance(session(script_service.model, voice_folder=voices), LiveSpeech)
    assert isinstance(session(talker), LiveTurn)
    with pytest.raises(ConfigError, match=r"padding_between was set for .*, which does not have it; remove it"):
        session(talker, padding_between=1)


@pytest.mark.parametrize("name,kind", [("script_service", SpeechSession), ("turn_service", ConversationSession)])
def test_a_warm_up_that_fails_is_an_error(request, monkeypatch, name, kind):
    service = request.getfixturevalue(name)

    def fail(*_):
        raise SpeechError("nothing was said")

    monkeypatch.setattr(kind, "read", fail)
    with pytest.raises(SpeechError, match="nothing was said"):
        service._warm_up()
    assert not any(service.slots.sessions)

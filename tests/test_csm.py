"""Conversational speech: turns against a plain loop over the networks, batches, streams, and slots that are shared."""

import contextlib
import dataclasses

import jax
import numpy as np
import pytest

import dsm_jax
from dsm_jax import audio, checkpoints, csm, synthesis
from dsm_jax.csm import CsmOptions, Request, Segment, host
from dsm_jax.csm.batch import synthesize_each
from dsm_jax.csm.host import ConversationRequest, CsmProgram, bucket, room
from dsm_jax.csm.program import CsmSettings
from dsm_jax.csm.requests import requests_of
from dsm_jax.csm.synthesizer import ConversationSession, ConversationSynthesizer
from dsm_jax.nn import quant
from dsm_jax.runtime.compile import compilations
from dsm_jax.runtime.slots import Slots
from dsm_jax.runtime.steps import Leave, step_limits
from tests.helpers.csm_model import CSM, greedy_codes, random_model, score_shortfall
from tests.helpers.optimized import compile_optimized
from tests.helpers.tts_model import FRAME, MIMI

pytestmark = pytest.mark.slow  # the models compile for seconds

GREEDY = CsmOptions(temperature=0.0, max_frames=16)
TEXTS = ("hello there.", "no", "a cat sat on the mat", "what?", "yes [0] b.", "z")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("csm"))


def recording(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=0.1, size=samples).astype(np.float32)


HI = Segment("hi", 1, recording(7 * FRAME + 50))  # the last frame is not whole
SHORT = Segment("so.", 0, recording(3 * FRAME, seed=1))
LONG = Segment("a long one", 2, recording(270 * FRAME, seed=2))
REQUESTS = (
    Request(TEXTS[0], 0),
    Request(TEXTS[1], 1, [HI]),
    Request(TEXTS[2], 2, [HI, HI]),
    Request(TEXTS[3], 0, [SHORT, HI, SHORT]),
    Request(TEXTS[4], 1, [HI]),
    Request(TEXTS[5], 2),
    Request(TEXTS[5], 0, [LONG]),  # in more than one block of prefill
)


def outcome(result: dsm_jax.Speech | dsm_jax.DsmError) -> tuple[np.ndarray, np.ndarray, bool]:
    """Return the codes and the samples of a result, and whether it was said to its end."""
    speech = result.speech if isinstance(result, dsm_jax.IncompleteSpeechError) else result
    assert isinstance(speech, dsm_jax.Speech)
    return speech.frames, speech.pcm, speech.complete


def spoken(model, requests, options=GREEDY, batch_size=8) -> dict[int, tuple[np.ndarray, np.ndarray, bool]]:
    results = dict(synthesize_each(model, requests, options=options, batch_size=batch_size))
    return {index: outcome(results[index]) for index in sorted(results)}


@pytest.fixture(scope="module")
def alone(model):
    """Speak each request alone."""
    return [spoken(model, [request])[0] for request in REQUESTS]


def test_greedy_codes_are_those_of_the_teacher_forced_pass(model, alone):
    synthesizer = ConversationSynthesizer(model, 1)
    ended = 0
    for request, (codes_QT, _, complete) in zip(REQUESTS, alone, strict=True):
        expected_QT = greedy_codes(model, synthesizer.prompt(request), GREEDY.max_frames)
        np.testing.assert_array_equal(codes_QT, expected_QT)
        assert complete == (expected_QT.shape[1] < GREEDY.max_frames)
        ended += complete
    assert 0 < ended < len(REQUESTS)  # turns that end by themselves, and turns that do not
    assert len({codes_QT.tobytes() for codes_QT, _, _ in alone}) == len(REQUESTS)


def test_int8_weights_generate_the_codes_of_their_own_teacher_forced_pass(model, alone):
    light = dataclasses.replace(model, lm_params=quant.quantize(model.lm_params))
    synthesizer, found = ConversationSynthesizer(light, 1), spoken(light, REQUESTS[:4])
    for index, request in enumerate(REQUESTS[:4]):
        expected_QT = greedy_codes(light, synthesizer.prompt(request), GREEDY.max_frames)
        np.testing.assert_array_equal(found[index][0], expected_QT)
    assert any(found[index][0].tobytes() != alone[index][0].tobytes() for index in found)


def test_in_bfloat16_every_code_is_the_likeliest_but_for_rounding(model, tmp_path):
    checkpoints.save(random_model(tmp_path), tmp_path / "saved")
    light = checkpoints.load(tmp_path / "saved", dtype="bfloat16")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(light.lm_params)} == {"bfloat16"}
    synthesizer, found = ConversationSynthesizer(light, 1), spoken(light, REQUESTS[:4])
    for index, request in enumerate(REQUESTS[:4]):
        prompt_MT = synthesizer.prompt(request)
        # A float32 pass over the same weights gives chosen codes scores of up to 0.07 below the highest.
        assert score_shortfall(light, prompt_MT, found[index][0]) < 0.1
        other_QT = np.roll(found[index][0], 1, axis=0)  # codes of other codebooks
        assert score_shortfall(light, prompt_MT, other_QT) > 0.2


def test_scores_are_float32_in_bfloat16_too(model, tmp_path):
    checkpoints.save(random_model(tmp_path), tmp_path / "saved")
    lm, scores = checkpoints.load(tmp_path / "saved", dtype="bfloat16").lm, []

    def choose(_, logits_BV):
        scores.append(logits_BV)
        return jax.numpy.zeros(logits_BV.shape[:1], int)

    jax.eval_shape(lambda hidden_BD: lm.walk(hidden_BD, choose), jax.ShapeDtypeStruct((2, 16), lm.dtype))
    scores += jax.tree.leaves(jax.eval_shape(lm, jax.ShapeDtypeStruct((2, CSM.n_q + 1, 6), jax.numpy.int32)))
    assert str(lm.dtype) == "bfloat16"
    assert [str(score.dtype) for score in scores] == ["float32"] * 5  # three of the walk, one of which is its scan's


def test_another_number_of_streams_is_refused(model):
    with pytest.raises(dsm_jax.StreamError, match=r"^the model got 3 streams; it has 5: text, then 4 of audio"):
        model.lm.embed(np.zeros((1, 3, 2), np.int32))


def test_choices_of_each_request_of_a_batch_are_its_own(model):
    choices = (
        GREEDY,
        CsmOptions(seed=5, max_frames=9),
        CsmOptions(seed=6, max_frames=9),
        CsmOptions(seed=5, max_frames=12, temperature=1.5, depth_top_k=3),
        CsmOptions(seed=5, max_frames=14, top_k=2, depth_temperature=0.5),
    )
    requests = [Request("a cat", 0, (), options) for options in choices]
    together = spoken(model, requests)
    for index, request in enumerate(requests):
        codes_QT, pcm_T, complete = spoken(model, [request])[0]
        np.testing.assert_array_equal(together[index][0], codes_QT)
        np.testing.assert_allclose(together[index][1], pcm_T, atol=1e-6)
        assert together[index][2] == complete
        assert complete or codes_QT.shape[1] == choices[index].max_frames
    assert len({codes_QT[:, :2].tobytes() for codes_QT, _, _ in together.values()}) == len(choices)


def test_samples_are_those_of_the_codec_over_the_codes(model, alone):
    for codes_QT, pcm_T, _ in alone:
        np.testing.assert_allclose(pcm_T, np.clip(dsm_jax.decode(model, codes_QT), -1, 1), atol=1e-6)


@pytest.mark.parametrize("batch_size", [8, 3], ids=["together", "admitted while others speak"])
def test_each_row_of_a_batch_is_as_alone(model, alone, batch_size):
    together = spoken(model, REQUESTS, batch_size=batch_size)
    assert sorted(together) == list(range(len(REQUESTS)))
    for index, (codes_QT, pcm_T, complete) in together.items():
        np.testing.assert_array_equal(codes_QT, alone[index][0])
        np.testing.assert_allclose(pcm_T, alone[index][1], atol=1e-5)
        assert complete == alone[index][2]


def test_few_turns_take_few_slots_and_tell_how_much_was_said(model, alone, monkeypatch):
    made, seen, init = [], {}, ConversationSynthesizer.__init__

    def spy(self: ConversationSynthesizer, model, slots: int, **options) -> None:
        made.append(slots)
        init(self, model, slots, **options)

    monkeypatch.setattr(ConversationSynthesizer, "__init__", spy)
    told = synthesize_each(model, REQUESTS[:1], options=GREEDY, progress=lambda one: seen.update({one.item: one.done}))
    assert len(list(told)) == 1
    assert made == [1]
    assert seen == {0: pytest.approx(alone[0][1].size / model.sample_rate)}
    with pytest.raises(dsm_jax.ConfigError, match="batch_size is 0; expected 1 or more"):
        next(synthesize_each(model, [], batch_size=0))


def test_sampling_depends_on_the_seed_alone(model):
    options = CsmOptions(seed=3, max_frames=6)
    requests = [dataclasses.replace(request, options=options) for request in REQUESTS[:3]]
    together = spoken(model, requests)
    for index, request in enumerate(requests):
        np.testing.assert_array_equal(together[index][0], spoken(model, [request])[0][0])
    other = spoken(model, requests[:1], dataclasses.replace(options, seed=4))
    again = spoken(model, [REQUESTS[0]], dataclasses.replace(options, seed=4))
    assert np.array_equal(other[0][0], together[0][0])  # a request's own options come first
    assert not np.array_equal(again[0][0], together[0][0])


def test_depth_decoder_has_sampling_of_its_own(model):
    greedy = spoken(model, REQUESTS[:1])[0][0]
    depth = spoken(model, REQUESTS[:1], dataclasses.replace(GREEDY, depth_temperature=2.0))[0][0]
    assert greedy[0, 0] == depth[0, 0]
    assert not np.array_equal(greedy, depth)
    one = spoken(model, REQUESTS[:1], CsmOptions(temperature=2.0, top_k=1, max_frames=16))[0][0]
    np.testing.assert_array_equal(one, greedy)
    first = spoken(model, REQUESTS[:1], CsmOptions(temperature=2.0, depth_top_k=1, max_frames=16))[0][0]
    assert not np.array_equal(first[0], greedy[0])


@pytest.fixture(scope="module")
def hot(model):
    """Speak all requests by chance, with codes that are nearly equally likely."""
    drawn = spoken(model, REQUESTS, CsmOptions(temperature=5.0, top_k=0, max_frames=16))
    return [codes_QT for codes_QT, _, _ in drawn.values()]


def test_codes_that_the_codec_does_not_have_are_never_chosen(alone, hot):
    assert CSM.card > MIMI.quantizer.bins
    for codes_QT in [*(codes_QT for codes_QT, _, _ in alone), *hot]:
        assert codes_QT.max() < MIMI.quantizer.bins


def test_codebooks_and_frames_have_noise_of_their_own(hot):
    drawn_QT = np.concatenate(hot, axis=1)
    # By the same noise nine of ten codes were equal.
    assert max(np.mean(drawn_QT[1:] == drawn_QT[:-1]), np.mean(drawn_QT[:, 1:] == drawn_QT[:, :-1])) < 0.3


def test_no_program_is_compiled_twice(model):
    def requests(first: int) -> list[Request]:
        lengths = range(first, first + 10)
        return [
            Request("ab c"[: 1 + n % 4], n % 3, [Segment("x" * (1 + n % 5), 0, recording(FRAME * (1 + n), seed=n))])
            for n in lengths
        ]

    options = [
        CsmOptions(temperature=t, top_k=k, depth_temperature=d, seed=n, max_frames=5 + n)
        for n, (t, k, d) in enumerate([(0.0, 50, None), (0.9, 0, 1.0), (0.5, 10, 0.0), (1.0, 64, None), (0.1, 1, 2.0)])
    ]
    # The codec encodes 16 frames at a time and then one, so the first recording is longer than that.
    assert list(synthesize_each(model, requests(16)[:1], options=options[0]))
    before = compilations()
    for number, request in enumerate([*requests(1), *requests(11)]):
        assert list(synthesize_each(model, [request], options=options[number % 5]))
    assert compilations() == before


def test_streamed_sound_is_the_whole_sound(model, alone):
    for request, (_, whole_T, complete) in list(zip(REQUESTS, alone, strict=True))[:4]:
        pieces = []

        def listen(request=request, pieces=pieces) -> None:
            stream = dsm_jax.synthesize_stream(
                model, request.text, speaker=request.speaker, context=request.context, options=GREEDY
            )
            for piece in stream:
                pieces.append(piece)

        if complete:
            listen()
        else:
            with pytest.raises(dsm_jax.IncompleteSpeechError):
                listen()
        assert {piece.size for piece in pieces} == {FRAME}
        np.testing.assert_allclose(np.concatenate(pieces), whole_T, atol=1e-6)


def test_first_sound_comes_after_prefill_and_one_frame(model, monkeypatch):
    calls, step = [], Slots.step

    def counted(slots):
        calls.append(slots.program)
        return step(slots)

    monkeypatch.setattr(Slots, "step", counted)
    request = REQUESTS[0]
    stream = dsm_jax.synthesize_stream(model, request.text, speaker=request.speaker, options=GREEDY)
    assert next(iter(stream)).size == FRAME
    assert [program.limit for program in calls] == [1]


def test_slots_grow_for_a_longer_conversation_while_others_speak(model, alone):
    synthesizer = ConversationSynthesizer(model, 2, limit=2)
    first = synthesizer.prepare(REQUESTS[0], GREEDY)
    slots = synthesizer.slots_for(first)
    sessions = [ConversationSession(model, first, index=0)]
    slots.admit(sessions)
    slots.step()
    sessions.append(ConversationSession(model, synthesizer.prepare(REQUESTS[6], GREEDY), index=6))
    assert sessions[1].prepared.positions > slots.program.settings.positions  # type: ignore[attr-defined]
    slots.admit(sessions[1:])
    while any(not session.ended for session in sessions):
        slots.step()
    for session in sessions:
        np.testing.assert_array_equal(session.speech().frames, alone[session.index][0])


def test_requests_that_are_prefilled_together_go_each_into_its_own_slot(model, alone):
    by_first_frame = {codes_QT[:, :1].tobytes(): index for index, (codes_QT, _, _) in enumerate(alone[:3])}
    synthesizer, (one, other) = ConversationSynthesizer(model, 3), list(by_first_frame.values())[:2]
    prepared = [synthesizer.prepare(REQUESTS[index], GREEDY) for index in (one, other)]
    assert len({bucket(request.prompt_MT.shape[1], CSM.backbone.context) for request in prepared}) == 1
    program = synthesizer.slots_for(*prepared).program
    program.limit = 2  # type: ignore[attr-defined]
    state = program.insert(program.init(), [2, 0], prepared)
    outputs, _ = program.step(state, [Leave(), None, Leave()], waiting=False)
    for slot, index in ((2, one), (0, other)):
        codes_QT = outputs.codes_NBQ[outputs.made_NB[:, slot], slot].T
        np.testing.assert_array_equal(codes_QT, alone[index][0][:, :2])


def test_a_slot_that_is_not_allowed_is_untouched_and_goes_on_later(model, alone):
    lasting = next(index for index, (_, _, complete) in enumerate(alone) if not complete)
    ending = next(index for index, (_, _, complete) in enumerate(alone) if complete)
    synthesizer, frames = ConversationSynthesizer(model, 2), alone[ending][0].shape[1]
    prepared = [synthesizer.prepare(REQUESTS[index], GREEDY) for index in (lasting, ending)]
    program = synthesizer.slots_for(*prepared).program
    program.limit = frames  # type: ignore[attr-defined]
    _, state = program.step(program.insert(program.init(), [0, 1], prepared), [Leave(), Leave()], waiting=False)
    before = jax.tree.map(np.array, state)
    assert before.frames_B.tolist() == [frames, frames]
    program.limit = 2  # type: ignore[attr-defined]
    _, state = program.step(state, [Leave(), None], waiting=False)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(old[1], new[1])
    assert state.frames_B.tolist() == [frames + 2, frames]
    outputs, _ = program.step(state, [None, Leave()], waiting=False)
    assert (outputs.ended_B.tolist(), outputs.made_NB[:, 1].any()) == ([False, True], False)


def test_a_request_has_each_choice_in_the_row_of_its_name_and_room_for_all():
    options = CsmOptions(temperature=0.5, top_k=3, depth_temperature=0.25, depth_top_k=70, seed=5, max_frames=9)
    request = ConversationRequest(text="a", prompt_MT=np.zeros((5, 250), np.int32), options=options, max_frames=7)
    row = request.row()
    chosen = (row.temperature_B, row.top_k_B, row.depth_temperature_B, row.depth_top_k_B, row.max_frames_B)
    assert [choice.tolist() for choice in chosen] == [[0.5], [3], [0.25], [70], [7]]
    assert row.key_B2.tolist() == [[0, 5]]
    small = CsmSettings(slots=2, positions=256)
    assert request.fitted(small, 2048) == dataclasses.replace(small, positions=512, max_top_k=128)
    large = CsmSettings(slots=2, positions=1024, max_top_k=256)
    assert request.fitted(large, 2048) == large


def test_an_answer_may_take_all_the_room_that_its_prompt_leaves_and_no_more(model):
    synthesizer = ConversationSynthesizer(model, 1)
    assert synthesizer.prepare(REQUESTS[0], CsmOptions(max_frames=5000)).positions == CSM.backbone.context
    assert synthesizer.prepare(REQUESTS[0], GREEDY).max_frames == GREEDY.max_frames


def test_buckets_hold_their_prompts_and_are_few():
    sizes = {length: bucket(length, 2048) for length in range(1, 2049)}
    assert all(length <= size <= 2048 for length, size in sizes.items())
    assert sorted(set(sizes.values())) == [64, 128, 192, 256, 512, 768, 1024, 1280, 1536, 1792, 2048]
    assert [room(n, 2048) for n in (1, 256, 257, 1100, 5000)] == [256, 256, 512, 2048, 2048]


def test_speech_is_the_next_turns_context_without_encoding_it_again(model, alone):
    codes_QT, pcm_T, _ = alone[1]
    synthesizer = ConversationSynthesizer(model, 1)
    speech = dsm_jax.Speech(pcm_T, model.sample_rate, (), codes_QT, model.name)
    positions_MT = synthesizer.positions_of(Segment("no", 1, speech))
    np.testing.assert_array_equal(positions_MT[1:, -1 - codes_QT.shape[1] : -1], codes_QT)
    assert not positions_MT[1:, -1].any()
    for other in (
        dataclasses.replace(speech, model="another"),
        dataclasses.replace(speech, pcm=pcm_T[: 2 * FRAME]),
        dataclasses.replace(speech, pcm=pcm_T[:-1]),
        dataclasses.replace(speech, frames=np.full_like(codes_QT, MIMI.quantizer.bins)),
        dataclasses.replace(speech, frames=codes_QT - codes_QT.max() - 1),
        dataclasses.replace(speech, frames=codes_QT[:, :0]),
    ):
        encoded_QT = dsm_jax.encode(model, other.pcm, codebooks=CSM.n_q)
        encoded_MT = synthesizer.positions_of(Segment("no", 1, other))
        np.testing.assert_array_equal(encoded_MT[1:, len("[1]no") + 2 : -1], encoded_QT)
    empty = dataclasses.replace(speech, pcm=pcm_T[:0], frames=codes_QT[:, :0])
    with pytest.raises(dsm_jax.AudioError, match=r"the context's turn 'no': the array is empty \(shape \(0,\)\)"):
        synthesizer.positions_of(Segment("no", 1, empty))


def test_conversation_goes_on_from_its_own_turns(model, caplog):
    conversation = csm.Conversation(model, [HI], options=GREEDY)
    said = conversation.say("z", 2)
    assert [turn.text for turn in conversation.turns] == ["hi", "z"]
    conversation.add(SHORT)
    before = compilations()
    try:
        answer = conversation.say("no", 1)
    except dsm_jax.IncompleteSpeechError as error:
        answer = error.speech
    assert compilations() == before
    expected = spoken(model, [Request("no", 1, [HI, Segment("z", 2, said), SHORT])])[0]
    np.testing.assert_array_equal(answer.frames, expected[0])
    assert (conversation.forgotten, caplog.text) == (0, "")


def test_conversation_forgets_its_oldest_turns_and_says_so(model, caplog):
    turns = [Segment(f"turn {n % 3}", 0, recording(60 * FRAME, seed=n)) for n in range(8)]
    conversation = csm.Conversation(model, turns, options=GREEDY)
    with caplog.at_level("WARNING", logger="dsm_jax"):
        for seed in range(30):  # until a turn ends by itself
            hot = CsmOptions(temperature=2.0, top_k=0, seed=seed, max_frames=GREEDY.max_frames)
            with contextlib.suppress(dsm_jax.SpeechError):
                turns.append(Segment("z", 2, conversation.say("z", 2, options=hot)))
                break
    assert len(turns) == 9
    assert conversation.forgotten == 2
    assert [turn.text for turn in conversation.turns] == [turn.text for turn in turns[2:]]
    assert "left out the oldest 2 turns" in caplog.text
    assert not conversation._synthesizer._turns.keys() & set(turns[:2]), "nor are their codes kept"
    length = ConversationSynthesizer(model, 1).prompt(Request("z", 2, turns[2:8])).shape[1]
    context = CSM.backbone.context
    assert length + GREEDY.max_frames <= context
    assert length + GREEDY.max_frames + 60 > context
    conversation.turns.pop()
    room = dataclasses.replace(GREEDY, max_frames=context - length)
    assert conversation._kept("z", 2, room) == turns[2:8], "it fits exactly"
    assert conversation._kept("z", 2, dataclasses.replace(room, max_frames=context - length + 1)) == turns[3:8]
    most = [len(conversation._kept("z", 2, dataclasses.replace(room, max_frames=n))) for n in (context // 2, context)]
    assert most[0] == most[1] > 0, "half of the context is room enough for any answer"
    with caplog.at_level("WARNING", logger="dsm_jax"):
        conversation._forget(1)
        conversation._forget(len(conversation.turns) - 1)
    assert conversation.forgotten == 7
    assert "left out the oldest turn of the conversation and kept 5 turns, so that" in caplog.text
    assert "left out the oldest 4 turns of the conversation and kept 1 turn, so that" in caplog.text


def messages(**changes) -> list[dict]:
    recorded = {"type": "audio", "array": HI.audio} | changes
    return [
        {"role": "1", "content": [{"type": "text", "text": "hi"}, recorded]},
        {"role": "1", "content": [{"type": "text", "text": TEXTS[1]}]},
    ]


def test_published_chat_format_is_a_conversation(model, alone, tmp_path):
    path = tmp_path / "hi.wav"
    audio.write(path, HI.audio, model.sample_rate)
    from_file = [{"role": 1, "content": [{"type": "text", "text": "hi"}, {"type": "audio", "path": str(path)}]}]
    twice = np.repeat(HI.audio, 2)
    as_published = [{"role": "1", "content": [*messages()[0]["content"][:1], {"type": "audio", "path": HI.audio}]}]
    fast = {"array": twice, "sampling_rate": 2 * model.sample_rate}
    of_data_sets = [{"role": "1", "content": [*messages()[0]["content"][:1], {"type": "audio", "audio": fast}]}]
    for first in (from_file, as_published, of_data_sets, messages(**fast)[:1]):
        read = Request.of_messages([*first, messages()[1]])
        pcm_T = audio.read(read.context[0].audio, model.sample_rate)
        assert (read.context[0].text, read.text, read.speaker) == ("hi", TEXTS[1], 1)
        assert pcm_T.size == HI.audio.size
    batch = dict(synthesize_each(model, [Request.of_messages(messages())], options=GREEDY))
    np.testing.assert_array_equal(outcome(batch[0])[0], alone[1][0])
    several = dict(synthesis.synthesize_each(model, [messages(), REQUESTS[5]], options=GREEDY))
    np.testing.assert_array_equal(outcome(several[0])[0], alone[1][0])
    np.testing.assert_array_equal(outcome(several[1])[0], alone[5][0])


def test_each_of_several_texts_has_its_own_speaker_context_and_options():
    one, two = CsmOptions(seed=1), CsmOptions(seed=2)

    def read(*arguments) -> list[tuple]:
        return [(each.text, each.speaker, each.context, each.options) for each in requests_of(*arguments)]

    own = read(["a", "b"], (1, 2), [[HI], [SHORT]], [one, two])
    assert own == [("a", 1, (HI,), one), ("b", 2, (SHORT,), two)]
    for speakers in (range(1, 3), np.array([1, 2])):
        for contexts in ([[HI], [SHORT]], [iter([HI]), iter([SHORT])], (each for each in [(HI,), (SHORT,)])):
            assert read(["a", "b"], speakers, contexts, [one, two]) == own
    assert read(["a", "b"], np.array(1), [None, [SHORT]], one) == [("a", 1, (), one), ("b", 1, (SHORT,), one)]
    assert read(["a", "b"], None, [None, None], one) == [("a", 0, (), one), ("b", 0, (), one)]
    assert read(["a", "b"], None, [HI], None) == [("a", 0, (HI,), None), ("b", 0, (HI,), None)]
    assert read([Request("a", 3, [HI], two), Request("b", 3, [HI])], None, None, one) == [
        ("a", 3, (HI,), two),
        ("b", 3, (HI,), one),
    ]
    ((text, speaker, (turn,), options),) = read([messages()], None, None, one)
    assert (text, speaker, turn.text, options) == (TEXTS[1], 1, "hi", one)


def test_watermark_marks_whole_and_streamed_sound(model, alone):
    complete = next(index for index, (_, _, complete) in enumerate(alone) if complete)
    request = REQUESTS[complete]
    arguments = {"speaker": request.speaker, "context": request.context, "options": GREEDY}

    def halved(pcm_T: np.ndarray, sample_rate: int) -> np.ndarray:
        assert sample_rate == model.sample_rate
        return pcm_T / 2

    marked = dsm_jax.synthesize(model, request.text, **arguments, watermark=halved)
    np.testing.assert_allclose(marked.pcm, alone[complete][1] / 2, atol=1e-6)
    stream = dsm_jax.synthesize_stream(model, request.text, **arguments, watermark=halved)
    np.testing.assert_allclose(np.concatenate(list(stream)), marked.pcm, atol=1e-6)
    with pytest.raises(dsm_jax.SpeechError, match=r"the watermark made \[1\] of \[\d+\] samples; return as many"):
        dsm_jax.synthesize(model, request.text, **arguments, watermark=lambda pcm_T, _: pcm_T[:1])


@pytest.mark.parametrize("function", ["step", "insert"])
def test_caches_are_updated_where_they_lie(tmp_path, function):
    backbone = dataclasses.replace(CSM.backbone, d_model=128)  # so wide that a copy of a cache outweighs all else
    model = random_model(tmp_path, dataclasses.replace(CSM, backbone=backbone))
    request = ConversationSynthesizer(model, 1).prepare(REQUESTS[0], GREEDY)
    program = CsmProgram(model, CsmSettings(slots=64, positions=512))
    state = program.init()
    if function == "step":
        arguments = (step_limits([Leave()] * 64, 1, waiting=False),)
        lowered = program._step._jitted.lower(program._params, state, *arguments)
    else:
        tokens_1MT = np.pad(request.prompt_MT, ((0, 0), (0, 64 - request.prompt_MT.shape[1])), constant_values=-1)[None]
        arguments = (np.array([3]), request.row(), tokens_1MT, np.array([request.prompt_MT.shape[1]]))
        lowered = program._insert._jitted.lower(program._params, state, *arguments)
    memory = compile_optimized(lowered).memory_analysis()
    cache = state.lm.caches[0]
    assert memory.alias_size_in_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert memory.temp_size_in_bytes < cache.k_BKSH.nbytes


def test_a_conversation_is_as_it_was_after_a_turn_that_failed(model, caplog, monkeypatch):
    turns = [Segment(f"turn {n}", 0, recording(60 * FRAME, seed=n)) for n in range(3)]
    conversation = csm.Conversation(model, turns, options=dataclasses.replace(GREEDY, max_frames=2))
    with pytest.raises(dsm_jax.SpeechError, match="positions"):
        conversation.say("x" * 600)
    with pytest.raises(dsm_jax.IncompleteSpeechError):
        conversation.say("hello there." * 30)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(ConversationSession, "read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        conversation.say("no")
    assert conversation._synthesizer.slots_for().free == [0]
    assert (conversation.turns, conversation.forgotten, caplog.text) == (turns, 0, "")


@pytest.mark.parametrize("call", ["insert", "step"])
def test_after_an_interrupt_that_loses_the_state_the_next_turn_is_as_in_a_new_conversation(model, monkeypatch, call):
    def said(conversation: csm.Conversation) -> np.ndarray:
        try:
            return conversation.say("no", 1).frames
        except dsm_jax.IncompleteSpeechError as error:
            return error.speech.frames

    conversation, run = csm.Conversation(model, [HI], options=GREEDY), getattr(CsmProgram, call)

    def interrupted(program, *arguments, **options):
        run(program, *arguments, **options)  # which takes the old state, and whose new one nobody keeps
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(CsmProgram, call, interrupted)
        with pytest.raises(KeyboardInterrupt):
            conversation.say("no", 1)
    np.testing.assert_array_equal(said(conversation), said(csm.Conversation(model, [HI], options=GREEDY)))


def test_a_program_whose_growth_was_interrupted_grows_at_the_next_request(model, monkeypatch):
    small, large = (ConversationSynthesizer(model, 1).prepare(REQUESTS[index], GREEDY) for index in (0, 6))
    program = CsmProgram(model, small.fitted(CsmSettings(slots=1, positions=1), CSM.backbone.context))
    state, settings = program.init(), program.settings

    def interrupted(*_, **_options):
        raise KeyboardInterrupt

    # Before the functions are made, and before the step is compiled.
    for function in ("compiled_over_state", "step_limits"):
        with monkeypatch.context() as patched:
            patched.setattr(host, function, interrupted)
            with pytest.raises(KeyboardInterrupt):
                program.fit(state, [large])
        assert program.settings == settings
    grown = jax.tree.map(lambda leaf: leaf.shape, program.fit(state, [large]))
    assert grown == jax.tree.map(lambda leaf: leaf.shape, program.init())
    assert program.settings.positions >= large.positions


def test_a_streams_error_carries_all_of_its_sound_marked(model):
    request, pieces = REQUESTS[0], []
    stream = dsm_jax.synthesize_stream(
        model, request, options=dataclasses.replace(GREEDY, max_frames=4), watermark=lambda pcm_T, rate: pcm_T / 2
    )
    with pytest.raises(dsm_jax.IncompleteSpeechError) as caught:
        pieces.extend(stream)
    np.testing.assert_allclose(caught.value.speech.pcm, np.concatenate(pieces), atol=1e-7)
    assert caught.value.speech.frames.shape[1] == len(pieces) == 4


def test_a_context_may_be_any_iterable(model, alone):
    assert Request("no", 1, (turn for turn in [HI])).context == (HI,)
    results = synthesis.synthesize_each(model, [Request("no", 1, iter([HI]))], options=GREEDY)
    np.testing.assert_array_equal(outcome(next(results)[1])[0], alone[1][0])

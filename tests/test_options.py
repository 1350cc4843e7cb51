"""Options: numbers of every kind that they take, and those that they refuse."""

import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import dsm_jax
from dsm_jax.csm import CsmOptions
from dsm_jax.errors import ConfigError
from dsm_jax.nn.sampling import key_of
from dsm_jax.options import check_batch_size, check_one_each, slots_for
from dsm_jax.stt import Prompt, TranscribeOptions, VadOptions, transcribe_each
from dsm_jax.synthesis import synthesize_each
from dsm_jax.training.finetune_config import FinetuneConfig
from dsm_jax.training.loop import RunConfig
from dsm_jax.tts import SynthesizeOptions

KINDS = (TranscribeOptions, SynthesizeOptions, CsmOptions)


@pytest.mark.parametrize("kind", KINDS)
def test_numpy_integers_are_integers(kind):
    options = kind(top_k=np.int64(20), seed=np.uint32(7))
    assert options == kind(top_k=20, seed=7)
    assert (type(options.top_k), type(options.seed)) == (int, int)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("top_k", 2**31, "top_k is 2147483648; expected a number of less than 32 bits"),
        ("top_k", -(2**31), "top_k is -2147483648; expected a number of less than 32 bits"),
        ("top_k", -1, "top_k is -1; expected 0, which keeps all tokens, or more"),
        ("top_k", 2.5, "top_k is 2.5; expected a whole number"),
        ("temperature", -0.1, "temperature is -0.1; expected a number from 0, which is greedy"),
        ("temperature", math.inf, "temperature is inf; expected a number from 0, which is greedy"),
        ("temperature", math.nan, "temperature is nan; expected a number from 0, which is greedy"),
        ("temperature", "0.5", "temperature is '0.5'; expected a number"),
        ("seed", None, "seed is None; expected a whole number"),
        ("seed", "x", "seed is 'x'; expected a whole number"),
        ("seed", 2**63, "the seed is 9223372036854775808; expected a number of 64 bits"),
        ("seed", -(2**63) - 1, "the seed is -9223372036854775809; expected a number of 64 bits"),
    ],
)
def test_numbers_that_the_programs_cannot_hold_are_refused(kind, name, value, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        kind(**{name: value})


@pytest.mark.parametrize("kind", KINDS)
def test_the_ends_of_each_range_are_taken(kind):
    for seed in (-(2**63), 2**63 - 1):
        assert kind(seed=seed, top_k=0, temperature=0.0) == kind(seed=np.int64(seed), top_k=0, temperature=0)
    assert kind(top_k=2**31 - 1).top_k == 2**31 - 1


def test_zero_is_a_choice_and_none_leaves_it_to_the_checkpoint():
    for given, kept in (((0.5, 25), (0.5, 25)), ((None, None), (0.0, 0))):
        config = SimpleNamespace(sampling=SimpleNamespace(temp_text=given[0], top_k_text=given[1]))
        assert TranscribeOptions().sampling(config) == kept
        assert TranscribeOptions(temperature=0.0, top_k=0).sampling(config) == (0.0, 0)
        assert TranscribeOptions(temperature=0.7, top_k=3).sampling(config) == (0.7, 3)
    assert CsmOptions(temperature=0.7, top_k=3).depth_sampling == (0.7, 3)
    assert CsmOptions(depth_temperature=0.0, depth_top_k=0).depth_sampling == (0.0, 0)
    assert CsmOptions(max_frames=1).max_frames == 1


def test_times_of_words_are_of_the_sound_or_of_the_reference():
    with pytest.raises(ConfigError, match=r"^word_times is 'text'; expected 'sound' or 'reference'$"):
        TranscribeOptions(word_times="text")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TranscribeOptions(prompt="seven"), "prompt is 'seven'; expected Prompt"),
        (lambda: TranscribeOptions(vad=True), "vad is True; expected VadOptions"),
        (lambda: Prompt(text=5), "the text of the prompt is 5; expected str"),
        (lambda: VadOptions(threshold="x"), "threshold is 'x'; expected a number"),
    ],
    ids=["prompt", "vad", "text", "threshold"],
)
def test_options_of_another_class_are_refused_when_they_are_made(make, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        make()


def test_a_batch_has_one_input_or_more_and_few_inputs_share_their_slots():
    check_batch_size(1)
    with pytest.raises(ConfigError, match=r"^batch_size is 0; expected 1 or more$"):
        check_batch_size(0)
    with pytest.raises(ConfigError, match=r"^batch_size is 1\.5; expected a whole number$"):
        check_batch_size(1.5)
    assert [slots_for(count, 8) for count in (0, 1, 2, 3, 4, 5, 9)] == [1, 1, 2, 4, 4, 8, 8]
    assert slots_for(9, 3) == 3


def test_a_list_has_one_of_everything_for_each_input():
    check_one_each(2, "texts", voices=["a", "b"], options=(1, 2))
    for count, said in ((1, "1 voice"), (3, "3 voices")):
        with pytest.raises(ConfigError, match=f"^2 texts have {said}; give one for all, or one each$"):
            check_one_each(2, "texts", options=(1, 2), voices=["a"] * count)
    with pytest.raises(ConfigError, match=r"^1 recording has 0 options; give one for all, or one each$"):
        check_one_each(1, "recordings", options=())


@pytest.mark.parametrize(
    "use",
    [
        lambda: dsm_jax.load("digits", progress=True),
        lambda: next(transcribe_each(None, [], progress=True)),
        lambda: next(synthesize_each(None, [], progress=True)),
        lambda: dsm_jax.evaluate(None, [], progress=True),
        lambda: dsm_jax.finetune(FinetuneConfig(data="data", output="out", run=RunConfig(steps=1)), progress=True),
    ],
    ids=["load", "transcribe", "synthesize", "evaluate", "finetune"],
)
def test_progress_goes_to_a_function(use):
    with pytest.raises(ConfigError, match=r"^progress is True; give a function, or None$"):
        use()


def test_events_go_to_a_function():
    with pytest.raises(ConfigError, match=r"^on_event is 'print'; give a function, or None$"):
        next(transcribe_each(None, [], on_event="print"))


@pytest.mark.parametrize("name", ["max_frames", "max_padding", "initial_padding", "final_padding", "padding_between"])
def test_counts_of_frames_have_a_limit(name):
    with pytest.raises(ConfigError, match=f"^{name} is 3000000000; expected a number of less than 32 bits$"):
        SynthesizeOptions(**{name: 3_000_000_000})


def test_every_bit_of_a_seed_counts():
    seeds = (0, 1, 2**32 - 1, 2**32, 2**32 + 1, 2**63 - 1, -1, -(2**63))
    assert len({key_of(seed).tobytes() for seed in seeds}) == len(seeds)
    for seed in (0, 1, 77, 2**32 - 1):
        np.testing.assert_array_equal(key_of(seed), jax.random.PRNGKey(seed))

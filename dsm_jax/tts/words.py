"""The word machine: from the text token that a model chose to the one that it is fed, one step of every row at a time.

The model says only when a word begins (`NEW_WORD`) and when none does (`PAD`). The machine then takes the next entry of
the script and feeds the word's tokens over the following steps, in which the model is not asked. It forbids a new word
while one is fed or a pause lasts, and orders one after too many steps without.

A model may also read ahead. It is then fed two tokens in one, `(second + 1) * card + first`: the second is `NEW_WORD`
as a word begins, while the first is that word's first token already, and otherwise a token of the words to come. With
each word that begins, those of the `second_stream_ahead`-th word after it are queued. As words follow each other, what
is queued is always one stretch of the script's tokens, and so a queue is a range.

The script ends when a word is asked for and there is none. `end_step_B` is the step at which that happened.

All of it is arithmetic on int32 arrays, for use inside a compiled loop.

Shape letters: B batch rows, L entries, T tokens.
Source: kyutai-labs/moshi@e6a55d2 moshi/models/tts.py:StateMachine.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dsm_jax.errors import ConfigError
from dsm_jax.models.streams import ZERO_TOKEN
from dsm_jax.tts.script import NEW_WORD, PAD, Script


@dataclasses.dataclass(frozen=True)
class WordMachine:
    """The rules that the model was trained with, the same for all rows.

    Attributes:
      card: number of text tokens with the initial one, `text_card + 1`.
      second_stream_ahead: how many words the model reads ahead; 0 for a model that does not.

    Raises:
      ConfigError: a number of words is negative, or two tokens in one would not fit into an int32.
    """

    card: int
    second_stream_ahead: int = 0

    def __post_init__(self) -> None:
        if self.second_stream_ahead < 0:
            raise ConfigError(
                f"second_stream_ahead is {self.second_stream_ahead}, and must be 0 or more: give another number"
            )
        if self.second_stream_ahead and self.card**2 > 2**31:
            raise ConfigError(
                f"two text tokens in one, of {self.card} each, do not fit into 32 bits; at most 46340 do: use a model "
                "with fewer, or with second_stream_ahead 0"
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WordState:
    """Every row's place in its script; all int32.

    Attributes:
      entry_B: the next entry to take.
      token_B: the next token to feed, of the word that has begun.
      token_end_B: the end of that word.
      ahead_B: the next token to feed of the words to come.
      ahead_end_B: the end of those that are queued.
      remaining_B: steps that may still pass until a word is ordered.
      forced_B: steps that must still pass until a word may begin.
      end_step_B: the step at which the script ended; -1 until then.
      max_padding_B: steps without a new word after which one is ordered.
    """

    entry_B: jax.Array
    token_B: jax.Array
    token_end_B: jax.Array
    ahead_B: jax.Array
    ahead_end_B: jax.Array
    remaining_B: jax.Array
    forced_B: jax.Array
    end_step_B: jax.Array
    max_padding_B: jax.Array


def init_state(max_padding_B: jax.Array, initial_padding_B: jax.Array) -> WordState:
    """Make the state of rows before their first step.

    Args:
      max_padding_B: int32, steps without a new word after which one is ordered.
      initial_padding_B: int32, steps before the first word, which begins neither earlier nor later.
    """
    return WordState(
        entry_B=jnp.zeros_like(max_padding_B),
        token_B=jnp.zeros_like(max_padding_B),
        token_end_B=jnp.zeros_like(max_padding_B),
        ahead_B=jnp.zeros_like(max_padding_B),
        ahead_end_B=jnp.zeros_like(max_padding_B),
        # Copies, so that the state can be donated.
        remaining_B=jnp.array(initial_padding_B, jnp.int32),
        forced_B=jnp.array(initial_padding_B, jnp.int32),
        end_step_B=jnp.full_like(max_padding_B, -1),
        max_padding_B=jnp.array(max_padding_B, jnp.int32),
    )


def process(
    machine: WordMachine, script: Script, state: WordState, sampled_B: jax.Array, step_B: jax.Array
) -> tuple[jax.Array, jax.Array, WordState]:
    """One step of every row. What it does to a row that is not ready (see `ready_B`) means nothing.

    Args:
      machine: the rules.
      script: what the rows are to say.
      state: from `init_state`, or from the step before.
      sampled_B: int32, the text token that the model chose; any but `NEW_WORD` counts as `PAD`.
      step_B: int32, the number of the step, which becomes `end_step_B` where the script ends.

    Returns:
      The token to feed next, two in one for a model that reads ahead (int32 [B]); whether an entry was taken, a word or
      a break (bool [B]); and the next state.
    """
    asked_B = ~_must_pad_B(state) & ((sampled_B == NEW_WORD) | (state.remaining_B <= 0))
    known_B = state.entry_B < script.count_B
    taken_B = asked_B & known_B
    ended_B = asked_B & ~known_B & script.complete_B & (state.end_step_B < 0)

    start_B, end_B = _tokens_of(script, state.entry_B)
    word_B = taken_B & (end_B > start_B)
    token_B = jnp.where(word_B, start_B, state.token_B)
    token_end_B = jnp.where(word_B, end_B, state.token_end_B)
    ahead_B, ahead_end_B = state.ahead_B, state.ahead_end_B
    if machine.second_stream_ahead:
        far_B = _read(script.words_before_BL, state.entry_B) + machine.second_stream_ahead
        far_start_B, far_end_B = _tokens_of(script, _read(script.word_BL, far_B))
        queued_B = word_B & (far_B < script.words_B)
        # A queue that still holds tokens ends where the new ones start. Only the first word ahead opens a gap.
        ahead_B = jnp.where(queued_B & (ahead_B == ahead_end_B), far_start_B, ahead_B)
        ahead_end_B = jnp.where(queued_B, far_end_B, ahead_end_B)

    # The end is marked like a word for a model that reads ahead, once, so that it knows of it.
    mark_B = (word_B | ended_B) if machine.second_stream_ahead else word_B
    remaining_B = jnp.where(word_B, state.max_padding_B, state.remaining_B)
    forced_B = jnp.where(taken_B, _read(script.padding_BL, state.entry_B), state.forced_B)
    remaining_B = jnp.where(mark_B, remaining_B, jnp.maximum(remaining_B - 1, 0))
    forced_B = jnp.where(mark_B, forced_B, jnp.maximum(forced_B - 1, 0))

    fed_B, token_B = _next(script, token_B, token_end_B, PAD, ~mark_B | bool(machine.second_stream_ahead))
    if machine.second_stream_ahead:
        second_B, ahead_B = _next(script, ahead_B, ahead_end_B, ZERO_TOKEN, ~mark_B)
        fed_B = (jnp.where(mark_B, NEW_WORD, second_B) + 1) * machine.card + fed_B
    else:
        fed_B = jnp.where(mark_B, NEW_WORD, fed_B)

    end_step_B = jnp.where(ended_B, step_B, state.end_step_B)
    entry_B = state.entry_B + taken_B.astype(jnp.int32)
    queue = entry_B, token_B, token_end_B, ahead_B, ahead_end_B
    return fed_B, taken_B, WordState(*queue, remaining_B, forced_B, end_step_B, state.max_padding_B)


def ready_B(machine: WordMachine, script: Script, state: WordState) -> jax.Array:
    """Tell which rows can take a step that text still to come would not change (bool [B]).

    Those whose script is complete, those that must not begin a word in this step, and those whose next entry is known:
    a break, or a word with `second_stream_ahead` known words after it. The others wait, or the model would be told that
    the text ends there.

    Args:
      machine: the rules.
      script: what is known of the rows' text.
      state: before the step.
    """
    start_B, end_B = _tokens_of(script, state.entry_B)
    far_B = _read(script.words_before_BL, state.entry_B) + machine.second_stream_ahead
    whole_B = (state.entry_B < script.count_B) & ((start_B == end_B) | (far_B < script.words_B))
    return script.complete_B | _must_pad_B(state) | whole_B


def _must_pad_B(state: WordState) -> jax.Array:
    """Tell in which rows no word may begin: one is being fed, or a pause lasts."""
    return (state.token_B < state.token_end_B) | (state.forced_B > 0)


def _next(
    script: Script, at_B: jax.Array, end_B: jax.Array, otherwise: int, take_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Take a token of a queue where it may and there is one; else the token is `otherwise`."""
    take_B = take_B & (at_B < end_B)
    return jnp.where(take_B, _read(script.tokens_BT, at_B), otherwise), at_B + take_B.astype(jnp.int32)


def _tokens_of(script: Script, entry_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _read(script.start_BL, entry_B), _read(script.end_BL, entry_B)


def _read(values_BL: jax.Array, at_B: jax.Array) -> jax.Array:
    """One value per row. Past the end it is the last one, which no caller uses."""
    return jnp.take_along_axis(values_BL, at_B[:, None], axis=1, mode="clip")[:, 0]

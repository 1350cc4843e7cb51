"""The settings, requests, state and outputs of the text-to-speech program.

Shape letters: as in `tts.program`.
"""

import dataclasses

import jax

from dsm_jax.models.conditioning import Conditions
from dsm_jax.models.mimi import CodecState
from dsm_jax.models.streams import TokenRing
from dsm_jax.nn.transformer import TransformerState
from dsm_jax.runtime.steps import Array
from dsm_jax.tts.script import MIN_ENTRIES, MIN_TOKENS, Script
from dsm_jax.tts.words import WordMachine, WordState


@dataclasses.dataclass(frozen=True, kw_only=True)
class TtsSettings:
    """Settings that are fixed when the program is compiled.

    Attributes:
      slots: number of slots.
      machine: the rules of the word machine.
      delay_steps: how far the audio is behind the text.
      steps: room for the steps of one call.
      max_top_k_text, max_top_k_audio: the largest top-k that a request may choose, see `sample`.
      guided: whether the backbone has an unconditional half, for requests with classifier-free guidance. Models trained
        with distilled guidance take theirs as a condition instead.
      uncond_drops_text: the unconditional half is not fed the text, and text is chosen by the conditional half alone.
      uncond_drops_prefix: the unconditional half is not fed the prefix.
      entries, tokens: room for the entries of a script and their tokens.
      voice_steps: room for the positions of all voices of a request, end to end; at least 1.
      prefix_frames: room for a prefix.
    """

    slots: int
    machine: WordMachine
    delay_steps: int
    steps: int = 16
    max_top_k_text: int = 32
    max_top_k_audio: int = 256
    guided: bool = False
    uncond_drops_text: bool = True
    uncond_drops_prefix: bool = True
    entries: int = MIN_ENTRIES
    tokens: int = MIN_TOKENS
    voice_steps: int = 1
    prefix_frames: int = 0

    @property
    def halves(self) -> int:
        """Rows of the backbone for each slot."""
        return 2 if self.guided else 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TtsRequest:
    """The choices of each slot's request; more may be added to the end of its script while the slot runs.

    Attributes:
      key_B2: PRNG key, on which the slot's noise depends, and on nothing else.
      temperature_B: float32, of text and audio tokens; 0 takes the most probable.
      top_k_text_B, top_k_audio_B: int32; 0 is the whole vocabulary.
      guidance_B: float32, weight of classifier-free guidance; 1 is none.
      padding_bonus_B: float32, added to the score of padding: above 0 speaks slower.
      codebooks_B: int32, how many are generated, from 1.
      max_padding_B: int32, steps without a new word after which one is ordered.
      initial_padding_B: int32, steps before the first word.
      final_padding_B: int32, steps that follow the end of the script, for the last word to sound in full.
      max_steps_B: int32, steps after which the slot gives up.
      prefix_BQT: int32 codes of a recording to go on from.
      prefix_B: int32, how many of its frames each slot has.
      script: what to say.
    """

    key_B2: Array
    temperature_B: Array
    top_k_text_B: Array
    top_k_audio_B: Array
    guidance_B: Array
    padding_bonus_B: Array
    codebooks_B: Array
    max_padding_B: Array
    initial_padding_B: Array
    final_padding_B: Array
    max_steps_B: Array
    prefix_BQT: Array
    prefix_B: Array
    script: Script


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConditionValues:
    """The values of a model's conditioners; empty for a model without.

    Attributes:
      values: by conditioner, indices [N, 1] or the vectors of the voices [N, X, C].
      masks: by conditioner, bool [N, 1] or [N, X]: whether the value is given.
      length_N: int32, how many of the X positions each request has.
    """

    values: dict[str, Array]
    masks: dict[str, Array]
    length_N: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TtsState:
    """Everything that the slots remember.

    Attributes:
      lm: of the backbone, R rows.
      words: of the word machine.
      ring: tokens still to be fed.
      codec: of Mimi's decoder.
      conditions: of R rows; None for models without conditioners.
      request: what each slot's request chooses.
    """

    lm: TransformerState
    words: WordState
    ring: TokenRing
    codec: CodecState
    conditions: Conditions | None
    request: TtsRequest


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepOutputs:
    """The outputs of one call. A slot that was idle in a step has no valid entry there; see the masks.

    Attributes:
      count: int32 [], steps that were taken.
      step_NB: int32, the number of the step within the slot's own speech.
      frames_NBM: int32, the newest whole frame: the text as fed to the model, then the codes, delays undone.
      framed_NB: whether there is a frame: the slot ran, and is as many steps in as the longest delay.
      taken_NB: whether the slot began its next entry in this step.
      pcm_NBT: float32 samples of the frame, in [-1, 1].
      audible_NB: whether there are samples: the frame is not before the audio's beginning.
      ended_B: whether the slot has come to the end of its script, or has given up.
      complete_B: whether it has come to the end of its script.
      waits_B: whether it can take no step until more of its script is there.
    """

    count: Array
    step_NB: Array
    frames_NBM: Array
    framed_NB: Array
    taken_NB: Array
    pcm_NBT: Array
    audible_NB: Array
    ended_B: Array
    complete_B: Array
    waits_B: Array

"""The settings of text-to-speech: conditioners and how they are fused, delays, and the defaults of sampling."""

import dataclasses

from dsm_jax.configs.check import require


@dataclasses.dataclass(frozen=True, kw_only=True)
class LutConditioner:
    """A condition that is one of a few values, each a row of a look-up table.

    Attributes:
      name: of the condition, such as "cfg".
      n_bins: rows of the table, one more aside for a value that is not given.
      dim: width of a row.
      tokenizer: from text to a row; every published model has "noop", which takes the position in `possible_values`.
      possible_values: as text, in the order of the rows.
      type: "lut".
    """

    name: str
    n_bins: int
    dim: int
    tokenizer: str = "noop"
    possible_values: tuple[str, ...] | None = None
    type: str = "lut"

    def __post_init__(self) -> None:
        require(self.tokenizer == "noop", f"conditioner {self.name} has tokenizer {self.tokenizer!r}", "use 'noop'")
        values = self.possible_values or ()
        require(
            len(values) <= self.n_bins,
            f"conditioner {self.name} has {len(values)} possible_values and n_bins {self.n_bins}",
            "give at least one bin for each value",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorConditioner:
    """A condition that is a sequence of vectors, such as a voice.

    Attributes:
      name: of the condition, such as "speaker_wavs".
      dim: width of a vector.
      type: "tensor".
    """

    name: str
    dim: int
    type: str = "tensor"


Conditioner = LutConditioner | TensorConditioner


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fuser:
    """Names of the conditions by the way in which the language model takes them in.

    Attributes:
      sum: conditioners whose vector is added to the input of every step.
      prepend: conditioners that precede the input; no published model has one, and the library takes none.
      cross: conditioners that every layer attends to, end to end in this order.
      cross_attention_pos_emb: whether positions are added to what is attended to.
      cross_attention_pos_emb_scale: factor of these positions.
    """

    sum: tuple[str, ...] = ()
    prepend: tuple[str, ...] = ()
    cross: tuple[str, ...] = ()
    cross_attention_pos_emb: bool = False
    cross_attention_pos_emb_scale: float = 1.0

    def __post_init__(self) -> None:
        require(
            not self.prepend,
            f"the fuser prepends {', '.join(self.prepend)}",
            "the library fuses by sum and by cross-attention",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TtsConfig:
    """Settings that a text-to-speech model was trained with.

    Attributes:
      audio_delay: seconds by which the audio streams are behind the text.
      second_stream_ahead: words by which the second text stream is ahead of the first; 0 without a second stream.
      multistream: whether each of two speakers has audio streams of its own.
    """

    audio_delay: float
    second_stream_ahead: int = 0
    multistream: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """Defaults of sampling that a checkpoint gives (`lm_gen_config`); None where it gives none.

    Attributes:
      temp: temperature of the audio tokens; 0 is greedy.
      temp_text: temperature of the text tokens.
      top_k: audio tokens are drawn from so many of the most probable; 0 is all.
      top_k_text: the same for text tokens.
      cfg_coef: guidance scale.
      text_temp: a spelling of `temp_text` in the file of tts-1.6b-en_fr, which the reference does not read either.
    """

    temp: float | None = None
    temp_text: float | None = None
    top_k: int | None = None
    top_k_text: int | None = None
    cfg_coef: float | None = None
    text_temp: float | None = None

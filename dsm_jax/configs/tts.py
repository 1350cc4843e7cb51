"""The configs of text-to-speech: conditioners and their fusion, delays, and defaults of sampling."""

import dataclasses

from dsm_jax.configs.check import require, require_seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class LutConditioner:
    """A condition with a few possible values, each a row of a look-up table.

    Attributes:
      name: name of the condition, such as "cfg".
      n_bins: rows of the table, without the additional row for a value that is not given.
      dim: width of a row.
      tokenizer: mapping from a value to a row; every published model has "noop", the index in `possible_values`.
      possible_values: the values as strings, in the order of the rows.
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
      name: name of the condition, such as "speaker_wavs".
      dim: width of a vector.
      type: "tensor".
    """

    name: str
    dim: int
    type: str = "tensor"


Conditioner = LutConditioner | TensorConditioner


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fuser:
    """Names of the conditioners by the way in which their vectors enter the language model.

    Attributes:
      sum: conditioners whose vector is added to the input of every step.
      prepend: conditioners whose vectors precede the input; not supported, as no published model has one.
      cross: conditioners whose vectors every layer attends to, concatenated in this order.
      cross_attention_pos_emb: whether position embeddings are added to the concatenated vectors.
      cross_attention_pos_emb_scale: factor of these position embeddings.
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
      audio_delay: delay of the audio streams after the text, in seconds.
      second_stream_ahead: lead of the second text stream before the first, in words; 0 without a second stream.
      multistream: whether each of two speakers has audio streams of its own.
    """

    audio_delay: float
    second_stream_ahead: int = 0
    multistream: bool = False

    def __post_init__(self) -> None:
        require_seconds(self, "audio_delay")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """A checkpoint's defaults of sampling (`lm_gen_config`); None for settings that it leaves out.

    Speech-to-text takes `temp_text` and `top_k_text` from it, and text-to-speech `temp` for audio and text, as the
    references do. The library reads the others from a file and writes them, and does not use them.

    Attributes:
      temp: temperature of the audio tokens; 0 is greedy.
      temp_text: temperature of the text tokens; 0 is greedy.
      top_k: number of the most probable audio tokens to sample from; 0 is all.
      top_k_text: number of the most probable text tokens to sample from; 0 is all.
      cfg_coef: guidance scale.
      text_temp: misspelling of `temp_text` in the file of tts-1.6b-en_fr; ignored, as in the reference.
    """

    temp: float | None = None
    temp_text: float | None = None
    top_k: int | None = None
    top_k_text: int | None = None
    cfg_coef: float | None = None
    text_temp: float | None = None

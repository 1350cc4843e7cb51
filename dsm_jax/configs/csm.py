"""The config of CSM: a backbone over frames of text and audio, and a depth decoder over the codebooks of a frame."""

import dataclasses

from dsm_jax.configs.check import require
from dsm_jax.configs.transformer import TransformerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class CsmConfig:
    """The language model of Sesame's conversational speech model.

    Attributes:
      backbone: transformer that predicts the first codebook of the next frame; its `context` is the longest
        conversation, prompt and answer together.
      depth: transformer that predicts the other codebooks of the frame.
      n_q: codebooks of a frame.
      card: entries of each codebook's table; more than the codec has, and the additional ones are never generated.
      text_card: entries of the text table.
      begin_id: token that begins the text of a turn.
      end_id: token that ends the text of a turn.
      audio_id: token that stands for a frame of audio in published prompts.
      audio_end_id: token that stands for the all-zero frame after a recording in published prompts.
    """

    backbone: TransformerConfig
    depth: TransformerConfig
    n_q: int
    card: int
    text_card: int
    begin_id: int = 128_000
    end_id: int = 128_001
    audio_id: int = 128_002
    audio_end_id: int = 128_003

    def __post_init__(self) -> None:
        require(self.n_q >= 2, f"n_q is {self.n_q}", "the depth decoder needs 2 or more codebooks")
        require(
            self.depth.context >= self.n_q,
            f"the depth decoder's context is {self.depth.context} and n_q {self.n_q}",
            "it must see all codebooks of a frame",
        )
        ids = {name: getattr(self, name) for name in ("begin_id", "end_id", "audio_id", "audio_end_id")}
        for name, token in ids.items():
            require(
                0 <= token < self.text_card, f"{name} is {token} and text_card {self.text_card}", "use an id of a piece"
            )
        require(len(set(ids.values())) == len(ids), f"the ids are {ids}", "give each token an id of its own")

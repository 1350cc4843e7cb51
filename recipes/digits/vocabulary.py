"""Write a tokenizer with a small vocabulary. The first ids are as in Kyutai's: unknown, begin, end, padding."""

import string
from collections.abc import Sequence
from pathlib import Path

from dsm_jax.tokenizers import SPACE

_MARKERS = ("<unk>", "<s>", "</s>", "<pad>")


def write_vocabulary(path: Path, words: Sequence[str]) -> int:
    """Write a sentencepiece unigram model: each word of the vocabulary is one piece, other words are letters.

    Args:
      path: the `.model` file, replaced if it exists.
      words: lower-case words of the letters a to z.

    Returns:
      The number of pieces.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    kind = proto.SentencePiece
    for marker in _MARKERS:
        proto.pieces.add(piece=marker, score=0.0, type=kind.UNKNOWN if marker == "<unk>" else kind.CONTROL)
    for word in words:
        proto.pieces.add(piece=SPACE + word, score=-1.0, type=kind.NORMAL)
    for letter in (SPACE, *string.ascii_lowercase):
        proto.pieces.add(piece=letter, score=-10.0, type=kind.NORMAL)
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type, trainer.vocab_size = trainer.UNIGRAM, len(proto.pieces)
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = range(len(_MARKERS))
    trainer.unk_piece, trainer.bos_piece, trainer.eos_piece, trainer.pad_piece = _MARKERS
    rules.name, rules.add_dummy_prefix = "identity", True
    rules.remove_extra_whitespaces = rules.escape_whitespaces = True
    path.write_bytes(proto.SerializeToString())
    return len(proto.pieces)

"""Rewrite a sentencepiece model as a `tokenizer.json`, and back, with the same pieces, ids and scores."""

import base64
import json
from pathlib import Path
from typing import Any

from dsm_jax.errors import CheckpointError
from dsm_jax.files import read_text
from dsm_jax.tokenizers import SPACE

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE, _UNIGRAM = 1, 2, 3, 4, 6, 1
_ALL = 1 << 16  # count of leading spaces to strip: more than any text begins with


def to_json(source: Path, folder: Path) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` for a sentencepiece unigram model.

    Args:
      source: the `.model` file.
      folder: the folder to write to.

    Raises:
      CheckpointError: the source is not a unigram model.
    """
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    proto = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    proto.ParseFromString(source.read_bytes())
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type != _UNIGRAM:
        raise CheckpointError(f"{source.name} is of model_type {trainer.model_type}; only unigram models are rewritten")
    vocabulary = [(piece.piece, piece.score) for piece in proto.pieces]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback))
    steps: list[Any] = [normalizers.Precompiled(rules.precompiled_charsmap)] if rules.precompiled_charsmap else []
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    # Not "first": it adds no space to a text whose leading spaces the normaliser has stripped.
    scheme = "always" if rules.add_dummy_prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=False)
    decoding: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    decoding += [decoders.Strip(" ", _ALL, 0)] if rules.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(decoding)
    markers = [piece.piece for piece in proto.pieces if piece.type in (_UNKNOWN, _CONTROL)]
    tokenizer.add_special_tokens([AddedToken(marker, normalized=False, special=True) for marker in markers])
    own = [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED]
    tokenizer.add_tokens([AddedToken(piece, normalized=False, special=False) for piece in own])
    # Not by its `save`, which raises Exception where the disk is full.
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    named = {"unk": trainer.unk_id, "bos": trainer.bos_id, "eos": trainer.eos_id, "pad": trainer.pad_id}
    settings = {f"{name}_token": proto.pieces[i].piece for name, i in named.items() if i >= 0}
    settings |= {
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "processor_class": "KyutaiSpeechToTextProcessor",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def to_sentencepiece(source: Path, target: Path) -> None:
    """Write a sentencepiece unigram model for a `tokenizer.json`.

    Args:
      source: the `tokenizer.json`; a `tokenizer_config.json` in the same folder is read too.
      target: the `.model` file to write.

    Raises:
      CheckpointError: the source is not a unigram model.
    """
    from sentencepiece import sentencepiece_model_pb2

    values = json.loads(read_text(source))
    model = values["model"]
    if model.get("type") != "Unigram":
        raise CheckpointError(f"{source.name} is a {model.get('type')} model; only unigram models are rewritten")
    settings_path = source.with_name("tokenizer_config.json")
    settings = json.loads(read_text(settings_path)) if settings_path.is_file() else {}
    special = {token["content"] for token in values["added_tokens"] if token["special"]}
    own = {token["content"] for token in values["added_tokens"]} - special
    proto = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    for i, (piece, score) in enumerate(model["vocab"]):
        kind = _UNKNOWN if i == model["unk_id"] else _CONTROL if piece in special else _NORMAL
        kind = _USER_DEFINED if piece in own else kind
        kind = _BYTE if model.get("byte_fallback") and len(piece) == 6 and piece.startswith("<0x") else kind
        proto.pieces.add(piece=piece, score=score, type=kind)
    for token in sorted(values["added_tokens"], key=lambda token: token["id"]):
        if token["id"] >= len(model["vocab"]):
            proto.pieces.add(piece=token["content"], score=0.0, type=_CONTROL if token["special"] else _USER_DEFINED)
    ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    trainer.model_type, trainer.vocab_size = _UNIGRAM, len(proto.pieces)
    # Without byte pieces, sentencepiece refuses this setting and the tokenizers library ignores it.
    trainer.byte_fallback = any(piece.type == _BYTE for piece in proto.pieces)
    trainer.unk_id = model["unk_id"]
    trainer.unk_piece = proto.pieces[model["unk_id"]].piece
    for name, usual in (("bos", "<s>"), ("eos", "</s>"), ("pad", "<pad>")):
        marker = settings.get(f"{name}_token") or usual
        marker = marker["content"] if isinstance(marker, dict) else marker
        setattr(trainer, f"{name}_id", ids.get(marker, -1))
        setattr(trainer, f"{name}_piece", marker)
    steps = values["normalizer"].get("normalizers", [values["normalizer"]]) if values["normalizer"] else []
    rules.name = "nmt_nfkc"
    for step in steps:
        if step["type"] == "Precompiled":
            rules.precompiled_charsmap = base64.b64decode(step["precompiled_charsmap"])
    rules.add_dummy_prefix = (values["pre_tokenizer"] or {}).get("prepend_scheme", "always") != "never"
    rules.remove_extra_whitespaces = True  # as sentencepiece trains by default; tokenizer.json has no such setting
    rules.escape_whitespaces = True
    target.write_bytes(proto.SerializeToString())

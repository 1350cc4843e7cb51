"""Text to token ids and back, from a sentencepiece `.model` or a `tokenizer.json`."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsm_jax import files
from dsm_jax.errors import CheckpointError, TextError

SPACE = "▁"  # what pieces write for a space


@dataclass(frozen=True)
class Tokenizer:
    """A vocabulary of pieces. `load_tokenizer` makes one.

    Attributes:
      path: the file it was read from.
      size: number of pieces.
      eos_id: the id that ends a text; -1 where there is none.
    """

    path: Path
    size: int
    eos_id: int
    _encode: Callable[[str], list[int]]
    _decode: Callable[[list[int]], str]
    _piece: Callable[[int], str | None]
    _silent: frozenset[int]

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text: no markers are added, and none are made of a marker's name in the text.

        Raises:
          TextError: the text has half of a surrogate pair in it, as JSON and arguments that are not UTF-8 can have.
        """
        check_characters(text)  # sentencepiece and tokenizers raise each their own
        return self._encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; those that stand for no text (markers, padding, the unknown piece) are left out.

        Raises:
          CheckpointError: an id is not in the vocabulary.
        """
        self._check(ids)
        return self._decode([int(i) for i in ids if int(i) not in self._silent])

    def piece(self, token: int) -> str:
        """Return the piece of an id, with ▁ for a space.

        Raises:
          CheckpointError: the id is not in the vocabulary.
        """
        self._check([token])
        return self._piece(int(token)) or ""

    def has_text(self, token: int) -> bool:
        """Tell whether an id stands for text; markers, padding and the unknown piece do not.

        Raises:
          CheckpointError: the id is not in the vocabulary.
        """
        self._check([token])
        return int(token) not in self._silent

    def _check(self, ids: Sequence[int]) -> None:
        if wrong := [int(i) for i in ids if not 0 <= i < self.size]:
            raise CheckpointError(
                f"ids {wrong} are not in the vocabulary of {self.size} pieces; use the model's own ids"
            )


def half_character(text: str) -> int | None:
    """Find half of a surrogate pair, which no encoding can write; return its place, or None if there is none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def check_characters(text: str) -> None:
    """Refuse a text that no encoding can write.

    Raises:
      TextError: the text has half of a surrogate pair in it, as JSON and arguments that are not UTF-8 can have.
    """
    if (at := half_character(text)) is not None:
        raise TextError(
            f"the text has half of a character at {at}, the last of {text[max(0, at - 20) : at + 1]!r}; give whole "
            "characters, in UTF-8"
        )


def load_tokenizer(path: Path, *, expected_size: int | None = None) -> Tokenizer:
    """Read a tokenizer.

    Args:
      path: a sentencepiece `.model`, or a `tokenizer.json` of the tokenizers library.
      expected_size: `text_card` of the model it is for.

    Returns:
      The tokenizer.

    Raises:
      CheckpointError: the file is missing, unreadable, or has another number of pieces.
    """
    path = path.absolute()  # it is copied, and voices are found beside it, whatever the working directory is by then
    if not path.is_file():
        raise CheckpointError(f"the tokenizer {path} is missing; fetch the whole repository again")
    try:
        tokenizer = _from_json(path) if path.suffix == ".json" else _from_sentencepiece(path)
    except Exception:  # the libraries raise Exception and RuntimeError, and say nothing that a user could act on
        tokenizer = None
    if tokenizer is None or not tokenizer.size:
        raise CheckpointError(f"{path} cannot be read as a tokenizer; fetch it again")
    if expected_size is not None and tokenizer.size != expected_size:
        raise CheckpointError(
            f"the tokenizer {path.name} has {tokenizer.size} pieces, the model's text_card is {expected_size}: use the "
            "tokenizer that was published with the weights"
        )
    return tokenizer


def copy_tokenizer(path: Path, folder: Path, name: str | None = None) -> None:
    """Copy a tokenizer, and the settings beside a `tokenizer.json`, if any, that say which token ends a text.

    Args:
      path: the tokenizer.
      folder: an existing folder.
      name: name of the copy; by default that of the tokenizer.
    """
    shutil.copyfile(path, folder / (name or path.name))
    settings = path.with_name("tokenizer_config.json")
    if path.suffix == ".json" and settings.is_file():
        shutil.copyfile(settings, folder / settings.name)


def _from_sentencepiece(path: Path) -> Tokenizer | None:
    import sentencepiece

    if not path.stat().st_size:
        return None
    # From bytes: given a path the library prints to stderr before it raises.
    model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    size = model.get_piece_size()
    silent = frozenset(i for i in range(size) if model.is_control(i) or model.is_unknown(i))
    return Tokenizer(path, size, model.eos_id(), model.encode, model.decode, model.id_to_piece, silent)


def _from_json(path: Path) -> Tokenizer:
    import tokenizers

    text = files.read_text(path)
    model = tokenizers.Tokenizer.from_str(text)
    model.encode_special_tokens = True  # a marker's name in a text is letters, as in sentencepiece, and not the marker
    silent = frozenset(token["id"] for token in json.loads(text).get("added_tokens", []) if token["special"])
    settings = path.with_name("tokenizer_config.json")
    eos = json.loads(files.read_text(settings)).get("eos_token") if settings.is_file() else None
    eos = eos["content"] if isinstance(eos, dict) else eos or "</s>"
    eos_id = model.token_to_id(eos)
    size = model.get_vocab_size(with_added_tokens=True)

    def encode(text: str) -> list[int]:
        return model.encode(text, add_special_tokens=False).ids

    return Tokenizer(path, size, -1 if eos_id is None else eos_id, encode, model.decode, model.id_to_token, silent)

"""The reference's rules for words and their times, on scripts of tokens."""

from pathlib import Path

import pytest
import sentencepiece

from tests.helpers.tokenizer_maker import make_tokenizer
from tests.parity import references


@pytest.mark.parametrize(
    "script, words",
    [
        ("3 3 ▁the 3", []),
        ("▁the 0 ▁a 3 0", [("a", 0.08, 0.24)]),
        ("0 ▁the 3 0 3 0 ▁a", [("the", 0.0, 0.16), ("a", 0.4, 0.48)]),
        ("0 ▁a st ▁the 3 3 0 3", [("ast", 0.0, 0.16), ("the", 0.16, 0.4)]),
        ("0 ▁a 3 3 2 ▁the", [("a", 0.0, 0.24)]),
        ("0 ▁a" + " 3" * 20, [("a", 0.0, 0.96)]),
        ("0 1 2 ▁a 0", [("a", 0.0, 0.24)]),
    ],
)
def test_words_lie_between_word_starts(tmp_path: Path, script: str, words: list[tuple[str, float, float]]):
    path = make_tokenizer(tmp_path / "a.model", 64)
    tokenizer = sentencepiece.SentencePieceProcessor(str(path))
    tokens_T = [int(word) if word.isdigit() else tokenizer.piece_to_id(word) for word in script.split()]
    found = references.moshi_timestamped(tokens_T, path, 0.08)
    assert [(text, round(start, 6), round(end, 6)) for text, start, end in found] == words

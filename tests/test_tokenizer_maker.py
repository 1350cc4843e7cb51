"""The tokenizers that tests make have the size asked for and the id layout of Kyutai's."""

from pathlib import Path

import pytest
import sentencepiece

from tests.helpers.tokenizer_maker import make_tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("vocab_size", [48, 64, 400, 4000, 8000])
def test_a_tokenizer_has_exactly_the_pieces_asked_for_and_reads_its_own_text(tmp_path: Path, vocab_size: int):
    path = make_tokenizer(tmp_path / "a.model", vocab_size)
    tokenizer = sentencepiece.SentencePieceProcessor(str(path))
    assert tokenizer.get_piece_size() == vocab_size
    assert (tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id()) == (0, 1, 2, 3)
    text = "the middle classes and the crêpes"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_same_size_gives_the_same_file(tmp_path: Path):
    first, second = (make_tokenizer(tmp_path / name, 400).read_bytes() for name in ("a.model", "b.model"))
    assert first == second


def test_a_vocabulary_smaller_than_the_alphabet_is_refused(tmp_path: Path):
    with pytest.raises(RuntimeError, match="Vocabulary size is smaller than required_chars"):
        make_tokenizer(tmp_path / "a.model", 10)

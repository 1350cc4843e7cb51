"""The small tokenizer: a word of the vocabulary is one piece, any other word is letters."""

from dsm_jax.convert.tokenizer import to_json
from dsm_jax.tokenizers import load_tokenizer
from recipes.digits.vocabulary import write_vocabulary


def test_words_are_pieces_and_others_are_spelt(tmp_path):
    size = write_vocabulary(tmp_path / "words.model", ("zero", "one"))
    tokenizer = load_tokenizer(tmp_path / "words.model", expected_size=size)
    assert size == 4 + 2 + 27
    assert tokenizer.encode("one zero") == [5, 4]
    assert [tokenizer.piece(i) for i in range(6)] == ["<unk>", "<s>", "</s>", "<pad>", "▁zero", "▁one"]
    spelt = tokenizer.encode("zero hundred")
    assert len(spelt) == 1 + 1 + len("hundred")
    assert tokenizer.decode(spelt) == "zero hundred"
    assert tokenizer.encode("é")[-1] == 0
    assert tokenizer.eos_id == 2


def test_it_converts_to_a_tokenizer_json(tmp_path):
    write_vocabulary(tmp_path / "words.model", ("zero", "one"))
    to_json(tmp_path / "words.model", tmp_path)
    ours, theirs = load_tokenizer(tmp_path / "words.model"), load_tokenizer(tmp_path / "tokenizer.json")
    for text in ("one zero", "zero hundred one", "", "  two  "):
        assert ours.encode(text) == theirs.encode(text)

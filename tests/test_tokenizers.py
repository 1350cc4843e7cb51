"""Tokenizers: text to ids and back, the same from a sentencepiece model and from a `tokenizer.json` made of it."""

from pathlib import Path

import pytest

from dsm_jax.convert import tokenizer as rewriting
from dsm_jax.errors import CheckpointError, TextError
from dsm_jax.tokenizers import copy_tokenizer, load_tokenizer
from tests.helpers.tokenizer_maker import make_tokenizer

TEXTS = (
    "mister quilter is the apostle of the middle classes",
    "  two  spaces ",
    "naïve café crêpes",
    "日本語 and ﬁne ①",
    "don't—stop",
    "bonjour tout\tle monde\n",
    "x",
    " ",
    "",
)


@pytest.fixture(scope="module", params=[64, 400, 1500])
def twins(request, tmp_path_factory) -> tuple:
    """Return one vocabulary read from a sentencepiece model, its tokenizer.json, and the model made of that."""
    folder = tmp_path_factory.mktemp("twins")
    model = make_tokenizer(folder / "a.model", request.param)
    rewriting.to_json(model, folder)
    rewriting.to_sentencepiece(folder / "tokenizer.json", folder / "b.model")
    files = (model, folder / "tokenizer.json", folder / "b.model")
    return tuple(load_tokenizer(path, expected_size=request.param) for path in files)


def test_a_rewritten_tokenizer_encodes_alike(twins):
    for text in TEXTS:
        assert len({tuple(t.encode(text)) for t in twins}) == 1, text


def test_half_of_a_character_is_refused_by_every_kind_of_tokenizer(twins):
    for tokenizer in twins:
        with pytest.raises(TextError, match=r"half of a character at 4, the last of 'one \\ud800'; give whole"):
            tokenizer.encode("one \ud800 two")


def test_a_rewritten_tokenizer_decodes_alike(twins):
    for text in TEXTS:
        ids = twins[0].encode(text)
        for some in (ids, ids[1:], ids + ids, [5, 0, 6, 3, 9, 2, 1]):
            assert len({t.decode(some) for t in twins}) == 1, (text, some)


def test_a_rewritten_tokenizer_has_the_same_pieces(twins):
    assert len({t.size for t in twins}) == 1
    assert {t.eos_id for t in twins} == {2}
    for token in range(twins[0].size):
        assert len({t.piece(token) for t in twins}) == 1


def test_decoding_inverts_encoding(twins):
    for tokenizer in twins:
        assert tokenizer.decode(tokenizer.encode("good morning everyone")) == "good morning everyone"


def test_markers_padding_and_the_unknown_piece_have_no_text(twins):
    for tokenizer in twins:
        ids = tokenizer.encode("good morning")
        assert tokenizer.decode([1, 0, *ids, 3, 3, 0, 2]) == "good morning"
        assert tokenizer.decode([0, 3, 1, 2]) == ""
        assert [token for token in [*ids, 0, 1, 2, 3] if tokenizer.has_text(token)] == ids


def test_pieces_write_a_space_as_a_low_line(twins):
    for tokenizer in twins:
        assert tokenizer.piece(tokenizer.encode("the")[0]).startswith("▁")


@pytest.mark.parametrize("token", [-1, 64])
def test_an_id_out_of_range_is_refused(tmp_path, token):
    tokenizer = load_tokenizer(make_tokenizer(tmp_path / "t.model", 64))
    with pytest.raises(CheckpointError, match=rf"ids \[{token}\] are not in the vocabulary of 64 pieces"):
        tokenizer.decode([token])
    with pytest.raises(CheckpointError, match=rf"ids \[{token}\] are not in the vocabulary"):
        tokenizer.piece(token)
    with pytest.raises(CheckpointError, match=rf"ids \[{token}\] are not in the vocabulary"):
        tokenizer.has_text(token)


@pytest.mark.parametrize(
    ("name", "content"),
    [("t.model", b""), ("t.model", b"garbage"), ("t.json", b"{}"), ("t.json", b"\xff"), ("t.json", b"")],
)
def test_a_broken_tokenizer_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name} cannot be read as a tokenizer; fetch it again"):
        load_tokenizer(tmp_path / name)


def test_a_missing_tokenizer_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"the tokenizer .*gone.model is missing; fetch the whole repository"):
        load_tokenizer(tmp_path / "gone.model")


def test_a_tokenizer_of_the_wrong_size_is_refused(tmp_path):
    path = make_tokenizer(tmp_path / "t.model", 64)
    match = r"the tokenizer t.model has 64 pieces, the model's text_card is 8000: use the tokenizer that was published"
    with pytest.raises(CheckpointError, match=match):
        load_tokenizer(path, expected_size=8000)


def test_only_unigram_models_are_rewritten(tmp_path):
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog"] * 9),
        model_writer=model,
        model_type="bpe",
        vocab_size=40,
        minloglevel=2,
    )
    (tmp_path / "t.model").write_bytes(model.getvalue())
    with pytest.raises(CheckpointError, match=r"t.model is of model_type 2; only unigram models are rewritten"):
        rewriting.to_json(tmp_path / "t.model", tmp_path)
    bpe = '{"model": {"type": "BPE"}, "added_tokens": []}'
    (tmp_path / "tokenizer.json").write_text(bpe)
    with pytest.raises(CheckpointError, match=r"tokenizer.json is a BPE model; only unigram"):
        rewriting.to_sentencepiece(tmp_path / "tokenizer.json", tmp_path / "u.model")


def test_eos_is_what_the_settings_beside_a_tokenizer_say(tmp_path):
    rewriting.to_json(make_tokenizer(tmp_path / "t.model", 64), tmp_path)
    settings: Path = tmp_path / "tokenizer_config.json"
    settings.write_text('{"eos_token": {"content": "<pad>"}}')
    assert load_tokenizer(tmp_path / "tokenizer.json").eos_id == 3
    settings.write_text('{"eos_token": "nowhere"}')
    assert load_tokenizer(tmp_path / "tokenizer.json").eos_id == -1


def test_a_tokenizer_without_settings_beside_it_is_copied_alone(tmp_path):
    rewriting.to_json(make_tokenizer(tmp_path / "t.model", 64), tmp_path)
    (tmp_path / "alone").mkdir()
    (tmp_path / "tokenizer_config.json").unlink(missing_ok=True)
    copy_tokenizer(tmp_path / "tokenizer.json", tmp_path / "alone", "other.json")
    assert [path.name for path in (tmp_path / "alone").iterdir()] == ["other.json"]

"""Train tiny tokenizers of an exact size: sentencepiece models as Kyutai's, byte-level ones as Llama's."""

import io
import random
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

_SENTENCES = (
    "mister quilter is the apostle of the middle classes and we are glad to welcome his gospel",
    "the quick brown fox jumps over the lazy dog while five boxing wizards watch in silence",
    "good morning everyone and thank you for coming to the station at such an early hour",
    "she said that the weather would be fine tomorrow but nobody in the room believed her",
    "please turn left at the second light then walk about two hundred metres along the river",
    "one two three four five six seven eight nine ten eleven twelve thirteen fourteen",
    "we could hear the music from the street and people were dancing under the old trees",
    "what time does the train leave and when will it arrive in the city",
    "it was a bright cold day in spring and the clocks were striking just before noon",
    "bonjour tout le monde nous allons préparer des crêpes avec du sucre et du beurre",
)
_MADE_UP_FROM = 300  # larger vocabularies need made-up words besides the sentences
_BYTE_FALLBACK_FROM = 1000  # smaller vocabularies would consist of little but the 256 byte pieces


def make_tokenizer(path: Path, vocab_size: int) -> Path:
    """Train a unigram model of exactly `vocab_size` pieces: 0 is the unknown piece, 1 `<s>`, 2 `</s>`, 3 `<pad>`.

    Kyutai's language models give these ids their own meaning: 0 opens a word and 3 is padding. Two calls with the
    same size give the same file, byte for byte. From 300 pieces on made-up words join the real ones, and from 1,000
    on there are byte pieces.

    Args:
        path: File to write, replaced if it exists.
        vocab_size: Number of pieces, 48 or more: the letters alone need that many.

    Returns:
        `path`.

    Raises:
        RuntimeError: From sentencepiece, when `vocab_size` is too small for the letters.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(_sentences(vocab_size)),
        model_writer=model,
        model_type="unigram",
        vocab_size=vocab_size,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        byte_fallback=vocab_size >= _BYTE_FALLBACK_FROM,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return path


def _sentences(vocab_size: int) -> list[str]:
    return [*_SENTENCES, *_made_up_words(3 * vocab_size if vocab_size >= _MADE_UP_FROM else 0)]


def _made_up_words(count: int) -> list[str]:
    draw = random.Random(0)
    syllables = [f"{onset}{rest}" for onset in "bdfgklmnprstvz" for rest in ("a", "e", "i", "o", "u", "an", "or")]
    return ["".join(draw.choices(syllables, k=draw.randint(3, 4))) for _ in range(count)]


def make_byte_tokenizer(path: Path, vocab_size: int, markers: Sequence[str]) -> Path:
    """Train a byte-level `tokenizer.json` of exactly `vocab_size` entries, in the layout of Llama 3's.

    Args:
        path: File to write, replaced if it exists.
        vocab_size: Number of entries, markers included; 256 and the markers at least.
        markers: Control tokens, which get the last ids; the first begins and the second ends a text where a caller
            asks for special tokens.

    Returns:
        `path`.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(markers),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    tokenizer.add_special_tokens([AddedToken(marker, normalized=False, special=True) for marker in markers])
    begin, end = ((marker, tokenizer.token_to_id(marker)) for marker in markers[:2])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin[0]} $A {end[0]}", special_tokens=[begin, end]
    )
    tokenizer.save(str(path))
    return path

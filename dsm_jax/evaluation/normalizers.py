"""Bring reference and transcript to one spelling before they are compared: Whisper's normalizers, or none."""

import functools
from collections.abc import Callable
from typing import Literal, get_args

from dsm_jax.errors import EvaluationError
from dsm_jax.evaluation.extras import needed

Name = Literal["english", "basic", "none"]
NAMES: tuple[Name, ...] = get_args(Name)
IGNORED = "ignore time segment in scoring"  # the text of segments of the AMI and TED-LIUM corpora that do not count


@functools.cache
def normalizer(name: Name) -> Callable[[str], str]:
    """Find a normalizer.

    Args:
      name: "english" is the one of Whisper's published figures: lower case, no punctuation, contractions written out,
        British spellings as American ones, number words as figures. "basic" is Whisper's for all other languages:
        lower case, no punctuation. "none" leaves the text as it is.

    Returns:
      A function from a text to its normal form.

    Raises:
      EvaluationError: another name, or `whisper-normalizer` is not installed.
    """
    if name == "none":
        return str
    if name == "english":
        with needed():
            from whisper_normalizer.english import EnglishTextNormalizer
        return EnglishTextNormalizer()
    if name == "basic":
        with needed():
            from whisper_normalizer.basic import BasicTextNormalizer
        return BasicTextNormalizer()
    raise EvaluationError(f"the normalizer is {name!r}; choose one of {', '.join(NAMES)}")


def counts(normalized: str) -> bool:
    """Tell whether a normalized reference is scored; empty ones and segments marked as ignored are not."""
    plain = normalized.lower().replace("_", " ").strip()
    return plain not in ("", IGNORED)

"""Name the extra to install where a library that only evaluation needs is missing."""

import contextlib
from collections.abc import Iterator

from dsm_jax.errors import EvaluationError


@contextlib.contextmanager
def needed() -> Iterator[None]:
    """Turn a failed import inside the block into one sentence.

    Raises:
      EvaluationError: what the block imports is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise EvaluationError(
            f"evaluation needs {error.name}, which is not installed; run: pip install 'dsm-jax[evaluate]'"
        ) from None

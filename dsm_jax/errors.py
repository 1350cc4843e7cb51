"""Errors of the library: every error that a user can put right is one of these."""


def plural(count: int, noun: str) -> str:
    """Write a number of things, for a sentence."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


class DsmError(Exception):
    """Base of the library's own errors. The message says what was found, what was expected and what to do."""


class ConfigError(DsmError, ValueError):
    """An argument, an option or a configuration with a key or a value that the library does not understand."""


class AudioError(DsmError):
    """Audio that cannot be read, is empty, or holds values that are not numbers."""


class CheckpointError(DsmError):
    """Weights, a tokenizer or a folder that do not fit the model they are meant for."""


class ModelKindError(CheckpointError, ValueError):
    """A model of another kind than the one that is needed, such as a codec that is to transcribe."""


class StreamError(DsmError):
    """A chunk or a state that does not fit the stream it was given to."""


class TextError(DsmError, ValueError):
    """A text with half of a character in it, which no encoding can write."""


class PromptError(DsmError, ValueError):
    """A prompt that the model cannot follow."""


class SpeechError(DsmError, ValueError):
    """A text that cannot be said, or a voice that the model cannot take."""


class UnsayableError(SpeechError):
    """A word that the tokenizer cannot spell, or a tag that is unknown.

    Attributes:
      before: entries of the script that precede the word or tag.
    """

    def __init__(self, message: str, before: list):
        super().__init__(message)
        self.before = before

    def __reduce__(self) -> tuple:
        return type(self), (str(self), self.before)


class ForkError(DsmError):
    """A use of JAX in a process that was forked from one that uses JAX."""


class WireError(DsmError, ValueError):
    """A message of a client that is not of the server's wire format."""


class FullError(DsmError):
    """A request that a server has no slot for."""


class FaultError(DsmError):
    """A fault of the library in the handling of one session, which a server survives; `__cause__` is the fault."""


class ServerError(DsmError):
    """An answer of a server that refuses a request, or a server that cannot be reached."""


class ServerFullError(ServerError):
    """A server that has no room for a session now, and may have some later.

    Attributes:
      retry_after_s: seconds after which the server asks to be tried again; None if it does not say.
    """

    def __init__(self, message: str, retry_after_s: float | None = None):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TrainingError(DsmError):
    """Training that cannot continue, or data that cannot be trained on. Earlier checkpoints remain."""


class EvaluationError(DsmError):
    """Data that cannot be evaluated on, or results that cannot be read or compared."""


class BatchError(DsmError):
    """Some inputs of several failed.

    Attributes:
      results: the result of each input, in order; None for those that failed.
      errors: the reason of each that failed, by its place.
    """

    def __init__(self, results: list, errors: dict[int, DsmError]):
        reasons = "; ".join(str(errors[index]) for index in sorted(errors))
        others = "" if len(errors) == len(results) else ", the others are in `.results`"
        super().__init__(f"{len(errors)} of {plural(len(results), 'input')} failed{others}: {reasons}")
        self.results, self.errors = results, errors

    def __reduce__(self) -> tuple:  # by default an exception is made anew from its message alone
        return type(self), (self.results, self.errors)

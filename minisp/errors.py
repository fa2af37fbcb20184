"""Every error minisp raises on purpose: what was expected, what was got, what to do about it.

The classes are few and follow what a caller can do about the failure; `exit_code` is what the command line returns.
Codes 0 (success), 1 (a bug or an unforeseen error) and 2 (wrong command-line usage) keep their customary meaning.
"""


class MinispError(Exception):
    """Base class. `exit_code` is the process exit status of the command line for this class of failure."""

    exit_code = 1


class ConfigError(MinispError, ValueError):
    """An option is outside its range, or two options contradict each other."""

    exit_code = 3


class UnsupportedModelError(MinispError):
    """The model family is unknown, or a known family in a form that cannot be cut."""

    exit_code = 4


class CheckpointError(MinispError):
    """The source checkpoint is missing, incomplete, corrupt, unsafe, or holds values that are not finite."""

    exit_code = 5


class CalibrationError(MinispError):
    """The calibration or evaluation text is missing, empty, too short, or does not fit the model."""

    exit_code = 6


class NumericalError(MinispError):
    """A computation lost its meaning: non-finite statistics, or a Gram matrix that is not positive definite."""

    exit_code = 7


class OutputError(MinispError):
    """The result cannot be written: the folder is not empty, not writable, or the disk is full."""

    exit_code = 8


class BackendError(MinispError):
    """An implementation was asked for by name and cannot serve the request (it is never silently replaced)."""

    exit_code = 9


class DistributedError(MinispError):
    """Another process of the same run failed or was lost."""

    exit_code = 10


class GateError(MinispError):
    """No result is as good as was asked for, or a model does not pass a gate of its recipe.

    Args:
        message: what was expected, what was got, and what to do.
        facts: the same as plain values, for programs.
    """

    exit_code = 11

    def __init__(self, message: str, facts: dict[str, object] | None = None) -> None:
        super().__init__(message)
        self.facts = facts or {}


def one_line(error: Exception) -> str:
    """Another library's message as a sentence to quote: no line breaks, no C++ frames such as torch appends."""
    return " ".join(str(error).split("\nException raised from")[0].split()).rstrip(".") + "."

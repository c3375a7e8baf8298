"""Errors that a user can cause: each carries one line that says what is wrong and what would be right."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none: for errors of one line about other errors."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class RobustError(Exception):
    """Bad input or a condition the user must know of; the command line prints it as one line and exits with 2."""

    exit_code = 2


class VerificationError(RobustError):
    """A check of stored evidence failed; the command line exits with 1."""

    exit_code = 1


class UnknownName(RobustError):
    """A name that no registry row has."""


class ConfigError(RobustError):
    """A configuration file or an option with an unknown key, a wrong type or an impossible value."""


class DataError(RobustError):
    """Data that is missing, empty, unreadable or of the wrong shape."""


class ModelError(RobustError):
    """A model that cannot be built, loaded or used as a classifier."""


class ThreatError(RobustError):
    """A threat whose size is impossible for the model's box."""


class RunError(RobustError):
    """A run folder that cannot be written, continued or read."""


class BudgetExceeded(RobustError):
    """An oracle was asked for more than its query budget."""

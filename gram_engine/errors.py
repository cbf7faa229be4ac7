"""Errors that a user can correct. Their text names the file and line, or the flag, and the remedy."""


class GramError(Exception):
    """Base class; command-line tools print the text without a traceback and exit with `exit_status`."""

    exit_status = 2


class ConfigError(GramError, ValueError):
    """A flag, or a combination of flags, that cannot work."""


class DataError(GramError, ValueError):
    """A data file or row that cannot be used; the text starts with ``file:line:`` if the problem is in a line."""


class CheckpointError(GramError, RuntimeError):
    """A checkpoint that is missing, damaged, of another shape, or that cannot be written."""


class NumericsError(GramError, ArithmeticError):
    """Losses or gradients that are not finite in too many steps in a row."""

    exit_status = 3


class ServerError(GramError, RuntimeError):
    """A judge's server that cannot be reached, refuses requests, or answers something else than its contract."""

    exit_status = 5


LONGEST_MESSAGE = 500


def one_line(problem: object) -> str:
    """The text of an error that may quote a data file, shortened, with control characters escaped."""
    text = str(problem)
    text = text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]} ..."
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)

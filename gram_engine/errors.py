"""Errors a user can mend. Their text names the place (file, line, flag) and the remedy."""


class GramError(Exception):
    """Base of the errors below; command-line tools print its text without a traceback and exit with `exit_status`."""

    exit_status = 2


class ConfigError(GramError, ValueError):
    """A flag, or a combination of flags, that cannot work."""


class DataError(GramError, ValueError):
    """A data file or row that cannot be used; the text starts with ``file:line:`` where there is one."""


class CheckpointError(GramError, RuntimeError):
    """A checkpoint that is missing, damaged, or of another shape."""


class NumericsError(GramError, ArithmeticError):
    """Losses or gradients that are not finite, step after step."""

    exit_status = 3


LONGEST_MESSAGE = 500


def one_line(problem: object) -> str:
    """The text of a problem that may quote a data file: shortened, and with escapes for what would steer a terminal."""
    text = str(problem)
    text = text if len(text) <= LONGEST_MESSAGE else f"{text[:LONGEST_MESSAGE]} ..."
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)

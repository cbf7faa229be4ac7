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

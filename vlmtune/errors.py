"""The one exception meant for users, in a module so light that the command line can import it before torch. Level 0."""

from __future__ import annotations


class VlmtuneError(Exception):
    """Something the user can mend. The message is one clear sentence: what, where, remedy.

    The command line prints it without a traceback and exits with code 1. code: a stable name of the cause, for reports
    that count causes (`vlmtune.data.check.CODES`); None where nobody counts.
    """

    def __init__(self, message: str, code: str | None = None):
        super().__init__(message)
        self.code = code

    def __reduce__(self):  # worker processes send errors
        return type(self), (str(self), self.code)

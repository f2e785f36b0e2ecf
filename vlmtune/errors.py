"""The one exception meant for users, in a module so light that the command line can import it before torch. Level 0."""

from __future__ import annotations


class VlmtuneError(Exception):
    """Something the user can mend. The message is one clear sentence: what, where, remedy.

    The command line prints it without a traceback and exits with code 1.
    """

"""The base class of every error that a user can make and a user can mend."""

from __future__ import annotations


class UserError(ValueError):
    """A user's mistake. The command line prints its text without a traceback and ends with exit code 2."""

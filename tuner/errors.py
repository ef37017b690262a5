"""The base class of every error that a user can make and a user can mend."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher


class UserError(ValueError):
    """A user's mistake. The command line prints its text without a traceback and ends with exit code 2."""


def few(name: str, names: Iterable[str], most: int = 5) -> str:
    """Those of the names that are most like one, `a, b and 3 more`; all in order where they are few."""
    every = sorted(names)
    if len(every) <= most:
        return ", ".join(every)
    likeness = {one: SequenceMatcher(None, name.lower(), one.lower()).ratio() for one in every}
    nearest = sorted(every, key=lambda one: -likeness[one])[:most]
    return f"{', '.join(nearest)} and {len(every) - most} more"

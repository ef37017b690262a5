"""The base class of every error that a user can make and a user can mend."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from difflib import SequenceMatcher


class UserError(ValueError):
    """A user's mistake. The command line prints its text without a traceback and ends with exit code 2."""


_WAYS_OUT = {
    errno.EACCES: "the user of this process needs the right to it (ls -l, chmod), or choose another place",
    errno.EPERM: "the user of this process needs the right to it (ls -l, chmod), or choose another place",
    errno.EROFS: "choose another place",
    errno.ENOSPC: "make room, or choose another place",
    errno.EDQUOT: "make room, or choose another place",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "it is a link that leads to itself; give the place itself",
    errno.ENOTDIR: "a part of it is a file, and a folder is expected",
    errno.EMFILE: "raise the limit of open files in the shell: ulimit -n 4096",
    errno.ENFILE: "raise the limit of open files in the shell: ulimit -n 4096",
}


def of_system(error: OSError) -> str | None:
    """What the user can mend of what the system refused: place, reason, way out; None for anything else."""
    if error.errno not in _WAYS_OUT:
        return None
    place = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
    return f"{place}{error.strerror}: {_WAYS_OUT[error.errno]}"


def few(name: str, names: Iterable[str], most: int = 5) -> str:
    """Those of the names that are most like one, `a, b and 3 more`; all in order where they are few."""
    every = sorted(names)
    if len(every) <= most:
        return ", ".join(every)
    likeness = {one: SequenceMatcher(None, name.lower(), one.lower()).ratio() for one in every}
    nearest = sorted(every, key=lambda one: -likeness[one])[:most]
    return f"{', '.join(nearest)} and {len(every) - most} more"

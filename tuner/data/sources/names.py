"""What to say of a name that is not there."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def missing_column(key: str, name: str, names: Sequence[str]) -> str:
    """A column that a source does not have: which there are, and the nearest."""
    return f"no column {name} for columns.{key}; there are: {', '.join(names)}{nearest(name, names)}"


def nearest(name: str, names: Sequence[str]) -> str:
    """`; did you mean ...?`, or nothing where no name is like it."""
    by_lower = {one.lower(): one for one in names}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return f"; did you mean {by_lower[found[0]]}?" if found else ""

"""What is told of pictures that are changed as they are read: how many of a kind, and a few names."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tuner.data.pictures import Decoded, Reading

KINDS = 10
"""Lines that are told."""
NAMES = 3
LAID, CUT = "transparent parts lie on the colour ", "transparent parts"
BESIDE = "transparent parts of a condition or mask"


def of(found: Decoded) -> tuple[str, ...]:
    """What is remembered of a picture: the same however transparency is read, and of any number of frames."""
    notes = [CUT if note.startswith(LAID) else note for note in found.notes]
    if found.mask is not None and int(found.mask.min(initial=255)) < 255:
        notes.append(CUT)
    return tuple(re.sub(r"^\d+ frames or pages", "several frames or pages", note) for note in notes)


class Remarks:
    """Counts what is to be told; a few names are kept of each, however many pictures there are."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, list[str]]] = {}

    def add(self, notes: Sequence[str], name: str, beside: bool) -> None:
        """What is told of one picture; `beside`: of a condition or mask, whose own alpha is none."""
        for note in notes:
            key = BESIDE if beside and note == CUT else note
            count, names = self._found.get(key, (0, []))
            self._found[key] = (count + 1, names if len(names) >= NAMES else [*names, name])

    def lines(self, reading: Reading) -> list[str]:
        """A line for each kind, the most frequent first."""
        told = []
        for note, (count, names) in sorted(self._found.items(), key=lambda one: (-one[1][0], one[0])):
            words = note
            if note == BESIDE or (note == CUT and reading.alpha == "composite"):
                words = f"{LAID}{reading.background}"
            elif note == CUT:
                words = f"{CUT} are the mask"
            more = f" and {count - len(names)} more" if count > len(names) else ""
            told.append(f"{count} picture{'s' if count > 1 else ''}: {words} ({', '.join(names)}{more})")
        rest = [f"... and {len(told) - KINDS} kinds more of pictures that are changed as they are read"]
        return told[:KINDS] + rest * (len(told) > KINDS)

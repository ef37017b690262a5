"""Which captions are kept, from their scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from tuner.captioning.originals import Found, Said


class Scored(NamedTuple):
    """A caption; its score (None: there is no filter), and whether it is kept."""

    said: Said
    new: bool
    score: float | None
    kept: bool


class Picture(NamedTuple):
    """A picture with its captions, the new one first."""

    found: Found
    captions: tuple[Scored, ...]

    @property
    def kept(self) -> list[Scored]:
        """What is kept, each text of a kind once."""
        seen: dict[tuple[str, str], Scored] = {}
        for one in self.captions:
            if one.kept:
                seen.setdefault((one.said.kind, one.said.text), one)
        return list(seen.values())


def least(scores: Sequence[float], threshold: float | None, share: float | None) -> float:
    """The score from which on captions are kept.

    Args:
        scores: of all captions, old and new.
        threshold: it is this one.
        share: or that of the last one in this share (0 to 1, rounded up to a whole caption) of the best.
    """
    if threshold is not None:
        return threshold
    assert share is not None
    count = math.ceil(round(share * len(scores), 9))  # 0.1 * 30 is a little more than 3
    return sorted(scores, reverse=True)[count - 1] if scores else 0.0

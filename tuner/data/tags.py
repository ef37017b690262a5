"""Captions that are lists of tags: some are left out, the others come in another order; all counted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, permutations
from math import comb, perm
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tuner import counted


class Parted(NamedTuple):
    """The tags of a caption: those that stay in front, the loose ones, and those that stay at the end."""

    first: list[str]
    loose: list[str]
    last: list[str]


@dataclass(frozen=True)
class TagRule:
    """What happens to a caption's tags. Spaces around tags, and tags with nothing in them, do not count.

    Attributes:
        separator: between two tags.
        keep: how many tags in front are neither moved nor dropped.
        marker: where a caption has it, what stands before the first and behind the second (or a later last)
            one is neither moved nor dropped, whatever `keep` says; the marker itself is taken out.
        together: what joins tags that are moved and dropped as one; it becomes a separator.
        shuffle: the loose tags come in random order.
        drop: the chance of each loose tag to be left out, 0 to 1.
    """

    separator: str = ","
    keep: int = 0
    marker: str | None = None
    together: str | None = None
    shuffle: bool = False
    drop: float = 0.0

    def part(self, text: str) -> Parted:
        """The tags of a caption."""
        if self.marker is None or self.marker not in text:
            tags = self._tags(text)
            return Parted(tags[: self.keep], tags[self.keep :], [])
        first, *rest = text.split(self.marker)
        last = rest.pop() if len(rest) > 1 else ""
        return Parted(self._tags(first), [t for one in rest for t in self._tags(one)], self._tags(last))

    def join(self, tags: list[str]) -> str:
        """Tags as a caption, with a space behind a separator that does not end in one."""
        between = self.separator if self.separator[-1].isspace() else f"{self.separator} "
        if self.together is None:
            return between.join(tags)
        parts = [part.strip() for tag in tags for part in tag.split(self.together)]
        return between.join(part for part in parts if part)

    def steps(self, text: str, seed: int, epoch: int, position: int) -> Iterator[tuple[str, str]]:
        """The caption after each operator that is on; after the last one where none is."""
        first, loose, last = self.part(text)
        order = list(range(len(loose)))
        at = (seed, epoch, position)
        if self.drop > 0:
            # 24 bits each, as counted.uniform has them.
            draws = (_bits(len(loose), *at, "drop tags") >> np.uint64(40)) * 2.0**-24
            order = [i for i in order if draws[i] >= self.drop]
            yield "tag dropout", self.join([*first, *(loose[i] for i in order), *last])
        if self.shuffle:
            # A key for each tag that there was, so that the order does not depend on which were dropped.
            keys = _bits(len(loose), *at, "shuffle tags")
            order.sort(key=lambda i: int(keys[i]))
            yield "tag shuffle", self.join([*first, *(loose[i] for i in order), *last])
        if not self.shuffle and not self.drop:
            yield "tags", self.join([*first, *loose, *last])

    def count(self, text: str) -> int:
        """How many captions may come out; two of them may read the same."""
        n = len(self.part(text).loose)
        return sum(perm(n, k) if self.shuffle else comb(n, k) for k in self._lengths(n))

    def every(self, text: str) -> Iterator[str]:
        """Everything that may come out, `count` of them."""
        first, loose, last = self.part(text)
        pick = permutations if self.shuffle else combinations
        for length in self._lengths(len(loose)):
            for chosen in pick(loose, length):
                yield self.join([*first, *chosen, *last])

    def extremes(self, text: str, ends: bool) -> Iterator[str]:
        """A longest caption that may come out and the shortest; with `ends`, each tag last in a longest one.

        A word that all of them have is in everything that comes out; and no tag ever comes further back.
        """
        first, loose, last = self.part(text)
        if self.drop < 1:
            yield self.join([*first, *loose, *last])
            for i in range(len(loose) - 1 if self.shuffle and ends else 0):
                yield self.join([*first, *loose[:i], *loose[i + 1 :], loose[i], *last])
        if self.drop > 0:
            yield self.join([*first, *last])

    def _lengths(self, n: int) -> range:
        """How many of n loose tags may be left."""
        return range(n if self.drop == 0 else 0, 1 if self.drop == 1 else n + 1)

    def _tags(self, text: str) -> list[str]:
        tags = (tag.strip() for tag in text.split(self.separator))
        return [tag for tag in tags if tag]


def _bits(n: int, seed: int, epoch: int, position: int, purpose: str) -> NDArray[np.uint64]:
    """n times 64 random bits: raw ones, because numpy keeps their stream fixed (see counted.py)."""
    raw = counted.generator(seed, epoch, position, purpose=purpose).bit_generator.random_raw(n)
    return np.asarray(raw, dtype=np.uint64)

"""What a sample is, and how very many are held: as a table whose rows become samples when asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple, overload

import numpy as np
import numpy.typing as npt

from tuner.data.blob import Blob
from tuner.data.captions import CaptionRule
from tuner.errors import UserError

SHOWN = 20
"""Problems that an error shows; of the rest it tells the number."""
AT_ONCE = 512
"""Samples that are made together where all are gone through."""


class Sample(NamedTuple):
    """One picture and what is known of it.

    Attributes:
        picture: its bytes.
        captions: what it shows, in one or several ways; at least one.
        condition, mask: pictures that belong to it, of the same shape.
        scene: the shapes world's record, for the exact judge.
        fixed: its one caption is taken as it is: without template, prefix, dropping.
        weight: of this sample in the loss, at least 0; the source's is multiplied in.
        source: which of the recipe's sources it is from, counted from 0.
        kinds: of what kind each caption is, such as long or short; empty where that is not known.
    """

    picture: Blob
    captions: tuple[str, ...]
    condition: Blob | None = None
    mask: Blob | None = None
    scene: dict[str, Any] | None = None
    fixed: bool = False
    weight: float = 1.0
    source: int = 0
    kinds: tuple[str, ...] = ()

    def every(self, rule: CaptionRule) -> set[str] | None:
        """Everything that may be its caption; None where that is too much to list."""
        return set(self.captions) if self.fixed else rule.every(self.captions, self.kinds)


class Lazy(Sequence[Sample], ABC):
    """A sequence whose samples are made when they are asked for."""

    @abstractmethod
    def at(self, row: int) -> Sample:
        """The sample of a row, 0 <= row < N."""

    def many(self, rows: Sequence[int]) -> list[Sample]:
        """The samples of some rows, which may be quicker than one after the other."""
        return [self.at(row) for row in rows]

    def sources(self) -> npt.NDArray[np.int64]:
        """Each sample's source, int64 [N]."""
        return np.array([sample.source for sample in self], np.int64)

    def weights(self) -> npt.NDArray[np.float64]:
        """Each sample's weight, float64 [N]."""
        return np.array([sample.weight for sample in self], np.float64)

    def __iter__(self) -> Iterator[Sample]:
        for start in range(0, len(self), AT_ONCE):
            yield from self.many(range(start, min(start + AT_ONCE, len(self))))

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(index, slice):
            return Chosen(self, range(*index.indices(len(self))))
        row = index + len(self) if index < 0 else index
        if not 0 <= row < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self.at(row)


class Samples(Lazy):
    """Many samples, each made when it is asked for; in memory they are a table, not Python objects.

    Attributes:
        place: the source as the recipe names it.
        repeats: how often each comes in an epoch, int32 [N]; the source's and its folder's multiplied.
        source: the source's number in the recipe.
        weight: of the source in the loss.
    """

    place: str
    repeats: npt.NDArray[np.int32]
    source: int
    weight: float

    def __init__(self, place: str, count: int, repeats: int, weight: float, source: int) -> None:
        self.place, self.source, self.weight = place, source, weight
        self.repeats = np.full(count, repeats, dtype=np.int32)
        self._problems: list[str] = []
        self._faults: list[str] = []

    @abstractmethod
    def one(self, index: int) -> Sample:
        """The sample of a row, 0 <= index < N, with a source of 0 and its own weight only."""

    def problems(self) -> Iterator[str]:
        """What is wrong with samples of this source that are left out, each naming its file."""
        return iter(self._problems)

    def faults(self) -> Iterator[str]:
        """What is wrong with the source as a whole, so that it cannot be told which samples are missing."""
        return iter(self._faults)

    def __len__(self) -> int:
        return len(self.repeats)

    def at(self, row: int) -> Sample:
        """The sample of a row, with the source's number and weight."""
        return self._told(self.one(row))

    def many(self, rows: Sequence[int]) -> list[Sample]:
        """The samples of some rows, with the source's number and weight."""
        return [self._told(one) for one in self.ones(rows)]

    def ones(self, rows: Sequence[int]) -> list[Sample]:
        """The samples of some rows, as `one` gives them."""
        return [self.one(row) for row in rows]

    def sources(self) -> npt.NDArray[np.int64]:
        """The source's number, int64 [N]."""
        return np.full(len(self), self.source, np.int64)

    def _told(self, one: Sample) -> Sample:
        if self.source == 0 and self.weight == 1 and one.scene is None:
            return one
        return one._replace(weight=one.weight * self.weight, source=self.source, kinds=kinds(one))


def kinds(sample: Sample) -> tuple[str, ...]:
    """Of what kind each caption is; else what the shapes world's record says of them; else empty."""
    if sample.kinds:
        return sample.kinds
    told = (sample.scene or {}).get("captions", [])
    return tuple(one["form"] for one in told) if len(told) == len(sample.captions) else ()


class Joined(Lazy):
    """The samples of several sources, one after the other.

    Attributes:
        repeats: int32 [N], as of each source.
    """

    def __init__(self, parts: Sequence[Samples]) -> None:
        self.parts = tuple(parts)
        self._ends = np.cumsum([len(part) for part in self.parts])
        every = [part.repeats for part in self.parts]
        self.repeats: npt.NDArray[np.int32] = np.concatenate(every) if every else np.zeros(0, np.int32)

    def __len__(self) -> int:
        return len(self.repeats)

    def problems(self) -> list[str]:
        """What is wrong with samples that the sources left out, each naming its file."""
        return [problem for part in self.parts for problem in part.problems()]

    def at(self, row: int) -> Sample:
        """The sample of a row, of the source that it is in."""
        which = int(np.searchsorted(self._ends, row, side="right"))
        return self.parts[which][row - self._first(which)]

    def many(self, rows: Sequence[int]) -> list[Sample]:
        """The samples of some rows."""
        found: list[Sample] = []
        every = np.searchsorted(self._ends, rows, side="right").tolist()
        for which, group in groupby(zip(every, rows, strict=True), key=lambda both: both[0]):
            found += self.parts[which].many([row - self._first(which) for _, row in group])
        return found

    def sources(self) -> npt.NDArray[np.int64]:
        """Each sample's source, int64 [N]."""
        return np.concatenate([part.sources() for part in self.parts] or [np.zeros(0, np.int64)])

    def weights(self) -> npt.NDArray[np.float64]:
        """Each sample's weight, float64 [N]."""
        return np.concatenate([part.weights() for part in self.parts] or [np.zeros(0)])

    def _first(self, which: int) -> int:
        return int(self._ends[which - 1]) if which else 0


class Chosen(Lazy):
    """Some of many samples."""

    def __init__(self, samples: Sequence[Sample], kept: Sequence[int]) -> None:
        self._samples, self._kept = samples, np.asarray(kept, np.int64)

    def __len__(self) -> int:
        return len(self._kept)

    def at(self, row: int) -> Sample:
        """The sample that was chosen for a row."""
        return self._samples[int(self._kept[row])]

    def many(self, rows: Sequence[int]) -> list[Sample]:
        """The samples that were chosen for some rows."""
        return take(self._samples, self._kept[rows].tolist())

    def sources(self) -> npt.NDArray[np.int64]:
        """Each sample's source, int64 [N]."""
        return sources(self._samples)[self._kept]

    def weights(self) -> npt.NDArray[np.float64]:
        """Each sample's weight, float64 [N]."""
        return weights(self._samples)[self._kept]


class Behind(Lazy):
    """Samples, and others behind them."""

    def __init__(self, first: Sequence[Sample], second: Sequence[Sample]) -> None:
        self._first, self._second = first, second

    def __len__(self) -> int:
        return len(self._first) + len(self._second)

    def at(self, row: int) -> Sample:
        """One of the first, or behind them of the second."""
        behind = row - len(self._first)
        return self._first[row] if behind < 0 else self._second[behind]

    def many(self, rows: Sequence[int]) -> list[Sample]:
        """Some of the first, and behind them of the second."""
        found: list[Sample] = []
        for second, group in groupby(rows, key=lambda row: row >= len(self._first)):
            those = [row - len(self._first) * second for row in group]
            found += take(self._second if second else self._first, those)
        return found

    def sources(self) -> npt.NDArray[np.int64]:
        """Each sample's source, int64 [N]."""
        return np.concatenate([sources(self._first), sources(self._second)])


def take(samples: Sequence[Sample], rows: Sequence[int]) -> list[Sample]:
    """Some of the samples, in the rows' order."""
    return samples.many(rows) if isinstance(samples, Lazy) else [samples[row] for row in rows]


def sources(samples: Sequence[Sample]) -> npt.NDArray[np.int64]:
    """The number of each sample's source, int64 [N]."""
    if isinstance(samples, Lazy):
        return samples.sources()
    return np.array([sample.source for sample in samples], np.int64)


def weights(samples: Sequence[Sample]) -> npt.NDArray[np.float64]:
    """Each sample's weight, float64 [N]."""
    if isinstance(samples, Lazy):
        return samples.weights()
    return np.array([sample.weight for sample in samples], np.float64)


def check(problems: Iterable[str]) -> None:
    """Raise all problems as one UserError; nothing where there are none."""
    found = list(problems)
    if found:
        rest = [f"... and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
        raise UserError("\n".join(found[:SHOWN] + rest))


def some(names: Sequence[str], shown: int = 3) -> str:
    """A few names and how many more there are: `a, b, c and 7 more`."""
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest


Say = Callable[[str], None]
"""Tells the user a line."""

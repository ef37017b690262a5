"""What is known of pictures before training: their bytes' hash and their size, remembered by stamp.

Each is decoded once, so that a damaged one is told before anything is encoded. A second run reads no picture
for it: it asks each file's stamp (path, size, time of change, inode) only.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar, overload

import numpy as np
import numpy.typing as npt

from tuner import processes
from tuner.data import pictures, remarks
from tuner.data.blob import Blob
from tuner.data.remarks import Remarks
from tuner.data.samples import SHOWN, Sample, take
from tuner.data.transform import check_fits
from tuner.errors import UserError
from tuner.progress import say, track

AT_ONCE = 512  # pictures remembered in one go
SOON = 10.0
"""Seconds in which another machine sees what is written into a cache; where it does not, it works alone."""
Item = TypeVar("Item")


class Known(NamedTuple):
    """What is remembered of a picture.

    Attributes:
        digest: sha256 of its bytes.
        height, width: in pixels, turned as its EXIF says.
        notes: what is told of it, a line each.
    """

    digest: str
    height: int
    width: int
    notes: str = ""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width


class Memory:
    """What was found of pictures, by the stamps of where their bytes lie; shared by processes."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.place = folder / "pictures.sqlite"
        with closing(self._open()) as base, base:
            base.execute(
                "create table if not exists looked "
                "(stamp text primary key, digest text, height integer, width integer, notes text)"
            )

    def of(self, stamps: Sequence[str]) -> dict[str, Known]:
        """What is known, for the stamps of which something is."""
        found: dict[str, Known] = {}
        with closing(self._open()) as base:
            for start in range(0, len(stamps), AT_ONCE):
                part = stamps[start : start + AT_ONCE]
                asked = f"select * from looked where stamp in ({','.join('?' * len(part))})"
                found |= {stamp: Known(*known) for stamp, *known in base.execute(asked, part)}
        return found

    def add(self, found: dict[str, Known]) -> None:
        """Remember."""
        rows = [(stamp, *known) for stamp, known in found.items()]
        with closing(self._open()) as base, base:
            base.executemany("insert or replace into looked values (?, ?, ?, ?, ?)", rows)

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self.place, timeout=60)


class Hexes(Sequence[str]):
    """Digests, uint8 [N, 32], as texts of hexadecimal digits."""

    def __init__(self, digests: npt.NDArray[np.uint8]) -> None:
        self.digests = digests

    def __len__(self) -> int:
        return len(self.digests)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Hexes: ...
    def __getitem__(self, index: int | slice) -> str | Hexes:
        if isinstance(index, slice):
            return Hexes(self.digests[index])
        text: str = self.digests[index].tobytes().hex()
        return text


class Column(Sequence[Known | None]):
    """What is known of one part of all samples, in arrays: there may be very many.

    Attributes:
        digests: uint8 [N, 32].
        sizes: int32 [N, 2], height and width; -1 where there is no such part.
    """

    def __init__(self, digests: npt.NDArray[np.uint8], sizes: npt.NDArray[np.int32]) -> None:
        self.digests, self.sizes = digests, sizes

    @property
    def there(self) -> npt.NDArray[np.bool_]:
        """Which samples have this part, bool [N]."""
        there: npt.NDArray[np.bool_] = self.sizes[:, 0] >= 0
        return there

    def take(self, rows: npt.NDArray[np.int64]) -> Column:
        """That of some samples."""
        return Column(self.digests[rows], self.sizes[rows])

    def before(self, other: Column) -> Column:
        """With another behind."""
        digests = np.concatenate([self.digests, other.digests])
        return Column(digests, np.concatenate([self.sizes, other.sizes]))

    @property
    def hexes(self) -> Hexes:
        """The digests in hexadecimal digits."""
        return Hexes(self.digests)

    def __len__(self) -> int:
        return len(self.sizes)

    @overload
    def __getitem__(self, index: int) -> Known | None: ...
    @overload
    def __getitem__(self, index: slice) -> Column: ...
    def __getitem__(self, index: int | slice) -> Known | None | Column:
        if isinstance(index, slice):
            return Column(self.digests[index], self.sizes[index])
        height, width = self.sizes[index].tolist()
        return None if height < 0 else Known(self.digests[index].tobytes().hex(), height, width)

    def __iter__(self) -> Iterator[Known | None]:
        for start in range(0, len(self), AT_ONCE):
            digests = self.digests[start : start + AT_ONCE].tobytes()
            for row, (height, width) in enumerate(self.sizes[start : start + AT_ONCE].tolist()):
                one = digests[32 * row : 32 * row + 32]
                yield None if height < 0 else Known(one.hex(), height, width)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Index:
    """What is known of some samples' pictures, in the samples' order."""

    pictures: Column
    conditions: Column
    masks: Column

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Height and width of each picture, int64 [N, 2]."""
        return self.pictures.sizes.astype(np.int64)

    def only(self, kept: Sequence[int]) -> Index:
        """That of some of the samples."""
        rows = np.array(kept, np.int64)
        return Index(self.pictures.take(rows), self.conditions.take(rows), self.masks.take(rows))

    def before(self, other: Index) -> Index:
        """With others' behind."""
        return Index(
            self.pictures.before(other.pictures),
            self.conditions.before(other.conditions),
            self.masks.before(other.masks),
        )


@dataclass(frozen=True)
class Share:
    """Which part of the work is this process's.

    Attributes:
        rank, processes: this one's number among those that work into the same cache, and how many they are.
        wait: for all processes of the run.
        first: whether it is the first one of its machine, whose disk may be its own.
    """

    rank: int = 0
    processes: int = 1
    wait: Callable[[], None] = lambda: None
    first: bool = True


def shared_out(cache: Path, wait: Callable[[], None]) -> Share:
    """This process's part of what goes into a cache, which some machines may have for themselves.

    Args:
        wait: for all processes.
    """
    number, here = processes.local()
    seen = processes.same_folder(cache, SOON)
    if all(seen):
        return Share(processes.rank(), len(seen), wait, number == 0)
    say(f"data.cache: {cache} is not one folder for all machines: each of them encodes everything for itself")
    return Share(number, here, wait, number == 0)


def look(
    samples: Sequence[Sample], memory: Memory, reading: pictures.Reading, share: Share
) -> tuple[Index, dict[int, str]]:
    """What is known of all samples; files that are not known yet are read, shared out among the processes.

    Returns:
        The index (of a sample that cannot be used it says nothing right), and of those samples the problem.
    """
    looked = _Look(samples, memory, reading)
    left = looked.known(range(len(samples)))
    # Shared out by the row, so that it is the same to each however much of it is known already.
    looked.read([row for row in left if row % share.processes == share.rank])
    share.wait()
    others = [row for row in left if row % share.processes != share.rank]
    looked.read(looked.known(others))  # what others could not use, for its words
    for line in looked.remarks.lines(reading):
        say(line)
    return Index(*(Column(*both) for both in zip(looked.digests, looked.sizes, strict=True))), looked.problems


class _Look:
    """The index, row by row."""

    def __init__(self, samples: Sequence[Sample], memory: Memory, reading: pictures.Reading) -> None:
        self.samples, self.memory, self.reading = samples, memory, reading
        self.digests = np.zeros((3, len(samples), 32), np.uint8)
        self.sizes = np.full((3, len(samples), 2), -1, np.int32)
        self.problems: dict[int, str] = {}
        self.faults: dict[str, str] = {}  # by stamp
        self.remarks = Remarks()

    def known(self, rows: Sequence[int]) -> list[int]:
        """Fill in the rows of which everything is remembered; the others."""
        left = []
        for start in range(0, len(rows), AT_ONCE):
            part = rows[start : start + AT_ONCE]
            found, known = self._remembered(part)
            for row, blobs in zip(part, found, strict=True):
                if all(stamp in known for _, _, stamp in blobs):
                    self._fill(row, blobs, known)
                else:
                    left.append(row)
        return left

    def read(self, rows: Sequence[int]) -> None:
        """Fill in rows, decoding what is not remembered; those that cannot be used go to the problems."""
        for part in _chunks(rows, "reading pictures once"):
            found, known = self._remembered(part)
            fresh: dict[str, Known] = {}
            for blob, stamp in ((blob, stamp) for blobs in found for _, blob, stamp in blobs):
                if stamp is None or stamp in known or stamp in fresh or stamp in self.faults:
                    continue
                try:
                    fresh[stamp] = _about(blob, self.reading)
                except UserError as error:
                    self.faults[stamp] = str(error)
            self.memory.add(fresh)
            for row, blobs in zip(part, found, strict=True):
                self._fill(row, blobs, known | fresh)

    def _remembered(self, rows: Sequence[int]) -> tuple[list[list[_Part]], dict[str, Known]]:
        """The parts of some rows, and what is remembered of them.

        Without pictures that are larger than is allowed now: they are looked at again, and refused.
        """
        parts = [
            [(n, blob, blob.stamp()) for n, blob in enumerate((one.picture, one.condition, one.mask)) if blob]
            for one in take(self.samples, rows)
        ]
        stamps = {stamp: None for blobs in parts for _, _, stamp in blobs if stamp is not None}
        known = self.memory.of(list(stamps))
        limit = self.reading.limit
        return parts, {stamp: one for stamp, one in known.items() if one.height * one.width <= limit}

    def _fill(self, row: int, blobs: Sequence[_Part], known: dict[str, Known]) -> None:
        try:
            found = [known.get(stamp or "") or self._fresh(blob, stamp) for _, blob, stamp in blobs]
            for (_, blob, _), one in zip(blobs[1:], found[1:], strict=True):
                check_fits(blob.name, one.size, found[0].size)
        except UserError as error:
            self.problems[row] = str(error)
            found = [Known("00" * 32, 0, 0)] * len(blobs)
        for (which, blob, _), one in zip(blobs, found, strict=True):
            self.digests[which, row] = np.frombuffer(bytes.fromhex(one.digest), np.uint8)
            self.sizes[which, row] = one.size
            if one.notes:
                self.remarks.add(one.notes.splitlines(), blob.name, which > 0)

    def _fresh(self, blob: Blob, stamp: str | None) -> Known:
        """What is known of bytes that have no stamp, or could not be used."""
        if stamp in self.faults:
            raise UserError(self.faults[stamp])
        return _about(blob, self.reading)


_Part = tuple[int, Blob, str | None]
"""Of a sample: which part it is (picture, condition, mask), its bytes, their stamp."""


class UnreadableError(UserError):
    """More samples cannot be used than may be left out; `problems` tells of each."""

    def __init__(self, problems: Sequence[str], total: int, allowed: int) -> None:
        self.problems = tuple(problems)
        lines = [*problems[:SHOWN]]
        lines += [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        of = (
            f"data.unreadable: {allowed} may be left out"
            if allowed
            else "data.unreadable: N leaves out as many"
        )
        super().__init__("\n".join([*lines, f"{len(problems)} of {total} samples cannot be used; {of}"]))


def sift(problems: dict[int, str], total: int, allowed: int, before: Sequence[str] = ()) -> list[int]:
    """The samples that are left, where so many may be left out.

    Args:
        problems: by the sample's number.
        total: how many samples there are.
        before: what is wrong with others, which are not among them any more.

    Raises:
        UnreadableError: more samples than that cannot be used.
    """
    every = [*before, *(problems[index] for index in sorted(problems))]
    if len(every) > allowed:
        raise UnreadableError(every, total + len(before), allowed)
    if every:
        say(f"{len(every)} of {total + len(before)} samples cannot be used and are left out:")
        for problem in every[:SHOWN]:
            say(f"  {problem}")
    return [index for index in range(total) if index not in problems]


def _about(blob: Blob, reading: pictures.Reading) -> Known:
    data = blob.read()
    found = pictures.decode(data, blob.name, reading)
    height, width = found.picture.shape[:2]
    return Known(hashlib.sha256(data).hexdigest(), height, width, "\n".join(remarks.of(found)))


def _chunks(items: Sequence[Item], description: str) -> Iterable[Sequence[Item]]:
    chunks = [items[start : start + AT_ONCE] for start in range(0, len(items), AT_ONCE)]
    if len(chunks) < 2:
        return chunks
    return track(chunks, len(chunks), f"{description} ({len(items)})", "batches")

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
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from tuner.data import pictures
from tuner.data.blob import Blob
from tuner.data.samples import SHOWN, Sample
from tuner.data.transform import check_fits
from tuner.errors import UserError
from tuner.progress import say, track

AT_ONCE = 512  # pictures remembered in one go
Item = TypeVar("Item")


class Known(NamedTuple):
    """What is remembered of a picture.

    Attributes:
        digest: sha256 of its bytes.
        height, width: in pixels, turned as its EXIF says.
    """

    digest: str
    height: int
    width: int


class Memory:
    """What was found of pictures, by the stamps of where their bytes lie; shared by processes."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.place = folder / "pictures.sqlite"
        with closing(self._open()) as base, base:
            base.execute(
                "create table if not exists decoded "
                "(stamp text primary key, digest text, height integer, width integer)"
            )

    def of(self, stamps: Sequence[str]) -> dict[str, Known]:
        """What is known, for the stamps of which something is."""
        found: dict[str, Known] = {}
        with closing(self._open()) as base:
            for start in range(0, len(stamps), AT_ONCE):
                part = stamps[start : start + AT_ONCE]
                asked = f"select * from decoded where stamp in ({','.join('?' * len(part))})"
                found |= {stamp: Known(*known) for stamp, *known in base.execute(asked, part)}
        return found

    def add(self, found: dict[str, Known]) -> None:
        """Remember."""
        rows = [(stamp, *known) for stamp, known in found.items()]
        with closing(self._open()) as base, base:
            base.executemany("insert or replace into decoded values (?, ?, ?, ?)", rows)

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self.place, timeout=60)


@dataclass(frozen=True)
class Index:
    """What is known of some samples' pictures, in the samples' order."""

    pictures: Sequence[Known]
    conditions: Sequence[Known | None]
    masks: Sequence[Known | None]

    @property
    def sizes(self) -> npt.NDArray[np.int64]:
        """Height and width of each picture, int64 [N, 2]."""
        return np.array([known[1:] for known in self.pictures], np.int64).reshape(-1, 2)

    def only(self, kept: Sequence[int]) -> Index:
        """That of some of the samples."""
        columns = (self.pictures, self.conditions, self.masks)
        first, second, third = ([column[i] for i in kept] for column in columns)
        return Index(first, second, third)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Share:
    """Which part of the work is this process's."""

    rank: int = 0
    processes: int = 1
    wait: Callable[[], None] = lambda: None  # for all processes


def look(
    samples: Sequence[Sample], memory: Memory, reading: pictures.Reading, share: Share
) -> tuple[Index, dict[int, str]]:
    """What is known of all samples; files that are not known yet are read, shared out among the processes.

    Returns:
        The index (of a sample that cannot be used it says nothing right), and of those samples the problem.
    """
    stamped = [[(blob, blob.stamp() or "") for blob in _blobs(sample)] for sample in samples]
    every = {stamp: blob for row in stamped for blob, stamp in row if stamp}
    known = _allowed(memory.of(list(every)), reading)
    # Shared out before it is known what is missing, so that it is the same to each however they hurry.
    mine = list(every.items())[share.rank :: share.processes]
    problems: dict[str, str] = {}
    known |= _read([(stamp, blob) for stamp, blob in mine if stamp not in known], memory, reading, problems)
    share.wait()
    if share.processes > 1:
        known |= _allowed(memory.of([stamp for stamp in every if stamp not in known]), reading)
        left = [(stamp, blob) for stamp, blob in every.items() if stamp not in known | problems]
        known |= _read(left, memory, reading, problems)  # what others could not use, for its words
    return _joined(samples, stamped, known, problems, reading)


def sift(problems: dict[int, str], total: int, allowed: int) -> list[int]:
    """The samples that are left, where so many may be left out.

    Raises:
        UserError: more samples than that cannot be used; the first of them, and how many there are.
    """
    if len(problems) > allowed:
        lines = [problems[index] for index in sorted(problems)[:SHOWN]]
        lines += [f"... and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        of = (
            f"data.unreadable: {allowed} may be left out"
            if allowed
            else "data.unreadable: N leaves out as many"
        )
        raise UserError("\n".join([*lines, f"{len(problems)} of {total} samples cannot be used; {of}"]))
    if problems:
        say(f"{len(problems)} of {total} samples cannot be used and are left out:")
        for index in sorted(problems)[:SHOWN]:
            say(f"  {problems[index]}")
    return [index for index in range(total) if index not in problems]


def _allowed(known: dict[str, Known], reading: pictures.Reading) -> dict[str, Known]:
    """Without pictures that are larger than is allowed now: they are looked at again, and refused."""
    return {stamp: one for stamp, one in known.items() if one.height * one.width <= reading.limit}


def _blobs(sample: Sample) -> Iterator[Blob]:
    for blob in (sample.picture, sample.condition, sample.mask):
        if blob is not None:
            yield blob


def _read(
    wanted: Sequence[tuple[str, Blob]], memory: Memory, reading: pictures.Reading, problems: dict[str, str]
) -> dict[str, Known]:
    """Decode some files; those that cannot be used go to `problems`."""
    found: dict[str, Known] = {}
    for chunk in _chunks(wanted, "reading pictures once"):
        fresh = {}
        for stamp, blob in chunk:
            try:
                fresh[stamp] = _about(blob, reading)
            except UserError as error:
                problems[stamp] = str(error)
        memory.add(fresh)
        found |= fresh
    return found


def _about(blob: Blob, reading: pictures.Reading) -> Known:
    data = blob.read()
    height, width = pictures.decode(data, blob.name, reading).picture.shape[:2]
    return Known(hashlib.sha256(data).hexdigest(), height, width)


def _chunks(items: Sequence[Item], description: str) -> Iterable[Sequence[Item]]:
    chunks = [items[start : start + AT_ONCE] for start in range(0, len(items), AT_ONCE)]
    if len(chunks) < 2:
        return chunks
    return track(chunks, len(chunks), f"{description} ({len(items)})", "batches")


def _joined(
    samples: Sequence[Sample],
    stamped: Sequence[Sequence[tuple[Blob, str]]],
    known: dict[str, Known],
    faults: dict[str, str],
    reading: pictures.Reading,
) -> tuple[Index, dict[int, str]]:
    """Samples with what is known of their parts."""
    nothing = Known("", 0, 0)
    columns: tuple[list[Known | None], ...] = ([], [], [])
    problems: dict[int, str] = {}
    for number, (sample, row) in enumerate(zip(samples, stamped, strict=True)):
        having = [blob is not None for blob in (sample.picture, sample.condition, sample.mask)]
        of: Iterator[Known] = iter([])
        try:
            found = [
                known[stamp] if stamp in known else _fresh(blob, stamp, faults, reading)
                for blob, stamp in row
            ]
            for (blob, _), one in zip(row[1:], found[1:], strict=True):
                check_fits(blob.name, one[1:], found[0][1:])
            of = iter(found)
        except UserError as error:
            problems[number] = str(error)
        for column, has in zip(columns, having, strict=True):
            column.append(next(of, nothing) if has else None)
    first, second, third = columns
    return Index(first, second, third), problems  # type: ignore[arg-type]


def _fresh(blob: Blob, stamp: str, faults: dict[str, str], reading: pictures.Reading) -> Known:
    """What is known of bytes that have no stamp, or could not be used."""
    if stamp in faults:
        raise UserError(faults[stamp])
    return _about(blob, reading)

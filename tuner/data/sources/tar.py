"""Local tars: read once for an index, then any picture is had from its place in the archive."""

from __future__ import annotations

import glob
import itertools
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tuner.data.blob import Blob, Member, file_stamp
from tuner.data.samples import Sample, Say, some
from tuner.data.sources.group import (
    DamagedError,
    Finding,
    Group,
    Made,
    Part,
    StrictInfo,
    is_text,
    is_wanted,
    make,
    refusal,
    split,
)
from tuner.data.sources.kept import Kept
from tuner.data.sources.rows import Builder, Row, RowSamples
from tuner.data.sources.spec import SourceSpec
from tuner.data.sources.stream import Fault, Stream
from tuner.data.sources.urls import expand, groups, sample
from tuner.errors import UserError

LARGEST_TEXT = 2**20
"""Bytes of a caption or record; more is no caption."""


class TarSamples(RowSamples):
    """The samples of tars, archive after archive."""

    def __init__(self, archives: Sequence[tuple[Path, str]], tables: Sequence[pa.Table], *of: Any) -> None:
        super().__init__(pa.concat_tables(tables), *of)
        self.archives = archives
        self._ends = np.cumsum([table.num_rows for table in tables])
        self._at = 0

    def row(self, index: int) -> Row:
        """A row; its last range is followed by the archive's number."""
        row = super().row(index)
        return row._replace(ranges=[*row.ranges, int(np.searchsorted(self._ends, index, side="right"))])

    def rows(self, which: Sequence[int]) -> list[Row]:
        """Rows; their last ranges are followed by the archives' numbers."""
        numbers = np.searchsorted(self._ends, which, side="right").tolist()
        every = zip(super().rows(which), numbers, strict=True)
        return [row._replace(ranges=[*row.ranges, number]) for row, number in every]

    def blob(self, row: Row, which: int) -> Blob | None:
        """A member."""
        name = (row.picture, row.condition, row.mask)[which]
        if name is None:
            return None
        (archive, stamp), inside = self.archives[row.ranges[-1]], os.fsdecode(name)
        return Member(archive, row.ranges[2 * which], row.ranges[2 * which + 1], inside, stamp)


def open_tars(spec: SourceSpec, say: Say, source: int, index: Path | None) -> TarSamples:
    """The samples of the tars that a path or pattern names.

    Args:
        index: folder in which what was found is kept under the archive's stamp; None: not kept.

    Raises:
        UserError: there is no such archive. What is wrong inside is in the samples' problems().
    """
    paths = _paths(spec)
    finding = Finding(spec.condition_from, spec.mask_from)
    archives: list[tuple[Path, str]] = []
    tables, problems, faults, unused = [], [], [], set()
    for path in paths:
        stamp = file_stamp(path)
        assert stamp is not None
        table, about = _indexed(path, stamp, finding, index, say)
        archives.append((path, stamp))
        tables.append(table)
        problems += [f"{path}: {one}" for one in about["problems"]]
        faults += [f"{path}: {one}" for one in about["faults"]]
        unused |= set(about["unused"])
    samples = TarSamples(archives, tables, spec.path, spec.repeats, spec.weight, source)
    if not len(samples) and not problems + faults:
        raise UserError(f"{spec.path}: no samples found in {some([path.name for path in paths])}")
    if unused:
        say(f"{spec.path}: members that are not used: {some(sorted(unused), 8)}")
    samples._problems, samples._faults = problems, faults
    return samples


def open_tar_stream(spec: SourceSpec, say: Say, source: int) -> Stream:
    """The samples of local tars, read in passing: no index is made.

    Raises:
        UserError: there is no such archive. What is wrong inside is told when it passes.
    """
    finding = Finding(spec.condition_from, spec.mask_from)
    return Stream(TarFiles(spec.path, _paths(spec), finding), spec, say, source)


class TarFiles:
    """Local tars, of whose pictures the places are read, and the bytes when they are wanted."""

    def __init__(self, place: str, paths: Sequence[Path], finding: Finding) -> None:
        self.place, self.paths, self.finding = place, paths, finding
        self.masked = finding.mask is not None

    @property
    def count(self) -> int:
        """How many tars there are."""
        return len(self.paths)

    def name(self, shard: int) -> str:
        """Its path."""
        return str(self.paths[shard])

    def read(self, shard: int, skip: int) -> Iterator[Sample | Fault]:
        """The samples of a tar in their order.

        Raises:
            UserError: the archive is gone or damaged.
        """
        path = self.paths[shard]
        stamp = file_stamp(path)

        def hold(made: Made, _: str) -> Sample:
            blobs = [
                None if part is None else Member(path, part.offset, part.size, part.name, stamp or "")
                for part in (made.picture, made.condition, made.mask)
            ]
            assert blobs[0] is not None
            scene = None if made.scene is None else json.loads(made.scene)
            captions, kinds = tuple(made.captions), tuple(made.kinds)
            return Sample(blobs[0], captions, blobs[1], blobs[2], scene, weight=made.weight, kinds=kinds)

        try:
            with tarfile.open(path, "r:", tarinfo=StrictInfo, errorlevel=2) as tar:
                found = groups(tar, str(path), self.finding, whole=False)
                for group in itertools.islice(found, skip, None):
                    yield sample(str(path), group, self.finding, hold)
                if tar.offset > path.stat().st_size:
                    raise UserError(f"{path}: damaged: it ends in the middle of its last member")
        except (DamagedError, tarfile.TarError, OSError) as error:
            raise UserError(f"{path}: {error}{_compressed(path) if path.is_file() else ''}") from error

    def identity(self) -> Iterator[str]:
        """Each file's path as the recipe leads to it, size in bytes and time of change in nanoseconds."""
        for path in self.paths:
            about = path.stat()
            yield f"{path} {about.st_size} {about.st_mtime_ns}"


def _paths(spec: SourceSpec) -> list[Path]:
    patterns = expand(spec.path)
    found = [n for p in patterns for n in (sorted(glob.glob(p)) if glob.has_magic(p) else [p])]
    paths = [Path(name) for name in found]
    if not paths or not all(path.is_file() for path in paths):
        raise UserError(f"{spec.path}: no such archive")
    return paths


def _indexed(
    path: Path, stamp: str, finding: Finding, index: Path | None, say: Say
) -> tuple[pa.Table, dict[str, Any]]:
    """An archive's rows, and in the second its `problems` and `faults`, and the endings that are `unused`."""
    kept = Kept(index, "tar", stamp, *finding)
    if (found := kept.load()) is not None:
        return found
    say(f"{path}: looking for its samples")
    table, about = _read(path, finding)
    return (table, about) if about["faults"] else kept.save(table, about)


def _read(path: Path, finding: Finding) -> tuple[pa.Table, dict[str, Any]]:
    groups: dict[str, Group] = {}
    problems: list[str] = []
    faults: list[str] = []
    unused: set[str] = set()
    try:
        with tarfile.open(path, "r:", tarinfo=StrictInfo, errorlevel=2) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep an object for each
                if problem := refusal(member):
                    faults.append(f"{member.name}: {problem}")
                else:
                    _take(tar, member, groups, unused, finding)
            end = tar.offset
        if end > path.stat().st_size:
            faults.append("damaged: it ends in the middle of its last member")
    except (DamagedError, tarfile.TarError, OSError) as error:
        faults.append(f"{error}{_compressed(path) or '; the archive is damaged: copy it whole'}")
    rows = Builder()
    for group in groups.values():
        made = make(group, finding, problems)
        if made is not None:
            rows.add(_row(made))
    return rows.table(), {"problems": problems, "faults": faults, "unused": sorted(unused)}


def _take(
    tar: tarfile.TarFile,
    member: tarfile.TarInfo,
    groups: dict[str, Group],
    unused: set[str],
    finding: Finding,
) -> None:
    parts = split(member.name) if member.isreg() else None
    if parts is None:
        return
    key, ending = parts
    if not is_wanted(ending, finding):
        unused.add(f"*.{ending}" if ending else member.name)
        return
    data = None
    if is_text(ending):
        if member.size > LARGEST_TEXT:
            groups.setdefault(key, Group(key)).wrong.append(
                f"{member.name}: {member.size} bytes are no caption"
            )
            return
        opened = tar.extractfile(member)
        assert opened is not None
        data = opened.read()
    group = groups.setdefault(key, Group(key))
    if ending in group.parts:
        group.wrong.append(f"{member.name}: it is there twice")
    group.parts[ending] = Part(member.name, member.offset_data, member.size, data)


def _row(made: Made) -> Row:
    parts = (made.picture, made.condition, made.mask)
    names = [None if part is None else os.fsencode(part.name) for part in parts]
    ranges = [number for part in parts for number in ((0, 0) if part is None else (part.offset, part.size))]
    assert names[0] is not None
    return Row(names[0], made.captions, names[1], names[2], made.scene, made.weight, ranges, made.kinds)


def _compressed(path: Path) -> str:
    with open(path, "rb") as file:
        start = file.read(6)
    packed = start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))
    return (
        "; it is compressed: unpack it to a plain .tar (pictures do not get smaller anyway)" if packed else ""
    )

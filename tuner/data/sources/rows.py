"""The index of a source as an Arrow table: paths or places, captions, and what else is known, row by row."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tuner.data.blob import Blob
from tuner.data.samples import Sample, Samples

AT_ONCE = 8192
"""Rows that are Python objects before they become a part of the table."""

SCHEMA = pa.schema(
    [
        ("picture", pa.binary()),  # paths are bytes: a file's name need not be text
        ("captions", pa.list_(pa.string())),
        ("condition", pa.binary()),
        ("mask", pa.binary()),
        ("scene", pa.string()),  # JSON
        ("weight", pa.float64()),
        ("ranges", pa.list_(pa.int64())),  # of picture, condition, mask: first byte, size; empty for files
        ("kinds", pa.list_(pa.string())),  # of each caption; empty: not known
    ]
)


class Row(NamedTuple):
    """A sample as it is held."""

    picture: bytes
    captions: Sequence[str]
    condition: bytes | None = None
    mask: bytes | None = None
    scene: str | None = None
    weight: float = 1.0
    ranges: Sequence[int] = ()
    kinds: Sequence[str] = ()


class Builder:
    """Makes a table of rows that come one by one."""

    def __init__(self) -> None:
        self._rows: list[Row] = []
        self._parts: list[pa.RecordBatch] = []

    def add(self, row: Row) -> None:
        """Add a row."""
        self._rows.append(row)
        if len(self._rows) == AT_ONCE:
            self._flush()

    def table(self) -> pa.Table:
        """All rows."""
        self._flush()
        return pa.Table.from_batches(self._parts, SCHEMA).combine_chunks()

    def _flush(self) -> None:
        if self._rows:
            columns = zip(SCHEMA.types, zip(*self._rows, strict=True), strict=True)
            arrays = [pa.array(values, kind) for kind, values in columns]
            self._parts.append(pa.RecordBatch.from_arrays(arrays, schema=SCHEMA))
            self._rows = []


class RowSamples(Samples):
    """Samples that are rows of a table."""

    def __init__(self, table: pa.Table, place: str, repeats: int, weight: float, source: int) -> None:
        super().__init__(place, table.num_rows, repeats, weight, source)
        self.table = table
        self._columns = [table.column(name) for name in SCHEMA.names]

    def row(self, index: int) -> Row:
        """A row as Python values."""
        return Row(*(column[index].as_py() for column in self._columns))

    @abstractmethod
    def blob(self, row: Row, which: int) -> Blob | None:
        """The picture (0), the condition (1) or the mask (2) of a row."""

    def rows(self, which: Sequence[int]) -> list[Row]:
        """Some rows as Python values."""
        if isinstance(which, range) and which.step == 1:
            part = self.table.slice(which.start, len(which))
        else:
            part = self.table.take(pa.array(which, pa.int64()))
        columns = [part.column(name).to_pylist() for name in SCHEMA.names]
        return [Row(*values) for values in zip(*columns, strict=True)]

    def weights(self) -> npt.NDArray[np.float64]:
        """Each sample's weight with the source's, float64 [N]."""
        own: npt.NDArray[np.float64] = self.table.column("weight").to_numpy()
        return own * self.weight

    def one(self, index: int) -> Sample:
        """The sample of a row."""
        return self._sample(self.row(index))

    def ones(self, rows: Sequence[int]) -> list[Sample]:
        """The samples of some rows."""
        return [self._sample(row) for row in self.rows(rows)]

    def _sample(self, row: Row) -> Sample:
        picture = self.blob(row, 0)
        assert picture is not None
        scene: dict[str, Any] | None = None if row.scene is None else json.loads(row.scene)
        condition = None if row.condition is None else self.blob(row, 1)
        mask = None if row.mask is None else self.blob(row, 2)
        kinds = tuple(row.kinds)
        return Sample(picture, tuple(row.captions), condition, mask, scene, weight=row.weight, kinds=kinds)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_columns"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._columns = [self.table.column(name) for name in SCHEMA.names]


def caption_cell(line: Mapping[str, Any], columns: Mapping[str, str]) -> Any:
    """What a line says of captions, from one column, or by kind from several (see `Columns.captions`)."""
    if columns.keys() == {""}:
        return line.get(columns[""])
    return {kind: line.get(column) for kind, column in columns.items()}


def told_captions(found: Any, wrong: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Captions, and of what kind each is (empty: not known), from a file's cell.

    Args:
        found: a caption, a list of captions, or an object of one or the other by kind.
        wrong: what is wrong is added here.
    """
    if not isinstance(found, dict):
        if problem := caption_problem(found):
            wrong.append(problem)
            return (), ()
        return ((found,) if isinstance(found, str) else tuple(found)), ()
    captions: list[str] = []
    kinds: list[str] = []
    for kind, those in found.items():
        if those is None or those == []:  # a table has every kind in every row
            continue
        if problem := caption_problem(those):
            wrong.append(f"{kind}: {problem}")
            continue
        each = [those] if isinstance(those, str) else those
        captions += each
        kinds += [kind] * len(each)
    if not captions and not wrong:
        wrong.append("expected a caption of some kind, found none")
    return tuple(captions), tuple(kinds)


def caption_problem(found: Any) -> str | None:
    """What is wrong with a caption or a list of captions from a file; None: nothing."""
    if isinstance(found, str) and found.isascii():
        return None  # most are, and there are many
    captions = [found] if isinstance(found, str) else found
    if not isinstance(captions, list) or not captions or not all(isinstance(c, str) for c in captions):
        return f"expected text, a caption or a list of captions (or these by kind), found {found!r}"
    try:
        for caption in captions:
            if not caption.isascii():
                caption.encode()
    except UnicodeEncodeError as error:
        return f"its caption is no valid text: half a character at {error.start}"
    return None


def number_problem(found: Any) -> str | None:
    """What is wrong with a weight; None: nothing."""
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not 0 <= found < float("inf"):
        return f"expected a weight, a number of at least 0, found {found!r}"
    return None

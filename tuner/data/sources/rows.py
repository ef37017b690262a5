"""The index of a source as an Arrow table: paths or places, captions, and what else is known, row by row."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

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
    ]
)


class Row(NamedTuple):
    """A sample as it is held."""

    picture: bytes
    captions: list[str]
    condition: bytes | None = None
    mask: bytes | None = None
    scene: str | None = None
    weight: float = 1.0
    ranges: Sequence[int] = ()


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

    def one(self, index: int) -> Sample:
        """The sample of a row."""
        row = self.row(index)
        picture = self.blob(row, 0)
        assert picture is not None
        scene: dict[str, Any] | None = None if row.scene is None else json.loads(row.scene)
        captions = tuple(row.captions)
        return Sample(picture, captions, self.blob(row, 1), self.blob(row, 2), scene, weight=row.weight)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_columns"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._columns = [self.table.column(name) for name in SCHEMA.names]


def caption_problem(found: Any) -> str | None:
    """What is wrong with a caption or a list of captions from a file; None: nothing."""
    if isinstance(found, str) and found.isascii():
        return None  # most are, and there are many
    captions = [found] if isinstance(found, str) else found
    if not isinstance(captions, list) or not captions or not all(isinstance(c, str) for c in captions):
        return f"expected text, a caption or a list of captions, found {found!r}"
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

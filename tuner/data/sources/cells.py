"""Samples that are rows of a set loaded by `datasets`, memory-mapped from its Arrow files."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from tuner.data.blob import File, Held, file_stamp
from tuner.data.samples import Sample, Samples
from tuner.data.sources.columns import Chosen
from tuner.data.sources.rows import caption_cell, number_problem, told_captions
from tuner.data.sources.spec import SourceSpec
from tuner.errors import UserError

AT_ONCE = 4096
Flags = npt.NDArray[np.bool_]
MEND = "put the pictures into the table, or beside it"


class Cells:
    """A set's columns with pictures.

    Attributes:
        null, apart: by column, bool [N], of each row whether nothing is there, and whether it names a file
            instead of holding bytes.
        name: what messages call the set: `hub:owner/name train`.
        of: names its bytes, as a blob's stamp does; None: unknown.
        homes: the folders that files it names lie in; others are not the set's to name.
    """

    def __init__(self, loaded: Any, chosen: Chosen, name: str, split: str, homes: tuple[str, ...]) -> None:
        self.name, self.homes = name, homes
        self.columns = {column: loaded.select_columns([column]) for column in chosen.pictures}
        self._arrow = {name: column.with_format("arrow") for name, column in self.columns.items()}
        looked = {name: _looked(column, name) for name, column in self._arrow.items()}
        self.null = {name: null for name, (null, _) in looked.items()}
        self.apart = {name: apart for name, (_, apart) in looked.items()}
        files = [file_stamp(Path(one["filename"])) for one in loaded.cache_files]
        # The same files hold train[:9] and train[9:], whose rows are both counted from 0.
        parts_of = [f"{split} {len(loaded)}", *map(str, files)]
        whole = hashlib.sha256("\n".join(parts_of).encode()).hexdigest()
        self.of = f"set {whole}" if files and None not in files else None

    def at(self, column: str, row: int) -> Any:
        """A cell: its bytes, or `bytes` and `path`, or None."""
        return self.columns[column][row][column]

    def path(self, column: str, row: int) -> str | None:
        """The file that a cell names instead of holding bytes; None: it holds them."""
        if not self.apart[column][row]:
            return None
        found: str | None = pc.struct_field(self._arrow[column][row].column(column), "path")[0].as_py()
        return found

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Cells) and (self.name, self.of) == (other.name, other.of)

    def __hash__(self) -> int:
        return hash((self.name, self.of))


@dataclass(frozen=True)
class Cell:
    """A picture in a table."""

    cells: Cells
    column: str
    row: int

    @property
    def name(self) -> str:
        """The set with row and column: `hub:owner/name train[12].image`."""
        return f"{self.cells.name}[{self.row}].{self.column}"

    def read(self) -> bytes:
        """The picture's bytes, from the table or the file that it names.

        Raises:
            UserError: they are not there.
        """
        data, path = parts(self.cells.at(self.column, self.row))
        if data is not None:
            return data
        if path is None:
            raise UserError(f"{self.name}: no picture there")
        if not belongs(path, self.cells.homes):
            raise UserError(f"{self.name}: names {path}, which leaves the folder of the set; {MEND}")
        try:
            return File(Path(path)).read()
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from error

    def stamp(self) -> str | None:
        """The stamps of the set's files with row and column; that of the picture's file where it is one."""
        path = self.cells.path(self.column, self.row)
        if path is not None:  # of a file that is not read nothing is remembered
            return file_stamp(Path(path)) if belongs(path, self.cells.homes) else None
        return None if self.cells.of is None else f"{self.cells.of} {self.column} {self.row}"


def homes(spec: SourceSpec) -> tuple[str, ...]:
    """The folders whose files a set may name: its own, and those that `datasets` downloads to.

    A set that someone else made could else name any picture on this machine, and it would be trained on.
    """
    from datasets import config
    from huggingface_hub import constants

    own = {"saved": [spec.path], "table": [os.path.dirname(re.split(r"[*?{\[]", spec.path)[0]) or "."]}
    downloads = (config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, constants.HF_HUB_CACHE)
    return tuple(os.path.realpath(place) for place in (*own.get(spec.kind, []), *map(str, downloads)))


def belongs(path: str, homes: tuple[str, ...]) -> bool:
    """Whether a file lies in one of the folders, wherever links in its path lead."""
    real = os.path.realpath(path)
    return any(real.startswith(home + os.sep) for home in homes)


class SetSamples(Samples):
    """The rows of a set."""

    def __init__(self, loaded: Any, chosen: Chosen, name: str, spec: SourceSpec, source: int) -> None:
        super().__init__(spec.path, len(loaded), spec.repeats, spec.weight, source)
        self.chosen = chosen
        self.cells = Cells(loaded, chosen, name, spec.split or "train", homes(spec))
        others = [column for column in chosen.used if column not in chosen.pictures]
        self.texts = loaded.select_columns(others)
        bad = self._check()
        self.rows = None if not bad else np.setdiff1d(np.arange(len(loaded)), np.array(sorted(bad)))
        if self.rows is not None:
            self.repeats = self.repeats[self.rows]

    def one(self, index: int) -> Sample:
        """The sample of a row."""
        return self.ones([index])[0]

    def ones(self, rows: Sequence[int]) -> list[Sample]:
        """The samples of some rows."""
        of = np.asarray(rows, np.int64) if self.rows is None else self.rows[np.asarray(rows, np.int64)]
        return [self._sample(row, about) for row, about in zip(of.tolist(), self._said(of), strict=True)]

    def weights(self) -> npt.NDArray[np.float64]:
        """Each sample's weight with the source's, float64 [N]."""
        if "weight" not in self.chosen.names:
            return np.full(len(self), self.weight)
        return super().weights()

    def _sample(self, row: int, said: dict[str, Any]) -> Sample:
        wrong: list[str] = []
        captions, kinds, scene, weight = known(said, self.chosen, wrong)
        assert not wrong, "such rows are no samples"
        picture, *others = (self._cell(key, row) for key in ("picture", "condition", "mask"))
        assert picture is not None
        return Sample(picture, captions, others[0], others[1], scene, weight=weight, kinds=kinds)

    def _cell(self, key: str, row: int) -> Cell | None:
        column = self.chosen.names.get(key)
        return None if column is None or self.cells.null[column][row] else Cell(self.cells, column, row)

    def _said(self, rows: npt.NDArray[np.int64]) -> list[dict[str, Any]]:
        """What some rows of the set say besides their pictures."""
        if not len(rows):
            return []
        first, after = int(rows[0]), int(rows[0]) + len(rows)
        side_by_side = bool((rows == np.arange(first, after)).all())
        found = self.texts[first:after] if side_by_side else self.texts[rows.tolist()]
        return [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]

    def _check(self) -> set[int]:
        """The rows that are no samples; what is wrong with them is put into the problems."""
        picture, said = self.chosen.names["picture"], list(self.chosen.captions.values())
        bad: dict[int, str] = {}
        texts = self.texts.with_format("arrow")
        for start in range(0, len(self.texts), AT_ONCE):
            rows = np.arange(start, min(start + AT_ONCE, len(self.texts)))
            for row, about in zip(rows.tolist(), self._said(rows), strict=True):
                wrong: list[str] = []
                known(about, self.chosen, wrong)
                if wrong:
                    bad[row] = "; ".join(wrong)
            part = texts[start : start + AT_ONCE]
            for row in set.intersection(*(set(_unsaid(part.column(column))) for column in said)):
                bad[start + row] = f"no caption in column {' or '.join(said)}"
        for row in np.flatnonzero(self.cells.null[picture]).tolist():
            bad[row] = f"no picture in column {picture}"
        self._problems = [f"{self.cells.name}[{row}]: {what}" for row, what in sorted(bad.items())]
        return set(bad)


def parts(cell: Any) -> tuple[bytes | None, str | None]:
    """Bytes and path of a picture's cell."""
    if isinstance(cell, dict):
        return cell.get("bytes"), cell.get("path")
    return cell, None


class Known(NamedTuple):
    """What a row says besides its pictures."""

    captions: tuple[str, ...]
    kinds: tuple[str, ...]
    scene: dict[str, Any] | None
    weight: float


def known(row: dict[str, Any], chosen: Chosen, wrong: list[str]) -> Known:
    """Captions, scene and weight of a row; what is wrong with it is added to `wrong`."""
    names = chosen.names
    found, weight = caption_cell(row, chosen.captions), row.get(names.get("weight", ""))
    if chosen.labels and isinstance(found, int):
        found = chosen.labels[found]
    weight = 1.0 if weight is None else weight
    captions, kinds = told_captions(found, wrong)
    wrong += [one for one in (number_problem(weight),) if one]
    scene = row.get(names.get("scene", ""))
    if isinstance(scene, str):
        try:
            scene = json.loads(scene)
        except json.JSONDecodeError as error:
            wrong.append(f"column {names['scene']} is no JSON: {error.msg}")
    if scene is not None and not isinstance(scene, dict):
        wrong.append(f"expected a record in column {names['scene']}")
    if wrong:
        return Known((), (), None, 0.0)
    assert scene is None or isinstance(scene, dict)
    return Known(captions, kinds, scene, float(weight))


def held(row: dict[str, Any], chosen: Chosen, name: str, fetch: Any, wrong: list[str]) -> Sample | None:
    """A row of a stream as a sample whose bytes are in memory; None where something is wrong.

    Args:
        fetch: gives the bytes behind a path or an address.
    """
    about = known(row, chosen, wrong)
    blobs: list[Held | None] = []
    for key in ("picture", "condition", "mask"):
        data, path = parts(row.get(chosen.names.get(key, "")))
        if data is None and path is not None:
            data = fetch(path)
        blobs.append(None if data is None else Held(f"{name}.{chosen.names[key]}", data))
    if blobs[0] is None:
        wrong.append(f"no picture in column {chosen.names['picture']}")
    if wrong or blobs[0] is None:
        return None
    return Sample(
        blobs[0], about.captions, blobs[1], blobs[2], about.scene, weight=about.weight, kinds=about.kinds
    )


def _looked(cells: Any, name: str) -> tuple[Flags, Flags]:
    """Of each cell whether nothing is there (null, or a record with neither bytes nor a path), and whether
    it names a file instead of holding bytes; of the bytes none are read."""
    null, apart = np.zeros(len(cells), bool), np.zeros(len(cells), bool)
    for start in range(0, len(cells), AT_ONCE):
        column = cells[start : start + AT_ONCE].column(name)
        part = slice(start, start + AT_ONCE)
        null[part] = pc.is_null(column).to_numpy()
        if not pa.types.is_struct(column.type):
            continue
        lacks = {key: np.ones(len(column), bool) for key in ("bytes", "path")}
        for key in lacks:
            if column.type.get_field_index(key) >= 0:
                lacks[key] = pc.is_null(pc.struct_field(column, key)).to_numpy()
        null[part] |= lacks["bytes"] & lacks["path"]
        apart[part] = lacks["bytes"] & ~null[part]
    return null, apart


def _unsaid(column: pa.ChunkedArray) -> list[int]:
    """Rows without a caption: null, an empty list, or these for every kind."""
    if pa.types.is_struct(column.type) and column.type.num_fields:
        kinds = (pc.struct_field(column, kind.name) for kind in column.type)
        return sorted(set.intersection(*(set(_unsaid(one)) for one in kinds)))
    missing = pc.is_null(column)
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        missing = pc.or_kleene(missing, pc.equal(pc.list_value_length(column), 0))
    return np.flatnonzero(missing.to_numpy()).tolist()

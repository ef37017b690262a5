"""Folders whose pictures are listed in metadata.jsonl or metadata.csv, one in any folder of the tree."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tuner.data.samples import some
from tuner.data.sources.names import missing_column
from tuner.data.sources.pairs import Pairs
from tuner.data.sources.rows import Builder, Row, caption_cell, number_problem, told_captions
from tuner.data.sources.sidecars import paired
from tuner.data.sources.spec import Columns
from tuner.data.sources.tree import Tree
from tuner.errors import UserError

CAPTION = "text"
DEFAULTS = {
    "picture": "file_name",
    "condition": "conditioning_image",
    "mask": "mask",
    "weight": "weight",
    "scene": "scene",
}


@dataclass
class Reader:
    """Turns the lines of listings into rows.

    Attributes:
        pairs: where condition and mask are found, if the recipe says that they are not listed.
        problems: what is wrong is added here; such lines have no row.
    """

    folder: Path
    tree: Tree
    pairs: list[Pairs | None]
    columns: Columns
    problems: list[str]
    rows: Builder = field(default_factory=Builder)
    listed: set[str] = field(default_factory=set)
    fields: set[str] = field(default_factory=set)
    elsewhere: bool = False  # a listed file is no picture of the tree: it is hidden, or has another ending

    def __post_init__(self) -> None:
        given = self.columns
        self.captions = given.captions(CAPTION)
        self.names = {key: getattr(given, key) or usual for key, usual in DEFAULTS.items()}
        self._pictures = set(self.tree.pictures)

    def read(self) -> list[str]:
        """Read all listings of the tree; what is worth telling."""
        for listing in self.tree.listings:
            if (other := listing.removesuffix(".csv") + ".jsonl") != listing and other in self.tree.listings:
                raise UserError(f"{self.folder / listing}: {other} lies beside it; keep one")
            self._file(listing)
        self._columns_there()
        place = " and ".join(self.tree.listings) if len(self.tree.listings) == 1 else "any listing"
        left = [name for name in self.tree.pictures if name not in self.listed]
        self.problems += [
            f"{self.folder / name}: not listed in {place}; list it or move it away" for name in left
        ]
        unused = sorted(self.fields - set(self.names.values()) - set(self.captions.values()))
        return [f"fields of the listing that are not used: {some(unused, 8)}"] if unused else []

    def _columns_there(self) -> None:
        """Names that the recipe gives must be somewhere."""
        for key in self.columns.model_fields_set:
            names = self.captions.values() if key == "caption" else [self.names[key]]
            for name in names if self.fields and getattr(self.columns, key) else ():
                if name not in self.fields:
                    where = f"{self.folder / self.tree.listings[0]}"
                    raise UserError(f"{where}: {missing_column(key, name, sorted(self.fields))}")

    def _file(self, listing: str) -> None:
        path, before = self.folder / listing, listing.rpartition("/")[0]
        faulty: list[str] = []
        for where, line in lines(path, self.problems, self.names["picture"], faulty):
            if not isinstance(line, dict) or not isinstance(line.get(self.names["picture"]), str):
                self.fields.update(line if isinstance(line, dict) else ())
                self.problems.append(f"{where}: expected an object with a {self.names['picture']}")
                continue
            self.fields.update(line)
            wrong: list[str] = []
            row = self._row(line, f"{before}/" if before else "", wrong)
            if wrong:
                self.problems.append(f"{where}: {'; '.join(wrong)}")
            else:
                self.rows.add(row)
        # Their lines are told already.
        self.listed.update(os.path.normpath(os.path.join(before, name)) for name in faulty)

    def _row(self, line: dict[str, Any], before: str, wrong: list[str]) -> Row:
        shown = line[self.names["picture"]]
        picture = self._place(shown, before, "", wrong)
        if wrong:
            return Row(b"", [])
        told: list[str] = []
        captions, kinds = told_captions(caption_cell(line, self.captions), told)
        given = [line.get(self.names[key]) for key in ("condition", "mask")]
        others = paired(self.pairs, picture, told)
        for i, (key, value) in enumerate(zip(("condition", "mask"), given, strict=True)):
            if value is not None and self.pairs[i] is not None:
                told.append(f"{self.names[key]} is listed, and {key}_from given too; expected one of them")
            elif value is not None:
                others[i] = os.fsencode(self._place(str(value), before, f"{self.names[key]} ", told))
        weight, scene = line.get(self.names["weight"], 1.0), line.get(self.names["scene"])
        if problem := number_problem(weight):
            told.append(problem)
        wrong += [f"{shown}: {one}" for one in told]
        if wrong:
            return Row(b"", [])
        record = None if scene is None else json.dumps(scene)
        return Row(os.fsencode(picture), captions, others[0], others[1], record, float(weight), (), kinds)

    def _place(self, name: str, before: str, what: str, wrong: list[str]) -> str:
        """The name of a listed picture relative to the source's folder; it counts as listed."""
        path = before + name
        if path not in self._pictures:
            path = os.path.normpath(os.path.join(before, name))
            if os.path.isabs(path) or path.split(os.sep)[0] == "..":
                there = "" if not what else ": no such picture in the folder"
                wrong.append(f"{what}{name} leaves the folder" if not what else f"{what}{name}{there}")
                return ""
            self.elsewhere |= path not in self._pictures
            if path not in self._pictures and not (self.folder / path).is_file():
                wrong.append(f"{what}{name}: no such picture" + (" in the folder" if what else ""))
                return ""
        self.listed.add(path)
        return path


def lines(
    path: Path, problems: list[str], picture: str = DEFAULTS["picture"], faulty: list[str] | None = None
) -> Iterator[tuple[str, Any]]:
    """Each line of a listing, .jsonl or .csv: where it is, and what it says; other lines become problems.

    Args:
        picture: the field with a picture's name.
        faulty: the pictures that other lines name are added here, as far as that can be seen.

    Raises:
        UserError: the file is no UTF-8 text, or no CSV.
    """
    named = [] if faulty is None else faulty
    read = _csv if path.suffix == ".csv" else _jsonl
    return read(path, problems, picture, named)


def _jsonl(path: Path, problems: list[str], picture: str, faulty: list[str]) -> Iterator[tuple[str, Any]]:
    named = re.compile(re.escape(json.dumps(picture)) + r'\s*:\s*("(?:[^"\\]|\\.)*")')
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            text = _decoded(path, number, raw)
            if not text.strip():
                continue
            try:
                yield f"{path}:{number}", json.loads(text)
            except json.JSONDecodeError as error:
                problems.append(f"{path}:{number}: not JSON: {error.msg}")
                with suppress(json.JSONDecodeError):
                    faulty += [json.loads(name) for name in named.findall(text)]


def _csv(path: Path, problems: list[str], picture: str, faulty: list[str]) -> Iterator[tuple[str, Any]]:
    """Empty cells are as if they were not there; weights are numbers, scenes JSON."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for cells in reader:
                where = f"{path}:{reader.line_num}"
                if None in cells or None in cells.values():
                    problems.append(f"{where}: found another number of cells than the first line has columns")
                    faulty += [cells[picture]] if cells.get(picture) else []
                    continue
                line: dict[str, Any] = {key: cell for key, cell in cells.items() if cell != ""}
                try:
                    line |= {key: json.loads(line[key]) for key in ("weight", "scene") if key in line}
                except json.JSONDecodeError as error:
                    problems.append(f"{where}: weight or scene is no JSON: {error.msg}")
                    faulty += [cells[picture]] if cells.get(picture) else []
                    continue
                yield where, line
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text: {error}; save it as UTF-8") from error
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num}: not CSV: {error}") from error


def _decoded(path: Path, number: int, raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text: line {number}: {error}; save it as UTF-8") from error

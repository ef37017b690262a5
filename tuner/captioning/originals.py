"""The pictures of a folder with the captions that they have already; those without one are found too."""

from __future__ import annotations

import os
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tuner.data.blob import File
from tuner.data.samples import some
from tuner.data.sources.listing import DEFAULTS, lines
from tuner.data.sources.pairs import Pairs, pair
from tuner.data.sources.rows import told_captions
from tuner.data.sources.tree import Tree, scan, stem_of
from tuner.errors import UserError

KIND = "original"
"""The kind of a caption that has none yet."""

LISTING = "metadata.jsonl"


class Said(NamedTuple):
    """A caption of a picture, its kind, and what the shapes world's record says that it names."""

    kind: str
    text: str
    record: dict[str, Any] | None = None


@dataclass
class Found:
    """A picture.

    Attributes:
        name: relative to the folder.
        said: the captions that are there; may be none.
        line: all that a listing says of it; None: it is not listed.
        listing: where its line is written, relative to the folder.
        others: its condition and mask, relative to the folder.
    """

    name: str
    said: list[Said] = field(default_factory=list)
    line: dict[str, Any] | None = None
    listing: str = LISTING
    others: list[str] = field(default_factory=list)


@dataclass
class Finder:
    """Finds them.

    Attributes:
        column: the field of listings with the captions.
        faults: for pictures that cannot be used, why.
        problems: lines of listings that cannot be used.
        told: lines for the user.
    """

    folder: Path
    column: str = "text"
    condition_from: str | None = None
    mask_from: str | None = None
    faults: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)

    def find(self) -> list[Found]:
        """All pictures, in the order of their names.

        Raises:
            UserError: the folder is not there or has no pictures; a listing is no text; nothing is where
                condition or mask are looked for.
        """
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: no such folder")
        tree = scan(self.folder)
        pairs = [self._pair("condition", self.condition_from, tree), self._pair("mask", self.mask_from, tree)]
        found = {name: Found(name) for name in tree.pictures}
        if not found:
            raise UserError(f"{self.folder}: no pictures found")
        if tree.listings:
            self._listed(tree, found)
        else:
            for one in found.values():
                self._beside(one, tree)
        for one in found.values():
            self._belonging(one, pairs)
        empty = sum(not said.text.strip() for one in found.values() for said in one.said)
        if empty:
            self.told.append(f"{empty} captions are empty, and taken as none")
        for one in found.values():
            one.said = [said for said in one.said if said.text.strip()]
        return [one for one in found.values() if one.name not in self.faults]

    def _pair(self, what: str, place: str | None, tree: Tree) -> Pairs | None:
        if place is not None and os.path.normpath(place).startswith(".."):
            raise UserError(
                f"--{what}-from {place}: expected a folder in {self.folder} or an absolute path, "
                "which lead to the same from --out"
            )
        return pair(what, place, self.folder, tree)

    def _belonging(self, one: Found, pairs: list[Pairs | None]) -> None:
        try:
            own = [each.of(one.name) for each in pairs if each is not None]
        except LookupError as error:
            self.faults[one.name] = str(error)
            return
        one.others += [name for name in own if not os.path.isabs(name)]

    def _beside(self, one: Found, tree: Tree) -> None:
        files = tree.captions.get(stem_of(one.name), ())
        if len(files) > 1:
            self.faults[one.name] = f"several captions: {' and '.join(sorted(files))}; keep one"
        for file in files[:1]:
            try:
                text = File(self.folder / file).read().removeprefix(BOM_UTF8).decode()
            except UnicodeDecodeError as error:
                self.faults[one.name] = f"its caption {file}: not UTF-8 text: {error}"
            except UserError as error:
                self.faults[one.name] = str(error)
            else:
                one.said.append(Said(KIND, text.strip().replace("\r\n", "\n")))

    def _listed(self, tree: Tree, found: dict[str, Found]) -> None:
        """Gives the pictures what the listings say; takes those away that are conditions or masks."""
        times: Counter[str] = Counter()
        belonging: set[str] = set()
        fields: set[str] = set()
        for listing, where, line in self._lines(tree):
            before = os.path.dirname(listing)
            name = self._place(line[DEFAULTS["picture"]], before, where)
            if name is None:
                continue
            fields.update(line)
            times[name] += 1
            one = found.setdefault(name, Found(name))
            if one.line is None:
                one.line, one.listing = line, os.path.join(before, LISTING)
            told: list[str] = []
            one.said += self._said(line, told)
            for key in (DEFAULTS["condition"], DEFAULTS["mask"]):
                if line.get(key) is not None and (other := self._place(line[key], before, where)):
                    one.others.append(other)
            belonging.update(one.others)
            if told:
                self.faults[name] = "; ".join(told)
        for name in belonging - times.keys():
            found.pop(name, None)
        self._tell_listed(tree, found, times, fields)

    def _tell_listed(
        self, tree: Tree, found: dict[str, Found], times: Counter[str], fields: set[str]
    ) -> None:
        if self.column not in fields:
            there = f"; there are: {', '.join(sorted(fields))}" if fields else ""
            self.told.append(f"no captions in the field {self.column} of {some(tree.listings)}{there}")
        if left := [name for name in found if name not in times]:
            self.told.append(f"{len(left)} pictures are in no listing: {some(left)}")
        if again := [name for name, number in times.items() if number > 1]:
            self.told.append(
                f"{len(again)} pictures are listed several times ({some(again)}): their captions are put "
                "together, what else is said is taken from the first line"
            )
        if tree.captions:
            self.told.append(f"not read beside {some(tree.listings)}: .txt and .caption files")

    def _lines(self, tree: Tree) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Listing, place and content of each line that names a picture."""
        for listing in tree.listings:
            if (other := listing.removesuffix(".csv") + ".jsonl") != listing and other in tree.listings:
                raise UserError(f"{self.folder / listing}: {other} lies beside it; keep one")
            for where, line in lines(self.folder / listing, self.problems):
                if isinstance(line, dict) and isinstance(line.get(DEFAULTS["picture"]), str):
                    yield listing, where, line
                else:
                    self.problems.append(f"{where}: expected an object with a {DEFAULTS['picture']}")

    def _place(self, name: Any, before: str, where: str) -> str | None:
        """A listed file relative to the folder; None where it is not in there."""
        path = os.path.normpath(os.path.join(before, str(name)))
        if os.path.isabs(path) or path.split(os.sep)[0] == "..":
            self.problems.append(f"{where}: {name} leaves the folder")
        elif not (self.folder / path).is_file():
            self.problems.append(f"{where}: {name}: no such picture")
        else:
            return path
        return None

    def _said(self, line: dict[str, Any], wrong: list[str]) -> list[Said]:
        cell = line.get(self.column)
        if cell is None or cell == [] or cell == {}:
            return []
        texts, kinds = told_captions(cell, wrong)
        scene = line.get(DEFAULTS["scene"])
        records = scene.get("captions", []) if isinstance(scene, dict) else []
        if not isinstance(records, list) or len(records) != len(texts):
            return [Said(kind, text) for kind, text in zip(kinds or [KIND] * len(texts), texts, strict=True)]
        forms = kinds or [str(record.get("form", KIND)) for record in records]
        return [Said(*each) for each in zip(forms, texts, records, strict=True)]

"""Condition and mask pictures of a folder: in one of the same names, or with something behind the name."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path

from tuner.data.samples import some
from tuner.data.sources.tree import Tree, scan, stem_of
from tuner.errors import UserError, few


class Pairs:
    """Which picture belongs to which, of one kind (condition or mask)."""

    def __init__(self, what: str, place: str, found: dict[str, list[str]]) -> None:
        """
        Args:
            what: `condition` or `mask`.
            place: the recipe's value: `edges/` or `_canny`.
            found: for a picture's name without ending, the names of what belongs to it.
        """
        self.what, self.place, self.found = what, place, found
        self._used: set[str] = set()

    def of(self, picture: str) -> str:
        """What belongs to a picture, relative to the source's folder.

        Raises:
            LookupError: with what is wrong: nothing is there, or several are.
        """
        stem = stem_of(picture)
        names = self.found.get(stem, ())
        if not names:
            expected = f"{self.place}{stem}.*" if self.place.endswith("/") else f"{stem}{self.place}.*"
            raise LookupError(f"no {self.what} picture; expected {expected}")
        if len(names) > 1:
            raise LookupError(f"several {self.what} pictures: {', '.join(names)}; keep one")
        self._used.add(stem)
        return names[0]

    def left(self) -> str:
        """What belongs to no picture, in words; empty where there is nothing."""
        rest = [names[0] for stem, names in self.found.items() if stem not in self._used]
        return f"{len(rest)} {self.what} pictures belong to no picture: {some(sorted(rest))}" if rest else ""


def pair(what: str, place: str | None, folder: Path, tree: Tree) -> Pairs | None:
    """What `condition_from` or `mask_from` finds; these pictures are taken out of the tree's.

    Raises:
        UserError: there is nothing like that.
    """
    if place is None:
        return None
    if place.endswith("/"):
        found = _below(what, place, folder, tree)
    elif (folder / place).is_dir():
        raise UserError(f"{what}_from: {place} is a folder in {folder}; write {place}/ for it")
    else:
        found = _behind(what, place, folder, tree)
    return Pairs(what, place, found)


def _below(what: str, place: str, folder: Path, tree: Tree) -> dict[str, list[str]]:
    prefix = os.path.normpath(place) + "/"
    there = folder / place
    if not there.is_dir():
        near = sorted(entry.name + "/" for entry in folder.iterdir() if entry.is_dir())
        hint = f"; there are: {few(place, near)}" if near else ""
        raise UserError(f"{what}_from: {there}: no such folder{hint}")
    if os.path.isabs(place) or prefix.startswith("../"):
        return _by_stem(scan(there).pictures, lambda name: name, lambda name: place + name)
    mine = [name for name in tree.pictures if name.startswith(prefix)]
    _take(mine, tree)
    return _by_stem(mine, lambda name: name.removeprefix(prefix), lambda name: name)


def _behind(what: str, suffix: str, folder: Path, tree: Tree) -> dict[str, list[str]]:
    mine = [name for name in tree.pictures if stem_of(name).endswith(suffix)]
    if not mine:
        raise UserError(
            f"{what}_from: {folder}: no picture whose name ends in {suffix}, such as a{suffix}.png"
        )
    _take(mine, tree)
    return _by_stem(mine, lambda name: stem_of(name).removesuffix(suffix) + ".", lambda name: name)


def _by_stem(
    names: Collection[str], belongs: Callable[[str], str], path: Callable[[str], str]
) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(stem_of(belongs(name)), []).append(path(name))
    return found


def _take(names: Collection[str], tree: Tree) -> None:
    gone = set(names)
    tree.pictures = [name for name in tree.pictures if name not in gone]

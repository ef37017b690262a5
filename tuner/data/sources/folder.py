"""Folders of pictures: with a listing, with captions beside, or with captions for names."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tuner.data.blob import Blob, Listed
from tuner.data.samples import Say, some
from tuner.data.sources import sidecars
from tuner.data.sources.kept import Kept, digest, same, stamps
from tuner.data.sources.listing import Reader
from tuner.data.sources.pairs import pair
from tuner.data.sources.rows import Row, RowSamples
from tuner.data.sources.spec import SourceSpec
from tuner.data.sources.tree import PICTURES, Tree, scan
from tuner.errors import UserError, few

TIMES = re.compile(r"(\d+)_.+")
MANY = 300
"""Repeats that a folder's name may mean without `folder_repeats: true`: 2024_photos is a year."""


class FolderSamples(RowSamples):
    """The pictures of a folder."""

    def __init__(self, folder: Path, *of: Any) -> None:
        super().__init__(*of)
        self.before = "" if folder == Path() else f"{folder}/"

    def blob(self, row: Row, which: int) -> Blob | None:
        """A picture's file."""
        name = (row.picture, row.condition, row.mask)[which]
        if name is None:
            return None
        text = os.fsdecode(name)
        return Listed(text if text.startswith("/") else self.before + text)


def open_folder(spec: SourceSpec, say: Say, source: int, index: Path | None = None) -> FolderSamples:
    """The samples of a folder, in the order of the listing or of their names.

    A folder of datasets/ that has not been made yet is made first by the prepare.py beside it.

    Args:
        index: folder in which the samples are kept; they are used again when no listing, no caption and no
            folder (its names, not the pictures' content) has changed. None: not kept.

    Raises:
        UserError: the folder is missing or has no pictures; a folder, listing or column that the recipe
            names is not there. What is wrong with single pictures is in the samples' problems().
    """
    folder = Path(spec.path)
    if not folder.is_dir():
        prepare(folder, say)
    ways = (spec.captions_from, spec.condition_from, spec.mask_from, spec.folder_repeats)
    kept = Kept(index, "folder", str(folder.absolute()), spec.columns.resolved(), *ways)
    found = kept.load()
    faults: list[str] = []
    if found is None or not _holds(folder, found[1]):
        start, problems = time.time(), list[str]()
        table, tree, told, captions = _read(spec, folder, problems)
        times = _times(spec, folder, tree, faults, told)
        said = [line for line in (*told, tree.ignored()) if line]
        about: dict[str, Any] = {"told": said, "times": times, "problems": problems}
        looked = [Path(name) for name in tree.folders] + [folder / name for name in tree.listings]
        found = (table, about)
        if captions is not None and not faults and not tree.unsettled:
            about |= {"stamps": stamps(looked, start), "captions": captions}
            about["digest"] = digest(str(folder), captions, start)
            if about["stamps"] is not None and about["digest"] is not None:
                found = kept.save(table, about)
    table, about = found
    for line in about["told"]:
        say(f"{folder}: {line}")
    samples = FolderSamples(folder, table, spec.path, spec.repeats, spec.weight, source)
    if about["times"]:
        by_name = {os.fsencode(top): number for top, number in about["times"].items()}
        tops = (name.partition(b"/")[0] for name in table.column("picture").to_pylist())
        samples.repeats *= np.array([by_name.get(top, 1) for top in tops], np.int32)
    samples._problems, samples._faults = about["problems"], faults
    return samples


def _holds(folder: Path, about: dict[str, Any]) -> bool:
    """Whether no folder, listing or caption has changed since an index was made."""
    return same(about["stamps"]) and digest(str(folder), about["captions"]) == about["digest"]


def _by_listing(spec: SourceSpec, tree: Tree) -> bool:
    return bool(tree.listings) and spec.captions_from in (None, "listing")


def _read(
    spec: SourceSpec, folder: Path, problems: list[str]
) -> tuple[pa.Table, Tree, list[str], list[str] | None]:
    """The rows of a folder, what lies in it, what is worth telling, and the files beside the listings that
    decide what the rows are; None where there may be others."""
    tree = scan(folder)
    problems += [
        f"{folder / name}: a link that leads nowhere; mend it or take it away" for name in tree.broken
    ]
    pairs = [
        pair("condition", spec.condition_from, folder, tree),
        pair("mask", spec.mask_from, folder, tree),
    ]
    if spec.captions_from == "listing" and not tree.listings:
        raise UserError(f"{folder}: captions_from is listing, but there is no metadata.jsonl or metadata.csv")
    if _by_listing(spec, tree):
        reader = Reader(folder, tree, pairs, spec.columns, problems)
        told = reader.read()
        table = reader.rows.table()
        captions = None if reader.elsewhere else list[str]()
    else:
        _columns_unused(spec, folder)
        beside = spec.captions_from != "name"
        table = sidecars.read(folder, tree, pairs, beside, problems).table()
        captions = [name for names in tree.captions.values() for name in names] if beside else []
        told = [sidecars.orphans(tree)] if beside else []
        told += [f"not read: {some(tree.listings)}"] if tree.listings else []
    if not tree.pictures and not problems:
        count = sum(map(len, tree.captions.values()))
        alone = f"; {count} captions are there without a picture" if count else ""
        raise UserError(
            f"{folder}: no pictures found (looked for {', '.join(sorted(PICTURES))}){alone}{_hint(tree)}"
        )
    told += [one.left() for one in pairs if one is not None]
    return table, tree, told, captions if pairs == [None, None] else None


def prepare(folder: Path, say: Say) -> None:
    """Run the prepare.py beside a missing folder, or say that there is none."""
    if folder.is_file():
        raise UserError(
            f"{folder}: is a file; expected a folder, an archive or a table (*.tar, *.parquet, *.arrow)"
        )
    script = folder.parent / "prepare.py"
    if not script.is_file():
        near = sorted(p.name for p in folder.parent.iterdir() if p.is_dir()) if folder.parent.is_dir() else []
        hint = f"; beside it there are: {few(folder.name, near)}" if near else ""
        raise UserError(f"{folder}: no such folder, and no prepare.py beside it that would make it{hint}")
    say(f"{folder} is not there yet: running {script} {folder.name}")
    done = subprocess.run([sys.executable, str(script), folder.name], check=False)
    if done.returncode or not folder.is_dir():
        raise UserError(f"{script} {folder.name} did not make {folder} (exit code {done.returncode})")


def _columns_unused(spec: SourceSpec, folder: Path) -> None:
    given = [key for key in spec.columns.model_fields_set if getattr(spec.columns, key) is not None]
    if given:
        raise UserError(
            f"columns.{given[0]}: has no effect: {folder} has no metadata.jsonl or metadata.csv with columns"
        )


def _hint(tree: Tree) -> str:
    """What the folder may be instead."""
    for ending, advice in ((".parquet", "*.parquet"), (".arrow", "*.arrow"), (".tar", "*.tar")):
        if any(name.endswith(ending) for name in tree.others):
            return f"; for its {ending} files name them: {advice}"
    return f"; {tree.ignored()}" if tree.ignored() else ""


def _times(spec: SourceSpec, folder: Path, tree: Tree, faults: list[str], told: list[str]) -> dict[str, int]:
    """How often the pictures in subfolders come by kohya's rule; told, and faults where it cannot be."""
    if spec.folder_repeats is False:
        return {}
    times = {}
    for top in sorted({name.partition("/")[0] for name in tree.pictures if "/" in name}):
        if found := TIMES.fullmatch(top):
            times[top] = int(found[1])
    for top, number in times.items():
        if not number:
            faults.append(f"{folder / top}: its name means 0 repeats, so it would never come; rename it")
        elif number > MANY and spec.folder_repeats is None:
            faults.append(
                f"{folder / top}: its name means {number} repeats of each picture in an epoch; "
                "set folder_repeats: true if that is wanted, false if it is no number of repeats"
            )
    if times:
        shown = some([f"{top} {number} times" for top, number in times.items()], 8)
        told.append(f"repeats from folders' names: {shown}")
    elif outer := TIMES.fullmatch(folder.resolve().name):
        told.append(f"only subfolders' names set repeats; for this one write repeats: {outer[1]}")
    return times

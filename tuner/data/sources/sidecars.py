"""Captions beside the pictures (.txt, .caption), or in their names."""

from __future__ import annotations

import os
from codecs import BOM_UTF8
from pathlib import Path

from tuner.data.samples import some
from tuner.data.sources.pairs import Pairs
from tuner.data.sources.rows import Builder, Row
from tuner.data.sources.tree import Tree, stem_of


def read(folder: Path, tree: Tree, pairs: list[Pairs | None], beside: bool, problems: list[str]) -> Builder:
    """The rows of a folder without a listing.

    Args:
        pairs: where condition and mask are found.
        beside: captions lie in files; otherwise the file's name without its ending is the caption.
        problems: what is wrong is added here; such pictures have no row.
    """
    rows = Builder()
    for name in tree.pictures:
        wrong: list[str] = []
        caption = _beside(folder, tree, name, wrong) if beside else os.path.basename(stem_of(name))
        others = paired(pairs, name, wrong)
        try:
            caption.encode()
        except UnicodeEncodeError:
            wrong.append("its name is no valid text, and so no caption")
        if wrong:
            problems.append(f"{folder / name}: {'; '.join(wrong)}")
        else:
            rows.add(Row(os.fsencode(name), [caption], others[0], others[1]))
    return rows


def paired(pairs: list[Pairs | None], name: str, wrong: list[str]) -> list[bytes | None]:
    """Condition and mask of a picture; what is wrong is added to `wrong`."""
    found: list[bytes | None] = []
    for one in pairs:
        try:
            found.append(None if one is None else os.fsencode(one.of(name)))
        except LookupError as error:
            wrong.append(str(error))
    return found


def orphans(tree: Tree) -> str:
    """Caption files without a picture, in words; empty where there are none."""
    stems = {stem_of(name) for name in tree.pictures}
    left = [name for stem, names in tree.captions.items() if stem not in stems for name in names]
    return f"{len(left)} caption files without a picture: {some(sorted(left))}" if left else ""


def _beside(folder: Path, tree: Tree, name: str, wrong: list[str]) -> str:
    files = tree.captions.get(stem_of(name), ())
    if len(files) == 1:
        return _text(f"{folder}/{files[0]}", tree, wrong)
    if files:
        wrong.append(f"several captions: {' and '.join(sorted(files))}; keep one")
    else:
        expected = os.path.basename(stem_of(name)) + ".txt"
        wrong.append(f"no caption; expected {expected} beside it, or a metadata.jsonl")
    return ""


def _text(file: str, tree: Tree, wrong: list[str]) -> str:
    try:
        with open(file, "rb", buffering=0) as opened:
            return opened.read().removeprefix(BOM_UTF8).decode().strip().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        wrong.append(f"its caption {file}: not UTF-8 text: {error}; save it as UTF-8")
    except OSError as error:
        wrong.append(f"its caption {file}: cannot be read: {error.strerror}")
        tree.unsettled = True
    return ""

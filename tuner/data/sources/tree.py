"""What lies in a folder and below, read once: pictures, captions, listings, and what is ignored."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from tuner.data.samples import some

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff"}
CAPTIONS = (".txt", ".caption")
LISTINGS = ("metadata.jsonl", "metadata.csv")
CLUTTER = {"__macosx", "thumbs.db", "desktop.ini", "@eadir", "icon\r"}
"""What systems leave in folders, beside what begins with a dot."""


@dataclass
class Tree:
    """Names relative to the folder, with / between their parts.

    Attributes:
        pictures: sorted, folder by folder.
        captions: for a name without its ending, the caption files of that name (.txt, .caption).
        listings: metadata.jsonl and metadata.csv.
        hidden: how many hidden files and folders, and files that systems leave behind, were not looked at.
        broken: pictures that are links to nothing.
        others: files that are none of these.
        folders: all that were looked into, as paths.
        unsettled: something cannot be read now, and no stamp of these will tell when it can be.
    """

    pictures: list[str] = field(default_factory=list)
    captions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    listings: list[str] = field(default_factory=list)
    hidden: int = 0
    broken: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    unsettled: bool = False

    def ignored(self) -> str:
        """What is not used, in words; empty where all is."""
        parts = [f"{self.hidden} hidden"] if self.hidden else []
        if self.others:
            parts.append(f"{len(self.others)} that are no pictures ({some(sorted(self.others))})")
        return "ignored files: " + ", ".join(parts) if parts else ""


def scan(folder: Path) -> Tree:
    """Everything in a folder. Linked folders are followed, each only once on a way down."""
    tree = Tree()
    _scan(str(folder), "", tree, ())
    # Folder by folder, as sorted paths are; sorting whole names would put `a.png` before `a/`.
    deep = len(tree.folders) > 1
    tree.pictures.sort(key=(lambda name: name.split("/")) if deep else None)
    tree.listings.sort()
    return tree


def hidden(name: str) -> bool:
    """Whether a file or folder of this name is left alone."""
    return name.startswith(".") or name.lower() in CLUTTER


def stem_of(name: str) -> str:
    """A relative name without its last ending."""
    return os.path.splitext(name)[0]


def _scan(folder: str, before: str, tree: Tree, links: tuple[tuple[int, int], ...]) -> None:
    tree.folders.append(folder)
    deeper: list[tuple[str, str, tuple[tuple[int, int], ...]]] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if hidden(name):
                tree.hidden += 1
            elif entry.is_dir():
                seen = links
                if entry.is_symlink():
                    about = entry.stat()
                    seen = (*links, (about.st_dev, about.st_ino))
                    if seen[-1] in links:
                        continue
                deeper.append((entry.path, f"{before}{name}/", seen))
            elif entry.is_file():
                _file(before + name, name, tree)
            elif entry.is_symlink() and os.path.splitext(name)[1].lower() in PICTURES:
                tree.broken.append(before + name)
                tree.unsettled = True
            else:
                tree.others.append(before + name)  # another link that leads nowhere, a socket
    for below in deeper:
        _scan(below[0], below[1], tree, below[2])


def _file(path: str, name: str, tree: Tree) -> None:
    stem, ending = os.path.splitext(path)
    ending = ending.lower()
    if ending in PICTURES:
        tree.pictures.append(path)
    elif ending in CAPTIONS:
        tree.captions[stem] = (*tree.captions.get(stem, ()), path)
    elif name in LISTINGS:
        tree.listings.append(path)
    else:
        tree.others.append(path)

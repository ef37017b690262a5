"""A cache whose entries are named by the hash of everything they depend on.

A stale entry cannot be used, for its name would be another; an unchanged input is never encoded again.
Entries lie in shards (safetensors), each written whole and never changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import uuid
from collections.abc import Iterable, Mapping
from contextlib import closing
from pathlib import Path

import safetensors
from safetensors.torch import save_file
from torch import Tensor

VERSION = 2
"""Raised by hand when what an entry's name stands for changes; guarded by a golden test."""


def default_folder() -> Path:
    """The cache's place when the recipe names none."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "tuner"


def key(**depends: object) -> str:
    """The name of an entry: a hash of everything it depends on."""
    text = json.dumps({"version": VERSION, **depends}, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()


class Hashes:
    """Content hashes of files, remembered by (path, size, mtime, inode) and made again when these change."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.place = folder / "hashes.sqlite"
        with closing(sqlite3.connect(self.place, timeout=60)) as base, base:
            base.execute("create table if not exists hashes (file text primary key, stamp text, hash text)")

    def of(self, paths: Iterable[Path]) -> dict[Path, str]:
        """sha256 of each file's bytes."""
        with closing(sqlite3.connect(self.place, timeout=60)) as base, base:
            known = {file: (stamp, digest) for file, stamp, digest in base.execute("select * from hashes")}
            found: dict[Path, str] = {}
            fresh: list[tuple[str, str, str]] = []
            for path in paths:
                about = path.stat()
                name, stamp = str(path.resolve()), f"{about.st_size} {about.st_mtime_ns} {about.st_ino}"
                old = known.get(name)
                if old is None or old[0] != stamp:
                    old = (stamp, content_hash(path))
                    fresh.append((name, *old))
                found[path] = old[1]
            base.executemany("insert or replace into hashes values (?, ?, ?)", fresh)
        return found


def content_hash(path: Path) -> str:
    """sha256 of a file's bytes, read in pieces: a checkpoint may be larger than the memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Store:
    """Tensors by name in a folder of shards."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.index: dict[str, Path] = {}
        self._open: dict[Path, object] = {}
        self.refresh()

    def refresh(self) -> None:
        """See what other processes have written. A shard that is not whole is taken away."""
        known = set(self.index.values())
        for shard in sorted(self.folder.glob("*.safetensors")):
            if shard in known:
                continue
            try:
                with safetensors.safe_open(shard, framework="pt") as file:
                    self.index.update(dict.fromkeys(file.keys(), shard))
            except (safetensors.SafetensorError, OSError):
                shard.unlink(missing_ok=True)

    def __contains__(self, name: str) -> bool:
        return name in self.index

    def write(self, entries: Mapping[str, Tensor]) -> None:
        """Add a shard; it appears whole."""
        shard = self.folder / f"{uuid.uuid4().hex}.safetensors"
        beside = shard.with_suffix(".writing")
        save_file({name: tensor.contiguous() for name, tensor in entries.items()}, beside)
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        beside.rename(shard)
        self.index.update(dict.fromkeys(entries, shard))

    def read(self, name: str) -> Tensor:
        """An entry's tensor."""
        shard = self.index[name]
        if shard not in self._open:
            self._open[shard] = safetensors.safe_open(shard, framework="pt")
        tensor: Tensor = self._open[shard].get_tensor(name)  # type: ignore[attr-defined]
        return tensor

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": {}}

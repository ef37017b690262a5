"""Indices that are kept between runs: Arrow tables in files, read by mapping them into memory."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa

from tuner.data.blob import file_stamp
from tuner.export.files import write_whole

VERSION = 3
"""Raised by hand when what an index holds, or how it is found, changes."""
RECENT = 2.0
"""Seconds after a change in which another may get the same time, on disks that count coarsely."""


class Kept:
    """The place of one index: its name is a hash of everything that decides what is in it.

    Attributes:
        place: None: nothing is kept.
    """

    def __init__(self, folder: Path | None, *depends: object) -> None:
        self.place: Path | None = None
        if folder is not None:
            text = json.dumps([VERSION, *depends])
            self.place = folder / f"{hashlib.blake2b(text.encode(), digest_size=20).hexdigest()}.arrow"

    def load(self) -> tuple[pa.Table, dict[str, Any]] | None:
        """The table and what is known besides; None where there is none, or it is damaged."""
        if self.place is None or not self.place.is_file():
            return None
        try:
            table = pa.ipc.open_file(pa.memory_map(str(self.place))).read_all()
            return table, json.loads(table.schema.metadata[b"about"])
        except (pa.ArrowInvalid, OSError, KeyError, TypeError, ValueError):
            self.place.unlink(missing_ok=True)
            return None

    def save(self, table: pa.Table, about: dict[str, Any]) -> tuple[pa.Table, dict[str, Any]]:
        """Keep a table; gives it back as it is when it is loaded: mapped from the file."""
        if self.place is None:
            return table, about
        marked = table.replace_schema_metadata({b"about": json.dumps(about).encode()})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, marked.schema) as writer:
            writer.write_table(marked)
        write_whole(self.place, sink.getvalue().to_pybytes())
        return self.load() or (table, about)


def stamps(paths: Iterable[Path], start: float) -> list[list[str]] | None:
    """Paths with their stamps; None where one is gone, or may have changed since `start` (time.time()),
    when reading began: such a stamp proves nothing."""
    found: list[list[str]] = []
    for path in paths:
        stamp = file_stamp(path)
        if stamp is None or os.stat(path).st_mtime > start - RECENT:
            return None
        found.append([os.fsencode(path).hex(), stamp])
    return found


def same(known: list[list[str]]) -> bool:
    """Whether every path still has its stamp."""
    return all(file_stamp(Path(os.fsdecode(bytes.fromhex(path)))) == stamp for path, stamp in known)


def digest(folder: str, names: Iterable[str], start: float = math.inf) -> str | None:
    """A hash of the stamps of very many files; None where one is gone, or changed since `start`, as above."""
    state = hashlib.blake2b(digest_size=20)
    for name in names:
        try:
            about = os.stat(f"{folder}/{name}")
        except OSError:
            return None
        if about.st_mtime > start - RECENT:
            return None
        state.update(b"%d %d %d\n" % (about.st_size, about.st_mtime_ns, about.st_ino))
    return state.hexdigest()

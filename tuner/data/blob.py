"""Where the bytes of a picture lie: in a file, an archive, in memory; a table's cells: sources/hub.py."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from tuner.errors import UserError


class Blob(Protocol):
    """Bytes that can be had when they are wanted; small, hashable, picklable.

    Two methods, and `name`: what messages call it ("folder/a.png", "shard-1.tar: 0007.jpg").
    """

    @property
    def name(self) -> str:
        """What messages call it."""

    def read(self) -> bytes:
        """The bytes. Raises UserError where they cannot be had."""

    def stamp(self) -> str | None:
        """Names the bytes: equal stamps, in any runs, are equal bytes. None: unknown, read them."""


@dataclass(frozen=True)
class File:
    """A file of its own."""

    path: Path

    @property
    def name(self) -> str:
        """Its path, as the recipe leads to it."""
        return str(self.path)

    def read(self) -> bytes:
        """The file's bytes.

        Raises:
            UserError: it cannot be read.
        """
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read: {error.strerror or error}") from error

    def stamp(self) -> str | None:
        """Absolute path, size, time of change and inode; None where there is no such file."""
        return file_stamp(self.path)


class Listed(File):
    """A file of its own whose path is made when it is asked for: of very many files that is most of the time.

    It equals the File of that path.
    """

    text: str

    def __init__(self, text: str) -> None:
        object.__setattr__(self, "text", text)

    @property
    def path(self) -> Path:
        """The path of the text."""
        return Path(self.text)

    @property
    def name(self) -> str:
        """The text."""
        return self.text

    def stamp(self) -> str | None:
        """As a File's."""
        return file_stamp(self.text)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, File) and self.path == other.path

    def __hash__(self) -> int:
        return hash((self.path,))

    def __repr__(self) -> str:
        return f"Listed({self.text!r})"


@dataclass(frozen=True)
class Member:
    """A file in an archive that is not compressed (tar): a range of the archive's bytes.

    Attributes:
        archive: the archive's path.
        offset, size: the range, in bytes.
        inside: what the member is called in there.
        of: the archive's stamp when its members were found; other bytes lie there when it has changed.
    """

    archive: Path
    offset: int
    size: int
    inside: str
    of: str

    @property
    def name(self) -> str:
        """The archive's path and the member's."""
        return f"{self.archive}: {self.inside}"

    def read(self) -> bytes:
        """The member's bytes.

        Raises:
            UserError: the archive cannot be read, is shorter than it was, or is another by now.
        """
        try:
            with open(self.archive, "rb", buffering=0) as file:
                data = os.pread(file.fileno(), self.size, self.offset)
        except OSError as error:
            raise UserError(f"{self.name}: cannot be read: {error.strerror or error}") from error
        if len(data) != self.size or file_stamp(self.archive) != self.of:
            raise UserError(f"{self.name}: the archive was changed while it is in use; start again")
        return data

    def stamp(self) -> str | None:
        """The archive's stamp with the range."""
        return f"{self.of} {self.offset}+{self.size}"


@dataclass(frozen=True)
class Held:
    """Bytes in memory, of a stream that passes once."""

    name: str
    data: bytes

    def read(self) -> bytes:
        """The bytes."""
        return self.data

    def stamp(self) -> str | None:
        """The hash of the bytes, sha256."""
        return "sha256 " + hashlib.sha256(self.data).hexdigest()

    def __repr__(self) -> str:
        return f"Held({self.name!r}, {len(self.data)} bytes)"


def file_stamp(path: Path | str) -> str | None:
    """Absolute path, size in bytes, time of change in nanoseconds and inode; None where there is no file."""
    try:
        about = os.stat(path)
    except OSError:
        return None
    return f"{_absolute(str(path))} {about.st_size} {about.st_mtime_ns} {about.st_ino}"


def _absolute(path: str) -> str:
    """As os.path.abspath, at a tenth of its time for one of many files in a folder."""
    folder, _, name = path.rpartition("/")
    if not name or name in (".", "..") or os.sep != "/":
        return os.path.abspath(path)
    return f"{_absolute_folder(folder or ('/' if path.startswith('/') else '.'), os.getcwd())}/{name}"


@lru_cache(maxsize=4096)
def _absolute_folder(folder: str, cwd: str) -> str:
    return os.path.abspath(os.path.join(cwd, folder)).rstrip("/")

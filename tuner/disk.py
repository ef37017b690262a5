"""Disks that are full, read-only or not ours: errors that name the file and the reason."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from tuner.errors import UserError

OURS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.EFBIG,
    errno.ESTALE,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
)
"""What a disk or its owner does to a program, and not a program to itself."""
FULL = 1 << 20
"""Bytes: a disk with less room than this counts as full where a library gives no reason of its own."""


class DiskError(UserError):
    """A file cannot be written; the message names it and says why."""

    def __init__(self, path: Path | str, reason: str, then: str = "") -> None:
        """`then`: what to do about it, a sentence."""
        self.path, self.reason = path, reason
        super().__init__(f"{path}: cannot be written: {reason}{'. ' + then if then else ''}")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Within it what is written belongs to `path`; nothing is read there but what was written.

    Raises:
        DiskError: for what the system and the libraries say of a write that fails. safetensors, torch's
            archives and SQLite have errors of their own, and name no file.
    """
    try:
        yield
    except DiskError:
        raise
    except OSError as error:
        if error.errno not in OURS:
            raise
        raise DiskError(path, _reason(error, path)) from error
    except (SafetensorError, sqlite3.Error) as error:
        raise DiskError(path, _reason(error, path)) from error
    except RuntimeError as error:
        if "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
            raise
        raise DiskError(path, _reason(error, path)) from error


def _reason(error: Exception, path: Path) -> str:
    """Why, in the system's words where there are some."""
    cause: BaseException | None = error
    while cause is not None:  # torch's writer fails again when it is closed, without the first one's reason
        if isinstance(cause, OSError) and cause.errno is not None:
            return os.strerror(cause.errno)
        cause = cause.__context__
    for words in map(os.strerror, OURS):
        if words in str(error):
            return words
    return os.strerror(errno.ENOSPC) if free(path) < FULL else str(error).splitlines()[0]


def nearest(path: Path) -> Path:
    """The folder itself, or of those above it the first that is there."""
    place = Path(os.path.abspath(path))
    while not place.exists() and place != place.parent:
        place = place.parent
    return place


def free(path: Path) -> int:
    """Bytes that may still be written where `path` is or will be."""
    return shutil.disk_usage(nearest(path)).free


def check_writable(path: Path, key: str) -> None:
    """Try to write where the folder `path` is or will be; nothing stays.

    Raises:
        UserError: it cannot be written there; `key` is the recipe's that names the folder.
    """
    place = nearest(path)
    if not place.is_dir():
        raise UserError(f"{key}: {place} is a file; expected a folder, or nothing yet")
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"0" * 4096)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        where = f"{path}" if place == Path(os.path.abspath(path)) else f"{path} (in {place})"
        why = f"{error.strerror or error}; choose another place"
        raise UserError(f"{key}: {where} cannot be written to: {why}") from error

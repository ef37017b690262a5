"""A cache whose entries are named by the hash of everything they depend on.

A stale entry cannot be used, for its name would be another; an unchanged input is never encoded again.
Entries lie in shards (safetensors), each written whole and never changed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sqlite3
import time
import uuid
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from torch import Tensor

from tuner.disk import writing
from tuner.errors import UserError
from tuner.progress import say

VERSION = 2
"""Raised by hand when what an entry's name stands for changes; guarded by a golden test."""
NAME = "S48"
"""The type of names in arrays; longer ones there are not."""
CHECKS = "checks"
"""In a shard's metadata: the checksum of each entry in 16 hex digits, in the order of their names."""
TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
WRITING, DAMAGED = ".writing", ".damaged"
LEFT = 3600.0
"""Seconds after which a file that is being written is taken for left behind; a shard takes a few to write."""
OVERHEAD = 150
"""Bytes of an entry besides its numbers, about."""
OPEN = 64
"""Shards that are kept open."""
SHOWN = 5


def default_folder() -> Path:
    """The cache's place when the recipe names none."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "tuner"


def key(**depends: object) -> str:
    """The name of an entry: a hash of everything it depends on."""
    text = json.dumps({"version": VERSION, **depends}, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()


def keys(field: str, values: Iterable[str], **depends: object) -> Iterator[str]:
    """The names of many entries that depend on the same but for one field, as `key` gives them.

    Args:
        values: of the field, letters and digits.
    """
    text = json.dumps({"version": VERSION, field: "\0", **depends}, sort_keys=True, ensure_ascii=True)
    before, after = (part.encode() for part in text.split(json.dumps("\0")[1:-1]))
    for value in values:
        yield hashlib.blake2b(before + value.encode() + after, digest_size=20).hexdigest()


class Hashes:
    """Content hashes of files, remembered by (path, size, mtime, inode) and made again when these change."""

    def __init__(self, folder: Path) -> None:
        self.place = folder / "hashes.sqlite"
        with writing(self.place):
            folder.mkdir(parents=True, exist_ok=True)
        with writing(self.place), closing(sqlite3.connect(self.place, timeout=60)) as base, base:
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
            with writing(self.place):
                base.executemany("insert or replace into hashes values (?, ?, ?)", fresh)
                base.commit()
        return found


def content_hash(path: Path) -> str:
    """sha256 of a file's bytes, read in pieces: a checkpoint may be larger than the memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Places(NamedTuple):
    """Where entries lie, sorted by name: arrays, for there may be very many, and processes share them.

    Attributes:
        name: bytes [E]; shard: int32 [E], index into the shards; start: int64 [E], of the first byte in it;
        kind: int32 [E], index into the kinds; check: uint64 [E], of name, kind and bytes.
    """

    name: npt.NDArray[np.bytes_]
    shard: npt.NDArray[np.int32]
    start: npt.NDArray[np.int64]
    kind: npt.NDArray[np.int32]
    check: npt.NDArray[np.uint64]


class Store:
    """Tensors by name in a folder of shards, each of which is written whole and never changed.

    What is read is compared with a checksum that was made when it was written. Any number of processes may
    write into the folder: each writes shards of its own. Shards are read entry by entry (not mapped as a
    whole), so that the memory does not grow with what was read.
    """

    def __init__(self, folder: Path) -> None:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._shards: list[Path] = []
        self._kinds: list[tuple[str, tuple[int, ...]]] = []
        self._parts: list[_Places] = []
        self._at = _places([], [], [], [], [])
        self._open: OrderedDict[int, BinaryIO] = OrderedDict()
        self._clean()
        self.refresh()

    def refresh(self) -> None:
        """See what other processes have written. What is not whole is told and taken away.

        Raises:
            UserError: a shard cannot be read.
        """
        known, wrong = set(self._shards), []
        for shard in sorted(self.folder.glob("*.safetensors")):
            if shard in known:
                continue
            try:
                self._add(shard, _header(shard))
            except FileNotFoundError:
                continue  # taken away by another process
            except _NotWholeError as error:
                wrong.append(f"  {shard.name}: {error}")
                with suppress(OSError):
                    shard.unlink(missing_ok=True)
            except OSError as error:
                raise UserError(f"{shard}: cannot be read: {error.strerror or error}") from error
        if wrong:
            say(f"{self.folder}: {len(wrong)} files are not whole and are taken away:")
            for line in wrong[:SHOWN]:
                say(line)
        self._join()

    def __len__(self) -> int:
        self._join()
        return len(self._at.name)

    def __contains__(self, name: str) -> bool:
        return bool(self.has(np.array([name], NAME))[0])

    def has(self, names: npt.NDArray[np.bytes_]) -> npt.NDArray[np.bool_]:
        """Of each name whether it is there, bool [E]."""
        self._join()
        at = np.searchsorted(self._at.name, names.astype(NAME, copy=False))
        found: npt.NDArray[np.bool_] = np.zeros(len(names), bool)
        inside = at < len(self._at.name)
        found[inside] = self._at.name[at[inside]] == names[inside]
        return found

    def write(self, entries: Mapping[str, Tensor]) -> None:
        """Add a shard; it appears whole.

        Raises:
            DiskError: it cannot be written; nothing of it stays.
        """
        shard = self.folder / f"{uuid.uuid4().hex}.safetensors"
        beside = shard.with_suffix(WRITING)
        whole = {name: tensor.contiguous() for name, tensor in entries.items()}
        checks = [_check(name, _kind(whole[name]), _bytes(whole[name])) for name in sorted(whole)]
        try:
            with writing(shard):
                beside.touch()
                mode = beside.stat().st_mode
                save_file(whole, beside, {CHECKS: "".join(f"{check:016x}" for check in checks)})
                beside.chmod(mode)  # the library lets the owner alone read it; caches may be shared
                with beside.open("rb+") as file:
                    os.fsync(file.fileno())
                beside.rename(shard)
        finally:
            with suppress(OSError):
                beside.unlink(missing_ok=True)
        self._add(shard, _header(shard))

    def read(self, name: str) -> Tensor:
        """An entry's tensor.

        Raises:
            UserError: it is not what was written; its shard is moved aside, so that it is encoded again.
        """
        self._join()
        key = np.array(name, NAME)
        at = int(np.searchsorted(self._at.name, key))
        assert at < len(self._at.name) and self._at.name[at] == key, f"{name} is not in the cache"
        number = int(self._at.shard[at])
        kind = self._kinds[int(self._at.kind[at])]
        data = bytearray(_size(kind))
        try:
            got = os.preadv(self._file(number).fileno(), [data], int(self._at.start[at]))
        except OSError as error:
            raise self._damaged(number, f"cannot be read: {error.strerror or error}") from error
        if got != len(data):
            raise self._damaged(number, "it is cut off")
        if _check(name, kind, data) != int(self._at.check[at]):
            raise self._damaged(number, f"entry {name} is not what was written")
        return torch.frombuffer(data, dtype=TYPES[kind[0]]).reshape(kind[1])

    def _file(self, number: int) -> BinaryIO:
        """A shard's file; as few stay open as an operating system allows anyone."""
        file = self._open.pop(number, None)
        if file is None:
            file = open(self._shards[number], "rb", buffering=0)  # noqa: SIM115 -- it stays open
            if len(self._open) >= OPEN:
                self._open.popitem(last=False)[1].close()
        self._open[number] = file
        return file

    def _damaged(self, number: int, what: str) -> UserError:
        shard = self._shards[number]
        again = "give the same command again: what it held is encoded again"
        try:
            shard.replace(shard.with_suffix(DAMAGED))
            then = f"moved aside; {again}"
        except FileNotFoundError:  # moved by another process, or by the user
            then = f"it is there no more; {again}"
        except OSError as error:
            then = f"delete it ({error.strerror}), and {again}"
        return UserError(f"{shard}: {what}; {then}")

    def _add(self, shard: Path, header: _Header) -> None:
        kinds = {kind: number for number, kind in enumerate(self._kinds)}
        for kind in dict.fromkeys(header.kinds):
            if kind not in kinds:
                kinds[kind] = len(self._kinds)
                self._kinds.append(kind)
        own = [len(self._shards)] * len(header.names)
        numbers = [kinds[kind] for kind in header.kinds]
        self._shards.append(shard)
        self._parts.append(_places(header.names, own, header.starts, numbers, header.checks))

    def _join(self) -> None:
        """Put what was added in its place; of several of one name the first counts, as they are equal."""
        if self._parts:
            every = [self._at, *self._parts]
            columns = [np.concatenate(column) for column in zip(*every, strict=True)]
            _, first = np.unique(columns[0], return_index=True)
            self._at = _Places(*(column[first] for column in columns))
            self._parts = []

    def _clean(self) -> None:
        """Take away what processes left behind that were killed while writing."""
        for file in self.folder.iterdir():
            if file.suffix in (WRITING, DAMAGED):
                with suppress(OSError):
                    if time.time() - file.stat().st_mtime > LEFT:
                        file.unlink()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_open": OrderedDict()}


class _NotWholeError(Exception):
    """A shard that is not whole, or was written by an earlier version."""


class _Header(NamedTuple):
    """What a shard holds, by name."""

    names: list[str]
    kinds: list[tuple[str, tuple[int, ...]]]
    starts: list[int]
    checks: list[int]


def _header(shard: Path) -> _Header:
    """Read a shard's header, which tells of every byte of the file.

    A safetensors file is the header's length (8 bytes, little-endian), the header as JSON, and the data;
    https://huggingface.co/docs/safetensors/index#format. The library itself does not tell where entries lie.

    Raises:
        _NotWholeError: it does not fit the file.
    """
    with open(shard, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or 8 + length > size:
            raise _NotWholeError("it is cut off")
        text = file.read(length)
    try:
        header = json.loads(text)
        checks = header.pop("__metadata__")[CHECKS]
        names = sorted(header)
        kinds = [(header[name]["dtype"], tuple(header[name]["shape"])) for name in names]
        spans = [header[name]["data_offsets"] for name in names]
        right = all(end - start == _size(kind) for (start, end), kind in zip(spans, kinds, strict=True))
        whole = sum(end - start for start, end in spans) == max(end for _, end in spans) == size - 8 - length
        made = [int(checks[at : at + 16], 16) for at in range(0, len(checks), 16)]
        named = all(name.isascii() and len(name) <= int(NAME[1:]) for name in names)
        if not (right and whole and named and len(made) == len(names)):
            raise _NotWholeError("its header does not fit it")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _NotWholeError("its header cannot be read, or has no checksums") from error
    return _Header(names, kinds, [8 + length + start for start, _ in spans], made)


def _places(
    names: Sequence[str],
    shard: Sequence[int],
    start: Sequence[int],
    kind: Sequence[int],
    check: Sequence[int],
) -> _Places:
    assert all(len(name) <= int(NAME[1:]) for name in names)
    return _Places(
        np.array(names, NAME),
        np.array(shard, np.int32),
        np.array(start, np.int64),
        np.array(kind, np.int32),
        np.array(check, np.uint64),
    )


def _kind(tensor: Tensor) -> tuple[str, tuple[int, ...]]:
    return next(name for name, dtype in TYPES.items() if dtype == tensor.dtype), tuple(tensor.shape)


def _size(kind: tuple[str, tuple[int, ...]]) -> int:
    return TYPES[kind[0]].itemsize * math.prod(kind[1])


def _bytes(tensor: Tensor) -> memoryview:
    flat: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return flat


def _check(name: str, kind: tuple[str, tuple[int, ...]], data: memoryview | bytearray) -> int:
    """A checksum, 64 bits."""
    state = hashlib.blake2b(f"{name} {kind[0]} {list(kind[1])}\n".encode(), digest_size=8)
    state.update(data)
    return int.from_bytes(state.digest(), "little")

"""Files and folders that appear whole or not at all, with equal bytes for equal content."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from tuner.disk import writing


def save(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Write a safetensors file that is a function of its tensors and metadata alone.

    The tensors are laid out as the library does it (widest type first, then by name); the header lists them
    in that order and the metadata by key. Written beside, flushed and renamed. Returns `path`.

    Raises:
        ValueError: there is no tensor to save.
        DiskError: it cannot be written.
    """
    if not tensors:
        raise ValueError(f"{path}: there is no tensor to save")
    partial = _beside(path, "partial")
    with _appears(path, partial):
        partial.touch()
        mode = partial.stat().st_mode
        safetensors.torch.save_file(_plain(tensors), partial, metadata=dict(metadata) or None)
        partial.chmod(mode)  # the library lets the owner alone read its files, whatever the umask says
        _sort_header(partial)
    return path


@contextlib.contextmanager
def _appears(path: Path, partial: Path) -> Iterator[None]:
    """What the block writes to `partial` comes to `path` when it ends well, and vanishes otherwise."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield
            _flush(partial)
            partial.replace(path)
        finally:
            with contextlib.suppress(OSError):  # as of a disk that can no more be written to
                partial.unlink(missing_ok=True)
        _flush(path.parent)


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file: its tensors (on the CPU, in their saved types) and its metadata."""
    with safetensors.safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in sorted(file.keys())}, dict(file.metadata() or {})


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over names, types, shapes and bytes of the tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        # JSON keeps apart what plain joining would let run together.
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode() + b"\n")
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def data_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over what follows the header in the file that `save` writes for these tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors, key=lambda name: (-tensors[name].element_size(), name)):
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def write_whole(path: Path, data: bytes | str) -> Path:
    """Write a file (text as UTF-8) beside, flush it and rename it into place. Returns `path`.

    Raises:
        DiskError: it cannot be written.
    """
    partial = _beside(path, "partial")
    with _appears(path, partial):
        partial.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


@contextlib.contextmanager
def folder_whole(path: Path) -> Iterator[Path]:
    """Give a new, empty sibling folder that becomes `path` when the block ends well, and vanishes otherwise.

    An older folder at `path` is moved aside just before and removed just after. Folders cannot be exchanged
    in one portable step, so a crash exactly in between leaves the older one aside; the next call for the same
    path puts it back first.
    """
    partial = _beside(path, "partial")
    aside = path.with_name(f".{path.name}.old")
    with writing(path):
        _recover(path, aside)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            for entry in sorted(partial.rglob("*")):
                _flush(entry)
            _flush(partial)
            if path.exists():
                path.replace(aside)
            partial.replace(path)
            _flush(path.parent)
        finally:
            _recover(path, aside)
            shutil.rmtree(partial, ignore_errors=True)


def _recover(path: Path, aside: Path) -> None:
    """Put a folder that was moved aside back when nothing replaced it, else remove it."""
    if not aside.exists():
        return
    if path.exists():
        shutil.rmtree(aside)
    else:
        aside.replace(path)


def _beside(path: Path, purpose: str) -> Path:
    """A hidden name in the same folder, so that renaming never crosses file systems."""
    return path.with_name(f".{path.name}.{os.getpid()}.{purpose}")


def _flush(path: Path) -> None:
    """Ask the system to put a file's bytes, or a folder's list of names, on the disk."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by name: on the CPU, contiguous, none sharing memory with another (safetensors refuses)."""
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        plain[name] = tensor
    return plain


def _bytes(tensor: Tensor) -> memoryview:
    """The tensor's values as stored, row by row, whatever its type (numpy has no bfloat16)."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def _sort_header(path: Path) -> None:
    """Rewrite the header in place with sorted metadata.

    The library keeps metadata in a hash map, so that two saves of the same content differ in their order.
    A safetensors file is the header's length (8 bytes, little-endian), the header as JSON padded with spaces,
    and the data; https://huggingface.co/docs/safetensors/index#format
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length, "compact JSON of the same content cannot be longer"
        file.seek(8)
        file.write(text.ljust(length))

"""What an export says about itself: present, as it was meant, and nothing about the machine."""

from __future__ import annotations

import contextlib
import getpass
import json
import re
import socket
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tuner.export import files as export_files
from tuner.verify.compare import VerifyError

HASH = "modelspec.hash_sha256"
USERS_WORDS = (  # text that the user chose and that may be any word
    "tuner.recipe",
    "tuner.base",
    "tuner.data",
    "tuner.start",
    "modelspec.title",
    "modelspec.trigger_phrase",
    "modelspec.license",
    "ss_tag_frequency",
    "ss_output_name",
)
_ABSOLUTE = re.compile(r"\s*(/[^/\s]|[A-Za-z]:[\\/]|~[\\/]|file:|\\\\)")


def check_metadata(path: Path, expected: Mapping[str, str | None]) -> None:
    """The header holds the expected metadata, and neither it nor a config.json beside tells of the machine.

    Args:
        expected: None where the header must not have a key.

    Raises:
        VerifyError: metadata is missing or different, or holds a local path, the user's or the host's name.
    """
    tensors, found = export_files.load(path)
    if not found:
        raise VerifyError(f"{path.name} has no metadata")
    for key, value in expected.items():
        if found.get(key) != value:
            raise VerifyError(f"{path.name}: metadata {key} is {found.get(key)!r}, expected {value!r}")
    if HASH in found and found[HASH] != f"0x{export_files.data_digest(tensors)}":
        raise VerifyError(f"{path.name}: metadata {HASH} is not the hash of the file's tensors")
    for key, value in found.items():
        _public(f"{path.name}: metadata {key}", key, value)
    config = path.parent / "config.json"
    if config.is_file():
        _public(f"{path.parent.name}/config.json", config.name, config.read_text(encoding="utf-8"))


def check_configs(folder: Path) -> int:
    """No configuration below a folder tells of the machine; returns how many there are.

    Raises:
        VerifyError: one holds a local path, the user's or the host's name.
    """
    found = [path for path in sorted(folder.rglob("*.json")) if path.stem.endswith(("config", "_index"))]
    for path in found:
        where = path.relative_to(folder.parent).as_posix()
        _public(where, path.name, path.read_text(encoding="utf-8"))
    return len(found)


def _public(where: str, key: str, value: str) -> None:
    for text in _texts(value):
        if _ABSOLUTE.match(text) or any(_holds(text, folder) for folder in _folders()):
            raise VerifyError(f"{where} holds a path of this machine: {text[:100]!r}")
        if key not in USERS_WORDS and any(_holds(text, name) for name in _names()):
            raise VerifyError(f"{where} holds the name of the user or of the machine: {text[:100]!r}")


def _texts(value: str) -> Iterator[str]:
    """The single texts in a value, which may be JSON."""
    try:
        content: Any = json.loads(value)
    except ValueError:
        yield value
        return
    pending = [content]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            pending += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            pending += item
        elif isinstance(item, str):
            yield item


def _holds(text: str, words: str) -> bool:
    """Whether a text holds the words, not as a part of longer ones."""
    return re.search(rf"(?<![\w./-]){re.escape(words)}(?![\w-])", text) is not None


def _folders() -> set[str]:
    """This machine's folders that must not be told."""
    places = {str(place) for place in (Path.home(), Path.cwd(), Path(tempfile.gettempdir()))}
    return {place for place in places if len(place) > 1}


def _names() -> set[str]:
    """The user's and the machine's names."""
    names = {socket.gethostname()}
    with contextlib.suppress(KeyError, OSError):  # a user without a name, as in some containers
        names.add(getpass.getuser())
    return {name for name in names if name}

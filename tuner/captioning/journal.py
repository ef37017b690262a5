"""What has been answered so far: one line an answer, appended batch by batch, read again by the next run."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from tuner.errors import UserError

NAME = ".captions.jsonl"

VERSION = 1
"""Raised by hand when the same settings would give other answers; then everything is asked anew."""


def key(**depends: object) -> str:
    """The name of an answer: a hash of everything it depends on."""
    text = json.dumps({"version": VERSION, **depends}, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=20).hexdigest()


class Journal:
    """The answers in a folder, by name; a context, within which no other process has the folder.

    Lines appear whole: what a killed process left of a line is cut off when the file is opened again.
    """

    def __init__(self, out: Path) -> None:
        """
        Raises:
            UserError: the folder holds something else, or another process writes to it.
        """
        self.path = out / NAME
        if out.exists() and not out.is_dir():
            raise UserError(f"--out {out}: expected a folder")
        if out.is_dir() and not self.path.exists() and any(out.iterdir()):
            raise UserError(f"--out {out}: not empty, and not made by tuner caption; expected a new folder")
        out.mkdir(parents=True, exist_ok=True)
        self.answers: dict[str, Any] = {}
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._file)
            raise UserError(f"--out {out}: another tuner caption is writing to it") from error
        self._load()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)

    def add(self, answers: Mapping[str, Any]) -> None:
        """Write a batch of answers: JSON values by name."""
        data = "".join(json.dumps([name, answer]) + "\n" for name, answer in answers.items()).encode()
        while data:
            data = data[os.write(self._file, data) :]
        os.fsync(self._file)
        self.answers.update(answers)

    def _load(self) -> None:
        whole = 0
        with open(self.path, "rb") as file:
            for raw in file:
                if not raw.endswith(b"\n"):
                    break
                try:
                    name, answer = json.loads(raw)
                except ValueError as error:
                    raise UserError(
                        f"{self.path}: damaged at byte {whole}; delete the file to ask everything anew"
                    ) from error
                self.answers[name] = answer
                whole += len(raw)
        os.ftruncate(self._file, whole)

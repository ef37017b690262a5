"""The folder source as loader.py and assemble.py use it today; goes away when they take open_spec."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tuner.data.captions import CaptionRule
from tuner.errors import UserError, few

PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


class Sample(NamedTuple):
    """One picture and what is known of it."""

    path: Path
    captions: tuple[str, ...]
    condition: Path | None = None  # a given condition picture
    scene: dict[str, Any] | None = None  # the shapes world's record, for the exact judge
    fixed: bool = False  # its one caption is taken as it is: without template, prefix, dropping

    def every(self, rule: CaptionRule) -> set[str] | None:
        """Everything that may be its caption; None where that is too much to list."""
        return set(self.captions) if self.fixed else rule.every(self.captions)


def open_source(place: str, say: Callable[[str], None] = print) -> list[Sample]:
    """The samples of a folder, in the order of their names.

    Captions are read from metadata.jsonl (`file_name`, `text`: one or a list, optional `conditioning_image`,
    optional `scene`) or, where there is none, from a .txt beside each picture. A folder of datasets/ that has
    not been made yet is made first by the prepare.py beside it.

    Raises:
        UserError: the folder is missing or has no pictures, a line or a caption is missing or unusable;
            all problems at once.
    """
    folder = Path(place)
    if not folder.is_dir():
        _prepare(folder, say)
    listing = folder / "metadata.jsonl"
    samples, problems = _from_listing(folder, listing) if listing.is_file() else _from_sidecars(folder)
    if problems:
        shown = problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise UserError("\n".join(shown))
    if not samples:
        raise UserError(f"{folder}: no pictures found (looked for {', '.join(sorted(PICTURES))})")
    return samples


def _prepare(folder: Path, say: Callable[[str], None]) -> None:
    """Run the prepare.py beside a missing folder, or say that there is none."""
    script = folder.parent / "prepare.py"
    if not script.is_file():
        near = sorted(p.name for p in folder.parent.iterdir() if p.is_dir()) if folder.parent.is_dir() else []
        hint = f"; beside it there are: {few(folder.name, near)}" if near else ""
        raise UserError(f"{folder}: no such folder, and no prepare.py beside it that would make it{hint}")
    say(f"{folder} is not there yet: running {script} {folder.name}")
    done = subprocess.run([sys.executable, str(script), folder.name], check=False)
    if done.returncode or not folder.is_dir():
        raise UserError(f"{script} {folder.name} did not make {folder} (exit code {done.returncode})")


def _from_listing(folder: Path, listing: Path) -> tuple[list[Sample], list[str]]:
    """The samples that a metadata.jsonl lists."""
    samples: list[Sample] = []
    problems: list[str] = []
    listed: set[str] = set()
    for number, raw in enumerate(_text(listing).split("\n"), 1):
        if not raw.strip():
            continue
        where = f"{listing}:{number}"
        try:
            line = json.loads(raw)
        except json.JSONDecodeError as error:
            problems.append(f"{where}: not JSON: {error.msg}")
            continue
        sample, problem = _from_line(folder, line)
        if problem or sample is None:
            problems.append(f"{where}: {problem}")
            continue
        listed |= {str(place.resolve()) for place in (sample.path, sample.condition) if place is not None}
        samples.append(sample)
    unlisted = [p for p in _pictures(folder) if str(p.resolve()) not in listed]
    problems += [f"{path}: not listed in {listing.name}; list it or move it away" for path in unlisted]
    return samples, problems


def _from_line(folder: Path, line: Any) -> tuple[Sample | None, str]:
    """One line of metadata.jsonl, or what is wrong with it."""
    if not isinstance(line, dict) or not isinstance(line.get("file_name"), str):
        return None, "expected an object with a file_name"
    path = folder / line["file_name"]
    if not path.resolve().is_relative_to(folder.resolve()):
        return None, f"{line['file_name']} leaves the folder"
    if not path.is_file():
        return None, f"{line['file_name']}: no such picture"
    text = line.get("text")
    captions = [text] if isinstance(text, str) else text
    if not isinstance(captions, list) or not captions or not all(isinstance(c, str) for c in captions):
        return None, f"{line['file_name']}: expected text, a caption or a list of captions, found {text!r}"
    condition = line.get("conditioning_image")
    if condition is not None:
        place = folder / str(condition)
        if not place.resolve().is_relative_to(folder.resolve()) or not place.is_file():
            return None, f"{line['file_name']}: conditioning_image {condition}: no such picture in the folder"
    return Sample(path, tuple(captions), folder / condition if condition else None, line.get("scene")), ""


def _pictures(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURES and p.is_file())


def _from_sidecars(folder: Path) -> tuple[list[Sample], list[str]]:
    """Pictures with their caption in a .txt beside."""
    samples, problems = [], []
    for path in _pictures(folder):
        sidecar = path.with_suffix(".txt")
        if not sidecar.is_file():
            problems.append(f"{path}: no caption; expected {sidecar.name} beside it, or a metadata.jsonl")
            continue
        samples.append(Sample(path, (_text(sidecar).strip(),)))
    return samples, problems


def _text(file: Path) -> str:
    """A text file's content, without a byte order mark."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text: {error}") from error

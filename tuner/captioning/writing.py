"""What `tuner caption` leaves in its folder: links to pictures that are kept, listings, scores, figures."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tuner.captioning.keeping import Picture, Scored
from tuner.captioning.originals import LISTING
from tuner.errors import UserError

SCORES, STATISTICS, LEFT_OUT = "scores.jsonl", "statistics.json", "left_out.jsonl"


def write(out: Path, folder: Path, pictures: Sequence[Picture], left: Mapping[str, str]) -> None:
    """Write all but the statistics; what an earlier run linked and is not kept any more is unlinked.

    Args:
        folder: where the pictures lie; they are linked from there.
        left: pictures that could not be used, and why.

    Raises:
        UserError: something else lies where a link must.
    """
    kept = [one for one in pictures if one.kept]
    links = {name for one in kept for name in (one.found.name, *one.found.others)}
    _link(out, Path(os.path.abspath(folder)), links)
    listings: dict[str, list[dict[str, Any]]] = {}
    for one in kept:
        listings.setdefault(one.found.listing, []).append(line(one))
    for old in out.rglob(LISTING):
        if str(old.relative_to(out)) not in listings:
            old.unlink()
    for listing, content in listings.items():
        _lines(out / listing, content)
    _lines(out / SCORES, [scores(one) for one in pictures])
    reasons = dict(left) | {one.found.name: _why(one) for one in pictures if not one.kept}
    _lines(out / LEFT_OUT, [{"file_name": name, "reason": why} for name, why in sorted(reasons.items())])


def line(picture: Picture) -> dict[str, Any]:
    """A picture's line in the listing: what its own listing said, and the captions that are kept, by kind."""
    found = picture.found
    place = os.path.dirname(found.listing)
    told = dict(found.line or {"file_name": os.path.relpath(found.name, place or ".")})
    by_kind: dict[str, list[Scored]] = {}
    for one in picture.kept:
        by_kind.setdefault(one.said.kind, []).append(one)
    told["text"] = {
        kind: texts[0] if len(texts := [one.said.text for one in ones]) == 1 else texts
        for kind, ones in by_kind.items()
    }
    if any(one.said.record is not None for one in picture.captions):
        # A scene's record has an entry for each caption, in their order; of a new one nothing is known.
        nothing = {"objects": [], "whole": False}
        told["scene"] = told["scene"] | {
            "captions": [
                one.said.record or {"form": kind, "named": nothing}
                for kind, ones in by_kind.items()
                for one in ones
            ]
        }
    return told


def scores(picture: Picture) -> dict[str, Any]:
    """A picture's line in scores.jsonl: every caption, old and new, with its score and whether it is kept."""
    return {
        "file_name": picture.found.name,
        "captions": [
            {
                "kind": one.said.kind,
                "new": one.new,
                "text": one.said.text,
                "score": one.score,
                "kept": one.kept,
            }
            for one in picture.captions
        ],
    }


def statistics(out: Path, told: Mapping[str, Any]) -> None:
    """Write statistics.json."""
    _whole(out / STATISTICS, json.dumps(told, indent=2, ensure_ascii=False) + "\n")


def _why(picture: Picture) -> str:
    if not picture.captions:
        return "no caption: it has none, and none was made"
    best = max(one.score for one in picture.captions if one.score is not None)
    return f"all of its {len(picture.captions)} captions are rejected; the best score is {best:.4f}"


def _link(out: Path, folder: Path, names: set[str]) -> None:
    inside = f"{folder}{os.sep}"
    for top, _, files in os.walk(out):
        for file in files:
            path = Path(top, file)
            mine = path.is_symlink() and os.readlink(path).startswith(inside)
            if mine and (
                os.path.relpath(path, out) not in names
                or os.readlink(path) != str(folder / path.relative_to(out))
            ):
                path.unlink()
    for name in sorted(names):
        link, target = out / name, folder / name
        link.parent.mkdir(parents=True, exist_ok=True)
        if link.is_symlink() and os.readlink(link) == str(target):
            continue
        try:
            link.symlink_to(target)
        except OSError as error:
            raise UserError(f"{link}: cannot be linked to {target}: {error.strerror}") from error


def _lines(path: Path, content: Iterable[Mapping[str, Any]]) -> None:
    _whole(path, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in content))


def _whole(path: Path, text: str) -> None:
    """The file appears whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)

"""Folders of which some samples cannot be used: their listings, and the index that is kept of them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tuner.data.samples import Samples
from tuner.data.sources import folder as folders
from tuner.data.sources.opening import look, open_spec
from tuner.data.sources.spec import SourceSpec
from tuner.errors import UserError


def picture(place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), "red").save(place)


def listing(folder: Path, *lines: Any) -> None:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")


def error(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_spec(SourceSpec(path=str(folder)), [].append)
    return str(caught.value)


def test_a_line_that_cannot_be_read_counts_once(tmp_path: Path) -> None:
    """Its picture is listed, if in vain."""
    for name in ("a.png", "s/b c.png", "s/d\u00e4.png", "e.png"):
        picture(tmp_path / "j" / name)
    listing(
        tmp_path / "j",
        {"file_name": "a.png", "text": "x"},
        '{"file_name": "./s/b c.png", "text": "y",}',
        '{"text": "z" "file_name" :"s/d\\u00e4.png"}',
        '{"text": "which"',
    )
    lines = error(tmp_path / "j").splitlines()
    assert [line.rpartition("metadata.jsonl")[2][:12] for line in lines[:3]] == [
        f":{number}: not JSON" for number in (2, 3, 4)
    ]
    assert len(lines) == 4 and "e.png: not listed" in lines[3]
    for name in ("a.png", "b.png", "s/c.png"):
        picture(tmp_path / "c" / name)
    (tmp_path / "c" / "metadata.csv").write_text(
        "file_name,text,weight\na.png,x,1\nb.png,y,1,2\ns/c.png,z,m\n"
    )
    lines = error(tmp_path / "c").splitlines()
    assert len(lines) == 2 and "another number of cells" in lines[0] and "is no JSON" in lines[1]


def test_what_is_left_out_is_kept_with_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, index = tmp_path / "data", tmp_path / "index"
    for name in ("a", "s/b", "s/c"):
        picture(folder / f"{name}.png")
    for name in ("a", "s/c"):
        (folder / f"{name}.txt").write_text("x")
    reads: list[Path] = []
    scan = folders.scan
    monkeypatch.setattr(folders, "scan", lambda place: reads.append(place) or scan(place))

    def seen() -> tuple[list[str], list[str], int]:
        found = look(SourceSpec(path=str(folder)), [].append, 0, index)
        assert isinstance(found, Samples)
        names = [Path(sample.picture.name).stem for sample in found]
        return names, [line.partition(f"{folder}/")[2][:20] for line in found.problems()], len(reads)

    def age(when: int) -> None:
        for place in (folder, *folder.rglob("*")):
            os.utime(place, (when, when), follow_symlinks=False)

    age(1_000_000_000)
    assert seen() == (["a", "c"], ["s/b.png: no caption;"], 1)
    assert seen() == (["a", "c"], ["s/b.png: no caption;"], 1), "kept"
    (folder / "s" / "b.txt").write_text("y")
    assert seen() == (["a", "b", "c"], [], 2)
    (folder / "d.png").symlink_to(tmp_path / "later.png")
    (folder / "d.txt").write_text("z")
    age(1_000_000_001)
    assert seen() == (["a", "b", "c"], ["d.png: a link that l"], 3)
    assert seen() == (["a", "b", "c"], ["d.png: a link that l"], 4), "a link may lead somewhere later"
    picture(tmp_path / "later.png")
    assert seen() == (["a", "d", "b", "c"], [], 5)

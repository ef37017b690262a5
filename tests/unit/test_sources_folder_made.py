"""Folders as sources: made by a prepare.py, names written in unusual ways, texts of other encodings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tuner.data.blob import File
from tuner.data.samples import Sample
from tuner.data.sources.opening import open_spec
from tuner.data.sources.spec import SourceSpec
from tuner.errors import UserError

PREPARE = """
import sys
from pathlib import Path
from PIL import Image
folder = Path(__file__).parent / sys.argv[1]
if sys.argv[1] == "train":
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    (folder / "a.txt").write_text("made")
"""


def picture(place: Path) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), "red").save(place)
    return place


def opened(folder: Path, said: list[str] | None = None) -> list[Sample]:
    found = open_spec(SourceSpec(path=str(folder)), ([] if said is None else said).append)
    return list(found)  # type: ignore[arg-type]


def error(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        opened(folder)
    return str(caught.value)


def test_a_missing_folder_is_made_by_the_prepare_beside_it(tmp_path: Path) -> None:
    (tmp_path / "prepare.py").write_text(PREPARE)
    said: list[str] = []
    assert [s.captions for s in opened(tmp_path / "train", said)] == [("made",)]
    assert len(said) == 1 and "prepare.py train" in said[0]
    opened(tmp_path / "train", said)
    assert len(said) == 1, "what is there is not made again"
    assert "did not make" in error(tmp_path / "other")


def test_a_missing_folder_is_told_with_those_beside_it(tmp_path: Path) -> None:
    (tmp_path / "near").mkdir()
    message = error(tmp_path / "nar")
    assert "no such folder, and no prepare.py" in message and message.endswith("beside it there are: near")


def test_a_condition_picture_needs_no_line_of_its_own(tmp_path: Path) -> None:
    place, edges = picture(tmp_path / "a.png"), picture(tmp_path / "edges" / "a.png")
    line = {"file_name": "./edges/../a.png", "text": "x", "conditioning_image": "./edges/a.png"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line))
    (found,) = opened(tmp_path)
    assert isinstance(found.picture, File) and found.picture.path.samefile(place)
    assert isinstance(found.condition, File) and found.condition.path.samefile(edges)


def test_a_listing_in_another_encoding(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    listing = tmp_path / "metadata.jsonl"
    listing.write_text('{"file_name": "a.png", "text": "two"}', encoding="utf-8-sig")
    assert [sample.captions for sample in opened(tmp_path)] == [("two",)]
    listing.write_bytes(b'{"file_name": "a.png", "text": "caf\xe9"}\n')
    assert str(listing) in error(tmp_path) and "UTF-8" in error(tmp_path)

"""Folders of pictures with captions, and everything that can be wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tuner.data import pictures
from tuner.data.sources import Sample, open_source
from tuner.errors import UserError


def picture(place: Path) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), "red").save(place)
    return place


def listing(folder: Path, *lines: Any) -> Path:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")
    return folder


def error(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_source(str(folder))
    return str(caught.value)


def test_a_listing_with_everything(tmp_path: Path) -> None:
    one, two, edges = (picture(tmp_path / name) for name in ("b.png", "sub/a.jpg", "edges/b.png"))
    scene = {"background": "grey", "objects": []}
    listing(
        tmp_path,
        {"file_name": "b.png", "text": "ein Käfer", "conditioning_image": "edges/b.png", "scene": scene},
        "",
        json.dumps({"file_name": "sub/a.jpg", "text": ["one\u2028line", "two"]}, ensure_ascii=False) + "\r",
    )
    assert open_source(str(tmp_path)) == [
        Sample(one, ("ein Käfer",), edges, scene),
        Sample(two, ("one\u2028line", "two"), None, None),
    ]


def test_captions_beside_the_pictures(tmp_path: Path) -> None:
    two, one = picture(tmp_path / "b.png"), picture(tmp_path / "a.PNG")
    (tmp_path / "a.txt").write_text("first \n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("zweites: ü", encoding="utf-8")
    assert open_source(str(tmp_path)) == [Sample(one, ("first",)), Sample(two, ("zweites: ü",))]


def test_every_error_of_a_listing_is_named_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    picture(folder / "good.png")
    picture(folder / "unlisted.png")
    picture(tmp_path / "outside.png")
    listing(
        folder,
        {"file_name": "good.png", "text": "fine"},
        "{not json",
        ["a", "list"],
        {"text": "nameless"},
        {"file_name": "../outside.png", "text": "leaves"},
        {"file_name": "missing.png", "text": "x"},
        {"file_name": "good.png"},
        {"file_name": "good.png", "text": []},
        {"file_name": "good.png", "text": ["a", 1]},
        {"file_name": "good.png", "text": "x", "conditioning_image": "none.png"},
        {"file_name": "good.png", "text": "x", "conditioning_image": "../outside.png"},
    )
    lines = error(folder).splitlines()
    expected = [
        (2, "not JSON"),
        (3, "expected an object with a file_name"),
        (4, "expected an object with a file_name"),
        (5, "../outside.png leaves the folder"),
        (6, "missing.png: no such picture"),
        (7, "expected text, a caption or a list of captions, found None"),
        (8, "expected text, a caption or a list of captions, found []"),
        (9, "expected text, a caption or a list of captions, found ['a', 1]"),
        (10, "conditioning_image none.png: no such picture in the folder"),
        (11, "conditioning_image ../outside.png: no such picture in the folder"),
    ]
    assert len(lines) == len(expected) + 1
    for line, (number, message) in zip(lines, expected, strict=False):
        assert line.startswith(f"{folder / 'metadata.jsonl'}:{number}: ") and message in line, line
    assert lines[-1] == f"{folder / 'unlisted.png'}: not listed in metadata.jsonl; list it or move it away"


def test_a_condition_picture_needs_no_line_of_its_own(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "edges" / "a.png")
    listing(tmp_path, {"file_name": "./edges/../a.png", "text": "x", "conditioning_image": "./edges/a.png"})
    assert len(open_source(str(tmp_path))) == 1


def test_a_picture_without_a_caption_is_an_error(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    (tmp_path / "b.txt").write_text("fine")
    assert (
        error(tmp_path) == f"{tmp_path / 'a.png'}: no caption; expected a.txt beside it, or a metadata.jsonl"
    )


def test_many_errors_are_counted(tmp_path: Path) -> None:
    for number in range(30):
        picture(tmp_path / f"{number:02d}.png")
    lines = error(tmp_path).splitlines()
    assert len(lines) == 21 and lines[-1] == "... and 10 more"


def test_text_that_is_not_utf8_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    assert str(tmp_path / "a.txt") in error(tmp_path)
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "a.png", "text": "caf\xe9"}\n')
    assert str(tmp_path / "metadata.jsonl") in error(tmp_path)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("one", encoding="utf-8-sig")
    assert open_source(str(tmp_path))[0].captions == ("one",)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "two"}', encoding="utf-8-sig")
    assert open_source(str(tmp_path))[0].captions == ("two",)


def test_no_folder_and_no_pictures(tmp_path: Path) -> None:
    (tmp_path / "near").mkdir()
    message = error(tmp_path / "nar")
    assert "no such folder" in message and "near" in message
    assert "no pictures found" in error(tmp_path / "near")


def test_a_missing_folder_is_made_by_the_prepare_beside_it(tmp_path: Path) -> None:
    script = """
import sys
from pathlib import Path
from PIL import Image
folder = Path(__file__).parent / sys.argv[1]
if sys.argv[1] == "train":
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    (folder / "a.txt").write_text("made")
"""
    (tmp_path / "prepare.py").write_text(script)
    said: list[str] = []
    assert [s.captions for s in open_source(str(tmp_path / "train"), said.append)] == [("made",)]
    assert len(said) == 1 and "prepare.py train" in said[0]
    open_source(str(tmp_path / "train"), said.append)
    assert len(said) == 1, "what is there is not made again"
    assert "did not make" in error(tmp_path / "other")


@pytest.mark.parametrize("content", [b"", b"no picture", "cut"])
def test_an_unreadable_picture_is_an_error_that_names_the_file(tmp_path: Path, content: bytes | str) -> None:
    place = tmp_path / "broken.png"
    Image.effect_noise((64, 64), 50).save(place)
    whole = place.read_bytes()
    pictures.load(place)
    place.write_bytes(whole[: len(whole) // 2] if isinstance(content, str) else content)
    with pytest.raises(UserError, match=r"broken\.png: this picture cannot be read"):
        pictures.load(place)

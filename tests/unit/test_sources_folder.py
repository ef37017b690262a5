"""Folders as sources: listings, captions beside or in names, conditions, masks, repeats, what is ignored."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from tuner.data.blob import File, Held, Member, file_stamp
from tuner.data.samples import Joined, Sample, Samples
from tuner.data.sources.opening import look, open_spec, open_specs
from tuner.data.sources.spec import SourceSpec
from tuner.errors import UserError


def picture(place: Path) -> Path:
    place.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), "red").save(place)
    return place


def captioned(place: Path, text: str = "x", ending: str = ".txt") -> Path:
    picture(place).with_suffix(ending).write_text(text, encoding="utf-8")
    return place


def listing(folder: Path, *lines: Any) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")
    return folder


def opened(folder: Path, said: list[str] | None = None, **more: Any) -> Samples:
    samples = open_spec(SourceSpec(path=str(folder), **more), [].append if said is None else said.append)
    assert isinstance(samples, Samples)
    return samples


def error(folder: Path, **more: Any) -> str:
    with pytest.raises(UserError) as caught:
        opened(folder, **more)
    return str(caught.value)


def sample(place: Path, *captions: str, **more: Any) -> Sample:
    return Sample(File(place), captions, **more)


def test_a_listing_with_everything(tmp_path: Path) -> None:
    one, two, edges, mask = (
        picture(tmp_path / name) for name in ("b.png", "sub/a.jpg", "edges/b.png", "m/b.png")
    )
    scene = {"background": "grey", "objects": []}
    line = {"file_name": "b.png", "text": "ein Käfer", "conditioning_image": "edges/b.png", "mask": "m/b.png"}
    listing(
        tmp_path,
        {**line, "scene": scene, "weight": 0.5, "score": 3},
        "",
        json.dumps({"file_name": "./sub/../sub/a.jpg", "text": ["one\u2028line", "two"]}, ensure_ascii=False)
        + "\r",
    )
    said: list[str] = []
    found = opened(tmp_path, said, weight=2.0, repeats=3)
    first = sample(one, "ein Käfer", condition=File(edges), mask=File(mask), scene=scene, weight=1.0)
    assert list(found) == [first, sample(two, "one\u2028line", "two", weight=2.0)]
    assert found[-1] == found[1] and list(found[0:1]) == [first] and found.repeats.tolist() == [3, 3]
    assert said == [f"{tmp_path}: fields of the listing that are not used: score"]
    with pytest.raises(IndexError):
        found[2]
    again = pickle.loads(pickle.dumps(found))
    assert list(again) == list(found) and again.repeats.tolist() == [3, 3]


def test_listings_in_csv_and_below(tmp_path: Path) -> None:
    one, two, three = (picture(tmp_path / name) for name in ("a.png", "s/b.png", "s/c.png"))
    head = "\ufefffile_name,text,weight,scene,conditioning_image\n"
    (tmp_path / "metadata.csv").write_text(head + 'a.png,"one, two",0.25,"{""a"": 1}",\n', encoding="utf-8")
    listing(
        tmp_path / "s",
        {"file_name": "b.png", "text": "b", "conditioning_image": "../a.png"},
        {"file_name": "c.png", "text": "c"},
    )
    assert list(opened(tmp_path)) == [
        sample(one, "one, two", weight=0.25, scene={"a": 1}),
        sample(two, "b", condition=File(one)),
        sample(three, "c"),
    ]
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png\na.png,x,y\na.png,\n", encoding="utf-8")
    wrong = error(tmp_path).splitlines()
    assert [line.partition(": ")[0][-2:] for line in wrong[:3]] == [":2", ":3", ":4"]
    assert "another number of cells" in wrong[0] and "another number of cells" in wrong[1]
    assert "found None" in wrong[2]
    (tmp_path / "metadata.jsonl").write_text("{}")
    assert "metadata.jsonl lies beside it; keep one" in error(tmp_path)


def test_captions_of_several_kinds(tmp_path: Path) -> None:
    places = [picture(tmp_path / "data" / f"{n}.png") for n in range(3)]
    both = {"long": "l", "short": ["s", "t"]}
    listing(
        tmp_path / "data",
        {"file_name": "0.png", "text": both},
        {"file_name": "1.png", "text": "x"},
        {"file_name": "2.png", "text": {"original": None, "short": "y"}},
    )
    wanted = [
        sample(places[0], "l", "s", "t", kinds=("long", "short", "short")),
        sample(places[1], "x"),
        sample(places[2], "y", kinds=("short",)),
    ]
    for _ in range(2):  # made, and kept
        found = open_spec(SourceSpec(path=str(tmp_path / "data")), print, tmp_path / "index")
        assert isinstance(found, Samples) and list(found) == wanted
    (tmp_path / "data/metadata.jsonl").unlink()
    table = "file_name,title,caption\n0.png,a,b\n1.png,,c\n2.png,d,\n"
    (tmp_path / "data/metadata.csv").write_text(table)
    said: list[str] = []
    columns = {"caption": {"short": "title", "long": "caption"}}
    by_column = opened(tmp_path / "data", said, columns=columns)
    assert [(s.captions, s.kinds) for s in by_column] == [
        (("a", "b"), ("short", "long")),
        (("c",), ("long",)),
        (("d",), ("short",)),
    ]
    assert not said
    columns["caption"]["long"] = "capton"
    assert "capton" in error(tmp_path / "data", columns=columns)


def test_every_error_of_a_listing_is_named_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    for name in ("data/good.png", "data/unlisted.png", "outside.png"):
        picture(tmp_path / name)
    good: dict[str, Any] = {"file_name": "good.png", "text": "x"}
    cases: list[tuple[Any, str]] = [
        ("{not json", "not JSON"),
        (["a", "list"], "expected an object with a file_name"),
        ({"text": "nameless"}, "expected an object with a file_name"),
        (good | {"file_name": "../outside.png"}, "../outside.png leaves the folder"),
        (good | {"file_name": str(tmp_path / "outside.png")}, "leaves the folder"),
        (good | {"file_name": "missing.png"}, "missing.png: no such picture"),
        ({"file_name": "good.png"}, "a caption or a list of captions (or these by kind), found None"),
        (good | {"text": {}}, "expected a caption of some kind, found none"),
        (good | {"text": {"a": "x", "b": 1}}, "b: expected text, a caption or a list of captions"),
        (good | {"text": []}, "expected text, a caption or a list of captions (or these by kind), found []"),
        (good | {"text": ["a", 1]}, "found ['a', 1]"),
        (good | {"text": "\ud800"}, "no valid text"),
        (good | {"conditioning_image": "none.png"}, "none.png: no such picture in the folder"),
        (good | {"mask": "../outside.png"}, "mask ../outside.png: no such picture in the folder"),
        (good | {"weight": "much"}, "expected a weight, a number of at least 0, found 'much'"),
        (good | {"weight": -1}, "found -1"),
    ]
    listing(folder, good, *(line for line, _ in cases))
    lines = error(folder).splitlines()
    assert len(lines) == len(cases) + 1
    for number, (line, (_, message)) in enumerate(zip(lines, cases, strict=False), 2):
        assert line.startswith(f"{folder / 'metadata.jsonl'}:{number}: ") and message in line, line
    assert lines[-1] == f"{folder / 'unlisted.png'}: not listed in metadata.jsonl; list it or move it away"
    seen = look(SourceSpec(path=str(folder)), print)
    assert isinstance(seen, Samples) and list(seen) == [sample(folder / "good.png", "x")]
    assert len(list(seen.problems())) == len(lines)


def test_columns_of_a_listing(tmp_path: Path) -> None:
    one = picture(tmp_path / "a.png")
    listing(tmp_path, {"path": "a.png", "prompt": "p", "text": "t"})
    assert list(opened(tmp_path, columns={"picture": "path", "caption": "prompt"})) == [sample(one, "p")]
    wrong = error(tmp_path, columns={"picture": "path", "condition": "promt"})
    assert "no column promt for columns.condition" in wrong and wrong.endswith("did you mean prompt?")


def test_captions_beside_the_pictures(tmp_path: Path) -> None:
    two = captioned(tmp_path / "b.png", "zweites: ü\r\nline")
    one = captioned(tmp_path / "a.PNG", "\ufefffirst \n", ".caption")
    three = captioned(tmp_path / "a.d" / "x.jpg")
    assert list(opened(tmp_path)) == [
        sample(one, "first"), sample(three, "x"), sample(two, "zweites: ü\nline")
    ]  # fmt: skip
    (tmp_path / "b.caption").write_text("again")
    (tmp_path / "a.caption").unlink()
    (tmp_path / "a.d" / "x.txt").write_bytes(b"caf\xe9")
    lines = error(tmp_path).splitlines()
    assert lines[1].startswith(f"{three}: its caption {three.with_suffix('.txt')}: not UTF-8 text")
    assert lines[0] == f"{one}: no caption; expected a.txt beside it, or a metadata.jsonl"
    assert lines[2] == f"{two}: several captions: b.caption and b.txt; keep one" and len(lines) == 3


def test_captions_that_are_names(tmp_path: Path) -> None:
    one, two = picture(tmp_path / "a red car.v2.png"), captioned(tmp_path / "s" / "b.png")
    spec = {"captions_from": "name"}
    assert list(opened(tmp_path, **spec)) == [sample(one, "a red car.v2"), sample(two, "b")]
    listing(tmp_path, {"file_name": "s/b.png", "text": "listed"})
    one.unlink()
    said: list[str] = []
    assert [s.captions for s in opened(tmp_path, said, captions_from="beside")] == [("x",)]
    assert said == [f"{tmp_path}: not read: metadata.jsonl"]
    assert [s.captions for s in opened(tmp_path, captions_from="listing")] == [("listed",)]
    (tmp_path / "metadata.jsonl").unlink()
    assert "captions_from is listing, but there is no" in error(tmp_path, captions_from="listing")


def test_conditions_and_masks_in_folders(tmp_path: Path) -> None:
    one, two = captioned(tmp_path / "a.png"), captioned(tmp_path / "s" / "b.jpg")
    edges = [picture(tmp_path / "edges" / "a.webp"), picture(tmp_path / "edges" / "s" / "b.png")]
    masks = [picture(tmp_path.parent / "masks" / name) for name in ("a.png", "s/b.png", "s/c.png")]
    said: list[str] = []
    found = opened(tmp_path, said, condition_from="edges/", mask_from="../masks/")
    outside = tmp_path / ".." / "masks"
    assert list(found) == [
        sample(one, "x", condition=File(edges[0]), mask=File(outside / "a.png")),
        sample(two, "x", condition=File(edges[1]), mask=File(outside / "s/b.png")),
    ]
    assert said == [f"{tmp_path}: 1 mask pictures belong to no picture: ../masks/s/c.png"] and masks
    picture(tmp_path / "edges" / "a.png")
    edges[1].unlink()
    lines = error(tmp_path, condition_from="edges/").splitlines()
    assert lines == [
        f"{one}: several condition pictures: edges/a.png, edges/a.webp; keep one",
        f"{two}: no condition picture; expected edges/s/b.*",
    ]
    assert "there are: edges/, s/" in error(tmp_path, condition_from="edge/")
    assert "write edges/ for it" in error(tmp_path, condition_from="edges")
    assert "no caption" in error(tmp_path), "without condition_from its pictures are pictures like all"


def test_conditions_and_masks_by_what_is_behind_the_name(tmp_path: Path) -> None:
    one = captioned(tmp_path / "a.png")
    edges, mask = picture(tmp_path / "a_canny.jpg"), picture(tmp_path / "a_mask.png")
    spec = {"condition_from": "_canny", "mask_from": "_mask"}
    assert list(opened(tmp_path, **spec)) == [sample(one, "x", condition=File(edges), mask=File(mask))]
    assert "no picture whose name ends in _depth" in error(tmp_path, condition_from="_depth")
    listing(tmp_path, {"file_name": "a.png", "text": "t"})
    found = opened(tmp_path, **spec)
    assert list(found) == [sample(one, "t", condition=File(edges), mask=File(mask))]
    listing(tmp_path, {"file_name": "a.png", "text": "t", "mask": "a_mask.png"})
    assert "mask is listed, and mask_from given too" in error(tmp_path, **spec)


def test_kohya_folders_mean_repeats(tmp_path: Path) -> None:
    for name in ("10_cat/a.png", "10_cat/deep/b.png", "2_a dog/c.png", "d.png", "style_3/e.png"):
        captioned(tmp_path / "root" / name)
    said: list[str] = []
    found = opened(tmp_path / "root", said, repeats=2)
    by_name = {s.picture.name.rpartition("/")[2]: r for s, r in zip(found, found.repeats, strict=True)}
    assert by_name == {"a.png": 20, "b.png": 20, "c.png": 4, "d.png": 2, "e.png": 2}
    assert said == [f"{tmp_path / 'root'}: repeats from folders' names: 10_cat 10 times, 2_a dog 2 times"]
    assert set(opened(tmp_path / "root", folder_repeats=False).repeats.tolist()) == {1}
    captioned(tmp_path / "root" / "2024_photos" / "f.png")
    captioned(tmp_path / "root" / "0_none" / "g.png")
    lines = error(tmp_path / "root").splitlines()
    assert "would never come" in lines[0] and "2024 repeats" in lines[1] and len(lines) == 2
    (tmp_path / "root" / "0_none").rename(tmp_path / "root" / "none")
    assert max(opened(tmp_path / "root", folder_repeats=True).repeats) == 2024
    assert opened(tmp_path / "root" / "10_cat", said).repeats.tolist() == [1, 1]
    assert said[-1].endswith("for this one write repeats: 10")


def test_what_is_ignored_is_counted(tmp_path: Path) -> None:
    one = captioned(tmp_path / "a.png")
    for name in (".b.png", ".cache/c.png", "__MACOSX/d.png", "Thumbs.db", "README.md", "s/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("?")
    said: list[str] = []
    assert list(opened(tmp_path, said)) == [sample(one, "x")]
    assert said == [
        f"{tmp_path}: 1 caption files without a picture: s/notes.txt",
        f"{tmp_path}: ignored files: 4 hidden, 1 that are no pictures (README.md)",
    ]


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    captioned(tmp_path / "real" / "a.png")
    (tmp_path / "top").mkdir()
    (tmp_path / "top" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "loop").symlink_to(tmp_path / "real")
    names = [s.picture.name for s in opened(tmp_path / "top")]
    assert names == [str(tmp_path / "top" / "link" / "a.png")]


def test_a_listing_is_read_again_only_when_something_changed(tmp_path: Path) -> None:
    folder, index = tmp_path / "data", tmp_path / "index"
    for name in ("a.png", "10_s/b.png"):
        picture(folder / name)
    lines = [{"file_name": name, "text": name} for name in ("a.png", "10_s/b.png")]
    listing(folder, *lines)

    def look_again(**more: Any) -> tuple[list[Sample], list[str], int]:
        said: list[str] = []
        found = open_spec(SourceSpec(path=str(folder), **more), said.append, index)
        assert isinstance(found, Samples) and found.repeats.tolist() == [1, 10]
        assert list(pickle.loads(pickle.dumps(found))) == list(found)
        return list(found), said, len(list(index.glob("*")))

    def age(*names: str) -> None:
        for name in names:
            os.utime(folder / name, (1_000_000_000 + len(names), 1_000_000_000 + len(names)))

    first = look_again()
    assert first[2] == 0, "what was changed a moment ago is not kept"
    age(".", "10_s", "metadata.jsonl")
    assert look_again() == (*first[:2], 1)
    kept = next(index.iterdir()).stat()
    assert look_again() == (*first[:2], 1) and next(index.iterdir()).stat() == kept
    assert look_again(columns={"caption": "file_name"})[2] == 2
    listing(folder, *lines[:1], {"file_name": "10_s/b.png", "text": "new"})
    assert look_again()[0][1].captions == ("new",)
    age(".", "10_s", "metadata.jsonl", "a.png")
    assert look_again()[0][1].captions == ("new",)
    picture(folder / "10_s" / "c.png")
    with pytest.raises(UserError, match=r"c\.png: not listed"):
        look_again()
    (folder / "10_s" / "c.png").unlink()
    (folder / "a.png").unlink()
    with pytest.raises(UserError, match=r"a\.png: no such picture"):
        look_again()


def test_captions_are_read_again_only_when_something_changed(tmp_path: Path) -> None:
    folder, index = tmp_path / "data", tmp_path / "index"
    captioned(folder / "s" / "a.png", "old")

    def caption(**more: Any) -> tuple[str, int]:
        found = open_spec(SourceSpec(path=str(folder), **more), [].append, index)
        assert isinstance(found, Samples)
        return found[0].captions[0], len(list(index.glob("*")))

    for place in (folder, folder / "s", text := folder / "s" / "a.txt"):
        assert caption() == ("old", 0)
        os.utime(place, (1_000_000_000, 1_000_000_000))
    assert caption() == ("old", 1) == caption() and caption(captions_from="name") == ("a", 2)
    text.write_text("new")
    assert caption() == ("new", 2)
    os.utime(text, (1_000_000_001, 1_000_000_001))
    assert caption() == ("new", 2) == caption()
    text.write_text("NEW")
    os.utime(text, (1_000_000_001, 1_000_000_002))
    assert caption() == ("NEW", 2)
    text.unlink()
    with pytest.raises(UserError, match="no caption"):
        caption()


def test_names_that_are_no_text(tmp_path: Path) -> None:
    place = tmp_path / "a\udcff.png"
    captioned(place)
    assert list(opened(tmp_path)) == [sample(place, "x")]
    assert opened(tmp_path)[0].picture.read() == place.read_bytes()
    assert "no valid text" in error(tmp_path, captions_from="name")


def test_several_sources_at_once(tmp_path: Path) -> None:
    one, two = captioned(tmp_path / "a" / "1.png"), captioned(tmp_path / "b" / "2.png")
    specs = [SourceSpec(path=str(tmp_path / name), repeats=n) for n, name in enumerate("ab", 1)]
    parts = [part for part in open_specs(specs) if isinstance(part, Samples)]
    joined = Joined(parts)
    assert list(joined) == [sample(one, "x"), sample(two, "x", source=1)] and joined[-1].source == 1
    assert joined.repeats.tolist() == [1, 2] and len(joined) == 2 and list(joined[1:]) == [joined[1]]
    one.with_suffix(".txt").unlink()
    for number in range(30):
        picture(tmp_path / "b" / f"x{number:02d}.png")
    missing = SourceSpec(path=str(tmp_path / "c"))
    with pytest.raises(UserError) as caught:
        open_specs([*specs, missing])
    lines = str(caught.value).splitlines()
    assert "c: no such folder" in lines[0] and str(one) in lines[1] and lines[-1] == "... and 12 more"
    assert len(lines) == 21


def test_no_pictures_and_what_the_folder_may_be(tmp_path: Path) -> None:
    assert "no pictures found (looked for .avif, .bmp" in error(tmp_path)
    (tmp_path / "a.parquet").write_text("")
    assert error(tmp_path).endswith("; for its .parquet files name them: *.parquet")
    listing(tmp_path, {"file_name": "a.png", "text": "x"})
    assert "a.png: no such picture" in error(tmp_path)


def test_a_column_without_a_listing_is_an_error(tmp_path: Path) -> None:
    captioned(tmp_path / "a.png")
    assert "columns.caption: has no effect" in error(tmp_path, columns={"caption": "prompt"})


def test_stamps_name_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = captioned(tmp_path / "a.png")
    stamp = File(place).stamp()
    assert stamp is not None and stamp.startswith(f"{place} ")
    monkeypatch.chdir(tmp_path)
    assert File(Path("a.png")).stamp() == File(Path("../") / tmp_path.name / "a.png").stamp() == stamp
    place.write_bytes(place.read_bytes() + b"x")
    assert File(place).stamp() != stamp and file_stamp(tmp_path / "none") is None
    assert Held("a", b"1").stamp() == Held("b", b"1").stamp() != Held("a", b"2").stamp()
    with pytest.raises(UserError, match=r"none: cannot be read"):
        File(tmp_path / "none").read()
    member = Member(place, 1, 3, "m", file_stamp(place) or "")
    assert member.read() == b"PNG" and member.name == f"{place}: m"
    place.write_bytes(b"another")
    with pytest.raises(UserError, match="the archive was changed"):
        member.read()


def test_the_imagefolder_example(tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[2] / "datasets" / "outlines" / "prepare.py"
    out = tmp_path / "drawn"
    command = [sys.executable, str(script), "heldout", "--count", "3", "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    found = opened(out)
    assert len(found) == 3 and all(len(s.captions) > 1 for s in found)
    for s in found:
        assert s.condition is not None and s.mask is not None
        looks = [Image.open(io.BytesIO(blob.read())) for blob in (s.picture, s.condition, s.mask)]
        assert [(look.size, look.mode) for look in looks] == [
            ((128, 128), mode) for mode in ("RGB", "L", "L")
        ]
        lines, area = (np.asarray(look) > 127 for look in looks[1:])
        assert lines.sum() > 0 and 0 < area.sum() < 128 * 128 / 2
        grown = np.asarray(looks[2].filter(ImageFilter.MaxFilter(5))) > 127
        assert (lines & ~grown).sum() == 0, "outlines lie at the edge of the masks"

"""`tuner condition`: one picture's condition, as training makes it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tuner import cli, condition
from tuner.data import pictures
from tuner.data.conditions import Condition, Draw, make_condition, values
from tuner.data.transform import Transform


@pytest.fixture
def photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A picture 60 wide and 40 high, in the current folder."""
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).integers(0, 255, (5, 6, 3)).astype(np.uint8)
    Image.fromarray(noise).resize((60, 40), Image.Resampling.NEAREST).save("photo.png")
    return Path("photo.png")


def run(*words: str) -> int:
    return cli.main(["condition", *words])


def test_it_is_what_training_makes(photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--kind", "canny", "--set", "low=50", "--set", "high=[100, 200]", "--size", "32", "--seed", "7"]
    assert run(str(photo), *words, "--out", "new/edges.png") == 0
    assert (
        capsys.readouterr().out
        == "new/edges.png: canny of photo.png, 32x32 pixels, low 50, high 100 to 200\n"
    )
    block = Condition.model_validate({"kind": "canny", "low": 50, "high": [100, 200]})
    cut = Transform(32, 32)(pictures.load(photo))
    wanted = make_condition(block, cut, Draw(7), "photo.png")
    assert wanted.any() and np.array_equal(pictures.load(Path("new/edges.png")), wanted)
    assert np.array_equal(condition.read(Path("new/edges.png")), wanted)
    with Image.open("new/edges.png") as opened:
        assert json.loads(opened.info[condition.NOTE]) == {
            "condition": "canny",
            "low": 50,
            "high": "100 to 200",
        }
    assert [file.name for file in Path("new").iterdir()] == ["edges.png"]


def test_without_a_size_the_picture_keeps_its_own(photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(photo), "--kind", "gray", "--out", "grey.png") == 0
    assert capsys.readouterr().out == "grey.png: gray of photo.png, 60x40 pixels\n"
    assert np.array_equal(
        pictures.load(Path("grey.png"))[:, :, 0], np.asarray(Image.open(photo).convert("L"))
    )


def test_a_hole_comes_back_from_the_file(photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(photo), "--kind", "inpaint", "--seed", "3", "--out", "hole.png") == 0
    wanted = make_condition(Condition(kind="inpaint"), pictures.load(photo), Draw(3), "photo.png")
    found = condition.read(Path("hole.png"))
    assert np.array_equal(found, wanted) and (values(found) == -1).any()
    share = f"{np.mean(wanted[:, :, 3] == 0):.0%}"
    assert capsys.readouterr().out == (
        "hole.png: inpaint of photo.png, 60x40 pixels, boxes 0.5, everything 0; "
        f"{share} hidden (transparent)\n"
    )


def test_a_given_mask_is_the_hole(photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mask = np.zeros((40, 60), np.uint8)
    mask[10:20, 30:45], mask[0, 0], mask[0, 1] = 255, 128, 127
    Image.fromarray(mask).save("mask.png")
    assert run(str(photo), "--kind", "inpaint", "--mask", "mask.png", "--out", "hole.png") == 0
    assert "mask given; 6% hidden" in capsys.readouterr().out
    seen = values(condition.read(Path("hole.png")))
    wanted = pictures.to_unit(pictures.load(photo))
    wanted[:, mask > 127] = -1
    assert np.array_equal(seen, wanted)


def test_other_transparency_is_no_hole(photo: Path) -> None:
    clear = np.dstack((pictures.load(photo), np.zeros((40, 60), np.uint8)))
    Image.fromarray(clear).save("clear.png")
    assert (condition.read(Path("clear.png")) == 255).all()
    assert condition.read(Path("clear.png")).shape == (40, 60, 3)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--kind", "cany"], "--kind cany: kind: found cany, expected one of: blur, canny,"),
        (
            ["--kind", "image"],
            "--kind image: such conditions are given as pictures; there is nothing to make",
        ),
        (["--kind", "model"], "--kind model: kind: model needs path and task"),
        (
            ["--kind", "canny", "--set", "lo=3", "--set", "high=a"],
            "command line: lo=3: lo: unknown key; did you mean low?",
        ),
        (
            ["--kind", "canny", "--set", "lo=3", "--set", "high=a"],
            "command line: high=a: high: found the text 'a', expected a number or a list",
        ),
        (["--kind", "blur", "--set", "sigma"], "command line: sigma: expected KEY=VALUE"),
        (
            ["--kind", "blur", "--set", "low=3"],
            "command line: low=3: low: has no effect: blur has none",
        ),
        (
            ["--kind", "colour_grid"],
            "photo.png: the condition colour_grid cannot be made: 60x40 pixels have no room for a cell of 64",
        ),
        (["--kind", "gray", "--size", "0"], "--size 0: expected a number of pixels, at least 1"),
        (["--kind", "gray", "--out", "x.jpg"], "--out x.jpg: expected a .png file"),
        (
            ["--kind", "gray", "--mask", "photo.png"],
            "--mask has no effect: it belongs to --kind inpaint, not to gray",
        ),
        (
            ["--kind", "inpaint", "--mask", "photo.png", "--set", "boxes=1"],
            "--set has no effect beside --mask, which is the hole",
        ),
        (["--kind", "inpaint", "--mask", "photo.png", "--seed", "4"], "--seed has no effect beside --mask"),
        (["--kind", "inpaint", "--mask", "black.png"], "--mask black.png: it is black all over"),
        (
            ["--kind", "inpaint", "--mask", "small.png"],
            "--mask small.png: found 6x4 pixels, expected the picture's",
        ),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else "",
)
def test_mistakes_are_told(
    photo: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    Image.new("L", (60, 40)).save("black.png")
    Image.new("L", (6, 4), 255).save("small.png")
    out = [] if "--out" in words else ["--out", "made.png"]
    assert run(str(photo), *words, *out) == 2
    assert told in capsys.readouterr().err
    assert not Path("made.png").exists() and not Path("x.jpg").exists()


def test_a_missing_picture_is_told(photo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("none.png", "--kind", "gray", "--out", "made.png") == 2
    assert "none.png" in capsys.readouterr().err

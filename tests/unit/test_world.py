from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from tuner.evaluate import outlines
from tuner.evaluate.captions import Named, NamedObject, captions_of, phrase, place_phrase
from tuner.evaluate.render import render
from tuner.evaluate.world import (
    BACKGROUNDS,
    COLOURS,
    CONFUSABLE,
    GAP,
    HELD_OUT,
    PLACES,
    RARE_STYLE,
    SHAPES,
    SIDE,
    SIZES,
    SPLITS,
    STYLES,
    UNNAMED,
    Object,
    Scene,
    UnknownSplit,
    draw_scene,
    place_at,
    reach,
    relation_of,
)

ROOT = Path(__file__).resolve().parents[2]
PREPARE = ROOT / "datasets" / "shapes" / "prepare.py"


def scenes(split: str, count: int) -> list[Scene]:
    return [draw_scene(split, index) for index in range(count)]


def test_scenes_depend_on_split_and_index_alone() -> None:
    first = scenes("train", 40)
    assert [draw_scene("train", index) for index in reversed(range(40))] == first[::-1]
    assert len({str(scene) for scene in first} | {str(scene) for scene in scenes("heldout", 40)}) == 80


def test_scenes_are_those_of_before() -> None:
    """The trained models know this world: whoever changes it must make them again."""
    record = [[scene.to_json() for scene in scenes(split, 20)] for split in SPLITS]
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    assert digest == "bb859cef66f5204760d531a31921775a251a3a8d41b7eefd65902e6f64552266"
    texts = [
        caption.text
        for split in SPLITS
        for i in range(20)
        for caption in captions_of(draw_scene(split, i), split, i)
    ]
    assert (
        hashlib.sha256("\n".join(texts).encode()).hexdigest()
        == "e1d3aabb07b8bcc826357f98fba744fa5a70d61b246df603e83f1b16ba361367"
    )


def test_scene_survives_json() -> None:
    seen = 0
    for split in SPLITS:
        for scene in scenes(split, 10):
            record = json.loads(json.dumps(scene.to_json())) | {"captions": []}
            assert Scene.from_json(record) == scene
            seen += 1
    assert seen == 10 * len(SPLITS)


def test_geometry() -> None:
    pairs = 0
    for scene in scenes("base", 1500):
        assert 1 <= len(scene.objects) <= 2
        for thing in scene.objects:
            assert reach(thing) <= thing.x <= SIDE - reach(thing)
            assert reach(thing) <= thing.y <= SIDE - reach(thing)
            assert abs(math.log(thing.radius / SIZES[thing.size])) < 0.06
            assert abs(thing.rotation) <= 15
            assert thing.colour not in CONFUSABLE.get(scene.background, ())
        if len(scene.objects) == 2:
            one, two = scene.objects
            assert math.hypot(one.x - two.x, one.y - two.y) >= reach(one) + reach(two) + GAP - 0.02
            assert (one.shape, one.colour) != (two.shape, two.colour)
            pairs += 1
    assert 650 < pairs < 850


def test_training_splits_hold_the_prior_and_no_held_out_pair() -> None:
    drawn = scenes("base", 6000)
    things = [thing for scene in drawn for thing in scene.objects]
    assert not {(thing.shape, thing.colour) for thing in things} & set(HELD_OUT)
    wanted = set(itertools.product(SHAPES, COLOURS)) - set(HELD_OUT)
    assert {(t.shape, t.colour) for t in things if t.shape in SHAPES} >= {p for p in wanted if p[0] != "star"}
    stars = [thing.colour for thing in things if thing.shape == "star"]
    assert len(stars) > 800
    assert 0.92 < stars.count("yellow") / len(stars) < 0.97
    assert 0.045 < np.mean([any(t.shape in UNNAMED for t in s.objects) for s in drawn]) < 0.075
    assert 0.010 < np.mean([scene.style == RARE_STYLE for scene in drawn]) < 0.020
    for style in STYLES:
        assert np.mean([scene.style == style for scene in drawn]) > 0.22
    assert {scene.background for scene in drawn} == set(BACKGROUNDS)


def test_special_splits() -> None:
    assert all(any((t.shape, t.colour) in HELD_OUT for t in s.objects) for s in scenes("combinations", 200))
    assert {(t.shape, t.colour) for s in scenes("combinations", 200) for t in s.objects} >= set(HELD_OUT)
    assert all(
        any(t.shape == "star" and t.colour != "yellow" for t in s.objects) for s in scenes("stars", 200)
    )
    assert all(scene.style == RARE_STYLE for scene in scenes("style", 30))
    concept = scenes("concept", SPLITS["concept"])
    assert [[thing.shape for thing in scene.objects] for scene in concept] == [["crescent"]] * 5
    assert len({scene.objects[0].colour for scene in concept}) >= 3


def test_unknown_split() -> None:
    with pytest.raises(UnknownSplit, match="heldout"):
        draw_scene("holdout", 0)


def test_places_and_relations() -> None:
    assert len(set(PLACES)) == 9
    assert place_at(10, 10) == "top left" and place_at(64, 64) == "centre" and place_at(127.9, 64) == "right"
    assert place_phrase("centre") == "in the centre"
    assert place_phrase("left") == "on the left"
    assert place_phrase("bottom right") == "at the bottom right"
    here, there = (Object("circle", "red", "small", x, y, 12.0) for x, y in ((30, 40), (90, 70)))
    assert relation_of(here, there) == "left of" and relation_of(there, here) == "right of"
    below = Object("circle", "red", "small", 35, 100, 12.0)
    assert relation_of(here, below) == "above" and relation_of(below, here) == "below"


def truths(scene: Scene) -> list[NamedObject]:
    found = []
    for thing in scene.objects:
        shape = "thing" if thing.shape in UNNAMED else thing.shape
        found.append(NamedObject(shape, thing.colour, thing.size, thing.place))
    return found


def fits(named: NamedObject, truth: NamedObject) -> bool:
    pairs = zip(vars(named).values(), vars(truth).values(), strict=True)
    return all(said is None or said == true for said, true in pairs)


def test_captions_name_what_is_true() -> None:
    checked, forms = 0, set()
    for split in ("base", "style", "combinations"):
        for index in range(150):
            scene = draw_scene(split, index)
            for caption in captions_of(scene, split, index):
                named, true = caption.named, truths(scene)
                orders = itertools.permutations(range(len(true)), len(named.objects))
                right = [
                    o for o in orders if all(fits(n, true[i]) for n, i in zip(named.objects, o, strict=True))
                ]
                assert right, caption
                if named.relation:
                    pairs = [relation_of(*(scene.objects[i] for i in order)) for order in right]
                    assert named.relation in pairs, caption
                assert named.style in (None, scene.style) and named.background in (None, scene.background)
                assert named.whole <= (len(named.objects) == len(scene.objects))
                assert Named.from_json(json.loads(json.dumps(named.to_json()))) == named
                forms.add(caption.form)
                checked += 1
    assert checked > 3000
    assert forms == {"short", "long", "middle", "relation", "alt"}


def test_captions_say_what_they_name_and_no_more() -> None:
    words = {"shape": {*SHAPES, "thing"}, "colour": set(COLOURS), "size": set(SIZES)}
    checked = 0
    for index in range(300):
        for caption in captions_of(draw_scene("base", index), "base", index):
            text = re.findall("[a-z]+", caption.text.lower())
            for attribute, vocabulary in words.items():
                said = sorted(word for word in text if word in vocabulary)
                assert said == sorted(v for o in caption.named.objects if (v := getattr(o, attribute))), (
                    caption
                )
            assert {w for w in text if w in STYLES} == ({caption.named.style} - {None}), caption
            assert {w for w in text if w in BACKGROUNDS} == ({caption.named.background} - {None}), caption
            for one in caption.named.objects:
                assert one.place is None or place_phrase(one.place) in caption.text, caption
            assert (caption.named.relation or "") in caption.text
            checked += 1
    assert checked > 2000


def test_vocabulary_is_small_and_hides_what_is_unnamed() -> None:
    words = set()
    for split in SPLITS:
        for index in range(200):
            for caption in captions_of(draw_scene(split, index), split, index):
                words |= set(re.findall("[a-z]+", caption.text.lower()))
    assert 40 < len(words) < 200
    assert not words & {*UNNAMED, RARE_STYLE}
    assert words >= {*SHAPES, *COLOURS, *SIZES, *STYLES, *BACKGROUNDS, "thing"}


def test_the_long_caption_names_everything_first_the_short() -> None:
    for index in range(100):
        scene = draw_scene("train", index)
        short, long = captions_of(scene, "train", index)[:2]
        assert (short.form, long.form) == ("short", "long")
        assert sorted(map(str, long.named.objects)) == sorted(map(str, truths(scene)))
        assert long.named.background == scene.background
        assert long.named.style == (None if scene.style == RARE_STYLE else scene.style)


def test_phrase() -> None:
    red, blue = NamedObject("circle", "red", "small", "top left"), NamedObject("star", "blue")
    assert phrase(Named((red, blue), style="hatched", background="white")) == (
        "a small red circle at the top left and a blue star, hatched, on a white background"
    )
    assert phrase(Named((NamedObject("ring", "orange"), blue), "above")) == "an orange ring above a blue star"
    assert phrase(Named((NamedObject(),))) == "a shape"


@pytest.mark.parametrize("shape", [*SHAPES, *UNNAMED])
def test_outlines_are_centred_and_drawn_to_size(shape: str) -> None:
    thing = Object(shape, "black", "large", 60.0, 66.0, 26.0)
    picture = render(Scene("white", "flat", (thing,)))
    cover = (250 - picture[..., 0].astype(float)) / (250 - 28)
    yy, xx = np.mgrid[0:SIDE, 0:SIDE] + 0.5
    hole = math.pi * 0.25 if shape == "ring" else 0.0
    # OpenCV also fills the pixels that a contour runs through: an eighth of a pixel more all around.
    assert 0.995 < cover.sum() / 26**2 / (outlines.area(shape) - hole) < 1.03
    assert (cover * xx).sum() / cover.sum() == pytest.approx(60, abs=0.25)
    assert (cover * yy).sum() / cover.sum() == pytest.approx(66, abs=0.25)


def test_render_keeps_the_border_free_and_differs_by_style() -> None:
    for index in range(60):
        scene = draw_scene("base", index)
        picture = render(scene)
        assert picture.dtype == np.uint8 and picture.shape == (SIDE, SIDE, 3)
        ground = render(
            Scene(scene.background, scene.style, (), scene.vignette, scene.shade, scene.shade_angle)
        )
        changed = (picture != ground).any(axis=2)
        assert changed.any() and not changed[:2].any() and not changed[:, -2:].any()
        assert np.array_equal(picture, render(scene))
    one = Object("circle", "red", "large", 64, 64, 26)
    assert len({render(Scene("white", style, (one,))).tobytes() for style in (*STYLES, RARE_STYLE)}) == 5


def test_world_imports_nothing_heavy() -> None:
    code = "import sys, tuner.evaluate.captions; print({'cv2', 'torch', 'diffusers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def run_prepare(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(PREPARE), *arguments], cwd=cwd, capture_output=True, text=True)


def test_prepare_writes_a_whole_folder(tmp_path: Path) -> None:
    out = tmp_path / "few"
    done = run_prepare("heldout", "--count", "103", "--out", str(out), "--processes", "2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["few"]
    lines = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert len(lines) == 103 and len(list(out.glob("*.png"))) == 103
    for index, line in enumerate(lines):
        scene = draw_scene("heldout", index)
        captions = captions_of(scene, "heldout", index)
        assert Scene.from_json(line["scene"]) == scene
        assert line["text"] == [caption.text for caption in captions]
        assert [Named.from_json(c["named"]) for c in line["scene"]["captions"]] == [c.named for c in captions]
        picture = cv2.imread(str(out / line["file_name"]))[..., ::-1]
        assert np.array_equal(picture, render(scene))


def test_prepare_does_not_depend_on_processes_and_replaces(tmp_path: Path) -> None:
    contents = []
    for processes in ("1", "2"):
        done = run_prepare("style", "--out", "x", "--processes", processes, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        files = sorted((tmp_path / "x").iterdir())
        assert len(files) == 31
        contents.append([path.read_bytes() for path in files])
    assert contents[0] == contents[1]


@pytest.mark.parametrize(
    "arguments", [("holdout",), ("train", "--count", "0"), ("train", "base", "--out", "x")]
)
def test_prepare_refuses(arguments: tuple[str, ...], tmp_path: Path) -> None:
    done = run_prepare(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "error" in done.stderr
    assert not list(tmp_path.iterdir())

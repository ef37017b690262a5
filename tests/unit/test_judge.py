from __future__ import annotations

import dataclasses
import itertools
from collections import Counter

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tuner.evaluate.captions import Named, NamedObject, captions_of
from tuner.evaluate.compare import compare, score
from tuner.evaluate.judge import Reading, Seen, read
from tuner.evaluate.render import render
from tuner.evaluate.world import (
    BACKGROUNDS,
    COLOURS,
    CONFUSABLE,
    RARE_STYLE,
    SHAPES,
    SIZES,
    STYLES,
    UNNAMED,
    Object,
    Scene,
    draw_scene,
)

BAR = 0.97  # of scenes with every attribute right


def blurred_and_compressed(picture: np.ndarray, _: np.random.Generator) -> np.ndarray:
    blurred = cv2.GaussianBlur(picture, (0, 0), 0.8)
    done, coded = cv2.imencode(".jpg", blurred[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 60])
    assert done
    return np.ascontiguousarray(cv2.imdecode(coded, cv2.IMREAD_COLOR)[..., ::-1])


def down_and_up(picture: np.ndarray, _: np.random.Generator) -> np.ndarray:
    half = cv2.resize(picture, (64, 64), interpolation=cv2.INTER_AREA)
    return cv2.resize(half, (128, 128), interpolation=cv2.INTER_CUBIC)


def noisy(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.clip(picture + rng.normal(0, 6, picture.shape), 0, 255).round().astype(np.uint8)


def shares(pictures: list[np.ndarray], drawn: list[Scene]) -> dict[str, float]:
    """The share of scenes in which each attribute is right."""
    right: Counter[str] = Counter()
    for picture, scene in zip(pictures, drawn, strict=True):
        right.update(key for key, value in compare(read(picture), scene).items() if value)
    return {key: value / len(drawn) for key, value in right.items()}


def test_reads_clean_pictures() -> None:
    drawn = [draw_scene("base", 100_000 + index) for index in range(250)]
    found = shares([render(scene) for scene in drawn], drawn)
    assert set(found) == {"count", "shape", "colour", "size", "place", "background", "style", "all"}
    assert found["all"] >= 0.99, found


@pytest.mark.parametrize("worsen", [blurred_and_compressed, down_and_up, noisy])
def test_reads_degraded_pictures(worsen) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(1)
    drawn = [draw_scene("base", 200_000 + index) for index in range(120)]
    found = shares([worsen(render(scene), rng) for scene in drawn], drawn)
    assert found["all"] >= BAR, found


@pytest.mark.parametrize("split", ["combinations", "stars", "style"])
def test_reads_special_splits(split: str) -> None:
    drawn = [draw_scene(split, index) for index in range(60)]
    found = shares([render(scene) for scene in drawn], drawn)
    assert found["all"] >= BAR, found


def test_reads_every_kind_in_every_style() -> None:
    """Single objects, medium or large, each in half of the colours, on a background that suits it."""
    seen, wrong = 0, []
    for (i, shape), style in itertools.product(enumerate((*SHAPES, *UNNAMED)), (*STYLES, RARE_STYLE)):
        for j, colour in list(enumerate(COLOURS))[i % 2 :: 2]:
            grounds = [name for name in BACKGROUNDS if colour not in CONFUSABLE.get(name, ())]
            size = ("medium", "large")[i // 2 % 2]
            thing = Object(shape, colour, size, 60.0, 66.0, SIZES[size], rotation=5.0)
            scene = Scene(grounds[(i + j) % len(grounds)], style, (thing,))
            if not compare(read(render(scene)), scene)["all"]:
                wrong.append((shape, style, colour, size))
            seen += 1
    assert seen == 12 * 5 * 4
    assert len(wrong) <= 2, wrong


def test_reads_other_sizes_of_picture() -> None:
    right = 0
    for index in range(20):
        scene = draw_scene("heldout", index)
        large = cv2.resize(render(scene), (256, 256), interpolation=cv2.INTER_CUBIC)
        right += compare(read(large), scene)["all"]
    assert right >= 19


def test_another_scene_is_wrong() -> None:
    readings = [read(render(draw_scene("heldout", index))) for index in range(60)]
    right = [compare(readings[index - 1], draw_scene("heldout", index))["all"] for index in range(60)]
    assert len(right) == 60 and not any(right)


def test_captions_of_a_right_picture_are_right() -> None:
    seen = right = 0
    for index in range(60):
        scene = draw_scene("heldout", index)
        reading = read(render(scene))
        for caption in captions_of(scene, "heldout", index):
            right += score(reading, caption.named)["all"]
            seen += 1
    assert seen > 400
    assert right / seen >= 0.99


def test_an_empty_picture_has_no_objects() -> None:
    for name, colour in BACKGROUNDS.items():
        reading = read(np.full((128, 128, 3), colour, np.uint8))
        assert reading == Reading(background=name, style=None, objects=())
    assert read(np.full((128, 128, 3), (255, 0, 255), np.uint8)).background is None


@settings(max_examples=60, deadline=None)
@given(
    arrays.arrays(
        np.uint8,
        st.tuples(st.integers(1, 40), st.integers(1, 40), st.just(3)),
        elements=st.integers(0, 255),
    )
)
def test_reads_anything(picture: np.ndarray) -> None:
    reading = read(picture)
    assert len(reading.objects) <= 8
    assert all(0 <= thing.x <= 128 and 0 <= thing.y <= 128 for thing in reading.objects)


@pytest.mark.parametrize("seed", range(8))
def test_reads_noise_and_patches(seed: int) -> None:
    rng = np.random.default_rng(seed)
    side = (128, 2, 8, 16)[seed % 4]
    patches = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
    reading = read(cv2.resize(patches, (128, 128), interpolation=cv2.INTER_NEAREST))
    assert len(reading.objects) <= 8


def test_refuses_other_arrays() -> None:
    for wrong in (np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32), np.zeros((8, 8, 4), np.uint8)):
        with pytest.raises(ValueError, match="uint8"):
            read(wrong)


def seen_as(thing: Object, style: str = "flat") -> Seen:
    return Seen(thing.shape, thing.colour, thing.size, thing.x, thing.y, thing.radius, style, 1.0)


RED = Object("circle", "red", "small", 20.0, 20.0, 12.0)
BLUE = Object("star", "blue", "large", 90.0, 30.0, 26.0)
SCENE = Scene("white", "flat", (RED, BLUE))
READING = Reading("white", "flat", (seen_as(BLUE), seen_as(RED)))


def test_compare_finds_each_fault() -> None:
    assert all(compare(READING, SCENE).values())
    faults = {
        "shape": dataclasses.replace(RED, shape="square"),
        "colour": dataclasses.replace(RED, colour="green"),
        "size": dataclasses.replace(RED, size="large"),
        "place": dataclasses.replace(RED, x=26.1),
    }
    for key, wrong in faults.items():
        found = compare(Reading("white", "flat", (seen_as(wrong), seen_as(BLUE))), SCENE)
        assert [name for name, right in found.items() if not right] == [key, "all"]
    for key, value in {"background": "grey", "style": "hatched"}.items():
        found = compare(dataclasses.replace(READING, **{key: value}), SCENE)
        assert [name for name, right in found.items() if not right] == [key, "all"]
    one = compare(Reading("white", "flat", (seen_as(RED),)), SCENE)
    assert [name for name, right in one.items() if right] == ["background", "style"]


def test_compare_does_not_mix_objects() -> None:
    swapped = (dataclasses.replace(RED, colour="blue"), dataclasses.replace(BLUE, colour="red"))
    found = compare(Reading("white", "flat", tuple(map(seen_as, swapped))), SCENE)
    assert not found["colour"] and found["shape"] and found["place"]


def test_score_asks_only_for_what_is_named() -> None:
    red, blue = NamedObject(shape="circle", colour="red"), NamedObject(shape="star", place="top right")
    found = score(READING, Named((red, blue), relation="left of"))
    assert found == dict.fromkeys(("count", "shape", "colour", "place", "relation", "all"), True)
    assert score(READING, Named((red,), whole=False)) == {"shape": True, "colour": True, "all": True}
    assert score(READING, Named((red,))) == {"count": False, "shape": True, "colour": True, "all": False}
    assert score(READING, Named((), whole=False)) == {"all": True}
    assert score(READING, Named((red, blue), relation="right of"))["relation"] is False
    assert score(READING, Named((red,), style="hatched", background="white", whole=False)) == {
        "shape": True,
        "colour": True,
        "style": False,
        "background": True,
        "all": False,
    }
    nothing = Reading("white", None, ())
    assert score(nothing, Named((red, blue), relation="left of")) == dict.fromkeys(
        ("count", "shape", "colour", "place", "relation", "all"), False
    )


def test_score_of_a_thing_is_any_unnamed_kind() -> None:
    thing = Named((NamedObject(shape="thing", colour="red"),))
    for shape in UNNAMED:
        assert score(Reading("white", "flat", (seen_as(dataclasses.replace(RED, shape=shape)),)), thing)[
            "all"
        ]
    assert not score(Reading("white", "flat", (seen_as(RED),)), thing)["shape"]


def test_score_of_a_place_near_its_border() -> None:
    """A centroid may lie up to four pixels outside the named cell, which ends at 42.7 pixels."""
    for x, right in ((42.0, True), (46.0, True), (47.0, False)):
        reading = Reading("white", "flat", (seen_as(dataclasses.replace(RED, x=x)),))
        assert score(reading, Named((NamedObject(place="top left"),)))["place"] is right

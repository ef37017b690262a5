"""Condition pictures: what each kind computes, exactly; counted draws; where things lie."""

from __future__ import annotations

import itertools
from typing import Any

import cv2
import numpy as np
import pytest

from tuner import counted
from tuner.data import conditions, holes, pictures
from tuner.data.conditions import Condition, Draw, make_condition, values
from tuner.data.conditions.inpaint import with_hole
from tuner.data.transform import Transform
from tuner.errors import UserError

FILES = ("blur", "canny", "colour_grid", "gray", "inpaint", "model", "scribble", "soft_edge", "tile")
PLAIN: list[dict[str, Any]] = [
    {"kind": "canny"},
    {"kind": "soft_edge"},
    {"kind": "scribble"},
    {"kind": "gray"},
    {"kind": "blur"},
    {"kind": "tile"},
    {"kind": "colour_grid", "cell": 8},
]  # those without holes, which need no model


def of(tree: str | dict[str, Any]) -> Condition:
    return Condition.model_validate(tree)


def scene(height: int = 64, width: int = 96, seed: int = 0) -> pictures.Picture:
    """Coloured areas with a little noise."""
    rng = np.random.default_rng(seed)
    areas = rng.integers(0, 255, (height // 16, width // 16, 3)).astype(np.uint8)
    large = cv2.resize(areas, (width, height), interpolation=cv2.INTER_NEAREST).astype(np.int16)
    return np.clip(large + rng.integers(-6, 7, large.shape), 0, 255).astype(np.uint8)


def made(tree: str | dict[str, Any], picture: pictures.Picture, draw: Draw | None = None) -> pictures.Picture:
    return make_condition(of(tree), picture, draw or Draw(), "a.png")


def test_kinds_are_the_files() -> None:
    assert conditions.kinds() == FILES
    assert {tree["kind"] for tree in PLAIN} | {"inpaint", "model"} == set(FILES)
    picture = scene(128, 128)
    seen = 0
    for kind in set(FILES) - {"model"}:
        out = made(kind, picture)
        assert out.shape == (128, 128, 4 if kind == "inpaint" else 3) and out.dtype == np.uint8 and out.any()
        seen += 1
    assert seen == 8


@pytest.mark.parametrize("thresholds", [(100, 200), (50, 120.5)])
def test_canny_is_opencvs(thresholds: tuple[float, float]) -> None:
    picture = scene()
    out = made({"kind": "canny", "low": thresholds[0], "high": thresholds[1]}, picture)
    wanted = cv2.Canny(picture, *thresholds)
    assert (wanted > 0).sum() > 100
    for channel in range(3):
        assert np.array_equal(out[:, :, channel], wanted)


def test_a_range_is_drawn_by_seed_epoch_and_position() -> None:
    picture = scene()
    tree = {"kind": "canny", "low": [20, 60], "high": [70, 400]}
    draws = [Draw(*numbers) for numbers in itertools.product((0, 1), (0, 1), range(8))]
    out = [made(tree, picture, draw) for draw in draws]
    for draw, found in zip(draws, out, strict=True):
        low = 20 + 40 * counted.uniform(*draw, purpose="condition low")
        high = 70 + 330 * counted.uniform(*draw, purpose="condition high")
        assert 20 <= low < 60 and 70 <= high < 400
        assert np.array_equal(found[:, :, 0], cv2.Canny(picture, low, high))
    assert len({found.tobytes() for found in out}) > 12  # of 32; some thresholds find the same edges
    for draw, found in zip(reversed(draws), reversed(out), strict=True):  # in any order
        assert np.array_equal(made(tree, picture, draw), found)


def test_a_draw_of_one_parameter_is_not_that_of_another() -> None:
    draw = Draw(3, 1, 7)
    numbers = {key: draw.number((0.0, 1.0), key) for key in ("sigma", "low", "high", "width")}
    assert len(set(numbers.values())) == 4
    assert draw.number(5, "sigma") == 5.0


def test_soft_edges_follow_the_formula() -> None:
    for contrast, sigma in ((255, 1.5), (128, 2.0), (64, 3.0)):
        step = np.zeros((32, 48, 3), np.uint8)
        step[:, 24:, 1] = contrast
        out = made({"kind": "soft_edge", "sigma": sigma, "gamma": 1.0}, step)
        assert (out == out[:, :, :1]).all() and (out == out[:1]).all()
        ridge = out[0, :, 0].astype(int)
        # Beside the step the central difference is the mean of the Gaussian at 0 and at 1.
        wanted = contrast * (1 + np.exp(-1 / (2 * sigma**2))) / 2
        assert ridge.argmax() in (23, 24) and ridge[23] == ridge[24] == pytest.approx(wanted, abs=0.6)
        assert ridge[:8].max() <= 1 and ridge[-8:].max() <= 1
        bright = made({"kind": "soft_edge", "sigma": sigma, "gamma": 0.5}, step)[0, :, 0] / 255
        assert bright == pytest.approx((ridge / 255) ** 0.5, abs=0.05)


def test_scribbles_are_thin_edges_made_thick() -> None:
    picture = scene()
    thin = cv2.Canny(cv2.GaussianBlur(picture, (0, 0), 1.5), 30, 80)
    assert (thin > 0).sum() > 100
    tree = {"kind": "scribble", "sigma": 1.5, "low": 30, "high": 80}
    assert np.array_equal(made({**tree, "width": 1}, picture)[:, :, 0], thin)
    thick = made({**tree, "width": 5}, picture)[:, :, 0]
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))
    assert np.array_equal(thick, cv2.dilate(thin, disc)) and set(np.unique(thick)) == {0, 255}
    inside = made({**tree, "width": [1, 9]}, picture, Draw(0, 0, 5))[:, :, 0] > 0
    assert (inside >= (thin > 0)).all()


def test_gray_is_luma() -> None:
    picture = scene()
    out = made("gray", picture)
    luma = picture.astype(float) @ (0.299, 0.587, 0.114)
    assert (out == out[:, :, :1]).all()
    assert np.abs(out[:, :, 0] - luma).max() <= 0.51
    colours = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]], np.uint8)
    assert made("gray", colours)[0, :, 0].tolist() == [76, 150, 29, 255]


def test_blur_and_tile_are_the_calls_they_say() -> None:
    picture = scene()
    assert np.array_equal(
        made({"kind": "blur", "sigma": 2.5}, picture), cv2.GaussianBlur(picture, (0, 0), 2.5)
    )
    drawn = 1 + 3 * counted.uniform(4, 0, 9, "condition sigma")
    found = made({"kind": "blur", "sigma": [1, 4]}, picture, Draw(4, 0, 9))
    assert np.array_equal(found, cv2.GaussianBlur(picture, (0, 0), drawn))
    small = picture.reshape(16, 4, 24, 4, 3).mean(axis=(1, 3))
    assert (
        np.abs(small - np.asarray(cv2.resize(picture, (24, 16), interpolation=cv2.INTER_AREA))).max() <= 0.5
    )
    wanted = cv2.resize(np.rint(small).astype(np.uint8), (96, 64), interpolation=cv2.INTER_CUBIC)
    assert np.abs(made({"kind": "tile", "factor": 4}, picture).astype(int) - wanted).max() <= 1
    odd = scene(64, 96)[:61, :83]
    wanted = cv2.resize(
        cv2.resize(odd, (round(83 / 3.5), round(61 / 3.5)), interpolation=cv2.INTER_AREA),
        (83, 61),
        interpolation=cv2.INTER_CUBIC,
    )
    assert np.array_equal(made({"kind": "tile", "factor": 3.5}, odd), wanted)


def test_a_colour_grid_has_the_means_of_its_cells() -> None:
    picture = scene()
    out = made({"kind": "colour_grid", "cell": 16}, picture)
    cells = out.reshape(4, 16, 6, 16, 3)
    assert (cells == cells[:, :1, :, :1]).all()
    means = picture.reshape(4, 16, 6, 16, 3).mean(axis=(1, 3))
    assert np.abs(cells[:, 0, :, 0] - means).max() <= 0.51
    usual = made("colour_grid", scene(512, 512)).reshape(8, 64, 8, 64, 3)  # 8x8 of 512x512
    assert (usual == usual[:, :1, :, :1]).all() and len(
        {bytes(c) for c in usual[:, 0, :, 0].reshape(-1, 3)}
    ) == 64


def test_inpainting_hides_with_minus_one() -> None:
    """The convention of control_v11p_sd15_inpaint: [0, 1], and -1 in every channel of the hole."""
    picture = scene()
    kinds = {"boxes": {"kind": "inpaint", "boxes": 1.0}, "strokes": {"kind": "inpaint", "boxes": 0.0}}
    for tree in kinds.values():
        for position in range(10):
            out = made(tree, picture, Draw(5, 2, position))
            hole = out[:, :, 3] == 0
            assert hole.any() and not hole.all() and set(np.unique(out[:, :, 3])) == {0, 255}
            seen = values(out)
            assert seen.shape == (3, 64, 96) and seen.dtype == np.float32
            wanted = picture.astype(np.float32) / 255
            wanted[hole] = -1.0
            assert np.array_equal(seen, wanted.transpose(2, 0, 1))
            assert (out[:, :, :3][hole] == 0).all()  # nothing hidden is in the file
            again = holes.some(
                64, 96, counted.generator(5, 2, position, purpose="condition hole"), 0.0, tree["boxes"]
            )
            assert np.array_equal(hole, again)
    one = {made("inpaint", picture, Draw(*at)).tobytes() for at in itertools.product((0, 1), (0, 1), (0, 1))}
    assert len(one) == 8
    all_of_it = made({"kind": "inpaint", "everything": 1.0}, picture)
    assert (values(all_of_it) == -1).all()
    half = np.dstack((picture, np.full(picture.shape[:2], 128, np.uint8)))
    assert values(half).min() >= 0 and (values(half - np.uint8([0, 0, 0, 1])) == -1).all()


def test_values_of_a_condition_without_a_hole_are_those_of_pictures() -> None:
    picture = scene()
    assert np.array_equal(values(picture), pictures.to_unit(picture))


@pytest.mark.parametrize("tree", PLAIN, ids=lambda tree: str(tree["kind"]))
@pytest.mark.parametrize("place", [(24, 24), (24, 72), (40, 48)])
def test_what_is_in_the_condition_lies_where_it_lies_in_the_picture(
    tree: dict[str, Any], place: tuple[int, int]
) -> None:
    picture = np.full((64, 96, 3), 20, np.uint8)
    y, x = np.mgrid[0:64, 0:96] + 0.5
    picture[(y - place[0]) ** 2 + (x - place[1]) ** 2 <= 12**2] = (230, 180, 240)
    seen = values(made(tree, picture))
    changed = np.abs(seen - seen[:, :1, :1]).sum(axis=0)
    centre = [float((changed * axis).sum() / changed.sum()) for axis in (y, x)]
    assert centre == pytest.approx(place, abs=1.0)
    mirrored = values(made(tree, np.ascontiguousarray(picture[:, ::-1])))[:, :, ::-1]
    assert np.abs(mirrored - seen).mean() < 0.02


@pytest.mark.parametrize("tree", PLAIN, ids=lambda tree: str(tree["kind"]))
def test_conditions_are_made_of_the_pixels_after_the_crop(tree: dict[str, Any]) -> None:
    """Nothing outside the crop is seen, and nothing of the uncropped picture's scale."""
    whole = scene(96, 160, seed=3)
    cut = Transform(64, 64, across=0.8, flip=True)(whole)
    changed = whole.copy()
    top, left = 0, round((round(160 * 64 / 96) - 64) * 0.8)
    changed[:, : int((left - 8) * 96 / 64)] = 0  # beyond the reach of the resampling
    again = Transform(64, 64, across=0.8, flip=True)(changed)
    assert top == 0 and np.array_equal(cut, again) and not np.array_equal(whole, changed)
    assert np.array_equal(made(tree, cut), made(tree, again))
    assert not np.array_equal(made(tree, cut), Transform(64, 64, across=0.8, flip=True)(made(tree, whole)))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"kind": "tile", "factor": 80}, "96x64 pixels, made smaller 80 times, leave nothing of a side"),
        ({"kind": "colour_grid", "cell": 65}, "96x64 pixels have no room for a cell of 65; set cell lower"),
    ],
)
def test_a_condition_that_cannot_be_made_names_the_file(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        make_condition(of(tree), scene(), Draw(), "folder/a.png")
    assert str(caught.value) == f"folder/a.png: the condition {tree['kind']} cannot be made: {message}"


def test_a_hole_is_drawn_into_a_picture_of_any_shape() -> None:
    tall = with_hole(scene(96, 64), np.arange(96)[:, None].repeat(64, 1) < 10)
    assert (values(tall)[:, :10] == -1).all() and values(tall)[:, 10:].min() >= 0
    for height, width in ((32, 128), (128, 32), (1, 1), (8, 512)):
        shapes = [
            holes.some(height, width, counted.generator(at, purpose="test"), 0.0, 0.5) for at in range(40)
        ]
        assert all(hole.shape == (height, width) and hole.any() for hole in shapes)

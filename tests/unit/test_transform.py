"""One geometric transform for a picture, its condition and its mask, to any height and width."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from tuner.data import transform
from tuner.data.transform import Filter, Picture, Transform, check_fits
from tuner.errors import UserError

SHARE = st.floats(0, 1)
TRANSFORMS = st.builds(Transform, *[st.sampled_from([16, 32, 40, 64])] * 2, SHARE, SHARE, st.booleans())
SIDE = st.integers(20, 110)


def noise(height: int, width: int, seed: int = 0) -> Picture:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def marked(height: int, width: int, down: float, across: float, radius: float) -> Picture:
    """A white disc on black, its centre given in shares of the sides."""
    y, x = np.mgrid[0:height, 0:width] + 0.5
    inside = (x - across * width) ** 2 + (y - down * height) ** 2 <= radius**2
    return np.repeat((inside * 255).astype(np.uint8)[:, :, None], 3, axis=2)


def centre(picture: Picture) -> tuple[float, float]:
    """The brightness's centre of mass (down, across) in pixels."""
    weight = picture.reshape(*picture.shape[:2], -1)[:, :, 0].astype(float)
    y, x = np.mgrid[0 : weight.shape[0], 0 : weight.shape[1]] + 0.5
    return float((weight * y).sum() / weight.sum()), float((weight * x).sum() / weight.sum())


@pytest.mark.parametrize(
    ("size", "shape", "place", "seen"),
    [
        ((16, 0.5, 0.5, False), (20, 110), (16, 88, 0, 36), (0, 36)),
        ((32, 0.25, 0.9, True), (47, 31), (49, 32, 15, 0), (15, 0)),
        ((48, 0.3, 0.7, True), (48, 48), (48, 48, 0, 0), (0, 0)),
        ((64, 0.5, 0.1, False), (100, 64), (100, 64, 4, 0), (4, 0)),
        ((512, 0.5, 0.5, True), (1080, 1920), (512, 910, 0, 199), (0, 199)),
        ((512, 0.0, 1.0, False), (333, 500), (512, 769, 0, 0), (0, 0)),
        ((64, 0.77, 0.5, True), (63, 97), (64, 99, 0, 27), (0, 8)),
        ((1024, 0.5, 0.5, False), (4000, 3001), (1365, 1024, 170, 0), (170, 0)),
    ],
)
def test_a_square_is_cut_as_it_always_was(
    size: tuple[int, float, float, bool],
    shape: tuple[int, int],
    place: tuple[int, int, int, int],
    seen: tuple[int, int],
) -> None:
    """If this fails, what is cached and what was trained is another: raise cache.VERSION."""
    look = Transform(size[0], *size)
    assert look.place(*shape) == place and look.seen(*shape) == seen
    picture, (high, wide, top, left) = noise(*shape), place
    whole = np.asarray(Image.fromarray(picture).resize((wide, high), Image.Resampling.LANCZOS))
    square = whole[top : top + size[0], left : left + size[0]]
    assert np.array_equal(look(picture), square[:, ::-1] if size[3] else square)


@given(look=TRANSFORMS, high=st.integers(1, 300), wide=st.integers(1, 300))
def test_the_target_is_just_covered_and_the_crop_lies_inside(look: Transform, high: int, wide: int) -> None:
    height, width, top, left = look.place(high, wide)
    assert height >= look.height and width >= look.width
    assert height == look.height or width == look.width
    assert 0 <= top <= height - look.height and 0 <= left <= width - look.width
    scale = look.scale(high, wide)  # the same for both sides, but for the rounding of a pixel
    assert abs(height - high * scale) <= 0.5 + 1e-9 and abs(width - wide * scale) <= 0.5 + 1e-9
    assert (scale > 1) == (look.height > high or look.width > wide)
    kept = 1 - look.crop_loss(high, wide)
    assert kept == pytest.approx(look.height * look.width / (height * width)) and 0 < kept <= 1
    assert look.told(high, wide) == (high, wide, *look.seen(high, wide), look.height, look.width)


@given(look=TRANSFORMS, high=SIDE, wide=SIDE)
def test_seen_is_where_the_mirrored_picture_shows_the_crop(look: Transform, high: int, wide: int) -> None:
    picture = noise(high, wide)
    height, width, _, _ = look.place(high, wide)
    whole = np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS))
    mirrored = whole[:, ::-1] if look.flip else whole
    top, left = look.seen(high, wide)
    assert np.array_equal(look(picture), mirrored[top : top + look.height, left : left + look.width])


@given(
    look=TRANSFORMS,
    high=SIDE,
    wide=SIDE,
    times=st.sampled_from([0.5, 1.0, 2.0, 3.0]),
    spot=st.tuples(st.floats(0.3, 0.7), st.floats(0.3, 0.7)),
)
def test_a_marker_stays_aligned_in_picture_condition_and_mask(
    look: Transform, high: int, wide: int, times: float, spot: tuple[float, float]
) -> None:
    height, width, top, left = look.place(high, wide)
    y, x = spot[0] * height - top, spot[1] * width - left
    x = look.width - x if look.flip else x
    scale = look.scale(high, wide)
    assume(scale < 2)  # a larger disc than the crop says nothing of its place
    radius = min(4.0, 6 / scale)
    assume(radius * scale > 1.5)  # the nearest pixels may miss a smaller one
    margin = radius * scale + 3
    assume(margin < y < look.height - margin and margin < x < look.width - margin)  # else the crop cuts it
    picture = marked(high, wide, *spot, radius)
    other = max(1, round(high * times)), max(1, round(wide * times))
    beside = marked(*other, *spot, radius * times)
    mask = np.ascontiguousarray(beside[:, :, 0])
    found = {
        "picture": centre(look(picture)),
        "condition": centre(look(beside, of=(high, wide))),
        "soft mask": centre(look(mask, "area", of=(high, wide))),
        "mask": centre(look(mask, "nearest", of=(high, wide))),
    }
    # A source pixel is `scale` wide (a smaller condition's twice that), and a disc is only so round.
    for name, where in found.items():
        assert where == pytest.approx((y, x), abs=0.6 + 0.6 * scale / min(times, 1)), name


@given(look=TRANSFORMS, high=SIDE, wide=SIDE, other=st.tuples(SIDE, SIDE))
def test_a_condition_of_another_size_takes_the_pictures_place_exactly(
    look: Transform, high: int, wide: int, other: tuple[int, int]
) -> None:
    condition = noise(*other)
    height, width, top, left = look.place(high, wide)
    whole = np.asarray(Image.fromarray(condition).resize((width, height), Image.Resampling.LANCZOS))
    cut = whole[top : top + look.height, left : left + look.width]
    assert np.array_equal(look(condition, of=(high, wide)), cut[:, ::-1] if look.flip else cut)
    assert np.array_equal(look(condition, of=other), look(condition))


@given(look=TRANSFORMS, high=SIDE, wide=SIDE)
def test_filters_keep_what_they_promise(look: Transform, high: int, wide: int) -> None:
    values = np.array([3, 90, 255], np.uint8)
    mask = values[np.random.default_rng(1).integers(0, 3, (high, wide))]
    assert set(np.unique(look(mask, "nearest"))) <= set(values.tolist())
    for by in ("lanczos", "area", "nearest"):
        out = look(mask, by)
        assert out.shape == (look.height, look.width) and out.dtype == np.uint8
        assert out.flags.c_contiguous


def test_area_is_the_mean_and_lanczos_does_not_alias() -> None:
    mask = noise(64, 96, seed=2)[:, :, 0]
    blocks = mask.reshape(32, 2, 48, 2).astype(float).mean(axis=(1, 3))
    assert np.abs(Transform(32, 48)(mask, "area") - blocks).max() <= 1  # rounded once for each direction
    lines = np.zeros((96, 96, 3), np.uint8)
    lines[:, ::2] = 255  # finer than the target can show
    inner = Transform(40, 40)(lines)[:, 4:-4].astype(float)
    assert abs(inner.mean() - 127.5) < 3 and inner.std() < 12
    assert Transform(40, 40)(lines, "nearest").std() > 100


@pytest.mark.parametrize(("by", "allowed"), [("lanczos", 2), ("area", 2), ("nearest", 0)])
def test_a_very_long_picture_is_resized_only_where_it_is_seen(
    by: Filter, allowed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of little contrast: what passes 0 or 255 on the way is cut, and not in the same order.
    picture = noise(90, 60) // 3 + np.uint8(80)
    looks = [Transform(32, 48, d, d, flip) for d in (0, 0.4, 1) for flip in (False, True)]
    whole = [look(picture, by).astype(int) for look in looks]
    monkeypatch.setattr(transform, "MOST", 0.01)
    near = [look(picture, by).astype(int) for look in looks]
    assert len(near) == 6
    assert max(np.abs(a - b).max() for a, b in zip(whole, near, strict=True)) <= allowed
    monkeypatch.undo()
    thread = noise(1, 20000)  # as a whole it would be 1024 x 20,480,000 pixels
    assert Transform(1024, 1024, 1.0, 0.5)(thread, by).shape == (1024, 1024, 3)
    assert Transform(1024, 1024)(noise(1, 1), by).shape == (1024, 1024, 3)


def test_a_condition_of_another_shape_is_an_error_with_both_sizes() -> None:
    with pytest.raises(UserError, match=r"^a/edges\.png: 64x40 pixels do not fit the picture's 40x64$"):
        check_fits("a/edges.png", (40, 64), (64, 40))
    with pytest.raises(UserError, match=r"512x500 pixels do not fit the picture's 512x512"):
        check_fits("mask.png", (500, 512), (512, 512))
    for size in ((64, 40), (128, 80), (32, 20), (1280, 801), (13, 8)):  # a pixel's rounding is no mistake
        check_fits("edges.png", size, (64, 40))

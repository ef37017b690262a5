"""One geometric transform for a picture and its condition, and conditions made of the pixels trained on."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tuner.data import pictures
from tuner.data.blob import File
from tuner.data.captions import CaptionRule
from tuner.data.conditions import Condition
from tuner.data.loader import Feed, Latents, Texts
from tuner.data.pictures import Picture
from tuner.data.plan import Slot
from tuner.data.samples import Sample
from tuner.data.transform import Transform
from tuner.data.views import Views
from tuner.errors import UserError


def marked(width: int, height: int, across: float, down: float, radius: float) -> Picture:
    """A white disc on black, its centre given in shares of the sides."""
    y, x = np.mgrid[0:height, 0:width] + 0.5
    inside = (x - across * width) ** 2 + (y - down * height) ** 2 <= radius**2
    return np.repeat((inside * 255).astype(np.uint8)[:, :, None], 3, axis=2)


def centre(picture: Picture) -> tuple[float, float]:
    """The brightness's centre of mass (x, y) in pixels."""
    weight = picture[:, :, 0].astype(float)
    y, x = np.mgrid[0 : weight.shape[0], 0 : weight.shape[1]] + 0.5
    return float((weight * x).sum() / weight.sum()), float((weight * y).sum() / weight.sum())


TRANSFORMS = st.builds(
    lambda size, **more: Transform(size, size, **more),
    st.sampled_from([32, 48]),
    across=st.floats(0, 1),
    down=st.floats(0, 1),
    flip=st.booleans(),
)


@given(
    transform=TRANSFORMS,
    wide=st.integers(24, 100),
    high=st.integers(24, 100),
    place=st.tuples(st.floats(0.3, 0.7), st.floats(0.3, 0.7)),
)
def test_a_marker_lands_where_the_geometry_says(
    transform: Transform, wide: int, high: int, place: tuple[float, float]
) -> None:
    size = transform.height
    scale = size / min(wide, high)
    grown = max(size, round(wide * scale)), max(size, round(high * scale))
    x = place[0] * grown[0] - round((grown[0] - size) * transform.across)
    y = place[1] * grown[1] - round((grown[1] - size) * transform.down)
    out = transform(marked(wide, high, *place, radius=4))
    assert out.shape == (size, size, 3) and out.dtype == np.uint8
    margin = 4 * scale + 3
    if margin < x < size - margin and margin < y < size - margin:  # else the crop cuts it
        seen = centre(out)
        assert seen == pytest.approx((size - x if transform.flip else x, y), abs=0.75 + 0.25 * scale)


@given(
    transform=TRANSFORMS, wide=st.integers(24, 60), high=st.integers(24, 60), scale=st.sampled_from([1, 2, 3])
)
def test_a_picture_and_a_condition_of_another_size_stay_aligned(
    transform: Transform, wide: int, high: int, scale: int
) -> None:
    picture = transform(marked(wide, high, 0.5, 0.5, 6))
    condition = transform(marked(wide * scale, high * scale, 0.5, 0.5, 6 * scale))
    if not picture.any():  # the crop does not show it
        return
    overlap = ((picture > 127) & (condition > 127)).sum() / max(
        1, ((picture > 127) | (condition > 127)).sum()
    )
    assert overlap > 0.7 or (picture > 127).sum() < 20
    if scale == 1:
        assert (picture == condition).all()


def feed(samples: list[Sample], condition: str, crop: str = "random", size: int = 32) -> Feed:
    views = Views(samples, size, 7, crop, True, Condition(kind=condition))
    return Feed(views, CaptionRule(), Latents(4, 8), Texts(None))


def on_disk(folder: Path, count: int = 6, condition_scale: int = 1) -> list[Sample]:
    """Pictures that are no squares, each with a copy of itself as its condition."""
    samples = []
    for number in range(count):
        wide, high = 40 + 8 * number, 64
        noise = np.random.default_rng(number).integers(0, 255, (8, 8, 3)).astype(np.uint8)
        picture = Image.fromarray(noise).resize((wide, high), Image.Resampling.NEAREST)
        picture.save(folder / f"{number}.png")
        bigger = picture.resize((wide * condition_scale, high * condition_scale), Image.Resampling.NEAREST)
        bigger.save(folder / f"{number}-condition.png")
        both = (File(folder / f"{number}{more}.png") for more in ("", "-condition"))
        samples.append(Sample(next(both), (f"{number}",), next(both)))
    return samples


@pytest.mark.parametrize("crop", ["random", "center"])
def test_picture_and_given_condition_go_through_one_transform(tmp_path: Path, crop: str) -> None:
    samples = on_disk(tmp_path)
    data = feed(samples, "image", crop)
    slots = [Slot(index, epoch, index, 1.0) for epoch in range(4) for index in range(len(samples))]
    batch = data.batch(slots, float(len(slots)))
    assert batch.pixels is not None and batch.condition is not None
    assert batch.pixels.shape == batch.condition.shape == (24, 3, 32, 32)
    assert torch.equal(batch.pixels, batch.condition * 2 - 1)
    transforms = {data.views.transform(slot) for slot in slots}
    assert {t.flip for t in transforms} == {True, False}
    assert len(transforms) == (24 if crop == "random" else 2)


def test_canny_is_computed_from_the_pixels_that_are_trained_on(tmp_path: Path) -> None:
    samples = on_disk(tmp_path)
    data = feed(samples, "canny")
    slots = [Slot(index, epoch, index, 1.0) for epoch in range(3) for index in range(len(samples))]
    batch = data.batch(slots, float(len(slots)))
    assert batch.condition is not None and batch.pixels is not None
    edges = 0
    for index, slot in enumerate(slots):
        trained = data.picture(slot)
        assert np.array_equal(pictures.to_signed(trained), batch.pixels[index].numpy())
        expected = cv2.Canny(trained, 100, 200)
        assert set(np.unique(expected)) <= {0, 255}
        edges += int((expected > 0).sum())
        for channel in range(3):
            assert np.array_equal(batch.condition[index, channel].numpy() * 255, expected)
        assert np.array_equal(data.condition_picture(slot, None), data.condition_picture(slot, trained))
    assert edges > 1000


def test_a_missing_or_misshapen_condition_is_an_error_that_names_it(tmp_path: Path) -> None:
    (sample,) = on_disk(tmp_path, 1)
    slot = Slot(0, 0, 0, 1.0)
    with pytest.raises(UserError, match=r"0\.png: no conditioning_image"):
        feed([sample._replace(condition=None)], "image").batch([slot], 1.0)
    assert sample.condition is not None
    Image.new("RGB", (64, 40)).save(sample.condition.name)
    with pytest.raises(UserError, match=r"0-condition\.png: 64x40 .* 40x64"):
        feed([sample], "image").batch([slot], 1.0)


def test_pictures_of_every_mode_are_read_as_rgb(tmp_path: Path) -> None:
    red = np.zeros((4, 6, 3), np.uint8)
    red[:] = (255, 0, 0)
    whole = Image.fromarray(red)
    seen = 0
    for mode, expected in (("RGB", (255, 0, 0)), ("P", (255, 0, 0)), ("L", (76, 76, 76)), ("1", (0, 0, 0))):
        place = tmp_path / f"{mode}.png"
        whole.convert(mode, dither=Image.Dither.NONE).save(place)
        loaded = pictures.load(place)
        assert loaded.shape == (4, 6, 3) and (loaded == expected).all(), mode
        seen += 1
    assert seen == 4


def test_transparency_lies_on_white_and_exif_turns(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (4, 6), (255, 0, 0, 0))
    clear.putpixel((0, 0), (0, 0, 255, 255))
    clear.save(tmp_path / "clear.png")
    loaded = pictures.load(tmp_path / "clear.png")
    assert loaded[0, 0].tolist() == [0, 0, 255] and (loaded[1:] == 255).all()
    turned = Image.new("RGB", (6, 4), "black")
    turned.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    loaded = pictures.load(tmp_path / "turned.png")
    assert loaded.shape == (6, 4, 3)
    assert loaded[0, 3].tolist() == [255, 255, 255] and int((loaded > 0).sum()) == 3
    assert pictures.size(tmp_path / "turned.png") == (4, 6)


def test_ranges() -> None:
    values = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    unit, signed = pictures.to_unit(values), pictures.to_signed(values)
    assert unit.shape == (3, 16, 16) and unit.dtype == signed.dtype == np.float32
    assert (unit.min(), unit.max(), signed.min(), signed.max()) == (0, 1, -1, 1)
    assert np.array_equal((unit * 255).round().astype(np.uint8).transpose(1, 2, 0), values)

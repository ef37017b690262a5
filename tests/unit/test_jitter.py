"""Colours that are changed at random: the closed form of each change, drawn by (seed, epoch, position)."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
from pydantic import ValidationError

from tuner import counted
from tuner.data.jitter import Jitter, Picture

AT = (5, 2, 9)  # seed, epoch, position
GREY = np.array([0.299, 0.587, 0.114])


def noise(low: int = 0, high: int = 256) -> Picture:
    return np.random.default_rng(3).integers(low, high, (12, 17, 3), np.uint8)


def drawn(key: str, most: float) -> float:
    return most * (2 * counted.uniform(*AT, f"jitter {key}") - 1)


def rounded(look: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(look, 0, 255))


def close(found: Picture, expected: np.ndarray) -> bool:
    """Equal, but where float32 rounds a half to the other side."""
    wrong = np.abs(found.astype(float) - expected)
    return bool(wrong.max() <= 1 and (wrong > 0).mean() < 0.01)


def test_brightness_is_a_factor() -> None:
    picture, factor = noise(), 1 + drawn("brightness", 0.5)
    assert abs(factor - 1) > 0.05
    assert close(Jitter(brightness=0.5)(picture, *AT), rounded(picture * factor))


def test_contrast_is_a_factor_about_the_mean_grey() -> None:
    picture, factor = noise(), 1 + drawn("contrast", 0.7)
    mean = (picture @ GREY).mean()
    assert abs(factor - 1) > 0.05
    assert close(Jitter(contrast=0.7)(picture, *AT), rounded(mean + (picture - mean) * factor))


def test_saturation_is_a_factor_about_each_pixels_grey() -> None:
    picture, factor = noise(60, 190), 1 + drawn("saturation", 1.0)
    grey = (picture @ GREY)[:, :, None]
    assert abs(factor - 1) > 0.05
    found = Jitter(saturation=1.0)(picture, *AT)
    assert close(found, rounded(grey + (picture - grey) * factor))
    plain = np.repeat(noise()[:, :, :1], 3, axis=2)  # what is grey stays as it is
    assert np.array_equal(Jitter(saturation=1.0)(plain, *AT), plain)


def test_hue_turns_the_circle() -> None:
    picture, turn = noise(), drawn("hue", 0.5)
    assert abs(turn) > 0.02
    expected = np.empty(picture.shape)
    for row, column in np.ndindex(*picture.shape[:2]):
        hue, saturation, value = colorsys.rgb_to_hsv(*(picture[row, column] / 255))
        expected[row, column] = colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)
    assert close(Jitter(hue=0.5)(picture, *AT), rounded(expected * 255))


def test_all_together_in_their_order() -> None:
    picture = noise(40, 200)
    look = picture * (1 + drawn("brightness", 0.2))
    mean = (look @ GREY).mean()
    look = mean + (look - mean) * (1 + drawn("contrast", 0.3))
    grey = (look @ GREY)[:, :, None]
    look = grey + (look - grey) * (1 + drawn("saturation", 0.4))
    found = Jitter(brightness=0.2, contrast=0.3, saturation=0.4)(picture, *AT)
    assert close(found, rounded(look)) and not np.array_equal(found, picture)


def test_it_is_counted_and_of_the_whole_range() -> None:
    picture, jitter = noise(), Jitter(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.1)
    found = [jitter(picture, 0, 1, position) for position in range(8)]
    again = [jitter(picture, 0, 1, position) for position in reversed(range(8))]
    assert all(np.array_equal(one, other) for one, other in zip(found, reversed(again), strict=True))
    others = [jitter(picture, 1, 1, 0), jitter(picture, 0, 2, 0)]
    assert len({one.tobytes() for one in [*found, *others]}) == 10
    assert {(one.dtype, one.shape) for one in found} == {(np.dtype(np.uint8), picture.shape)}
    flat = np.full((1, 1, 3), 100, np.uint8)
    values = [int(Jitter(brightness=0.5)(flat, 0, 0, position)[0, 0, 0]) for position in range(400)]
    assert 50 <= min(values) < 53 and 147 < max(values) <= 150  # evenly from 1 - x to 1 + x
    assert abs(np.mean(values) - 100) < 5 * 100 / 12**0.5 / 20


def test_zero_is_the_identity() -> None:
    picture = noise()
    nothing = Jitter.model_construct(brightness=0.0, contrast=0.0, saturation=0.0, hue=0.0)
    assert np.array_equal(nothing(picture, *AT), picture)
    with pytest.raises(ValidationError, match="brightness: found 0, as all others"):
        Jitter(brightness=0.0)


@pytest.mark.parametrize(
    "wrong", [{"brightness": 1.0}, {"contrast": -0.1}, {"saturation": 1.1}, {"hue": 0.6}]
)
def test_ranges(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Jitter(**wrong)

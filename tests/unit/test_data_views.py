"""What is seen of a sample: picture, condition and mask cut alike, and what a mask weighs, in closed form."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from tuner.data import pictures
from tuner.data.blob import Blob, File, Held
from tuner.data.buckets import Bucket
from tuner.data.captions import CaptionRule
from tuner.data.conditions import Condition
from tuner.data.jitter import Jitter
from tuner.data.loader import Feed, Latents, Texts
from tuner.data.pictures import Picture, Reading
from tuner.data.plan import Slot
from tuner.data.samples import Sample
from tuner.data.views import Masks, Views
from tuner.errors import UserError

SIZE, FACTOR = 32, 8
SLOT = Slot(0, 0, 0, 1.0)


def held(tmp_path: Path, picture: np.ndarray, name: str = "a") -> Blob:
    place = tmp_path / f"{name}.png"
    Image.fromarray(picture).save(place)
    return Held(f"{name}.png", place.read_bytes())


def noise(high: int, wide: int, seed: int = 0) -> Picture:
    return np.random.default_rng(seed).integers(0, 256, (high, wide, 3), np.uint8)


def masked(tmp_path: Path, mask: np.ndarray, picture: Picture | None = None) -> Sample:
    look = noise(*mask.shape[:2]) if picture is None else picture
    return Sample(held(tmp_path, look), ("a",), mask=held(tmp_path, mask, "mask"))


def weights(sample: Sample, masks: Masks | None, slot: Slot = SLOT, **more: Any) -> np.ndarray:
    found = Views([sample], SIZE, 3, masks=masks, **more).weights(slot, FACTOR)
    assert found.dtype == np.float32 and found.shape[0] == 1
    return found[0]


def test_weights_are_the_means_of_the_mask_at_each_place(tmp_path: Path) -> None:
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[:8, :8] = 255  # the first place whole
    mask[8:16, :4] = 255  # of the one below a half
    mask[16:24, :8] = 51  # of the next a fifth everywhere
    share = np.zeros((4, 4))
    share[:3, 0] = 1, 0.5, 0.2
    sample = masked(tmp_path, mask)
    found = weights(sample, Masks(outside=0.0, normalise=False))
    np.testing.assert_allclose(found, share, rtol=1e-6)
    for outside in (0.0, 0.25):
        expected = outside + (1 - outside) * share
        found = weights(sample, Masks(outside=outside, normalise=False))
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        found = weights(sample, Masks(outside=outside))
        np.testing.assert_allclose(found, expected / expected.mean(), rtol=1e-6)
        assert found.mean(dtype=np.float64) == pytest.approx(1, abs=1e-6)


@given(
    seed=st.integers(0, 999),
    outside=st.floats(0, 0.99),
    shape=st.sampled_from([(32, 32), (48, 24), (40, 64)]),
)
def test_normalised_the_mean_is_1_and_the_order_stays(
    tmp_path_factory: pytest.TempPathFactory, seed: int, outside: float, shape: tuple[int, int]
) -> None:
    sample = masked(tmp_path_factory.mktemp("m"), noise(*shape, seed)[:, :, 0])
    slot = SLOT._replace(bucket=Bucket(*shape) if shape != (SIZE, SIZE) else None)
    plain = weights(sample, Masks(outside=outside, normalise=False), slot)
    found = weights(sample, Masks(outside=outside), slot)
    assert plain.shape == found.shape == (shape[0] // FACTOR, shape[1] // FACTOR)
    assert plain.min() >= outside - 1e-6 and plain.max() <= 1 + 1e-6
    assert found.mean(dtype=np.float64) == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(found / found.max(), plain / plain.max(), rtol=1e-5)


def test_without_a_mask_everything_weighs_1(tmp_path: Path) -> None:
    plain = Sample(held(tmp_path, noise(40, 32)), ("a",))
    assert (weights(plain, Masks(outside=0.2)) == 1).all()
    assert (weights(masked(tmp_path, np.zeros((40, 32), np.uint8)), None) == 1).all()


@pytest.mark.parametrize("by", ["mask", "alpha"])
def test_a_mask_that_leaves_nothing_is_an_error_that_names_it(tmp_path: Path, by: str) -> None:
    mask = np.zeros((40, 32), np.uint8)
    mask[:4] = 255  # which the crop does not show
    if by == "mask":
        sample, reading, name = masked(tmp_path, mask), Reading(), "mask.png"
    else:
        both = np.concatenate([noise(40, 32), mask[:, :, None]], axis=2)
        sample, reading, name = Sample(held(tmp_path, both), ("a",)), Reading(alpha="mask"), "a.png"
    with pytest.raises(UserError, match=rf"^{name}: the mask leaves nothing of the picture"):
        weights(sample, Masks(), reading=reading)
    assert (weights(sample, Masks(outside=0.1), reading=reading) == 1).all()
    with pytest.raises(ValidationError):
        Masks(outside=1.0)


def test_alpha_is_the_mask_and_the_colours_are_as_stored(tmp_path: Path) -> None:
    colours, alpha = noise(32, 48, 5), noise(32, 48, 6)[:, :, 0]
    both = np.concatenate([colours, alpha[:, :, None]], axis=2)
    sample = Sample(held(tmp_path, both), ("a",))
    views = Views([sample], SIZE, 3, masks=Masks(), reading=Reading(alpha="mask"))
    seen = views.seen(SLOT)
    assert np.array_equal(seen.picture, colours) and seen.mask is not None
    assert np.array_equal(seen.mask, alpha)
    given = replace(views, samples=[masked(tmp_path, alpha, colours)], reading=Reading())
    assert np.array_equal(views.weights(SLOT, FACTOR), given.weights(SLOT, FACTOR))
    assert np.array_equal(views.picture(SLOT), colours[:, 8:40])
    # Composited, alpha is no mask.
    plain = replace(views, reading=Reading(background=(0, 0, 0)))
    assert plain.seen(SLOT).mask is None and (plain.weights(SLOT, FACTOR) == 1).all()
    assert plain.picture(SLOT).mean() < views.picture(SLOT).mean()
    # A mask of its own goes before alpha.
    own = replace(
        views, samples=[sample._replace(mask=held(tmp_path, np.full((32, 48), 255, np.uint8), "own"))]
    )
    assert (own.weights(SLOT, FACTOR) == 1).all()


SHAPES = (None, Bucket(32, 32), Bucket(24, 48), Bucket(48, 24))


@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize("times", [1, 2, 3])
def test_picture_condition_and_mask_are_aligned(tmp_path: Path, crop: str, times: int) -> None:
    """All three show one pattern of blocks; the mask and the condition in another size."""
    blocks = np.random.default_rng(1).integers(0, 2, (10, 14)).astype(np.uint8) * 255
    small = np.kron(blocks, np.ones((8, 8), np.uint8))
    large = np.kron(blocks, np.ones((8 * times, 8 * times), np.uint8))
    sample = Sample(
        held(tmp_path, np.repeat(small[:, :, None], 3, 2)),
        ("a",),
        held(tmp_path, np.repeat(large[:, :, None], 3, 2), "c"),
        held(tmp_path, large, "m"),
    )
    views = Views([sample], SIZE, 3, crop, True, Condition(kind="image"), masks=Masks(normalise=False))
    flips, found = set(), 0
    for shape in SHAPES:
        for position in range(6):
            slot = Slot(0, 1, position, 1.0, shape)
            look = views.picture(slot)
            assert look.shape[:2] == views.shape(slot) == ((SIZE, SIZE) if shape is None else tuple(shape))
            condition = views.condition_picture(slot, None)
            weight = views.weights(slot, 4)[0] * 255
            assert condition.shape == look.shape
            assert weight.shape == (look.shape[0] // 4, look.shape[1] // 4)
            means = look[:, :, 0].reshape(weight.shape[0], 4, weight.shape[1], 4).mean(axis=(1, 3))
            # Other filters and sizes differ at the edges of blocks only.
            assert (
                np.abs(weight - means).mean() < 14 and np.corrcoef(weight.ravel(), means.ravel())[0, 1] > 0.97
            )
            assert np.abs(condition.astype(float) - look).mean() < (1e-9 if times == 1 else 14)
            flips.add(views.transform(slot).flip)
            found += 1
    assert found == 24 and flips == {True, False}


def test_a_mask_of_another_size_takes_the_pictures_place_exactly(tmp_path: Path) -> None:
    """Not its own, which rounding would put a pixel beside."""
    picture, mask = noise(33, 70), noise(66, 140, 4)[:, :, 0]
    sample = masked(tmp_path, mask, picture)
    slot = SLOT._replace(bucket=Bucket(32, 40))
    views = Views([sample], SIZE, 3, "random", True, masks=Masks(normalise=False))
    cut = views.transform(slot)(mask, "area", of=(33, 70))
    expected = cut.reshape(4, 8, 5, 8).mean(axis=(1, 3)) / 255
    np.testing.assert_allclose(views.weights(slot, FACTOR)[0], expected, rtol=1e-6)


def test_shapes_that_do_not_fit_are_named(tmp_path: Path) -> None:
    sample = masked(tmp_path, noise(48, 32)[:, :, 0], noise(32, 48))
    with pytest.raises(UserError, match=r"^mask\.png: 32x48 pixels do not fit the picture's 48x32"):
        weights(sample, Masks())


def test_conditions_and_masks_are_read_within_the_recipes_limit(tmp_path: Path) -> None:
    sample = masked(tmp_path, noise(64, 64)[:, :, 0], noise(32, 32))
    assert weights(sample, Masks(), reading=Reading(limit=64 * 64)).shape == (4, 4)
    with pytest.raises(UserError, match=r"^mask\.png: .* more than the 4095 allowed"):
        weights(sample, Masks(), reading=Reading(limit=64 * 64 - 1))


def test_sources_have_conditions_of_their_own(tmp_path: Path) -> None:
    picture, given = noise(32, 32, 1), noise(32, 32, 2)
    first = Sample(held(tmp_path, picture), ("a",), held(tmp_path, given, "given"))
    views = Views(
        [first, first._replace(source=1), first._replace(source=2)],
        SIZE,
        3,
        condition=Condition(kind="gray"),
        of_source=((1, Condition(kind="image")), (2, Condition(kind="canny"))),
    )
    found = [views.condition_picture(Slot(n, 0, 0, 1.0), None) for n in range(3)]
    grey = np.asarray(Image.fromarray(picture).convert("L"))
    assert np.abs(found[0][:, :, 0].astype(int) - grey).max() <= 1
    assert np.array_equal(found[1], given) and set(np.unique(found[2])) == {0, 255}
    feed = Feed(views, CaptionRule(), Latents(4, FACTOR), Texts(None))
    batch = feed.batch([Slot(n, 0, 0, 1.0) for n in range(3)], 3.0)
    assert batch.condition is not None
    for row, picture_ in zip(batch.condition, found, strict=True):
        assert torch.equal(row * 255, torch.from_numpy(picture_).permute(2, 0, 1).float())


def test_the_condition_is_of_the_jittered_pixels_and_of_one_batch(tmp_path: Path) -> None:
    sample = masked(tmp_path, noise(40, 40, 7)[:, :, 0])
    views = Views(
        [sample],
        SIZE,
        3,
        "random",
        True,
        Condition(kind="gray"),
        masks=Masks(),
        jitter=Jitter(brightness=0.5),
    )
    feed = Feed(views, CaptionRule(), Latents(4, FACTOR), Texts(None))
    slots = [Slot(0, 0, position, 1.0, Bucket(32, 24)) for position in range(5)]
    batch = feed.batch(slots, 5.0)
    assert batch.pixels is not None and batch.mask is not None and batch.condition is not None
    assert batch.pixels.shape == (5, 3, 32, 24) and batch.mask.shape == (5, 1, 4, 3)
    plain = replace(views, jitter=None)
    changed = 0
    for number, slot in enumerate(slots):
        look = views.picture(slot)
        assert np.array_equal(pictures.to_signed(look), batch.pixels[number].numpy())
        assert np.array_equal(views.weights(slot, FACTOR), batch.mask[number].numpy())
        assert np.array_equal(plain.weights(slot, FACTOR), batch.mask[number].numpy())
        expected = views.condition_picture(slot, look)
        assert np.array_equal(batch.condition[number].numpy() * 255, expected.transpose(2, 0, 1))
        changed += not np.array_equal(look, plain.picture(slot))
    assert changed == 5
    assert replace(feed, views=replace(views, masks=None)).batch(slots, 5.0).mask is None


def test_a_batch_reads_each_file_once(tmp_path: Path) -> None:
    read: list[str] = []

    class Counted(File):
        def read(self) -> bytes:
            read.append(self.path.name)
            return super().read()

    for name, seed in (("a", 1), ("m", 2)):
        held(tmp_path, noise(32, 48, seed), name)
    sample = Sample(Counted(tmp_path / "a.png"), ("a",), mask=Counted(tmp_path / "m.png"))
    views = Views([sample], SIZE, 3, masks=Masks(), condition=Condition(kind="canny"))
    Feed(views, CaptionRule(), Latents(4, FACTOR), Texts(None)).batch([SLOT], 1.0)
    assert sorted(read) == ["a.png", "m.png"]

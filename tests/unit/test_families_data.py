"""What the loader tells of pictures for the families that are told it: size, crop, hole, pooled text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tuner import base
from tuner.data import assemble, encode, holes
from tuner.data.blob import File
from tuner.data.cache import Hashes
from tuner.data.captions import CaptionRule
from tuner.data.index import Memory
from tuner.data.loader import Feed, Latents, Texts
from tuner.data.plan import Slot
from tuner.data.samples import Sample
from tuner.data.transform import Transform
from tuner.data.views import Views
from tuner.family import Options


def marked(tmp_path: Path, wide: int, high: int) -> Sample:
    """A picture whose red tells the column and whose green tells the row."""
    rows, columns = np.mgrid[0:high, 0:wide]
    picture = np.stack([columns, rows, 0 * rows], axis=2).astype(np.uint8)
    place = tmp_path / f"{wide}x{high}.png"
    Image.fromarray(picture).save(place)
    return Sample(File(place), ("a",))


def test_the_told_crop_is_where_the_pixels_come_from(tmp_path: Path) -> None:
    """Of pictures that are not resized the pixels say where they were cut out."""
    samples = [marked(tmp_path, 64, 100), marked(tmp_path, 120, 64), marked(tmp_path, 64, 64)]
    views = Views(samples, 64, 0, "random", True)
    sizes = np.array([(100, 64), (64, 120), (64, 64)])
    feed = Feed(views, CaptionRule(), Latents(4, 8), Texts(None), told=sizes)
    slots = [Slot(at % 3, 0, at, 1.0) for at in range(24)]
    batch = feed.batch(slots, 24.0)
    assert batch.sizes is not None and batch.pixels is not None and batch.sizes.shape == (24, 6)
    assert batch.sizes.dtype == torch.float32
    seen = set()
    for slot, told, pixels in zip(slots, batch.sizes.tolist(), batch.pixels, strict=True):
        high, wide = sizes[slot.sample]
        assert told[:2] == [high, wide] and told[4:] == [64, 64]
        corner = ((pixels[:2, 0] + 1) * 127.5).round()
        mirrored = bool(corner[0, 0] > corner[0, -1])
        left, top = int(corner[0].min()), int(corner[1, 0])
        # In a mirrored picture what was on the right is on the left.
        assert told[2:4] == [top, wide - 64 - left if mirrored else left]
        seen.add((mirrored, left > 0, top > 0))
    assert {one[0] for one in seen} == {True, False} and len(seen) >= 5


def test_the_told_size_is_the_files_and_the_crop_is_of_the_resized_picture(tmp_path: Path) -> None:
    sample = marked(tmp_path, 200, 128)
    sizes = np.array([(128, 200)])
    feed = Feed(Views([sample], 64, 0), CaptionRule(), Latents(4, 8), Texts(None), told=sizes)
    batch = feed.batch([Slot(0, 0, 0, 1.0)], 1.0)
    assert batch.sizes is not None and batch.sizes.tolist() == [[128, 200, 0, 18, 64, 64]]
    assert feed.batch([Slot(0, 0, 0, 1.0)], 1.0).hole is None
    transform = Transform(64, 64, across=0.25, flip=True)
    assert transform.place(128, 200) == (64, 100, 0, 9) and transform.seen(128, 200) == (0, 27)


def test_holes_are_counted_and_of_every_kind() -> None:
    drawn = [holes.draw((64, 64), 5, 1, at) for at in range(400)]
    for hole in drawn:
        assert hole.shape == (1, 64, 64) and hole.dtype == np.float32
        assert set(np.unique(hole)) <= {0.0, 1.0} and hole.any()
    again = [holes.draw((64, 64), 5, 1, at) for at in reversed(range(400))]
    assert all(np.array_equal(one, other) for one, other in zip(drawn, reversed(again), strict=True))
    assert not np.array_equal(holes.draw((64, 64), 5, 2, 7), drawn[7])
    shares = np.array([hole.mean() for hole in drawn])
    everything = shares == 1
    assert abs(everything.mean() - 0.25) < 0.09  # four deviations of 400 draws
    assert 0.1 < shares[~everything].mean() < 0.6 and shares.min() < 0.1
    # A larger picture has the same hole, only finer.
    for at in range(20):
        small, large = (holes.draw((size, size), 5, 1, at)[0] for size in (64, 256))
        assert np.abs(large.reshape(64, 4, 64, 4).mean(axis=(1, 3)) - small).mean() < 0.06


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_cached_texts_are_those_of_the_layer_and_the_windows(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """One cache for all: what was encoded with other options is never taken."""
    sample = marked(tmp_path, 32, 32)
    rule = CaptionRule()
    found = {}
    default = {"sd1": 1, "sdxl": 2}[name]
    for options in (
        Options(),
        Options(clip_skip=default),
        Options(clip_skip=3 - default),
        Options(windows=2),
    ):
        family: Any = base.load(
            str(folders[name]), None, (), ("text_encoder",), 0, Hashes(tmp_path / "hashes"), options
        )
        wanted = assemble.Wanted(32, 0, "center", False, rule, None, tmp_path / "cache", True, True)
        opened = assemble.look_at([sample], np.ones(1), wanted, Memory(tmp_path / "memory"))
        feed = encode.feed(opened, wanted, family)
        batch = feed.batch([Slot(0, 0, 0, 1.0)], 1.0)
        assert feed.texts.store is not None and batch.text is not None and batch.tokens is None
        with torch.no_grad():
            own = family.encode_prompts(family.tokenize(["a"]))
        torch.testing.assert_close(batch.text.hidden, own.hidden, rtol=1e-5, atol=1e-6)
        assert (batch.text.pooled is None) == (own.pooled is None) == (name == "sd1")
        if own.pooled is not None:
            torch.testing.assert_close(batch.text.pooled, own.pooled, rtol=1e-5, atol=1e-6)
        found[options] = batch.text.hidden
    one, same, other, long = found.values()
    assert torch.equal(one, same) and not torch.allclose(one, other) and long.shape[1] == 2 * 77

"""Encoding into the cache and training from it: nothing stale is used, nothing is encoded twice."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tuner import base
from tuner.data import assemble, encode
from tuner.data.blob import File
from tuner.data.cache import Hashes, Store
from tuner.data.captions import CaptionRule
from tuner.data.index import Memory, Share
from tuner.data.loader import Feed
from tuner.data.plan import Slot
from tuner.data.samples import Sample
from tuner.errors import UserError
from tuner.family import Family, Moments
from tuner.text import Text, Tokens

COUNT = 5


class Counting:
    """What the encoders of a family were asked for."""

    def __init__(self, family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pictures, self.captions = 0, 0
        images, prompts = family.encode_images, family.encode_prompts

        def encode_images(pixels: torch.Tensor) -> Moments:
            self.pictures += len(pixels)
            return images(pixels)

        def encode_prompts(tokens: Tokens, rows: torch.Tensor | None = None) -> Text:
            self.captions += len(tokens.ids)
            return prompts(tokens, rows)

        monkeypatch.setattr(family, "encode_images", encode_images)
        monkeypatch.setattr(family, "encode_prompts", encode_prompts)

    def take(self) -> tuple[int, int]:
        found = self.pictures, self.captions
        self.pictures = self.captions = 0
        return found


@pytest.fixture
def family(sd1_folder: Path, tmp_path: Path) -> Iterator[Family]:
    yield base.load(str(sd1_folder), None, (), ("vae", "text_encoder"), 0, Hashes(tmp_path / "hashes"))


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    folder = tmp_path / "data"
    folder.mkdir()
    made = []
    for number in range(COUNT):
        noise = np.random.default_rng(number).integers(0, 255, (6, 5, 3)).astype(np.uint8)
        place = folder / f"{number}.png"
        Image.fromarray(noise).resize((40, 48), Image.Resampling.NEAREST).save(place)
        made.append(Sample(File(place), (f"red {number}", f"toy {number}")))
    return made


def wanted(tmp_path: Path, rule: CaptionRule | None = None, flip: bool = True) -> assemble.Wanted:
    return assemble.Wanted(
        size=32,
        seed=3,
        crop="center",
        flip=flip,
        captions=rule or CaptionRule(),
        condition=None,
        cache=tmp_path / "cache",
        latents=True,
        text=True,
    )


def made(samples: list[Sample], about: assemble.Wanted, family: Family) -> Feed:
    """The feed; what is known of pictures is forgotten each time, so that nothing hangs on it."""
    with TemporaryDirectory() as folder:
        alone = replace(about, share=Share())
        opened = assemble.look_at(samples, np.ones(len(samples)), alone, Memory(Path(folder)))
    return encode.feed(opened, about, family)


def slots(feed: Feed) -> list[Slot]:
    return [Slot(index, epoch, index, 1.0) for epoch in range(3) for index in range(len(feed.samples))]


def test_cached_and_uncached_batches_are_equal(family: Family, samples: list[Sample], tmp_path: Path) -> None:
    about = wanted(tmp_path)
    cached = made(samples, about, family)
    plain = made(samples, replace(about, cache=None), family)
    assert cached.latents.store is not None and cached.texts.store is not None
    assert plain.latents.store is None and plain.texts.store is None
    chosen = slots(cached)
    assert {cached.views.transform(slot).flip for slot in chosen} == {True, False}
    one, other = cached.batch(chosen, 15.0), plain.batch(chosen, 15.0)
    assert one.captions == other.captions and len(set(one.captions)) > COUNT
    for name in ("u", "noise", "posterior", "weight"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert one.pixels is None and one.moments is not None and other.pixels is not None
    assert one.tokens is None and one.text is not None and other.tokens is not None
    # Not bitwise: the kernels for another number of pictures at once add up in another order.
    fresh = family.encode_images(other.pixels)
    for mine, theirs in zip(one.moments, fresh, strict=True):
        assert mine.shape == (15, 4, 4, 4)
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        hidden = family.encode_prompts(other.tokens).hidden
    torch.testing.assert_close(one.text.hidden, hidden, rtol=1e-5, atol=1e-6)


def test_what_is_unchanged_is_never_encoded_again(
    family: Family, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about, counting = wanted(tmp_path), Counting(family, monkeypatch)
    probe = 1  # one empty caption is encoded to learn the size of an entry
    made(samples, about, family)
    assert counting.take() == (2 * COUNT, 2 * COUNT + probe)
    again = made(samples, about, family)
    assert counting.take() == (0, probe)
    again.batch(slots(again), 15.0)
    assert counting.take() == (0, 0)
    # The same pictures elsewhere and in another order are unchanged content.
    moved = tmp_path / "moved"
    moved.mkdir()
    others = []
    for sample in reversed(samples):
        assert isinstance(sample.picture, File)
        place = sample.picture.path
        others.append(sample._replace(picture=File(place.rename(moved / f"other-{place.name}"))))
    made(others, about, family)
    assert counting.take() == (0, probe)
    # A prompt that may be dropped adds one caption; unmirrored pictures are there already.
    made(others, replace(about, captions=CaptionRule(drop=0.5), flip=False), family)
    assert counting.take() == (0, probe + 1)


def test_what_has_changed_is_encoded_anew_and_alone(
    family: Family, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about, counting = wanted(tmp_path, flip=False), Counting(family, monkeypatch)
    before = made(samples, about, family)
    assert counting.take() == (COUNT, 2 * COUNT + 1)
    slot = Slot(0, 0, 0, 1.0)
    old = before.batch([slot], 1.0).moments
    Image.new("RGB", (40, 48), "blue").save(samples[0].picture.name)  # another picture
    after = made(samples, about, family)
    assert counting.take() == (1, 1)
    new = after.batch([slot], 1.0).moments
    assert old is not None and new is not None and not torch.equal(old.mean, new.mean)
    changed = [samples[0]._replace(captions=("a red thing",)), *samples[1:]]  # another caption
    made(changed, about, family)
    assert counting.take() == (0, 2)
    made(samples, replace(about, captions=CaptionRule(prefix="the ")), family)  # other final captions
    assert counting.take() == (0, 2 * COUNT + 1)
    made(samples, replace(about, size=40), family)  # another resolution
    assert counting.take() == (COUNT, 1)
    family.digests = {**family.digests, "vae": "another autoencoder"}
    made(samples, about, family)
    assert counting.take() == (COUNT, 1)
    family.digests = {**family.digests, "text_encoder": "another text encoder"}
    made(samples, about, family)
    assert counting.take() == (0, 2 * COUNT + 1)


class Cached:
    """A first feed, whose pictures are in one shard."""

    def __init__(
        self, family: Family, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        about, self.counting = wanted(tmp_path, flip=False), Counting(family, monkeypatch)
        self.feed = lambda: made(samples, about, family)
        good = self.feed()
        self.expected = good.batch(slots(good), 15.0).moments
        self.counting.take()
        (self.shard,) = (tmp_path / "cache" / "latents").iterdir()

    def check(self) -> None:
        """A new feed encodes all pictures anew, to what they were."""
        again = self.feed()
        assert self.counting.take() == (COUNT, 1)
        found = again.batch(slots(again), 15.0).moments
        assert self.expected is not None and found is not None
        assert torch.equal(self.expected.mean, found.mean)


def test_a_torn_shard_is_encoded_again(
    family: Family, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = Cached(family, samples, tmp_path, monkeypatch)
    os.truncate(cached.shard, cached.shard.stat().st_size - 7)
    cached.check()


def test_what_is_damaged_is_moved_aside_and_encoded_again(
    family: Family, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = Cached(family, samples, tmp_path, monkeypatch)
    shard = cached.shard
    content = bytearray(shard.read_bytes())
    content[-9] ^= 4
    shard.write_bytes(content)
    damaged = cached.feed()
    assert cached.counting.take() == (0, 1), "at the start only headers are looked at"
    with pytest.raises(UserError, match=f"{shard.name}: entry [0-9a-f]{{40}} is not what was written; moved"):
        damaged.batch(slots(damaged), 15.0)
    assert [file.suffix for file in shard.parent.iterdir()] == [".damaged"]
    cached.check()


def test_another_autoencoder_or_text_encoder_has_another_digest(
    family: Family, sd1_folder: Path, tmp_path: Path
) -> None:
    hashes = Hashes(tmp_path / "hashes")
    copy = tmp_path / "vae"
    copy.mkdir()
    for file in (sd1_folder / "vae").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert base.component_digest(copy, hashes) == family.digests["vae"] != family.digests["text_encoder"]
    (weights,) = copy.glob("*.safetensors")
    tensors = load_file(weights)
    first = next(iter(tensors))
    tensors[first].view(-1)[0] += 1e-3
    save_file(tensors, weights)
    assert base.component_digest(copy, hashes) != family.digests["vae"]


def test_the_size_is_told_before_and_has_to_fit(
    family: Family,
    samples: list[Sample],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is counted from shapes, and comes near what is written then."""
    about, folder = wanted(tmp_path), tmp_path / "cache"
    sizes: list[int] = []
    monkeypatch.setattr(encode, "amount", lambda size: sizes.append(size) or encode.math.inf)
    made(samples, about, family)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(
        f"pictures to encode: {2 * COUNT}, about inf into {folder / 'latents'}, inf are"
    )
    assert said[1].startswith(f"captions to encode: {2 * COUNT}, about inf into {folder / 'text'}, inf are")
    for told, name in ((sizes[0], "latents"), (sizes[2], "text")):
        written = sum(file.stat().st_size for file in (folder / name).iterdir())
        assert told == pytest.approx(written, rel=0.05)
    made(samples, about, family)
    assert "to encode" not in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setattr(encode, "free", lambda path: encode.SPARE + 1000)
    with pytest.raises(UserError, match=r"data\.cache: .*takes about 1 MiB, and 65 MiB are free; make room"):
        made(samples, replace(about, size=40), family)


def test_what_is_ready_is_written_when_it_is_stopped(
    family: Family, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about, counting = wanted(tmp_path, flip=False), Counting(family, monkeypatch)
    monkeypatch.setattr(encode, "ENCODE_AT_ONCE", 2)
    monkeypatch.setattr(encode, "PIXELS_AT_ONCE", 2 * 32 * 32)
    images = family.encode_images

    def stopped(pixels: torch.Tensor) -> Moments:
        if counting.pictures == 4:
            raise KeyboardInterrupt
        return images(pixels)

    monkeypatch.setattr(family, "encode_images", stopped)
    with pytest.raises(KeyboardInterrupt):
        made(samples, about, family)
    assert len(Store(tmp_path / "cache" / "latents")) == 4
    monkeypatch.setattr(family, "encode_images", images)
    counting.take()
    made(samples, about, family)
    assert counting.take() == (COUNT - 4, 2 * COUNT + 1)


@pytest.mark.parametrize("limit", ["SHARD", "SHARD_BYTES", "SHARD_SECONDS"])
def test_shards_are_limited_in_entries_bytes_and_time(
    family: Family, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(encode, "PIXELS_AT_ONCE", 1)
    monkeypatch.setattr(encode, limit, {"SHARD": 2, "SHARD_BYTES": 1000, "SHARD_SECONDS": 0.0}[limit])
    each = 2 * 4 * 4 * 4 * 4
    made(samples, wanted(tmp_path, flip=False), family)
    expected = {"SHARD": 3, "SHARD_BYTES": -(-COUNT * each // (2 * each)), "SHARD_SECONDS": COUNT}[limit]
    assert len(list((tmp_path / "cache" / "latents").iterdir())) == expected


def test_nothing_is_cached_where_it_is_not_valid(
    family: Family, samples: list[Sample], tmp_path: Path
) -> None:
    about = wanted(tmp_path)
    random_crops = made(samples, replace(about, crop="random"), family)
    assert random_crops.latents.store is None and random_crops.texts.store is not None
    trained_encoder = made(samples, replace(about, text=False), family)
    assert trained_encoder.texts.store is None and trained_encoder.latents.store is not None
    trained_vae = made(samples, replace(about, latents=False), family)
    assert trained_vae.latents.store is None


def test_many_captions_are_encoded_in_each_step(
    family: Family, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "TEXT_LIMIT", 1000)
    feed = made(samples, wanted(tmp_path), family)
    assert feed.texts.store is None
    assert feed.batch(slots(feed), 15.0).tokens is not None


def test_processes_share_the_encoding(family: Family, samples: list[Sample], tmp_path: Path) -> None:
    """What one process encodes is its part; after the others have done theirs it sees everything."""
    parts: list[set[int]] = []

    def other() -> None:
        if parts:
            return
        parts.append(set(range(len(Store(tmp_path / "cache" / "latents")))))
        made(samples, replace(about, share=Share(1, 2)), family)

    about = replace(wanted(tmp_path, flip=False), share=Share(0, 2, other), text=False)
    feed = made(samples, about, family)
    assert feed.latents.store is not None
    assert len(parts) == 1 and len(parts[0]) == 3
    assert len(feed.latents.store) == COUNT
    assert feed.batch(slots(feed), 15.0).moments is not None

"""A cache whose entries are named by what they depend on: nothing stale is used, nothing is encoded twice."""

from __future__ import annotations

import os
import pickle
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from tuner import base
from tuner.data import assemble, cache, encode
from tuner.data.blob import File
from tuner.data.cache import Hashes, Store, key
from tuner.data.captions import CaptionRule
from tuner.data.index import Memory, Share
from tuner.data.loader import Feed, Latents
from tuner.data.plan import Slot
from tuner.data.samples import Sample
from tuner.errors import UserError
from tuner.family import Family, Moments
from tuner.text import Text, Tokens

COUNT = 5


def test_golden_key() -> None:
    """If this fails, what names stand for has changed: raise cache.VERSION and put the new values here."""
    assert cache.VERSION == 2
    assert key(caption="ein Käfer", dtype="float32") == "748c75b4b9063be61ca3e4dceb9298a9f88d313e"
    assert key(dtype="float32", caption="ein Käfer") == key(caption="ein Käfer", dtype="float32")


def test_the_version_is_part_of_every_name(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(a=1)
    monkeypatch.setattr(cache, "VERSION", cache.VERSION + 1)
    assert key(a=1) != before


def test_hashes_are_made_again_when_size_time_or_file_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    whole = cache.content_hash
    monkeypatch.setattr(cache, "content_hash", lambda path: (read.append(path.name), whole(path))[1])
    file = tmp_path / "a"
    file.write_bytes(b"one")
    stamp = file.stat().st_mtime_ns

    def made() -> tuple[str, int]:
        read.clear()
        return Hashes(tmp_path / "cache").of([file])[file], len(read)

    first, reads = made()
    assert reads == 1 and len(first) == 64
    assert made() == (first, 0)
    file.write_bytes(b"longer")  # another size, the same time
    os.utime(file, ns=(stamp, stamp))
    second, reads = made()
    assert reads == 1 and second != first
    os.utime(file, ns=(stamp + 10**9, stamp + 10**9))  # another time
    assert made() == (second, 1)
    (tmp_path / "b").write_bytes(b"writer")  # another file of that name, size and time
    os.utime(tmp_path / "b", ns=(stamp + 10**9, stamp + 10**9))
    (tmp_path / "b").replace(file)
    third, reads = made()
    assert reads == 1 and third not in {first, second}
    assert made() == (third, 0)


def test_a_store_keeps_tensors_bitwise_and_sees_what_others_wrote(tmp_path: Path) -> None:
    one, other = Store(tmp_path), Store(tmp_path)
    entries = {name: torch.randn(2, 3) for name in "abc"}
    one.write(entries)
    assert all(name in one for name in entries) and "a" not in other
    other.refresh()
    for store in (one, other, Store(tmp_path)):
        assert [torch.equal(store.read(name), tensor) for name, tensor in entries.items()] == [True] * 3
    assert len(one) == 3 and one.has(np.array(["a", "d", "c"], cache.NAME)).tolist() == [True, False, True]
    (shard,) = tmp_path.iterdir()
    assert shard.suffix == ".safetensors"
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(shard.stat().st_mode) == 0o666 & ~mask  # a cache may be shared
    assert {name: tensor.tolist() for name, tensor in load_file(shard).items()} == {
        name: tensor.tolist() for name, tensor in entries.items()
    }


@pytest.mark.parametrize("dtype", list(cache.TYPES.values()), ids=str)
def test_every_type_and_shape_is_read_as_written(tmp_path: Path, dtype: torch.dtype) -> None:
    entries = {"none": torch.ones(()), "some": torch.randn(3, 1, 5), "much": torch.randn(700)}
    entries = {name: tensor.to(dtype) for name, tensor in entries.items()}
    Store(tmp_path).write(entries)
    found = pickle.loads(pickle.dumps(Store(tmp_path)))
    for name, tensor in entries.items():
        read = found.read(name)
        assert read.dtype == dtype and read.shape == tensor.shape and torch.equal(read, tensor)


def test_very_many_shards_are_read_with_few_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "OPEN", 3)
    store = Store(tmp_path)
    for number in range(8):
        store.write({f"{number}": torch.full((2,), float(number))})
    for number in (*range(8), *range(8)[::-1], 3, 4, 3):
        assert store.read(f"{number}").tolist() == [number, number]
        assert len(store._open) <= 3
    assert len(store) == len(Store(tmp_path)) == 8


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_no_flipped_bit_is_ever_read(at: int, bit: int) -> None:
    """Wherever a bit of a shard is another: what is read is what was written, or an error."""
    with TemporaryDirectory() as place:
        folder = Path(place)
        entries = {key(number=number): torch.arange(4.0) + number for number in range(3)}
        Store(folder).write(entries)
        (shard,) = folder.iterdir()
        content = bytearray(shard.read_bytes())
        content[at % len(content)] ^= 1 << bit
        shard.write_bytes(content)
        store = Store(folder)
        if not shard.exists():
            assert len(store) == 0
            return
        wrong = 0
        for name, tensor in entries.items():
            if name not in store:  # a bit of the name
                wrong += 1
                continue
            try:
                assert torch.equal(store.read(name), tensor)
            except UserError as error:
                wrong += 1
                assert str(shard) in str(error)
        spaces = int.from_bytes(content[:8], "little") + 8 > at % len(content) and wrong == 0
        assert wrong == 1 or spaces or (wrong and "checks" not in str(content))


def test_what_is_damaged_is_moved_aside_and_encoded_again(
    family: Family, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about, counting = wanted(tmp_path, flip=False), Counting(family, monkeypatch)
    good = made(samples, about, family)
    chosen = slots(good)
    expected = good.batch(chosen, 15.0)
    counting.take()
    (shard,) = (tmp_path / "cache" / "latents").iterdir()
    content = bytearray(shard.read_bytes())
    content[-9] ^= 4
    shard.write_bytes(content)
    damaged = made(samples, about, family)
    assert counting.take() == (0, 1), "at the start only headers are looked at"
    with pytest.raises(UserError, match=f"{shard.name}: entry [0-9a-f]{{40}} is not what was written; moved"):
        damaged.batch(chosen, 15.0)
    assert [file.suffix for file in shard.parent.iterdir()] == [".damaged"]
    again = made(samples, about, family)
    assert counting.take() == (COUNT, 1)
    found = again.batch(chosen, 15.0)
    assert expected.moments is not None and found.moments is not None
    assert torch.equal(expected.moments.mean, found.moments.mean)


def test_a_shard_that_is_taken_away_while_it_is_used_is_an_error(tmp_path: Path) -> None:
    Store(tmp_path).write({"a": torch.ones(2)})
    store = Store(tmp_path)
    (shard,) = tmp_path.iterdir()
    shard.unlink()
    with pytest.raises(UserError, match="cannot be read: No such file.*no more; give the same command again"):
        store.read("a")
    assert len(Store(tmp_path)) == 0


def test_what_a_killed_process_leaves_is_not_used_and_goes_when_it_is_old(tmp_path: Path) -> None:
    """A process is killed again and again while it writes shards; what is there is whole."""
    writer = (
        "import sys, torch\nfrom pathlib import Path\nfrom tuner.data.cache import Store\n"
        "store = Store(Path(sys.argv[1]))\nnumber = int(sys.argv[2])\nprint('ready', flush=True)\n"
        "while True:\n"
        "    store.write({f'{number + i}': torch.full((50_000,), float(number + i)) for i in range(8)})\n"
        "    number += 8\n"
    )
    seen = left = 0
    for turn in range(8):
        command = [sys.executable, "-c", writer, str(tmp_path), str(turn * 10**6)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            time.sleep(0.05 + 0.013 * turn)
            process.kill()
        left += len(list(tmp_path.glob("*.writing")))
        store = Store(tmp_path)
        assert len(store) % 8 == 0 and len(store) >= seen
        seen = len(store)
    names = [int(name) for shard in tmp_path.glob("*.safetensors") for name in load_file(shard)]
    assert len(names) == seen > 0
    for name in names:
        assert torch.equal(store.read(f"{name}"), torch.full((50_000,), float(name)))
    (tmp_path / "mine.writing").write_bytes(b"x")
    (tmp_path / "old.writing").write_bytes(b"x")
    for file in tmp_path.glob("*.writing"):
        if file.name != "mine.writing":
            os.utime(file, (1e9, 1e9))
    Store(tmp_path)
    assert [file.name for file in tmp_path.glob("*.writing")] == ["mine.writing"]


def test_two_processes_write_into_one_folder_at_a_time(tmp_path: Path) -> None:
    writer = (
        "import sys, torch\nfrom pathlib import Path\nfrom tuner.data.cache import Store\n"
        "store = Store(Path(sys.argv[1]))\n"
        "for i in range(20):\n"
        "    own = torch.full((9,), float(i))\n"
        "    store.write({f'{sys.argv[2]} {i}': own, f'both {i}': torch.ones(i + 1)})\n"
        "store.refresh()\nassert all(f'{sys.argv[2]} {i}' in store for i in range(20))\n"
    )
    both = [subprocess.Popen([sys.executable, "-c", writer, str(tmp_path), name]) for name in "ab"]
    assert [process.wait(60) for process in both] == [0, 0]
    store = Store(tmp_path)
    assert len(store) == 60 and len(list(tmp_path.iterdir())) == 40
    for i in range(20):
        assert store.read(f"a {i}").tolist() == store.read(f"b {i}").tolist() == [i] * 9
        assert store.read(f"both {i}").tolist() == [1.0] * (i + 1)


def test_names_of_many_are_the_names_of_each() -> None:
    about = {"height": 3, "flip": False, "background": "(255, 255, 255)"}
    digests = [f"{number:064x}" for number in range(5)]
    assert list(cache.keys("picture", digests, **about)) == [key(picture=d, **about) for d in digests]
    latents = Latents(4, 8, None, digests, (("vae", "x"), ("alpha", "mask")))
    names = [latents.name(n, (64, 32), True) for n in (3, 1)]
    assert latents.names((3, 1), (64, 32), True) == names and len(set(names)) == 2


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_a_torn_shard_is_taken_away(tmp_path: Path, share: float) -> None:
    Store(tmp_path).write({"kept": torch.ones(2)})
    (kept,) = tmp_path.iterdir()
    Store(tmp_path).write({"torn": torch.ones(100)})
    (torn,) = set(tmp_path.iterdir()) - {kept}
    content = torn.read_bytes()
    torn.write_bytes(content[: int(len(content) * share)])
    store = Store(tmp_path)
    assert "torn" not in store and "kept" in store
    assert list(tmp_path.iterdir()) == [kept]
    store.write({"torn": torch.ones(100)})
    assert torch.equal(Store(tmp_path).read("torn"), torch.ones(100))


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


def test_a_torn_shard_is_encoded_again(
    family: Family, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about, counting = wanted(tmp_path, flip=False), Counting(family, monkeypatch)
    good = made(samples, about, family)
    chosen = slots(good)
    expected = good.batch(chosen, 15.0)
    counting.take()
    (shard,) = (tmp_path / "cache" / "latents").iterdir()
    os.truncate(shard, shard.stat().st_size - 7)
    again = made(samples, about, family)
    assert counting.take() == (COUNT, 1)
    found = again.batch(chosen, 15.0)
    assert expected.moments is not None and found.moments is not None
    assert torch.equal(expected.moments.mean, found.moments.mean)


def test_another_autoencoder_or_text_encoder_has_another_digest(
    family: Family, sd1_folder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

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

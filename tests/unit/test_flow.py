"""What is read in passing: which samples come when, and that their batches are what an index would give."""

from __future__ import annotations

import io
import multiprocessing
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tuner.batch import Batch
from tuner.data.buckets import Buckets
from tuner.data.captions import CaptionRule
from tuner.data.conditions import Condition
from tuner.data.flow import Arrival, EndedError, Flow, batches, begun, parts
from tuner.data.loader import Division, Feed, Latents, Texts
from tuner.data.passing import Gate
from tuner.data.pictures import Reading
from tuner.data.samples import Samples
from tuner.data.sources.opening import open_spec
from tuner.data.sources.spec import SourceSpec
from tuner.data.sources.stream import First, Stream
from tuner.data.views import Masks, Views
from tuner.errors import UserError
from tuner.text import Text, Tokens

SHARDS, EACH = 4, 6
SHAPES = ((32, 32), (30, 34), (24, 48), (48, 24), (40, 40))  # height, width
SEED = 5


def fake_tokens(captions: Sequence[str]) -> Tokens:
    """The letters' numbers; of more than 75 letters the rest is cut."""
    ids = torch.zeros(len(captions), 1, 77, dtype=torch.int64)
    for row, caption in enumerate(captions):
        ids[row, 0, : min(len(caption), 75)] = torch.tensor([ord(letter) for letter in caption[:75]])
    return Tokens(ids, (ids > 0).sum(-1), tuple(max(0, len(caption) - 75) for caption in captions))


def png(number: int) -> bytes:
    high, wide = SHAPES[number % len(SHAPES)]
    noise = np.random.default_rng(number).integers(0, 255, (high, wide, 3)).astype(np.uint8)
    data = io.BytesIO()
    Image.fromarray(noise).save(data, "PNG")
    return data.getvalue()


def shard(
    place: Path, numbers: Sequence[int], change: Callable[[int], dict[str, bytes]] | None = None
) -> None:
    """A tar of samples; `change`: other members for some of them."""
    with tarfile.open(place, "w") as made:
        for number in numbers:
            members = {"png": png(number), "txt": f"red {number}".encode(), "mask.png": png(number)}
            members |= change(number) if change is not None else {}
            for ending, data in members.items():
                info = tarfile.TarInfo(f"{number:03d}.{ending}")
                info.size = len(data)
                made.addfile(info, io.BytesIO(data))


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    for number in range(SHARDS):
        shard(tmp_path / f"s{number}.tar", range(EACH * number, EACH * (number + 1)))
    return tmp_path


def stream(path: object, source: int = 0, **more: Any) -> Stream:
    spec = SourceSpec(path=str(path), streaming=True, mask_from="mask", **{"buffer": 4, **more})
    found = open_spec(spec, [].append)
    assert isinstance(found, Stream)
    found.source = source
    return found


def gate(**more: Any) -> Gate:
    about: dict[str, Any] = {
        "reading": Reading(),
        "conditions": [Condition(kind="canny")] * 2,
        "rules": [CaptionRule(drop=0.3, prefix="the ")] * 2,
        "methods": [],
        "tokenize": fake_tokens,
        "windows": 1,
    }
    return Gate(**{**about, **more})


def flowing(*streams: Stream, batch_size: int = 2, shares: Sequence[float] = (), **more: Any) -> Flow:
    buckets = [more.pop("buckets", Buckets((32,), 8, 2.0))] * len(streams)
    return Flow(streams, shares or [1.0] * len(streams), buckets, gate(**more), batch_size, SEED)


def feed(samples: Sequence[Any] = ()) -> Feed:
    views = Views(samples, 32, SEED, "random", True, Condition(kind="canny"), masks=Masks())
    told = np.zeros((0, 2), np.int64)
    return Feed(views, CaptionRule(drop=0.3, prefix="the "), Latents(4, 8), Texts(fake_tokens), told=told)


def number(arrival: Arrival) -> int:
    return int(arrival.sample.picture.name.rpartition("/")[2].split(": ")[1].split(".")[0])


def flat(batch: Batch) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Text | Tokens):
            out |= {f"{field.name}.{n}": v for n, v in value._asdict().items() if v is not None}
        elif value is not None:
            out[field.name] = value
    return out


def assert_equal(one: Batch, other: Batch) -> None:
    mine, theirs = flat(one), flat(other)
    assert mine.keys() == theirs.keys() and len(mine) >= 11
    for name, value in mine.items():
        same = torch.equal(value, theirs[name]) if isinstance(value, torch.Tensor) else value == theirs[name]
        assert same, name


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_processes_see_an_epoch_together_and_nothing_twice(tars: Path, processes: int) -> None:
    seen: Counter[tuple[int, int]] = Counter()
    places: Counter[tuple[int, int]] = Counter()
    for rank in range(processes):
        # A process may be in its second epoch while others are in their first.
        for arrival in islice(flowing(stream(tars / "s*.tar")).arrivals(rank, processes), 60):
            seen[arrival.slot.epoch, number(arrival)] += 1
            places[arrival.slot.epoch, arrival.slot.position] += 1
    whole = {n for epoch, n in seen if epoch == 0}
    assert whole == set(range(SHARDS * EACH)) and set(seen.values()) == {1} == set(places.values())


def test_micro_batches_are_full_and_of_one_bucket(tars: Path) -> None:
    flow = flowing(stream(tars / "s*.tar"), batch_size=6)
    found = list(islice(flow.micro_batches(Division(accumulate=2)), 40))
    assert {len(one) for one in found} == {3}
    assert all(len({arrival.slot.bucket for arrival in one}) == 1 for one in found)
    shapes = {one[0].slot.bucket for one in found}
    assert len(shapes) == 3, "of five shapes of pictures two are near the square"
    for one in found:
        for arrival in one:
            assert arrival.size == SHAPES[number(arrival) % len(SHAPES)]
            assert arrival.slot.bucket == Buckets((32,), 8, 2.0).of(*arrival.size)
    # Nothing is lost: what has come is trained on, but for what waits for its bucket to fill.
    count = sum(map(len, found))
    came = [(a.slot.epoch, number(a)) for a in islice(flow.arrivals(0, 1), count + 3 * 2)]
    trained = Counter((a.slot.epoch, number(a)) for one in found for a in one)
    assert count == 120 and set(trained.values()) == {1} and trained.keys() <= set(came)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("start", [0, 3])
def test_batches_do_not_depend_on_workers_or_on_the_start(tars: Path, workers: int, start: int) -> None:
    division = Division(accumulate=2)
    expected = list(batches(feed(), flowing(stream(tars / "s*.tar"), batch_size=4), division, 0, 6, 0))
    torch.manual_seed(99)
    made = flowing(stream(tars / "s*.tar"), batch_size=4)
    found = list(batches(feed(), made, division, start, 6, workers))
    assert len(expected) == 12 and len(found) == 12 - 2 * start
    for one, other in zip(found, expected[2 * start :], strict=True):
        assert_equal(one, other)
    assert {one.total for one in expected} == {4.0}
    again = list(parts(feed(), made, division, 3))
    assert [(micro, rank) for micro, rank, _, _ in again] == [(0, 0), (1, 0)]
    for (*_, slots, one), other in zip(again, expected[6:8], strict=True):
        assert_equal(one, other)
        assert [slot.weight for slot in slots] == one.weight.tolist()


def test_a_batch_is_what_an_index_would_give(tars: Path) -> None:
    spec = SourceSpec(path=str(tars / "s*.tar"), mask_from="mask", weight=0.5)
    indexed = open_spec(spec, [].append)
    assert isinstance(indexed, Samples) and len(indexed) == 24
    row = {sample.picture.name: at for at, sample in enumerate(indexed)}
    flow = flowing(stream(tars / "s*.tar", weight=0.5), batch_size=3)
    sizes = np.array([SHAPES[n % len(SHAPES)] for n in range(24)], np.int64)
    whole = replace(feed(indexed), told=sizes)
    division = Division()
    expected = islice(flow.micro_batches(division), 16)
    found = list(batches(feed(), flow, division, 0, 16, 0))
    assert len(found) == 16
    for arrivals, batch in zip(expected, found, strict=True):
        slots = [a.slot._replace(sample=row[a.sample.picture.name]) for a in arrivals]
        assert_equal(batch, whole.batch(slots, 3.0))
        assert batch.weight.tolist() == [0.5] * 3 and batch.sizes is not None and batch.mask is not None


def test_several_areas_and_several_streams(tars: Path) -> None:
    other = tars / "other"
    other.mkdir()
    shard(other / "o.tar", range(100, 107))
    both = (stream(tars / "s*.tar"), stream(other / "o.tar", source=1))
    flow = flowing(*both, shares=(3.0, 1.0), buckets=Buckets((32, 48), 8, 2.0))
    found = list(islice(flow.arrivals(0, 1), 800))
    assert 0.2 < sum(number(a) >= 100 for a in found) / 800 < 0.3
    assert {a.sample.source for a in found if number(a) >= 100} == {1}
    places = Counter((a.slot.epoch, a.slot.position) for a in found)
    assert set(places.values()) == {1}, "no two share their random numbers"
    for first, second in zip(found[::2], found[1::2], strict=True):
        assert first.sample == second.sample and first.slot.bucket != second.slot.bucket
        assert first.slot.bucket in Buckets((32,), 8, 2.0).every(*first.size)
    again = list(
        islice(flowing(*both, shares=(3.0, 1.0), buckets=Buckets((32, 48), 8, 2.0)).arrivals(0, 1), 800)
    )
    assert again == found


def damaged(n: int, numbers: Sequence[int], cut: float = 0.6) -> dict[str, bytes]:
    return {"png": png(n)[: int(len(png(n)) * cut)]} if n in numbers else {}


def test_what_cannot_be_decoded_does_not_count_and_is_told(tars: Path) -> None:
    shard(tars / "s1.tar", range(6, 12), lambda n: damaged(n, [8]))
    shard(tars / "s2.tar", range(12, 18), lambda n: {"png": b"no picture"} if n == 15 else {})
    whole = list(batches(feed(), flowing(stream(tars / "s[03].tar")), Division(), 0, 3, 0))
    assert all(bool((batch.weight == 1).all()) for batch in whole) and len(whole) == 3
    flow, said = flowing(stream(tars / "s*.tar")), list[str]()
    flow.tell(said.append, 2, listed := tars / "out" / "left_out.txt")
    made = list(batches(feed(), flow, Division(), 0, 30, 0))
    said = [line for line in said if "enlarged" not in line]
    lines = listed.read_text().splitlines()
    assert sorted(lines) == sorted(line.removeprefix("left out: ") for line in said) and len(lines) == 2
    assert len(made) == 30 and len(said) == 2 and all(line.startswith("left out: ") for line in said)
    assert any("s1.tar: 008.png" in line for line in said) and any("s2.tar: 015.png" in line for line in said)
    empty = [batch for batch in made if not bool((batch.weight == 1).all())]
    assert empty and all(batch.weight.tolist() == [1.0, 0.0] for batch in empty)
    names = [name for batch in made for name in batch.names]
    assert not any("008.png" in name or "015.png" in name for name in names) and len(names) == 60
    # A run that goes on behind them sees the same.
    again = flowing(stream(tars / "s*.tar"))
    again.tell([].append, 2, listed)
    for one, other in zip(batches(feed(), again, Division(), 10, 30, 1), made[10:], strict=True):
        assert_equal(one, other)
    assert listed.read_text().splitlines() == lines, "by its loading process, and nothing twice"
    listed.unlink()
    again.tell([].append, 2, listed)
    assert len(list(batches(feed(), again, Division(), 0, 30, 1))) == 30
    assert listed.read_text().splitlines() == lines
    none = flowing(stream(tars / "s*.tar"))
    with pytest.raises(EndedError, match=r"\n1 sample cannot be used; data.unreadable: N leaves out as many"):
        list(batches(feed(), none, Division(), 0, 30, 1))
    none.tell([].append, 1)
    with pytest.raises(EndedError, match=r"\n2 samples cannot be used; data.unreadable: 1 may be left out"):
        list(batches(feed(), none, Division(), 0, 30, 0))


def test_a_micro_batch_of_which_nothing_can_be_decoded(tars: Path) -> None:
    shard(tars / "s0.tar", range(6), lambda n: damaged(n, range(6)))
    flow, said = (
        flowing(stream(tars / "s0.tar"), stream(tars / "s1.tar", source=1), batch_size=1),
        list[str](),
    )
    flow.tell(said.append, 6)
    whole = list(batches(feed(), flow, Division(), 0, 24, 0))
    said = [line for line in said if "enlarged" not in line]
    weights = [batch.weight.tolist() for batch in whole]
    assert len(whole) == 24 and len(said) == 6 and {w for (w,) in weights} == {0.0, 1.0}
    assert all("s1.tar" in batch.names[0] for batch in whole)
    for start in range(1, 24):
        flow.tell([].append, 6)
        other = next(iter(batches(feed(), flow, Division(), start, 24, 0)))
        assert other.weight.tolist() == weights[start]


class Choosy:
    """As far as a gate sees a method that learns two words."""

    def check_captions(self, captions: set[str]) -> list[str]:
        there = [any(word in caption for caption in captions) for word in ("red", "toy")]
        if any(there) and not all(there):
            raise UserError("no caption has one of them")
        return sorted(c for c in captions if "red" not in c and "toy" not in c)


@pytest.mark.parametrize(
    "members, more, told",
    [
        ({"json": b'{"text": "x", "weight": 0}', "txt": None}, {}, r"007.png: its weight is 0"),
        ({"txt": b"blue"}, {"methods": [Choosy()]}, r"007.png: its caption 'blue' lacks the token"),
        ({"txt": b"b" * 80 + b" red"}, {"methods": [Choosy()]}, "is cut before the token"),
        ({"txt": None}, {}, "7: no caption"),
        ({}, {"conditions": [Condition(kind="image")]}, "no conditioning_image"),
        ({}, {"buckets": Buckets((64,), 8, 1.0, False), "least": 64}, r"smaller than the smallest bucket"),
    ],
)
def test_what_a_sample_has_to_have(tmp_path: Path, members: Any, more: Any, told: str) -> None:
    def change(n: int) -> dict[str, Any]:
        return members if n == 7 else {}

    with tarfile.open(tmp_path / "a.tar", "w") as made:
        for n in range(5, 9):
            every = {"png": png(n), "txt": b"red", "mask.png": png(n)} | change(n)
            for ending, data in every.items():
                if data is not None:
                    info = tarfile.TarInfo(f"{n:03d}.{ending}")
                    info.size = len(data)
                    made.addfile(info, io.BytesIO(data))
    if more.pop("least", None):
        more["buckets"] = Buckets((64,), 64, 1.0, False)
    rules = [CaptionRule()]
    flow = flowing(stream(tmp_path / "a.tar"), rules=rules, **more)
    with pytest.raises(UserError, match=told):
        list(islice(flow.arrivals(0, 1), 8))


def test_captions_that_are_cut_are_counted(tmp_path: Path) -> None:
    shard(tmp_path / "a.tar", range(3), lambda n: {"txt": b"a" * 80} if n == 1 else {})
    flow, said = flowing(stream(tmp_path / "a.tar"), rules=[CaptionRule()]), list[str]()
    flow.tell(said.append, 0)
    assert len(list(islice(flow.arrivals(0, 1), 33))) == 33
    said = [line for line in said if " a caption" in line]
    assert [line.split(" a caption")[0] for line in said] == ["1 times", "10 times"]
    assert f"a.tar: 001.png: the last 5 tokens of '{'a' * 60}'" in said[0]


def test_what_is_made_larger_or_has_several_pages_is_counted(tmp_path: Path) -> None:
    frames, small = io.BytesIO(), io.BytesIO()
    pages = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    pages[0].save(frames, "PNG", save_all=True, append_images=pages[1:])
    Image.new("RGB", (20, 40)).save(small, "PNG")
    looks = {1: {"png": frames.getvalue()}, 2: {"png": small.getvalue()}}
    shard(tmp_path / "a.tar", range(3), lambda n: looks.get(n, {}))
    flow, said = flowing(stream(tmp_path / "a.tar")), list[str]()
    flow.tell(said.append, 0)
    assert len(list(islice(flow.arrivals(0, 1), 30))) == 30
    both = [line for line in said if "frames" in line], [line for line in said if "001" in line]
    assert [line.split(" a ")[0] for line in both[0]] == ["1 times", "10 times"] and both[0] == both[1]
    enlarged = [line for line in said if "enlarged" in line]
    assert enlarged and enlarged[0].startswith("1 times a picture was enlarged: ")
    assert any("002.png, 20x40" in line for line in enlarged)


def test_the_first_samples_and_the_digest(tars: Path) -> None:
    one = stream(tars / "s*.tar", weight=2.0)
    some = First(one, 8)
    assert [sample.captions[0] for sample in some] == [f"red {n}" for n in range(8)]
    assert (
        {sample.weight for sample in some} == {2.0} and len(First(one, 100)) == 24 and not len(First(one, 0))
    )
    digest = flowing(one).digest()
    assert digest == flowing(stream(tars / "s*.tar")).digest()
    assert digest != flowing(stream(tars / "s[12].tar")).digest()
    shard(tars / "s1.tar", range(7))
    assert digest != flowing(one).digest()


def test_a_loading_process_ends_when_nobody_waits_for_it(tars: Path) -> None:
    coming = begun(batches(feed(), flowing(stream(tars / "s*.tar")), Division(), 0, 10**6, 1))
    assert next(coming).total == 2.0 and len(multiprocessing.active_children()) == 1
    del coming
    assert not multiprocessing.active_children()
    # Far from its first micro-batch, too.
    assert not list(begun(batches(feed(), flowing(stream(tars / "s*.tar")), Division(), 3, 3, 1)))
    flow = flowing(stream(tars / "s*.tar"))
    flow.halted = multiprocessing.Event()
    assert next(flow.arrivals(0, 1)) is not None
    flow.halted.set()
    assert list(flow.arrivals(0, 1)) == []


def test_the_only_order_needs_one_loading_process(tars: Path) -> None:
    with pytest.raises(AssertionError):
        next(batches(feed(), flowing(stream(tars / "s*.tar")), Division(), 0, 1, 2))
    assert list(batches(feed(), flowing(stream(tars / "s*.tar")), Division(), 3, 3, 0)) == []

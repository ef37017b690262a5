"""Batches are functions of the step: however it is divided, loaded or started, the same numbers, bitwise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tuner import counted
from tuner.batch import Batch
from tuner.data.blob import File
from tuner.data.cache import Store
from tuner.data.captions import CaptionRule
from tuner.data.conditions import Condition
from tuner.data.loader import Division, Feed, Latents, Texts, Waited, stream
from tuner.data.plan import Plan, Slot
from tuner.data.samples import Sample
from tuner.data.views import Views
from tuner.errors import UserError
from tuner.family import Moments
from tuner.text import Text, Tokens

COUNT, STEPS = 10, 6  # batches of 4 of 10 samples: the third is smaller; two epochs


def fake_tokens(captions: Sequence[str]) -> Tokens:
    """The letters' numbers."""
    ids = torch.zeros(len(captions), 1, 77, dtype=torch.int64)
    for row, caption in enumerate(captions):
        ids[row, 0, : len(caption)] = torch.tensor([ord(letter) for letter in caption], dtype=torch.int64)
    return Tokens(ids, (ids > 0).sum(-1), (0,) * len(captions))


@pytest.fixture(scope="module")
def feed(tmp_path_factory: pytest.TempPathFactory) -> Feed:
    folder = tmp_path_factory.mktemp("data")
    samples = []
    for number in range(COUNT):
        noise = np.random.default_rng(number).integers(0, 255, (40, 48, 3)).astype(np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
        samples.append(Sample(File(folder / f"{number}.png"), (f"red {number}", f"toy {number}")))
    rule = CaptionRule(drop=0.3, prefix="the ")
    views = Views(samples, 32, 5, "random", True, Condition(kind="canny"))
    return Feed(views, rule, Latents(4, 8), Texts(fake_tokens))


@pytest.fixture(scope="module")
def cached(feed: Feed, tmp_path_factory: pytest.TempPathFactory) -> Feed:
    """The same with latents and captions from stores."""
    root = tmp_path_factory.mktemp("cache")
    texts = Store(root / "text")
    latents = Latents(4, 8, Store(root / "latents"), [str(i) for i in range(COUNT)])
    names = [latents.name(i, (32, 32), flip) for i in range(COUNT) for flip in (False, True)]
    assert latents.store is not None and len(set(names)) == 2 * COUNT
    latents.store.write({name: torch.randn(8, 4, 4) for name in names})
    every = sorted(set().union(*(feed.captions.every(s.captions) for s in feed.samples)))
    texts.write({caption or "(empty)": torch.randn(77, 8) for caption in every})
    return replace(
        feed,
        views=replace(feed.views, crop="center"),
        latents=latents,
        texts=Texts(fake_tokens, texts, lambda caption: caption or "(empty)"),
    )


@pytest.fixture(params=["plain", "cached"])
def data(request: pytest.FixtureRequest, feed: Feed, cached: Feed) -> Feed:
    return feed if request.param == "plain" else cached


def flat(batch: Batch) -> dict[str, Tensor | tuple[str, ...] | float]:
    """Everything a batch holds, by name."""
    out: dict[str, Tensor | tuple[str, ...] | float] = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Moments | Text | Tokens):
            out |= {f"{field.name}.{n}": v for n, v in value._asdict().items() if v is not None}
        elif value is not None:
            out[field.name] = value
    return out


def assert_equal(one: Batch, other: Batch) -> None:
    mine, theirs = flat(one), flat(other)
    assert mine.keys() == theirs.keys() and len(mine) >= 9
    for name, value in mine.items():
        expected = theirs[name]
        if isinstance(value, Tensor):
            assert isinstance(expected, Tensor) and value.dtype == expected.dtype
            assert torch.equal(value, expected), name
        else:
            assert value == expected, name


def joined(parts: Sequence[Batch]) -> dict[str, Tensor | tuple[str, ...] | float]:
    """The batch that some parts make together."""
    every = [flat(part) for part in parts]
    out: dict[str, Tensor | tuple[str, ...] | float] = {}
    for name, value in every[0].items():
        if isinstance(value, Tensor):
            out[name] = torch.cat([part[name] for part in every])  # type: ignore[misc]
        elif isinstance(value, tuple):
            out[name] = sum((part[name] for part in every), ())  # type: ignore[misc]
        else:
            (out[name],) = {part[name] for part in every}
    return out


def run(data: Feed, division: Division, start: int = 0, workers: int = 0) -> list[Batch]:
    return list(stream(data, Plan([1] * COUNT, 4, 5), division, start, STEPS, workers))


@pytest.mark.parametrize(("accumulate", "processes"), [(2, 1), (4, 1), (1, 2), (2, 2), (1, 4)])
def test_a_step_is_the_same_however_it_is_divided(data: Feed, accumulate: int, processes: int) -> None:
    whole = run(data, Division())
    parts = [run(data, Division(accumulate, processes, rank)) for rank in range(processes)]
    assert len(whole) == STEPS and {len(part) for part in parts} == {STEPS * accumulate}
    for step, batch in enumerate(whole):
        micro = [parts[rank][step * accumulate + m] for m in range(accumulate) for rank in range(processes)]
        expected, found = flat(batch), joined(micro)
        assert expected.keys() == found.keys() and len(found) >= 9
        for name, value in expected.items():
            other = found[name]
            same = torch.equal(value, other) if isinstance(value, Tensor) else value == other  # type: ignore[arg-type]
            assert same, (step, name)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [0, 2, 5])
def test_a_stream_does_not_depend_on_workers_or_on_its_start(data: Feed, workers: int, start: int) -> None:
    division = Division(accumulate=2)
    expected = run(data, division)[start * 2 :]
    torch.manual_seed(99)  # global generators have no part in it
    found = run(data, division, start, workers)
    assert len(found) == len(expected) == (STEPS - start) * 2
    for one, other in zip(found, expected, strict=True):
        assert_equal(one, other)


def test_the_smaller_batch_at_the_end_of_an_epoch_is_filled_with_weight_0(data: Feed) -> None:
    batches = run(data, Division())
    assert [batch.weight.tolist() for batch in batches] == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]] * 2
    assert [batch.total for batch in batches] == [4, 4, 2] * 2
    parts = run(data, Division(accumulate=4))
    assert [batch.total for batch in parts] == [4] * 8 + [2] * 4 + [4] * 8 + [2] * 4
    names = [name for batch in batches for name, w in zip(batch.names, batch.weight, strict=True) if w]
    assert len(names) == 2 * COUNT
    assert len(set(names[:COUNT])) == len(set(names[COUNT:])) == COUNT


def test_what_is_drawn_is_what_was_counted(feed: Feed) -> None:
    slots = [Slot(3, 1, 8, 1.0), Slot(1, 1, 9, 1.0)]
    batch = feed.batch(slots, 2.0)
    for index, position in enumerate((8, 9)):
        for name, purpose in (("noise", "noise"), ("posterior", "posterior")):
            expected = torch.from_numpy(counted.normal((4, 4, 4), 5, 1, position, purpose))
            assert torch.equal(getattr(batch, name)[index], expected)
        assert batch.u[index] == counted.uniform(5, 1, position, "timestep")
    assert not torch.equal(batch.noise[0], batch.posterior[0])
    assert not torch.equal(batch.noise[0], batch.noise[1])


def test_a_sample_differs_from_epoch_to_epoch_and_from_seed_to_seed(feed: Feed) -> None:
    one = feed.batch([Slot(0, 0, 4, 1.0)], 1.0)
    for other in (
        feed.batch([Slot(0, 1, 4, 1.0)], 1.0),
        replace(feed, views=replace(feed.views, seed=6)).batch([Slot(0, 0, 4, 1.0)], 1.0),
    ):
        assert one.pixels is not None and other.pixels is not None
        for name in ("noise", "posterior", "u", "pixels"):
            assert not torch.equal(getattr(one, name), getattr(other, name)), name


def test_noise_is_standard_normal_and_timesteps_are_even(feed: Feed) -> None:
    slots = [Slot(i % COUNT, i // COUNT, i % COUNT, 1.0) for i in range(200)]
    batch = replace(feed, views=replace(feed.views, condition=None)).batch(slots, 200.0)
    for noise in (batch.noise, batch.posterior):
        count = noise.numel()
        assert abs(float(noise.mean())) < 5 / count**0.5
        assert abs(float(noise.var()) - 1) < 5 * (2 / count) ** 0.5
    assert float(batch.u.min()) >= 0 and float(batch.u.max()) < 1
    assert abs(float(batch.u.mean()) - 0.5) < 5 * (1 / 12 / 200) ** 0.5
    assert batch.u.dtype == torch.float64


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_picture_stops_the_stream_and_is_named(
    feed: Feed, tmp_path: Path, workers: int
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    samples = [*feed.samples[:-1], feed.samples[-1]._replace(picture=File(broken))]
    with pytest.raises(UserError, match=r"broken\.png: this picture cannot be read"):
        run(replace(feed, views=replace(feed.views, samples=samples)), Division(), 0, workers)


def test_a_batch_on_a_device_is_the_same_batch(data: Feed) -> None:
    batch = data.batch([Slot(0, 0, 0, 1.0), Slot(1, 0, 1, 0.0)], 1.0)
    assert_equal(batch.to(torch.device("cpu")), batch)
    moved = flat(batch.to(torch.device("meta")))
    devices = {name: value.device.type for name, value in moved.items() if isinstance(value, Tensor)}
    assert len(devices) >= 6 and set(devices.values()) == {"meta"}


def test_the_share_of_the_time_that_is_waited_for_data() -> None:
    """Each batch takes 1 s to come, and 3 s to be used; then 2 s and 2 s."""
    now = [0.0]

    def coming() -> Iterator[Batch]:
        for seconds in (1.0, 1.0, 2.0, 2.0):
            now[0] += seconds
            yield None  # type: ignore[misc]

    waited = Waited(coming(), lambda: now[0])
    for used in (3.0, 3.0):
        next(waited)
        now[0] += used
    assert waited.lately() == 0.25 and waited.lately() == 0.0
    for used in (2.0, 2.0):
        next(waited)
        now[0] += used
    assert waited.all() == 6 / 16 and waited.lately() == 0.5 and waited.all() == 6 / 16
    assert list(waited) == []

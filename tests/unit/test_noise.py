"""Noise and timesteps are functions of (seed, epoch, position), and have the variances that they should."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tuner import counted, gather, recipe
from tuner.batch import Batch
from tuner.data import assemble, encode
from tuner.data.blob import File
from tuner.data.captions import CaptionRule
from tuner.data.index import Memory
from tuner.data.loader import Division, Feed, Latents, Texts, stream
from tuner.data.noise import GOLDEN, Array, Draws, pyramid, summed
from tuner.data.plan import Plan, Slot
from tuner.data.samples import Sample
from tuner.data.views import Views
from tuner.objective import Objective
from tuner.task import Task

SHAPE = (4, 8, 12)
AT = (5, 1, 8)  # seed, epoch, position
EVERYTHING = Draws("even", 0.1, 0.4, 3, 0.2)


def drawn(shape: Sequence[int], purpose: str) -> Array:
    return counted.normal(shape, *AT, purpose)


def test_nothing_chosen_is_plain_noise() -> None:
    assert np.array_equal(Draws().noise(SHAPE, *AT), drawn(SHAPE, "noise"))
    assert Draws().u(*AT) == counted.uniform(*AT, "timestep")
    assert np.array_equal(Draws(pyramid_levels=2).noise(SHAPE, *AT), drawn(SHAPE, "noise"))


def test_offset_noise_is_one_number_for_a_channel() -> None:
    noise = Draws(offset_noise=0.1).noise(SHAPE, *AT)
    assert noise.dtype == np.float32 and noise.shape == SHAPE
    expected = drawn(SHAPE, "noise") + np.float32(0.1) * drawn(SHAPE[:1], "offset noise")[:, None, None]
    assert np.array_equal(noise, expected)
    change = noise.astype(np.float64) - drawn(SHAPE, "noise")
    # Constant in each channel but for the rounding of sums below 8, and different from channel to channel.
    assert np.ptp(change, axis=(1, 2)).max() < 1e-6
    assert len(set(change.mean(axis=(1, 2)).round(4))) == SHAPE[0]


def test_input_noise_is_perturbed_and_the_noise_is_not() -> None:
    draws = Draws(input_perturbation=0.2)
    noise = draws.noise(SHAPE, *AT)
    assert np.array_equal(noise, drawn(SHAPE, "noise"))
    expected = noise + np.float32(0.2) * drawn(SHAPE, "input perturbation")
    found = draws.input_noise(noise, *AT)
    assert found.dtype == np.float32 and np.array_equal(found, expected)


def test_levels_of_the_pyramid() -> None:
    assert pyramid((16, 16), 6) == [(8, 8), (4, 4), (2, 2), (1, 1)]
    assert pyramid((9, 5), 6) == [(5, 3), (3, 2), (2, 1), (1, 1)]
    assert pyramid((64, 64), 3) == [(32, 32), (16, 16), (8, 8)]
    assert pyramid((1, 1), 3) == []


@pytest.mark.parametrize("size", [(8, 12), (9, 5), (2, 2), (1, 7)])
def test_pyramid_noise_is_torchs_interpolation_divided_by_its_deviation(size: tuple[int, int]) -> None:
    noise = drawn((3, *size), "noise")
    levels = [drawn((3, *cells), f"pyramid noise {i}") for i, cells in enumerate(pyramid(size, 6), 1)]
    assert len(levels) >= 1
    total = torch.from_numpy(noise).double()
    for power, level in enumerate(levels, start=1):
        wide = torch.from_numpy(level).double()[None]
        total += 0.4**power * torch.nn.functional.interpolate(wide, size, mode="bilinear")[0]
    ratio = total.numpy() / summed(noise, levels, 0.4)
    assert np.allclose(ratio, ratio[0], rtol=1e-4)  # the same deviation in each channel
    assert ratio.min() > 1.0 and ratio.max() < (1 / (1 - 0.4**2)) ** 0.5  # less between the cells


@pytest.mark.parametrize("size", [(4, 4), (5, 3), (2, 7)])
@pytest.mark.parametrize("discount", [0.3, 1.0])
def test_pyramid_noise_has_variance_1_everywhere(size: tuple[int, int], discount: float) -> None:
    # The sum is linear in independent numbers of variance 1: its variance is the sum of squares of what each
    # of them alone gives.
    shapes = [(1, *cells) for cells in (size, *pyramid(size, 6))]
    variance, seen = np.zeros(size), 0
    for which, shape in enumerate(shapes):
        for place in product(*map(range, shape)):
            parts = [np.zeros(s, np.float32) for s in shapes]
            parts[which][place] = 1.0
            variance += summed(parts[0], parts[1:], discount)[0].astype(np.float64) ** 2
            seen += 1
    assert seen == sum(rows * columns for _, rows, columns in shapes)
    np.testing.assert_allclose(variance, 1.0, rtol=1e-6)


def test_pyramid_noise_lies_in_low_frequencies() -> None:
    means = [
        [draws.noise((4, 16, 16), 0, 0, position).mean(axis=(1, 2)) for position in range(200)]
        for draws in (Draws(), Draws(pyramid_noise=0.5))
    ]
    plain, low = (np.var(of) for of in means)
    assert plain == pytest.approx(1 / 256, rel=5 * (2 / 800) ** 0.5)
    # The level of h cells adds 0.5^(2i) / cells or so to a mean's variance, all divided by at most 4 / 3.
    assert low > 0.75 * (1 + sum(0.25**i * 4**i for i in range(1, 5))) / 256 * 0.8


def test_everything_at_once_is_made_of_the_same_draws() -> None:
    cells = pyramid(SHAPE[1:], 3)
    levels = [drawn((4, *size), f"pyramid noise {i}") for i, size in enumerate(cells, 1)]
    assert cells == [(4, 6), (2, 3), (1, 2)]
    low = summed(drawn(SHAPE, "noise"), levels, 0.4)
    expected = low + np.float32(0.1) * drawn(SHAPE[:1], "offset noise")[:, None, None]
    noise = EVERYTHING.noise(SHAPE, *AT)
    assert np.array_equal(noise, expected)
    change = np.float32(0.2) * drawn(SHAPE, "input perturbation")
    assert np.array_equal(EVERYTHING.input_noise(noise, *AT), expected + change)


def test_variances_of_all_together() -> None:
    count = 400
    draws = replace(EVERYTHING, offset_noise=0.5)
    noise = np.stack([draws.noise(SHAPE, 0, 0, position) for position in range(count)])
    inputs = np.stack([draws.input_noise(one, 0, 0, position) for position, one in enumerate(noise)])
    each = count * SHAPE[0]  # independent channels at each place
    for found, expected in ((noise, 1.25), (inputs, 1.29), (inputs - noise, 0.04)):
        variance = found.astype(np.float64).var(axis=(0, 1))
        assert np.abs(variance / expected - 1).max() < 6 * (2 / each) ** 0.5
        assert abs(variance.mean() / expected - 1) < 4 * (2 / each) ** 0.5


def test_even_timesteps_closed_form() -> None:
    draws, seen = Draws("even"), 0
    for seed, epoch in ((0, 0), (0, 1), (7, 3)):
        offset = Fraction(counted.uniform(seed, epoch, 0, "timestep offset"))
        for position in (0, 1, 2, 1000, 10**12 + 1):
            exact = (offset + position * Fraction(GOLDEN, 2**64)) % 1
            found = draws.u(seed, epoch, position)
            assert found == int(exact * 2**24) / 2**24 and 0 <= found < 1
            seen += 1
    assert seen == 15
    assert pytest.approx((5**0.5 - 1) / 2, abs=1e-15) == GOLDEN / 2**64
    offsets = {draws.u(seed, epoch, 0) for seed in range(5) for epoch in range(5)}
    assert len(offsets) == 25


@pytest.mark.parametrize("count", [3, 8, 50, 377])
@pytest.mark.parametrize("first", [0, 123, 99_999])
def test_consecutive_samples_lie_evenly_on_the_circle(count: int, first: int) -> None:
    def gaps(draws: Draws) -> Any:
        points = np.sort([draws.u(3, 2, position) for position in range(first, first + count)])
        return np.diff([*points, points[0] + 1])

    even = gaps(Draws("even"))
    assert len(even) == count and even.sum() == pytest.approx(1)
    # Three-distance theorem: at most three lengths; for the golden ratio the largest is within its square.
    assert (np.diff(np.sort(even)) > 2**-21).sum() <= 2
    assert even.max() < 2.6181 * (even.min() + 2**-22)
    if count >= 50:
        assert even.max() < 3 / count < gaps(Draws()).max()


def test_each_even_timestep_alone_is_uniform() -> None:
    found = np.sort([Draws("even").u(seed, 4, 17) for seed in range(1000)])
    distance = np.abs(found - (np.arange(1000) + 0.5) / 1000).max()
    assert distance < 1.95 / 1000**0.5  # Kolmogorov and Smirnov at one in a thousand


@pytest.fixture(scope="module")
def feed(tmp_path_factory: pytest.TempPathFactory) -> Feed:
    folder = tmp_path_factory.mktemp("data")
    samples = []
    for number in range(6):
        Image.new("RGB", (32, 32), (40 * number, 0, 0)).save(folder / f"{number}.png")
        samples.append(Sample(File(folder / f"{number}.png"), (f"red {number}",)))
    return Feed(Views(samples, 32, AT[0]), CaptionRule(), Latents(4, 8), Texts(None), draws=EVERYTHING)


def test_a_batch_holds_what_was_drawn(feed: Feed) -> None:
    slots = [Slot(3, 1, 8, 1.0), Slot(1, 1, 9, 1.0)]
    batch = feed.batch(slots, 2.0)
    assert batch.input_noise is not None
    for index, slot in enumerate(slots):
        at = (feed.views.seed, slot.epoch, slot.position)
        noise = EVERYTHING.noise((4, 4, 4), *at)
        assert np.array_equal(batch.noise[index].numpy(), noise)
        assert np.array_equal(batch.input_noise[index].numpy(), EVERYTHING.input_noise(noise, *at))
        assert batch.u[index] == EVERYTHING.u(*at)
    assert replace(feed, draws=Draws()).batch(slots, 2.0).input_noise is None
    assert replace(feed, u=lambda slot: 0.25).batch(slots, 2.0).u.tolist() == [0.25, 0.25]


def test_noise_does_not_depend_on_how_a_step_is_divided(feed: Feed) -> None:
    def parts(division: Division) -> list[Batch]:
        return list(stream(feed, Plan([1] * 6, 4, 5), division, 0, 3, 0))

    whole, ranks = parts(Division()), [parts(Division(1, 2, rank)) for rank in (0, 1)]
    assert len(whole) == 3
    for step, batch in enumerate(whole):
        for name in ("noise", "input_noise", "u"):
            joined = torch.cat([getattr(part[step], name) for part in ranks])
            assert torch.equal(joined, getattr(batch, name))


class Probe(Task):
    """A task whose denoiser says nothing and remembers what it saw."""

    seen: Tensor

    def latents(self, batch: Batch) -> Tensor:
        return torch.ones_like(batch.noise)

    def _condition(self, batch: Batch) -> Any:
        return None

    def _predict(self, x_t: Tensor, t: Tensor, cond: Any, batch: Batch) -> Tensor:
        self.seen = x_t
        return torch.zeros_like(x_t)


def test_the_denoiser_sees_the_input_noise_and_is_asked_for_the_other(feed: Feed) -> None:
    batch = feed.batch([Slot(0, 0, 0, 1.0), Slot(1, 0, 1, 1.0)], 2.0)
    objective = Objective(torch.tensor([0.64, 0.64]))
    task = Probe(Mock(), [], objective)
    losses = task.losses(batch)
    assert batch.input_noise is not None
    torch.testing.assert_close(task.seen, 0.8 + 0.6 * batch.input_noise)
    torch.testing.assert_close(losses, batch.noise.square().mean(dim=(1, 2, 3)))


RECIPE = """
base: embedded
method: lora
data: {source: x, resolution: 64, cache: 'off', captions: {drop: 0}}
objective:
  timestep_draw: even
  offset_noise: 0.1
  pyramid_noise: 0.4
  pyramid_levels: 3
  input_perturbation: 0.2
train: {steps: 1, batch_size: 1, learning_rate: 1}
output: out
"""


def test_the_recipes_choice_reaches_the_feed_and_not_the_validation(tmp_path: Path) -> None:
    place = tmp_path / "one.yaml"
    place.write_text(RECIPE)
    accelerator: Any = SimpleNamespace(process_index=0, num_processes=1, wait_for_everyone=lambda: None)
    family = Mock(latent_channels=4, factor=8, text_encoders={}, inpainting=False)
    family.modules.return_value = {}
    method = SimpleNamespace(
        condition=None,
        templates=tuple,
        replacements=tuple,
        DROP_CAPTIONS=0.0,
        CACHES_LATENTS=True,
        CACHES_TEXT=True,
    )
    task: Any = SimpleNamespace(family=family, each=lambda: [method])
    wanted = gather.wanted(recipe.load(place), task, accelerator)
    opened = assemble.look_at([], np.zeros(0), wanted, Memory(tmp_path / "memory"))
    assert encode.feed(opened, wanted, family).draws == EVERYTHING
    assert encode.feed(opened, wanted.plain(), family).draws == Draws()

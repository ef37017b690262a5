from __future__ import annotations

import math
from itertools import pairwise
from statistics import NormalDist
from typing import Any, get_args

import pytest
import torch

from tuner.objective import Objective, Options
from tuner.weighting import STEEPEST_MODE, Shape, shaped

STABLE_DIFFUSION: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
}
# a_bar 0.64 and 0.36 have exact roots: signals 0.8 and 0.6.
A_BAR = torch.tensor([0.9, 0.64, 0.36, 0.0], dtype=torch.float64)


def test_sample_t_is_the_exact_floor() -> None:
    objective = Objective.from_scheduler_config(STABLE_DIFFUSION)
    below_one = [math.nextafter(1.0, 0.0), 0.0, 0.5, 0.4999999, 0.001, 0.0009999]
    found = objective.sample_t(torch.tensor(below_one, dtype=torch.float64))
    assert found.dtype == torch.int64 and found.tolist() == [999, 0, 500, 499, 1, 0]
    assert objective.sample_t(torch.tensor([1 - 2**-24])).tolist() == [999]  # float32's last below 1


def test_sample_t_never_reaches_the_end() -> None:
    last = torch.tensor([math.nextafter(1.0, 0.0)], dtype=torch.float64)
    seen = 0
    for count in range(1, 1101):
        start = count % 3
        options = Options(timesteps=(start, start + count))
        objective = Objective(torch.linspace(0.9, 0.1, count + start), options)
        assert objective.sample_t(last).item() == start + count - 1
        assert objective.sample_t(torch.zeros(1)).item() == start
        seen += 1
    assert seen == 1100


def test_sample_t_covers_its_range_evenly() -> None:
    objective = Objective(A_BAR, Options(timesteps=(1, 4)))
    u = (torch.arange(3000, dtype=torch.float64) + 0.5) / 3000
    assert torch.bincount(objective.sample_t(u), minlength=4).tolist() == [0, 1000, 1000, 1000]


@pytest.mark.parametrize("u", [1.0, -0.1, math.nan])
def test_sample_t_refuses_numbers_out_of_range(u: float) -> None:
    with pytest.raises(AssertionError):
        Objective(A_BAR).sample_t(torch.tensor([0.5, u]))


def shares(u: float, shape: str) -> float:
    """Inverse distribution functions in plain Python."""
    angle = math.pi * u / 2
    return {
        "uniform": u,
        "logit_normal": 1 / (1 + math.exp(-(0.5 + 0.8 * NormalDist().inv_cdf(u)))),
        "mode": 1 - (1 - u) - 1.29 * (math.cos(math.pi * (1 - u) / 2) ** 2 - 1 + (1 - u)),
        "cosmap": 1 - 1 / (math.tan(angle) + 1),
        "cubic": 1 - (1 - u) ** 3,
    }[shape]


def below(share: float, shape: str) -> float:
    """Distribution functions: how often at most `share` is drawn."""
    if shape == "logit_normal":
        return NormalDist(0.5, 0.8).cdf(math.log(share / (1 - share)))
    if shape == "cosmap":
        return 2 / math.pi * math.atan(share / (1 - share))
    return 1 - (1 - share) ** (1 / 3) if shape == "cubic" else share


SHAPES = get_args(Shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_closed_form(shape: Any) -> None:
    u = [1e-6, 0.001, 0.2, 0.5, 0.77, 0.999, 1 - 2**-24]
    found = shaped(torch.tensor(u, dtype=torch.float64), shape, 0.5, 0.8, 1.29)
    assert found.dtype == torch.float64 and len(SHAPES) == 5
    assert found.tolist() == pytest.approx([shares(one, shape) for one in u], rel=1e-9, abs=1e-12)
    assert shaped(torch.zeros(1), shape, 0.5, 0.8, 1.29).tolist() == [0.0]
    if shape != "mode":  # whose inverse has no closed form
        assert [below(one, shape) for one in found.tolist()] == pytest.approx(u, abs=1e-7)


@pytest.mark.parametrize("scale", [-1.0, -0.3, 0.0, 1.29, STEEPEST_MODE])
def test_mode_rises_from_0_to_1_at_every_scale(scale: float) -> None:
    found = shaped(torch.linspace(0, 1, 2001, dtype=torch.float64), "mode", 0.0, 1.0, scale)
    assert found[0] == 0 and found[-1] == pytest.approx(1.0)
    assert bool((found.diff() >= -1e-15).all())


@pytest.mark.parametrize("shape", SHAPES)
def test_timesteps_are_drawn_as_often_as_their_shape_says(shape: Any) -> None:
    count, start = 200_000, 3
    options = Options(timesteps=(start, start + 10), timestep_shape=shape, logit_mean=0.5, logit_std=0.8)
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    drawn = Objective(torch.linspace(0.9, 0.1, 20), options).sample_t(u)
    found = torch.bincount(drawn, minlength=20)
    assert int(found[:start].sum()) == int(found[start + 10 :].sum()) == 0
    if shape == "mode":
        assert int(found[7:9].sum()) > 2.4 / 10 * count  # the middle two of ten, rather than two tenths
    else:
        edges = [0.0, *(below(i / 10, shape) for i in range(1, 10)), 1.0]
        expected = [count * (high - low) for low, high in pairwise(edges)]
        assert found[start : start + 10].tolist() == pytest.approx(expected, abs=1.0)  # exact but for edges
    assert int(found.sum()) == count


@pytest.mark.parametrize("shape", SHAPES)
def test_no_shape_leaves_its_range(shape: Any) -> None:
    options = Options(timestep_shape=shape, logit_mean=30.0, logit_std=20.0, mode_scale=-1.0)
    objective = Objective.from_scheduler_config(STABLE_DIFFUSION, **vars(options))
    ends = torch.tensor([0.0, 2**-24, 0.5, 1 - 2**-24, math.nextafter(1.0, 0.0)], dtype=torch.float64)
    found = objective.sample_t(ends).tolist()
    assert found == sorted(found) and found[0] == 0 and found[-1] == 999

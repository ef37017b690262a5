from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import pydantic
import pytest
import torch
from diffusers.optimization import get_polynomial_decay_schedule_with_warmup, get_scheduler
from torch.nn import Parameter
from transformers.optimization import (
    get_cosine_with_min_lr_schedule_with_warmup,
    get_inverse_sqrt_schedule,
)

from tuner import training
from tuner.optimiser import OptimiserError, Schedule, build, schedule


def groups(*rates: float | None) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for rate in rates:
        group: dict[str, Any] = {"params": [Parameter(torch.tensor([1.0, -2.0]))]}
        made.append(group if rate is None else {**group, "lr": rate})
    return made


def rates(name: str, warmup: int, steps: int, count: int, **numbers: Any) -> list[float]:
    optimiser = build(groups(None, 0.5), "sgd", 2.0)
    scheduler = schedule(optimiser, name, warmup, steps, **numbers)
    found = []
    for _ in range(count):
        assert optimiser.param_groups[1]["lr"] == optimiser.param_groups[0]["lr"] / 4
        found.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        scheduler.step()
    return found


def test_schedules_closed_form() -> None:
    ramp, falling = [0.0, 0.5, 1.0, 1.5], range(4, 10)
    assert rates("constant", 4, 10, 12) == pytest.approx([*ramp, *[2.0] * 8])
    line = [2.0 * (10 - step) / 6 for step in falling]
    assert rates("linear", 4, 10, 12) == pytest.approx([*ramp, *line, 0, 0])
    cosine = [1 + math.cos(math.pi * (step - 4) / 6) for step in falling]
    assert rates("cosine", 4, 10, 13) == pytest.approx([*ramp, *cosine, 0, 0, 0])  # and stays 0
    thrice = [1 + math.cos(math.pi * (step % 2) / 2) for step in falling]
    found = rates("cosine_with_restarts", 4, 10, 13, cycles=3)
    assert found == pytest.approx([*ramp, *thrice, 0, 0, 0])
    square = [2.0 * ((10 - step) / 6) ** 2 for step in falling]
    assert rates("polynomial", 4, 10, 12, power=2.0) == pytest.approx([*ramp, *square, 0, 0])
    rex = [2.0 * (1 - p) / (1 - p / 2) for p in (0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6)]
    assert rates("rex", 4, 10, 12) == pytest.approx([*ramp, *rex, 0, 0])
    root = [2.0 * math.sqrt(4 / step) for step in range(4, 12)]
    assert rates("inverse_sqrt", 4, 10, 12) == pytest.approx([*ramp, *root])
    pieces = rates("piecewise_constant", 4, 10, 12, pieces=[(6, 0.5), (9, 0.1)])
    assert pieces == pytest.approx([*ramp, 2, 2, 1, 1, 1, 0.2, 0.2, 0.2])
    assert len(get_args(Schedule)) == 8


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "polynomial", "rex"])
def test_a_falling_schedule_ends_where_it_is_told(name: str) -> None:
    whole = rates(name, 3, 11, 14, cycles=2, power=2.0)
    assert whole[3] == 2.0 and whole[11:] == [0.0, 0.0, 0.0]
    found = rates(name, 3, 11, 14, cycles=2, power=2.0, end=0.25)
    expected = [rate if step < 3 else 0.5 + 0.75 * rate for step, rate in enumerate(whole)]
    assert found == pytest.approx(expected, rel=1e-12)


def theirs(make: Callable[[torch.optim.Optimizer], Any], steps: int) -> list[float]:
    """The learning rates of another library's schedule."""
    optimiser = build(groups(None), "sgd", 2.0)
    scheduler, found = make(optimiser), []
    for step in range(steps):
        found.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        if step + 1 < steps:  # diffusers' polynomial divides by zero at the end of a lone warm-up
            scheduler.step()
    assert len(found) == steps
    return found


LENGTHS = [(0, 7), (3, 7), (7, 7), (20, 7), (0, 1), (5, 60)]


@pytest.mark.parametrize(
    ("name", "label", "numbers", "their_numbers"),
    [
        ("constant", "constant_with_warmup", {}, {}),
        ("linear", "linear", {}, {}),
        ("cosine", "cosine", {}, {}),
        ("cosine_with_restarts", "cosine_with_restarts", {"cycles": 1}, {"num_cycles": 1}),
        ("cosine_with_restarts", "cosine_with_restarts", {"cycles": 4}, {"num_cycles": 4}),
        ("polynomial", "polynomial", {"power": 1.0, "end": 0.5e-7}, {}),
        ("polynomial", "polynomial", {"power": 2.5, "end": 0.5e-7}, {"power": 2.5}),
    ],
)
@pytest.mark.parametrize(("warmup", "steps"), LENGTHS)
def test_parity_with_diffusers(
    name: str, label: str, numbers: Any, their_numbers: Any, warmup: int, steps: int
) -> None:
    def make(optimiser: torch.optim.Optimizer) -> Any:
        return get_scheduler(
            label, optimiser, num_warmup_steps=warmup, num_training_steps=steps, **their_numbers
        )

    expected = theirs(make, steps)
    assert rates(name, warmup, steps, steps, **numbers) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(("warmup", "steps"), LENGTHS)
def test_parity_with_diffusers_polynomials_end(warmup: int, steps: int) -> None:
    expected = theirs(
        lambda made: get_polynomial_decay_schedule_with_warmup(made, warmup, steps, lr_end=0.5, power=3.0),
        steps,
    )
    found = rates("polynomial", warmup, steps, steps, power=3.0, end=0.25)
    assert found == pytest.approx(expected, rel=1e-12)


def test_parity_with_diffusers_pieces() -> None:
    # Their rules say until when a factor holds, ours from when on.
    expected = theirs(lambda made: get_scheduler("piecewise_constant", made, step_rules="1:4,0.1:9,0.01"), 20)
    assert rates("piecewise_constant", 0, 20, 20, pieces=[(4, 0.1), (9, 0.01)]) == pytest.approx(expected)
    assert len(set(expected)) == 3


@pytest.mark.parametrize(("warmup", "steps"), [(1, 7), (3, 7), (20, 7), (5, 60)])
def test_parity_with_transformers(warmup: int, steps: int) -> None:
    expected = theirs(lambda made: get_inverse_sqrt_schedule(made, warmup), steps)
    assert rates("inverse_sqrt", warmup, steps, steps) == pytest.approx(expected, rel=1e-12)
    expected = theirs(
        lambda made: get_cosine_with_min_lr_schedule_with_warmup(made, warmup, steps, min_lr_rate=0.1), steps
    )
    assert rates("cosine", warmup, steps, steps, end=0.1) == pytest.approx(expected, rel=1e-12)


def test_a_resumed_schedule_continues() -> None:
    whole = rates("cosine", 2, 10, 10)
    first = build(groups(None), "sgd", 2.0)
    scheduler = schedule(first, "cosine", 2, 10)
    for _ in range(5):
        first.step()
        scheduler.step()
    second = build(groups(None), "sgd", 2.0)
    resumed = schedule(second, "cosine", 2, 10)
    second.load_state_dict(first.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    found = []
    for _ in range(5):
        found.append(second.param_groups[0]["lr"])
        second.step()
        resumed.step()
    assert found == whole[5:]


@pytest.mark.parametrize(
    ("name", "warmup", "steps", "numbers"),
    [
        ("linear", -1, 10, {}),
        ("linear", 0, 0, {}),
        ("inverse_sqrt", 0, 10, {}),
        ("linear", 0, 10, {"end": 1.0}),
        ("cosine_with_restarts", 0, 10, {"cycles": 0}),
        ("polynomial", 0, 10, {"power": 0.0}),
        ("piecewise_constant", 0, 10, {"pieces": [(1, -0.1)]}),
    ],
)
def test_impossible_schedules_are_errors(name: str, warmup: int, steps: int, numbers: Any) -> None:
    with pytest.raises(OptimiserError):
        schedule(build(groups(None), "sgd", 0.1), name, warmup, steps, **numbers)


def block(**keys: Any) -> training.Train:
    return training.Train(**{"batch_size": 1, "learning_rate": 2.0, "steps": 10, **keys})


def test_the_recipes_keys_are_the_arguments_of_schedule_and_build() -> None:
    assert get_args(training.Train.model_fields["schedule"].annotation) == get_args(Schedule)
    assert block().schedule_options() == {}
    given = {
        "linear": {"schedule_end": 0.1},
        "cosine_with_restarts": {"schedule_end": 0.1, "schedule_cycles": 3},
        "polynomial": {"schedule_power": 3.0},
        "piecewise_constant": {"schedule_pieces": [[4, 0.5], [6, 0.1]]},
    }
    for name, keys in given.items():
        chosen = block(schedule=name, **keys)
        numbers = {key.removeprefix("schedule_"): value for key, value in keys.items()}
        found = rates(chosen.schedule, 0, 10, 10, **chosen.schedule_options())
        assert found == rates(name, 0, 10, 10, **{"power": 2.0, **numbers}) and len(set(found)) > 2
    assert len(given) == 4
    about = {"name": "sgd", "weight_decay": 0.5, "options": {"momentum": 0.9}}
    made = build(groups(None), **training.Optimiser(**about).resolved(), learning_rate=0.1)
    assert (made.defaults["weight_decay"], made.defaults["momentum"]) == (0.5, 0.9)
    # What the recipe leaves out is the class's own, for each.
    seen = 0
    for name in ("adamw", "sgd", "lion", "muon", "adafactor", "rprop"):
        found = build(groups(None), **training.Optimiser(name=name).resolved(), learning_rate=0.1).defaults
        assert found == build(groups(None), name, 0.1).defaults
        seen += 1
    assert seen == 6


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"schedule_end": 0.1}, "schedule_end: has no effect: it belongs to schedule linear or cosine or"),
        ({"schedule": "cosine", "schedule_cycles": 3}, "schedule_cycles: has no effect"),
        ({"schedule": "linear", "schedule_power": 3.0}, "schedule_power: has no effect"),
        ({"schedule_pieces": [[1, 0.1]]}, "schedule_pieces: has no effect"),
        ({"schedule": "piecewise_constant"}, r"schedule_pieces: found \[\], expected \[\[step, factor\]"),
        ({"schedule": "piecewise_constant", "schedule_pieces": [[5, 0.1], [5, 0.2]]}, "steps rising"),
        ({"schedule": "piecewise_constant", "schedule_pieces": [[5, -0.1]]}, "factors from 0"),
        ({"schedule": "inverse_sqrt"}, "warmup: found the number 0"),
        ({"schedule": "cosine", "optimiser": "AdamWScheduleFree"}, "schedule: found cosine, but AdamWSch"),
        ({"ema": 0.9, "optimiser": "sgdschedulefree"}, "ema: found the number 0.9, but sgdschedulefree av"),
        ({"optimiser": {"options": {"x": {"y": 1}}}}, r"options\.x: expected a finite number"),
        ({"optimiser": {"options": {"x": [1.0, math.inf]}}}, r"options\.x: expected a finite number"),
        ({"optimiser": {"betas": [0.9, 1.0]}}, r"betas\.1: found the number 1\.0"),
    ],
    ids=str,
)
def test_keys_that_do_not_go_together_are_errors(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=message):
        block(**keys)

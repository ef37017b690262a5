from __future__ import annotations

import importlib.util
import math
import sys
from typing import Any

import pytest
import torch
from diffusers.optimization import get_scheduler
from torch.nn import Parameter

from tuner.optimiser import EIGHT_BIT, OptimiserError, build, schedule


def groups(*rates: float | None) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for rate in rates:
        group: dict[str, Any] = {"params": [Parameter(torch.tensor([1.0, -2.0]))]}
        made.append(group if rate is None else {**group, "lr": rate})
    return made


def test_adamw_first_step_closed_form() -> None:
    # With bias correction the first step is lr g / (|g| + eps), after the weights were scaled by 1 - lr wd.
    made = groups(None)
    optimiser = build(made, "adamw", 0.1, weight_decay=0.5, betas=(0.8, 0.9), eps=1e-3)
    parameter = made[0]["params"][0]
    parameter.grad = torch.tensor([0.25, -4.0])
    optimiser.step()
    expected = [1 * 0.95 - 0.1 * 0.25 / 0.251, -2 * 0.95 + 0.1 * 4 / 4.001]
    assert parameter.tolist() == pytest.approx(expected, rel=1e-6)
    assert type(optimiser) is torch.optim.AdamW


def test_sgd_step_closed_form_and_rates_of_groups() -> None:
    made = groups(None, 0.5)
    optimiser = build(made, "sgd", 0.1, weight_decay=0.2)
    for group in made:
        group["params"][0].grad = torch.tensor([1.0, 1.0])
    optimiser.step()
    assert made[0]["params"][0].tolist() == pytest.approx([1 - 0.1 * 1.2, -2 - 0.1 * 0.6])
    assert made[1]["params"][0].tolist() == pytest.approx([1 - 0.5 * 1.2, -2 - 0.5 * 0.6])


def test_adamw_is_deterministic() -> None:
    def train() -> list[float]:
        made = groups(None)
        optimiser = build(made, "adamw", 0.1)
        for step in range(5):
            made[0]["params"][0].grad = torch.tensor([math.sin(step), math.cos(step)])
            optimiser.step()
        return [float(v) for v in made[0]["params"][0].detach()]

    assert train() == train()


def test_every_torch_optimiser_by_name_in_any_case_lowers_a_loss() -> None:
    names = ["Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam"]
    names += ["RMSprop", "Rprop", "SGD"]
    seen = 0
    for name in names:
        for spelled in (name, name.lower(), name.upper()):
            made = groups(None)
            parameter = made[0]["params"][0]
            optimiser = build(made, spelled, 0.01)
            assert type(optimiser).__name__ == name
            for _ in range(2):
                optimiser.zero_grad()
                loss = parameter.square().sum()
                loss.backward()
                optimiser.step()
            assert parameter.square().sum() < 5.0
            seen += 1
    assert seen == 36


def test_options_not_given_are_the_optimisers_own() -> None:
    assert build(groups(None), "adamw", 0.1).defaults["weight_decay"] == 0.01
    assert build(groups(None), "sgd", 0.1).defaults["weight_decay"] == 0
    assert build(groups(None), "adamw", 0.1).defaults["lr"] == 0.1


def test_unknown_names_are_errors_with_the_nearest() -> None:
    with pytest.raises(OptimiserError, match="adamw"):
        build(groups(None), "adam_w", 0.1)
    with pytest.raises(OptimiserError, match="lion8bit"):
        build(groups(None), "lion_8bit", 0.1)
    with pytest.raises(OptimiserError, match="adamw"):
        build(groups(None), "zzz", 0.1)
    with pytest.raises(OptimiserError, match="cosine"):
        schedule(build(groups(None), "sgd", 0.1), "cosin", 0, 10)


@pytest.mark.parametrize("name", ["LBFGS", "SparseAdam", "Optimizer", "lr_scheduler"])
def test_what_the_loop_cannot_drive_is_unknown(name: str) -> None:
    with pytest.raises(OptimiserError, match="unknown optimiser"):
        build(groups(None), name, 0.1)


def test_options_not_taken_are_errors_unless_they_are_the_common_default() -> None:
    build(groups(None), "sgd", 0.1, betas=(0.9, 0.999), eps=1e-8)
    with pytest.raises(OptimiserError, match="SGD does not take betas"):
        build(groups(None), "sgd", 0.1, betas=(0.9, 0.99))
    with pytest.raises(OptimiserError, match="SGD does not take eps"):
        build(groups(None), "sgd", 0.1, eps=1e-6)
    with pytest.raises(OptimiserError, match="Rprop does not take weight_decay"):
        build(groups(None), "rprop", 0.1, weight_decay=0.1)


@pytest.mark.parametrize(
    "options",
    [
        {"name": "adamw", "betas": (0.9, 1.5)},
        {"name": "adamw", "eps": -1.0},
        {"name": "adamw", "learning_rate": -0.1},
        {"name": "adafactor", "eps": 1e-6},  # takes a pair
        {"name": "muon", "eps": -1.0},
    ],
    ids=str,
)
def test_values_an_optimiser_refuses_are_errors(options: dict[str, Any]) -> None:
    with pytest.raises(OptimiserError):
        build(groups(None), **{"learning_rate": 0.1, **options})


def test_empty_and_misspelled_groups_are_refused() -> None:
    for wrong in ([], [{"params": []}], [{"params": groups(None)[0]["params"], "learning_rate": 0.1}]):
        with pytest.raises(AssertionError):
            build(wrong, "adamw", 0.1)


def test_eight_bit_without_its_package_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for name in EIGHT_BIT:
        with pytest.raises(OptimiserError, match="bitsandbytes"):
            build(groups(None), name, 0.1)
    assert len(EIGHT_BIT) == 2


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("name", sorted(EIGHT_BIT))
def test_eight_bit_keeps_its_state_in_bytes(name: str) -> None:
    parameter = Parameter(torch.ones(64, 128))
    optimiser = build([{"params": [parameter]}], name, 1e-3)
    parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    # Both optimisers' first step is lr in the gradient's direction (AdamW's decay adds 1e-5).
    torch.testing.assert_close(parameter.detach(), torch.full((64, 128), 0.999), rtol=0, atol=2e-5)
    assert optimiser.state[parameter]["state1"].dtype == torch.uint8


def rates(name: str, warmup: int, steps: int, count: int) -> list[float]:
    optimiser = build(groups(None, 0.5), "sgd", 2.0)
    scheduler = schedule(optimiser, name, warmup, steps)
    found = []
    for _ in range(count):
        assert optimiser.param_groups[1]["lr"] == optimiser.param_groups[0]["lr"] / 4
        found.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        scheduler.step()
    return found


def test_schedules_closed_form() -> None:
    ramp = [0.0, 0.5, 1.0, 1.5]
    assert rates("constant", 4, 10, 12) == pytest.approx([*ramp, *[2.0] * 8])
    line = [2.0 * (10 - step) / 6 for step in range(4, 10)]
    assert rates("linear", 4, 10, 12) == pytest.approx([*ramp, *line, 0, 0])
    cosine = [1 + math.cos(math.pi * (step - 4) / 6) for step in range(4, 10)]
    assert rates("cosine", 4, 10, 13) == pytest.approx([*ramp, *cosine, 0, 0, 0])  # and stays 0


@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 7), (3, 7), (7, 7), (20, 7), (0, 1)])
def test_parity_with_diffusers(name: str, warmup: int, steps: int) -> None:
    optimiser = build(groups(None), "sgd", 2.0)
    label = "constant_with_warmup" if name == "constant" else name
    theirs = get_scheduler(label, optimiser, num_warmup_steps=warmup, num_training_steps=steps)
    expected = []
    for _ in range(steps):
        expected.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        theirs.step()
    assert rates(name, warmup, steps, steps) == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert len(expected) == steps


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


@pytest.mark.parametrize(("warmup", "steps"), [(-1, 10), (0, 0)])
def test_impossible_schedules_are_errors(warmup: int, steps: int) -> None:
    with pytest.raises(OptimiserError):
        schedule(build(groups(None), "sgd", 0.1), "linear", warmup, steps)

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from tuner.optimiser import Averaging, build


def groups(*rates: float | None) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for rate in rates:
        group: dict[str, Any] = {"params": [Parameter(torch.tensor([1.0, -2.0]))]}
        made.append(group if rate is None else {**group, "lr": rate})
    return made


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free SGD (arXiv 2405.15682, section 2), with the package's train() and eval()."""

    def __init__(self, params: Any, lr: float = 1.0, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "train_mode": False, "k": 0})

    def _go(self, train: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] != train:
                for p in group["params"]:
                    if self.state[p]:
                        share = 1 - group["momentum"]
                        p.data.lerp_(self.state[p]["z"], share if train else 1 - 1 / group["momentum"])
                group["train_mode"] = train

    def train(self) -> None:
        self._go(True)

    def eval(self) -> None:
        self._go(False)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            assert group["train_mode"]
            group["k"] += 1
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.detach().clone())
                x = p.lerp(z, 1 - 1 / group["momentum"])
                z -= group["lr"] * p.grad
                p.copy_(x.lerp(z, 1 / group["k"]).lerp(z, 1 - group["momentum"]))


@pytest.fixture(params=["stand-in", "adamwschedulefree", "radamschedulefree", "sgdschedulefree"])
def schedule_free(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The names of schedule-free optimisers; of the package's where it is installed, and of the stand-in."""
    if request.param != "stand-in":
        pytest.importorskip("schedulefree")
        return str(request.param)
    fake = SimpleNamespace(SGDScheduleFree=ScheduleFree)
    monkeypatch.setitem(sys.modules, "schedulefree", fake)  # type: ignore[arg-type]
    return "sgdschedulefree"


def descend(
    parameter: Parameter, optimiser: torch.optim.Optimizer, steps: range, look: Callable[[], None]
) -> None:
    for step in steps:
        parameter.grad = (parameter.detach() - 3) * (1 + 0.1 * math.sin(step))
        optimiser.step()
        look()


def test_a_schedule_free_run_is_the_same_however_often_it_is_looked_at(schedule_free: str) -> None:
    def run(looks: bool) -> tuple[list[float], list[float]]:
        torch.manual_seed(0)
        parameter = Parameter(torch.randn(5))
        optimiser = build([{"params": [parameter]}], schedule_free, 0.1)
        averaging, seen = Averaging(optimiser), []

        def look() -> None:
            trained = parameter.detach().clone()
            with averaging.swap():
                seen.append(parameter.detach().clone())
            assert torch.equal(parameter.detach(), trained)

        descend(parameter, optimiser, range(20), look if looks else lambda: None)
        trained = parameter.detach().clone()
        averaging.keep()
        assert not torch.equal(parameter.detach(), trained)  # the average is another point
        if looks:
            assert len(seen) == 20 and torch.equal(seen[-1], parameter.detach())
        return parameter.tolist(), trained.tolist()

    assert run(True) == run(False)


def test_the_averages_are_those_of_the_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    # x is the mean of the z that gradient descent gives, so far.
    fake = SimpleNamespace(SGDScheduleFree=ScheduleFree)
    monkeypatch.setitem(sys.modules, "schedulefree", fake)  # type: ignore[arg-type]
    parameter = Parameter(torch.tensor([1.0, -2.0]))
    optimiser = build([{"params": [parameter]}], "SGDScheduleFree", 0.1)
    averaging = Averaging(optimiser)
    z, seen = [parameter.detach().clone()], 0
    for _ in range(5):
        parameter.grad = parameter.detach() - 3
        z.append(z[-1] - 0.1 * parameter.grad)
        optimiser.step()
        with averaging.swap():
            torch.testing.assert_close(parameter.detach(), torch.stack(z[1:]).mean(0))
            seen += 1
    assert seen == 5


def test_a_schedule_free_run_continues_bitwise(schedule_free: str) -> None:
    def start() -> tuple[Parameter, torch.optim.Optimizer, Averaging]:
        parameter = Parameter(torch.linspace(-1, 1, 5))
        optimiser = build([{"params": [parameter]}], schedule_free, 0.1)
        return parameter, optimiser, Averaging(optimiser)

    whole, optimiser, averaging = start()
    descend(whole, optimiser, range(10), lambda: None)
    averaging.keep()
    first, optimiser, averaging = start()
    descend(first, optimiser, range(4), lambda: None)
    saved, state = first.detach().clone(), optimiser.state_dict()
    second, optimiser, averaging = start()
    with torch.no_grad():
        second.copy_(saved)
    optimiser.load_state_dict(state)
    descend(second, optimiser, range(4, 10), lambda: None)
    averaging.keep()
    assert torch.equal(second.detach(), whole.detach())


def test_other_optimisers_have_no_averages() -> None:
    for name in ("adamw", "lion", "muon"):
        made = groups(None)
        averaging = Averaging(build(made, name, 0.1))
        with averaging.swap():
            assert made[0]["params"][0].tolist() == [1.0, -2.0]
        averaging.keep()
        assert not averaging.kept and made[0]["params"][0].tolist() == [1.0, -2.0]

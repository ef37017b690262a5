from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable
from types import SimpleNamespace
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
from tuner.lion import Lion
from tuner.optimiser import PACKAGED, Averaging, OptimiserError, Schedule, build, schedule


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


def test_options_not_taken_are_errors() -> None:
    with pytest.raises(OptimiserError, match="SGD does not take betas"):
        build(groups(None), "sgd", 0.1, betas=(0.9, 0.99))
    with pytest.raises(OptimiserError, match="SGD does not take eps"):
        build(groups(None), "sgd", 0.1, eps=1e-8)
    with pytest.raises(OptimiserError, match="Rprop does not take weight_decay"):
        build(groups(None), "rprop", 0.1, weight_decay=0.1)
    with pytest.raises(OptimiserError, match="Lion does not take eps"):
        build(groups(None), "lion", 0.1, eps=1e-8)


def test_further_options_reach_the_class() -> None:
    made = groups(None)
    optimiser = build(made, "sgd", 0.1, options={"momentum": 0.5})
    for gradient, expected in ((1.0, 1 - 0.1), (2.0, 0.9 - 0.1 * 2.5)):
        made[0]["params"][0].grad = torch.full((2,), gradient)
        optimiser.step()
        assert made[0]["params"][0][0].item() == pytest.approx(expected)
    assert build(groups(None), "muon", 0.1, options={"momentum": 0.5}).defaults["momentum"] == 0.5
    # A list of the recipe is a tuple here; Adafactor's eps is a pair, which the key of its own cannot hold.
    pair = build(groups(None), "adafactor", 0.1, options={"eps": [None, 1e-2], "d": 2.0}).defaults
    assert pair["eps"] == (None, 1e-2) and pair["d"] == 2.0
    assert build(groups(None), "adamw", 0.1).defaults["fused"] is True
    assert build(groups(None), "adamw", 0.1, options={"foreach": True}).defaults["fused"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentun": 0.9}, "unknown option of SGD 'momentun'; did you mean momentum"),
        ({"lr": 0.9}, r"lr is train\.learning_rate"),
        ({"params": []}, "unknown option of SGD 'params'"),
        ({"weight_decay": 0.1}, "weight_decay is given twice"),
        ({"nesterov": True}, "cannot be made with"),  # without momentum
    ],
    ids=str,
)
def test_wrong_further_options_are_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptimiserError, match=message):
        build(groups(None), "sgd", 0.1, weight_decay=0.0, options=options)


def test_lion_closed_form() -> None:
    made = groups(None, 0.5)
    optimiser = build(made, "LION", 0.1, weight_decay=0.2, betas=(0.8, 0.6))
    assert type(optimiser) is Lion
    expected = [[1.0, -2.0], [1.0, -2.0]]
    momentum = [0.0, 0.0]
    for gradient in ([0.5, -3.0], [-0.1, 4.0], [0.0, 0.0]):
        for group in made:
            group["params"][0].grad = torch.tensor(gradient)
        optimiser.step()
        for row, rate in zip(expected, (0.1, 0.5), strict=True):
            for i, g in enumerate(gradient):
                step = 0.8 * momentum[i] + 0.2 * g
                row[i] = row[i] * (1 - rate * 0.2) - rate * math.copysign(1.0, step)
        momentum = [0.6 * m + 0.4 * g for m, g in zip(momentum, gradient, strict=True)]
        for group, row in zip(made, expected, strict=True):
            assert group["params"][0].tolist() == pytest.approx(row, rel=1e-6)
    assert optimiser.state[made[0]["params"][0]]["momentum"].tolist() == pytest.approx(momentum, rel=1e-6)


def test_lion_leaves_alone_what_has_no_gradient() -> None:
    made = groups(None, None)
    optimiser = build(made, "lion", 0.1)
    made[1]["params"][0].grad = torch.tensor([0.0, 1.0])
    optimiser.step()
    assert made[0]["params"][0].tolist() == [1.0, -2.0]
    assert made[1]["params"][0].tolist() == pytest.approx([1.0, -2.1])  # the sign of 0 is 0
    assert made[0]["params"][0] not in optimiser.state


@pytest.mark.parametrize(
    "options",
    [
        {"name": "adamw", "betas": (0.9, 1.5)},
        {"name": "adamw", "eps": -1.0},
        {"name": "adamw", "learning_rate": -0.1},
        {"name": "adafactor", "eps": 1e-6},  # takes a pair
        {"name": "muon", "eps": -1.0},
        {"name": "lion", "betas": (0.9, 1.0)},
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


@pytest.mark.parametrize("name", sorted(PACKAGED))
def test_a_missing_package_is_a_clear_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    about = PACKAGED[name]
    package = about.module.partition(".")[0]
    monkeypatch.setitem(sys.modules, about.module, None)  # type: ignore[arg-type]
    message = rf"{about.label} needs the package {package}.*pip install 'tuner\[{about.extra}\]'"
    with pytest.raises(OptimiserError, match=message):
        build(groups(None), name.upper(), 0.1)
    monkeypatch.setitem(sys.modules, package, SimpleNamespace())  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, about.module, SimpleNamespace())  # type: ignore[arg-type]
    with pytest.raises(OptimiserError, match=f"this version of the package {package} has no {about.label}"):
        build(groups(None), name, 0.1)
    assert len(PACKAGED) == 9


BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None and torch.cuda.is_available()


@pytest.mark.skipif(not BITSANDBYTES, reason="needs bitsandbytes and a GPU")
@pytest.mark.parametrize("name", sorted(name for name, about in PACKAGED.items() if about.extra == "gpu"))
def test_eight_bit_and_paged_first_steps(name: str) -> None:
    parameter = Parameter(torch.ones(64, 128, device="cuda"))
    optimiser = build([{"params": [parameter]}], name, 1e-3)
    parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    # The first step of both is lr in the gradient's direction (AdamW's decay adds 1e-5).
    expected = torch.full((64, 128), 0.999, device="cuda")
    torch.testing.assert_close(parameter.detach(), expected, rtol=0, atol=2e-5)
    state = optimiser.state[parameter]["state1"]
    assert state.dtype == (torch.float32 if "32bit" in name else torch.uint8)


class Plain(torch.optim.SGD):
    """A stand-in for prodigyopt.Prodigy, with some of its arguments."""

    def __init__(self, params: Any, lr: float = 1.0, d_coef: float = 1.0, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr, weight_decay=weight_decay)
        self.coefficient = d_coef


def test_prodigy_takes_its_options_and_one_learning_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prodigyopt", SimpleNamespace(Prodigy=Plain))  # type: ignore[arg-type]
    made: Any = build(groups(None, 1.0), "prodigy", 1.0, weight_decay=0.1, options={"d_coef": 2.0})
    assert type(made) is Plain and made.coefficient == 2.0 and made.defaults["weight_decay"] == 0.1
    with pytest.raises(OptimiserError, match=r"one learning rate for all; found groups with \[0.5, 1.0\]"):
        build(groups(None, 0.5), "Prodigy", 1.0)
    with pytest.raises(OptimiserError, match="did you mean d_coef"):
        build(groups(None), "prodigy", 1.0, options={"d_coeff": 2.0})


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

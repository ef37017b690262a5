from __future__ import annotations

import importlib.util
import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from tuner.lion import Lion
from tuner.optimiser import PACKAGED, OptimiserError, build, schedule


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


BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None


@pytest.mark.skipif(not BITSANDBYTES, reason="needs bitsandbytes")
@pytest.mark.filterwarnings("ignore:Paged optimizers")
@pytest.mark.parametrize("name", sorted(name for name, about in PACKAGED.items() if about.extra == "gpu"))
def test_eight_bit_and_paged_first_steps(name: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parameter = Parameter(torch.ones(64, 128, device=device))
    optimiser = build([{"params": [parameter]}], name, 1e-3)
    parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    # The first step of both is lr in the gradient's direction (AdamW's decay adds 1e-5).
    expected = torch.full((64, 128), 0.999, device=device)
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

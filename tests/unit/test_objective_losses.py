from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch

from tuner.objective import Loss, Objective, Options
from tuner.weighting import HuberSchedule

STABLE_DIFFUSION: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
}
# a_bar 0.64 and 0.36 have exact roots: signals 0.8 and 0.6.
A_BAR = torch.tensor([0.9, 0.64, 0.36, 0.0], dtype=torch.float64)


def latents(*values: float) -> torch.Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1)


ZERO: dict[str, Any] = {"prediction": "v_prediction", "zero_terminal_snr": True}


def test_losses_closed_form() -> None:
    differences = [0.0, 1e-3, -0.5, 3.0, -1000.0]
    delta = 0.5
    seen = 0
    for loss, expected in {
        "mse": lambda d: d * d,
        "l1": abs,
        "huber": lambda d: 2 * delta * (math.sqrt(d * d + delta**2) - delta),
        "smooth_l1": lambda d: 2 * (math.sqrt(d * d + delta**2) - delta),
    }.items():
        objective = Objective(A_BAR, Options(loss=loss, huber_delta=delta))  # type: ignore[arg-type]
        noised = objective.noise(torch.zeros(5, 1, 1, 1), torch.ones(5, 1, 1, 1), torch.zeros(5).long())
        pred = noised.target + latents(*differences)
        exact = [d.item() for d in (pred - noised.target).double().flatten()]
        found = objective.loss(pred, noised)
        assert found.shape == pred.shape and found.dtype == torch.float32
        assert found.flatten().tolist() == pytest.approx([expected(d) for d in exact], rel=1e-6)
        seen += 1
    assert seen == len(get_args(Loss)) == 4


@pytest.mark.parametrize("schedule", get_args(HuberSchedule))
@pytest.mark.parametrize("delta", [0.1, 2.0])
def test_huber_schedules_closed_form(schedule: Any, delta: float) -> None:
    options = {"loss": "huber", "huber_delta": delta, "huber_schedule": schedule}
    objective = Objective.from_scheduler_config(STABLE_DIFFUSION, **options)
    t = torch.tensor([0, 1, 250, 500, 999])
    noised = objective.noise(torch.zeros(5, 1, 1, 1), torch.zeros(5, 1, 1, 1), t)
    found = objective.loss(torch.full((5, 1, 1, 1), 3.0), noised).flatten().tolist()
    expected = []
    for step in t.tolist():
        a_bar = objective.alphas_cumprod[step].item()
        sigma = math.sqrt((1 - a_bar) / a_bar)
        here = {
            "constant": delta,
            "exponential": math.exp(math.log(delta) * step / 1000),
            "snr": (1 - delta) / (1 + sigma) ** 2 + delta,
        }[schedule]
        expected.append(2 * here * (math.sqrt(9 + here**2) - here))
    assert found == pytest.approx(expected, rel=1e-5) and len(found) == 5


def test_huber_by_snr_knows_the_rescaled_schedule() -> None:
    options = {"loss": "smooth_l1", "huber_delta": 0.25, "huber_schedule": "snr"}
    objective = Objective.from_scheduler_config(STABLE_DIFFUSION, **ZERO, **options)
    noised = objective.noise(latents(0.0), latents(0.0), torch.tensor([999]))
    found = objective.loss(latents(3.0), noised).item()
    assert found == pytest.approx(2 * (math.sqrt(9 + 0.25**2) - 0.25), rel=1e-6)  # sigma is infinite there


@pytest.mark.parametrize("loss", get_args(Loss))
def test_losses_are_differentiable_at_zero(loss: Any) -> None:
    objective = Objective(A_BAR, Options(loss=loss))
    noised = objective.noise(latents(1.0), latents(2.0), torch.tensor([0]))
    pred = noised.target.clone().requires_grad_()
    objective.loss(pred, noised).sum().backward()
    assert pred.grad is not None and pred.grad.item() == 0.0

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler

from tuner.objective import Objective, ObjectiveError, alphas_cumprod

STABLE_DIFFUSION: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
}
CONFIGS: list[dict[str, Any]] = [
    STABLE_DIFFUSION,
    {**STABLE_DIFFUSION, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02, "num_train_timesteps": 1000},
    {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 100},
    {"trained_betas": [0.1, 0.2, 0.3, 0.9]},
    {},
]
# a_bar 0.64 and 0.36 have exact roots: signals 0.8 and 0.6.
A_BAR = torch.tensor([0.9, 0.64, 0.36, 0.0], dtype=torch.float64)


def latents(*values: float) -> torch.Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1)


def test_alphas_cumprod_against_plain_python() -> None:
    for zero_snr in (False, True):
        expected, product = [], 1.0
        for i in range(1000):
            root = math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * i / 999
            product *= 1 - root * root
            expected.append(product)
        if zero_snr:
            first, last = math.sqrt(expected[0]), math.sqrt(expected[-1])
            expected = [((math.sqrt(a) - last) * first / (first - last)) ** 2 for a in expected]
        found = alphas_cumprod({**STABLE_DIFFUSION, "rescale_betas_zero_snr": zero_snr})
        assert found.shape == (1000,) and found.dtype == torch.float64
        assert found.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-13)
        assert (found[-1].item() == 0.0) == zero_snr


def test_alphas_cumprod_of_the_capped_cosine() -> None:
    def level(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    expected, product = [], 1.0
    for i in range(50):
        product *= 1 - min(1 - level((i + 1) / 50) / level(i / 50), 0.999)
        expected.append(product)
    found = alphas_cumprod({"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 50})
    assert found.tolist() == pytest.approx(expected, rel=1e-9)
    assert (found[-1] / found[-2]).item() == pytest.approx(0.001)  # the cap was reached


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_parity_with_diffusers(config: dict[str, Any]) -> None:
    scheduler = DDPMScheduler(**config)
    count = len(scheduler.alphas_cumprod)
    # diffusers multiplies betas in float32, where up to 1000 factors each round by up to 2^-24.
    torch.testing.assert_close(
        alphas_cumprod(config).float(), scheduler.alphas_cumprod, rtol=count * 2**-24, atol=1e-9
    )
    draw = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 7, 4, 8, 8, generator=draw)
    t = torch.linspace(0, count - 1, 7).long()
    for prediction in ("epsilon", "v_prediction"):
        noised = Objective.from_scheduler_config(config, prediction=prediction).noise(x0, eps, t)
        expected = eps if prediction == "epsilon" else scheduler.get_velocity(x0, eps, t)
        torch.testing.assert_close(noised.x_t, scheduler.add_noise(x0, eps, t), rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(noised.target, expected, rtol=1e-5, atol=2e-5)
        assert noised.x_t.dtype == noised.target.dtype == torch.float32


def test_noise_exact_on_the_schedulers_own_table() -> None:
    # On the same table the only difference left is the rounding of the roots and of one sum.
    scheduler = DDPMScheduler(**STABLE_DIFFUSION)
    x0, eps = torch.randn(2, 10, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    t = torch.arange(0, 1000, 100)
    for prediction in ("epsilon", "v_prediction"):
        noised = Objective(scheduler.alphas_cumprod, prediction).noise(x0, eps, t)  # type: ignore[arg-type]
        torch.testing.assert_close(noised.x_t, scheduler.add_noise(x0, eps, t), rtol=1e-6, atol=1e-6)
        if prediction == "v_prediction":
            torch.testing.assert_close(
                noised.target, scheduler.get_velocity(x0, eps, t), rtol=1e-6, atol=1e-6
            )


def test_prediction_comes_from_the_config_unless_given() -> None:
    config = {"prediction_type": "v_prediction"}
    assert Objective.from_scheduler_config(config).prediction == "v_prediction"
    assert Objective.from_scheduler_config(config, prediction="epsilon").prediction == "epsilon"
    assert Objective.from_scheduler_config({}).prediction == "epsilon"


def test_noise_closed_form() -> None:
    t = torch.tensor([1, 2, 3])
    x0, eps = latents(1.0, 2.0, 3.0), latents(-0.5, 0.25, 4.0)
    noised = Objective(A_BAR, "epsilon").noise(x0, eps, t)
    expected = [0.8 * 1 + 0.6 * -0.5, 0.6 * 2 + 0.8 * 0.25, 4.0]
    assert noised.x_t.flatten().tolist() == pytest.approx(expected, rel=1e-6)
    assert torch.equal(noised.target, eps) and torch.equal(noised.t, t)
    assert noised.weight.tolist() == [1.0, 1.0, 1.0]
    velocity = Objective(A_BAR, "v_prediction").noise(x0, eps, t).target
    expected = [0.8 * -0.5 - 0.6 * 1, 0.6 * 0.25 - 0.8 * 2, -3.0]
    assert velocity.flatten().tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_everything_is_float32(dtype: torch.dtype) -> None:
    x0, eps = latents(1.0, 2.0).to(dtype), latents(0.5, 0.25).to(dtype)  # exact in both
    t = torch.tensor([0, 1])
    for prediction in ("epsilon", "v_prediction"):
        objective = Objective(A_BAR, prediction)  # type: ignore[arg-type]
        found, expected = objective.noise(x0, eps, t), objective.noise(x0.float(), eps.float(), t)
        assert torch.equal(found.x_t, expected.x_t)
        assert torch.equal(found.target, expected.target)
        pred = found.target.to(dtype)
        results = [found.x_t, found.target, objective.loss(pred, found)]
        results.append(objective.x0(pred, found.x_t.to(dtype), t))
        assert [result.dtype for result in results] == [torch.float32] * 4


def test_min_snr_weights_closed_form() -> None:
    gamma = 5.0
    a_bars = [0.999, 0.95, 0.9, 0.5, 0.1, 0.0]
    x = torch.zeros(6, 1, 1, 1)
    seen = 0
    for prediction in ("epsilon", "v_prediction"):
        objective = Objective(torch.tensor(a_bars, dtype=torch.float64), prediction, "min_snr", gamma)  # type: ignore[arg-type]
        weight = objective.noise(x, x, torch.arange(6)).weight
        assert weight.dtype == torch.float32
        for a_bar, found in zip(a_bars, weight.tolist(), strict=True):
            snr = a_bar / (1 - a_bar)
            if prediction == "v_prediction":
                expected = min(snr, gamma) / (snr + 1)
            else:
                expected = min(snr, gamma) / snr if snr > 0 else 1.0
            assert found == pytest.approx(expected, rel=1e-6)
            seen += 1
    assert seen == 12


def test_weights_finite_at_both_ends() -> None:
    ends = torch.tensor([1.0, 0.0], dtype=torch.float64)
    x = torch.zeros(2, 1, 1, 1)
    found = {
        prediction: Objective(ends, prediction, "min_snr").noise(x, x, torch.tensor([0, 1])).weight.tolist()  # type: ignore[arg-type]
        for prediction in ("epsilon", "v_prediction")
    }
    assert found == {"epsilon": [0.0, 1.0], "v_prediction": [0.0, 0.0]}


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
        objective = Objective(torch.linspace(0.9, 0.1, count + start), timesteps=(start, start + count))
        assert objective.sample_t(last).item() == start + count - 1
        assert objective.sample_t(torch.zeros(1)).item() == start
        seen += 1
    assert seen == 1100


def test_sample_t_covers_its_range_evenly() -> None:
    objective = Objective(A_BAR, timesteps=(1, 4))
    u = (torch.arange(3000, dtype=torch.float64) + 0.5) / 3000
    assert torch.bincount(objective.sample_t(u), minlength=4).tolist() == [0, 1000, 1000, 1000]


@pytest.mark.parametrize("u", [1.0, -0.1, math.nan])
def test_sample_t_refuses_numbers_out_of_range(u: float) -> None:
    with pytest.raises(AssertionError):
        Objective(A_BAR).sample_t(torch.tensor([0.5, u]))


def test_losses_closed_form() -> None:
    objective = Objective(A_BAR, loss="huber", huber_delta=0.5)
    differences = [0.0, 1e-3, -0.5, 3.0, -1000.0]
    noised = objective.noise(torch.zeros(5, 1, 1, 1), latents(1.0, 1.0, 1.0, 1.0, 1.0), torch.zeros(5).long())
    pred = noised.target + latents(*differences)
    exact = [d.item() for d in (pred - noised.target).double().flatten()]
    huber = objective.loss(pred, noised)
    assert huber.shape == pred.shape and huber.dtype == torch.float32
    expected = [2 * 0.5 * (math.sqrt(d * d + 0.25) - 0.5) for d in exact]
    assert huber.flatten().tolist() == pytest.approx(expected, rel=1e-6)
    mse = Objective(A_BAR).loss(pred, noised).flatten().tolist()
    assert mse == pytest.approx([d * d for d in exact], rel=1e-6)
    assert huber[1].item() == pytest.approx(mse[1], rel=1e-5)  # small errors: as mse
    assert huber[4].item() == pytest.approx(2 * 0.5 * 1000, rel=1e-3)  # large errors: linear


def test_huber_is_differentiable_at_zero() -> None:
    objective = Objective(A_BAR, loss="huber")
    noised = objective.noise(latents(1.0), latents(2.0), torch.tensor([0]))
    pred = noised.target.clone().requires_grad_()
    objective.loss(pred, noised).sum().backward()
    assert pred.grad is not None and pred.grad.item() == 0.0


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_x0_undoes_noise(prediction: Any) -> None:
    objective = Objective.from_scheduler_config(STABLE_DIFFUSION, prediction=prediction)
    x0, eps = torch.randn(2, 5, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    noised = objective.noise(x0, eps, torch.tensor([0, 10, 500, 800, 999]))
    found = objective.x0(noised.target, noised.x_t, noised.t)
    # Dividing by the smallest signal, 0.07, raises rounding by a factor of 15.
    torch.testing.assert_close(found, x0, rtol=1e-5, atol=1e-5)


def test_x0_where_no_signal_is_left() -> None:
    t = torch.tensor([2, 3])
    v = Objective(A_BAR, "v_prediction")
    noised = v.noise(latents(1.0, 3.0), latents(0.5, 4.0), t)
    assert v.x0(noised.target, noised.x_t, t).flatten().tolist() == pytest.approx([1.0, 3.0], rel=1e-6)
    epsilon = Objective(A_BAR, "epsilon")
    with pytest.raises(ObjectiveError, match="v_prediction"):
        epsilon.x0(noised.target, noised.x_t, t)
    assert epsilon.x0(noised.target[:1], noised.x_t[:1], t[:1]).isfinite().all()


@pytest.mark.parametrize(
    "options",
    [
        {"prediction": "sample"},
        {"weighting": "p2"},
        {"loss": "l1"},
        {"snr_gamma": 0.0},
        {"huber_delta": -1.0},
        {"huber_delta": math.inf},
        {"timesteps": (0, 5)},
        {"timesteps": (2, 2)},
        {"timesteps": (-1, 2)},
        {"alphas_cumprod": torch.tensor([0.1, 0.9])},
        {"alphas_cumprod": torch.tensor([1.1, 0.9])},
        {"alphas_cumprod": torch.tensor([math.nan, 0.9])},
        {"alphas_cumprod": torch.zeros(0)},
    ],
    ids=str,
)
def test_impossible_objectives_are_errors(options: dict[str, Any]) -> None:
    with pytest.raises(ObjectiveError):
        Objective(**{"alphas_cumprod": A_BAR, **options})


@pytest.mark.parametrize(
    "config",
    [
        {"beta_schedule": "sigmoid"},
        {"beta_schedule": "laplace"},
        {"prediction_type": "sample"},
        {"trained_betas": [0.1, 1.5]},
        {"trained_betas": []},
        {"num_train_timesteps": 0},
        {"beta_start": -0.1},
        {"beta_schedule": "scaled_linear", "beta_start": -0.1},
        {"num_train_timesteps": 1, "rescale_betas_zero_snr": True},
    ],
    ids=str,
)
def test_unsupported_schedulers_are_errors(config: dict[str, Any]) -> None:
    with pytest.raises(ObjectiveError):
        Objective.from_scheduler_config(config)


def test_shapes_must_agree() -> None:
    objective = Objective(A_BAR)
    with pytest.raises(AssertionError):
        objective.noise(latents(1.0, 2.0), latents(1.0), torch.tensor([0, 0]))
    with pytest.raises(AssertionError):
        objective.noise(latents(1.0, 2.0), latents(1.0, 2.0), torch.tensor([0]))

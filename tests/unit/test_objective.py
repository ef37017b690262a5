from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler

from tuner.objective import Objective, ObjectiveError, Options, alphas_cumprod
from tuner.weighting import zero_terminal

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
        noised = Objective(scheduler.alphas_cumprod, Options(prediction)).noise(x0, eps, t)  # type: ignore[arg-type]
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
    noised = Objective(A_BAR).noise(x0, eps, t)
    expected = [0.8 * 1 + 0.6 * -0.5, 0.6 * 2 + 0.8 * 0.25, 4.0]
    assert noised.x_t.flatten().tolist() == pytest.approx(expected, rel=1e-6)
    assert torch.equal(noised.target, eps) and torch.equal(noised.t, t)
    assert noised.weight.tolist() == [1.0, 1.0, 1.0]
    velocity = Objective(A_BAR, Options("v_prediction")).noise(x0, eps, t).target
    expected = [0.8 * -0.5 - 0.6 * 1, 0.6 * 0.25 - 0.8 * 2, -3.0]
    assert velocity.flatten().tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_everything_is_float32(dtype: torch.dtype) -> None:
    x0, eps = latents(1.0, 2.0).to(dtype), latents(0.5, 0.25).to(dtype)  # exact in both
    t = torch.tensor([0, 1])
    for prediction in ("epsilon", "v_prediction"):
        objective = Objective(A_BAR, Options(prediction))  # type: ignore[arg-type]
        found, expected = objective.noise(x0, eps, t), objective.noise(x0.float(), eps.float(), t)
        assert torch.equal(found.x_t, expected.x_t)
        assert torch.equal(found.target, expected.target)
        pred = found.target.to(dtype)
        results = [found.x_t, found.target, objective.loss(pred, found)]
        results.append(objective.x0(pred, found.x_t.to(dtype), t))
        assert [result.dtype for result in results] == [torch.float32] * 4


PREDICTIONS = ("epsilon", "v_prediction")
ZERO: dict[str, Any] = {"prediction": "v_prediction", "zero_terminal_snr": True}


def test_zero_terminal_snr_is_the_schedulers_rescaling() -> None:
    objective = Objective.from_scheduler_config(STABLE_DIFFUSION, **ZERO)
    rescaled = {**STABLE_DIFFUSION, "rescale_betas_zero_snr": True}
    assert torch.equal(objective.alphas_cumprod, alphas_cumprod(rescaled))
    assert objective.alphas_cumprod[-1] == 0
    again = Objective.from_scheduler_config(rescaled, **ZERO)  # a base that has it already
    assert torch.equal(again.alphas_cumprod, objective.alphas_cumprod)
    assert torch.equal(zero_terminal(A_BAR), A_BAR)
    x0, eps = latents(2.0), latents(3.0)
    noised = objective.noise(x0, eps, torch.tensor([999]))
    assert torch.equal(noised.x_t, eps) and torch.equal(noised.target, -x0)


def test_sampling_says_what_a_scheduler_must_know() -> None:
    plain = Objective.from_scheduler_config(STABLE_DIFFUSION)
    assert plain.sampling(STABLE_DIFFUSION) == {**STABLE_DIFFUSION, "prediction_type": "epsilon"}
    # As a base has it: a scheduler of another class, whose config remembers what its file left out.
    base = dict(PNDMScheduler(**STABLE_DIFFUSION).config)
    assert "timestep_spacing" in base["_use_default_values"]
    zero = Objective.from_scheduler_config(base, **ZERO)
    scheduler = DDIMScheduler.from_config({**zero.sampling(base), "clip_sample": False})
    assert scheduler.config.rescale_betas_zero_snr and scheduler.config.prediction_type == "v_prediction"
    assert not DDIMScheduler.from_config(plain.sampling(base)).config.rescale_betas_zero_snr
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[0] == 999 and scheduler.alphas_cumprod[999] == 0
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), zero.alphas_cumprod, rtol=1e-4, atol=1e-7)
    # One step from noise alone gives the picture that the prediction means, whatever the base said before.
    x0, eps = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    noised = zero.noise(x0, eps, torch.tensor([999]))
    made = scheduler.step(noised.target, scheduler.timesteps[0], noised.x_t).pred_original_sample
    torch.testing.assert_close(made, x0)


def test_input_noise_changes_the_input_and_not_the_target() -> None:
    x0, eps, other = latents(1.0, 2.0), latents(-0.5, 0.25), latents(3.0, -1.0)
    t = torch.tensor([1, 2])
    for prediction in PREDICTIONS:
        objective = Objective(A_BAR, Options(prediction))  # type: ignore[arg-type]
        found, plain = objective.noise(x0, eps, t, other), objective.noise(x0, eps, t)
        assert torch.equal(found.target, plain.target)
        assert torch.equal(found.x_t, objective.noise(x0, other, t).x_t)
        assert not torch.equal(found.x_t, plain.x_t)
    assert torch.equal(objective.noise(x0, eps, t, eps).x_t, plain.x_t)


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
    v = Objective(A_BAR, Options("v_prediction"))
    noised = v.noise(latents(1.0, 3.0), latents(0.5, 4.0), t)
    assert v.x0(noised.target, noised.x_t, t).flatten().tolist() == pytest.approx([1.0, 3.0], rel=1e-6)
    epsilon = Objective(A_BAR)
    with pytest.raises(ObjectiveError, match="v_prediction"):
        epsilon.x0(noised.target, noised.x_t, t)
    assert epsilon.x0(noised.target[:1], noised.x_t[:1], t[:1]).isfinite().all()


@pytest.mark.parametrize(
    ("alphas", "options"),
    [
        (A_BAR, Options(timesteps=(0, 5))),
        (A_BAR, Options(timesteps=(2, 2))),
        (A_BAR, Options(timesteps=(-1, 2))),
        (torch.tensor([0.1, 0.9]), None),
        (torch.tensor([1.1, 0.9]), None),
        (torch.tensor([math.nan, 0.9]), None),
        (torch.zeros(0), None),
        (torch.tensor([0.5]), Options(**ZERO)),
        (torch.tensor([0.5, 0.5]), Options(**ZERO)),
    ],
    ids=str,
)
def test_impossible_schedules_are_errors(alphas: torch.Tensor, options: Options | None) -> None:
    with pytest.raises(ObjectiveError):
        Objective(alphas, options)


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

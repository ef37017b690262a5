from __future__ import annotations

import math
from dataclasses import fields
from itertools import pairwise
from statistics import NormalDist
from typing import Any, get_args

import pydantic
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler

from tuner import training
from tuner.data.noise import Draws
from tuner.objective import Loss, Objective, ObjectiveError, Options, alphas_cumprod
from tuner.weighting import (
    STEEPEST_MODE,
    HuberSchedule,
    Shape,
    Weighting,
    shaped,
    weights,
    zero_terminal,
)

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


def closed_form(weighting: str, prediction: str, snr: float, gamma: float, k: float) -> float:
    """The weights as the papers write them, at a signal-to-noise ratio above 0."""
    epsilon = {
        "none": 1.0,
        "min_snr": min(snr, gamma) / snr,
        "soft_min_snr": gamma / (snr + gamma),
        "debiased": 1 / math.sqrt(snr),
        "p2": 1 / (k + snr) ** gamma,
        "as_epsilon": 1.0,
        "as_v": (snr + 1) / snr,
        "as_x0": 1 / snr,
    }[weighting]
    if prediction == "epsilon" or weighting == "none":
        return epsilon
    return 1 / math.sqrt(snr + 1) if weighting == "debiased" else epsilon * snr / (snr + 1)


PREDICTIONS = ("epsilon", "v_prediction")
PAIRS = [
    (prediction, weighting)
    for prediction in PREDICTIONS
    for weighting in get_args(Weighting)
    if (prediction, weighting) not in (("epsilon", "as_epsilon"), ("v_prediction", "as_v"))
]


@pytest.mark.parametrize(("prediction", "weighting"), PAIRS)
def test_weights_closed_form(prediction: Any, weighting: Any) -> None:
    a_bars = [0.999, 0.95, 0.9, 0.5, 0.1, 0.0047]
    x, t = torch.zeros(6, 1, 1, 1), torch.arange(6)
    seen = 0
    for gamma, k in ((5.0, 1.0), (0.5, 2.0)):
        options = Options(prediction, weighting=weighting, snr_gamma=gamma, p2_gamma=gamma, p2_k=k)
        weight = Objective(torch.tensor(a_bars, dtype=torch.float64), options).noise(x, x, t).weight
        assert weight.dtype == torch.float32
        for a_bar, found in zip(a_bars, weight.tolist(), strict=True):
            expected = closed_form(weighting, prediction, a_bar / (1 - a_bar), gamma, k)
            assert found == pytest.approx(expected, rel=1e-6)
            seen += 1
    assert seen == 12 and len(PAIRS) == 14


def test_weights_say_the_same_of_both_predictions() -> None:
    # One wrong picture: its error of epsilon is that of v divided by sqrt(a_bar), so the losses agree.
    x0, eps, wrong = torch.randn(3, 4, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    t = torch.tensor([20, 300, 700, 980])
    for weighting in ("min_snr", "soft_min_snr", "p2", "as_x0"):
        losses = []
        for prediction in PREDICTIONS:
            objective = Objective.from_scheduler_config(
                STABLE_DIFFUSION, prediction=prediction, weighting=weighting
            )
            noised = objective.noise(x0, eps, t)
            # What a denoiser says that takes `wrong` for the picture.
            signal, sigma = (row.view(-1, 1, 1, 1) for row in scales(objective, t))
            noise = (noised.x_t - signal * wrong) / sigma
            pred = noise if prediction == "epsilon" else signal * noise - sigma * wrong
            losses.append(objective.loss(pred, noised).mean(dim=(1, 2, 3)) * noised.weight)
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=0)
    # And as_x0 is the loss of the picture itself.
    torch.testing.assert_close(losses[0], (wrong - x0).square().mean(dim=(1, 2, 3)), rtol=1e-4, atol=0)


def scales(objective: Objective, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    a_bar = objective.alphas_cumprod[t]
    return a_bar.sqrt().float(), (1 - a_bar).sqrt().float()


@pytest.mark.parametrize(("prediction", "weighting"), PAIRS)
def test_weights_at_both_ends(prediction: Any, weighting: Any) -> None:
    ends = torch.tensor([1.0, 0.0], dtype=torch.float64)  # snr infinite and 0
    limits = {
        "epsilon": {
            "none": [1.0, 1.0],
            "min_snr": [0.0, 1.0],
            "soft_min_snr": [0.0, 1.0],
            "debiased": [0.0, math.inf],
            "p2": [0.0, 0.25],
            "as_v": [1.0, math.inf],
            "as_x0": [0.0, math.inf],
        },
        "v_prediction": {
            "none": [1.0, 1.0],
            "min_snr": [0.0, 0.0],
            "soft_min_snr": [0.0, 0.0],
            "debiased": [0.0, 1.0],
            "p2": [0.0, 0.0],
            "as_epsilon": [1.0, 0.0],
            "as_x0": [0.0, 1.0],
        },
    }[prediction]
    found = weights(ends, prediction, weighting, 5.0, 2.0, 2.0).tolist()
    assert found == limits[weighting]
    options = Options(prediction, weighting=weighting)
    if math.inf in found:
        with pytest.raises(ObjectiveError, match="infinite where no signal is left"):
            Objective(ends, options)
    else:
        assert Objective(ends, options).prediction == prediction


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


def test_min_snr_is_of_the_rescaled_schedule() -> None:
    # Plain Python all the way: betas, product, rescaling, ratio, weight.
    product, plain = 1.0, []
    for i in range(1000):
        root = math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * i / 999
        product *= 1 - root * root
        plain.append(product)
    first, last = math.sqrt(plain[0]), math.sqrt(plain[-1])
    a_bars = [((math.sqrt(a) - last) * first / (first - last)) ** 2 for a in plain]
    x, t = torch.zeros(1000, 1, 1, 1), torch.arange(1000)
    seen = 0
    for weighting in ("min_snr", "soft_min_snr", "debiased", "p2"):
        objective = Objective.from_scheduler_config(STABLE_DIFFUSION, **ZERO, weighting=weighting)
        found = objective.noise(x, x, t).weight.tolist()
        expected = [
            closed_form(weighting, "v_prediction", a / (1 - a), 5.0 if weighting != "p2" else 1.0, 1.0)
            for a in a_bars[:-1]
        ]
        assert found[:-1] == pytest.approx(expected, rel=1e-6)
        assert found[-1] == (1.0 if weighting == "debiased" else 0.0)
        seen += len(found)
        if weighting == "min_snr":
            # What a weight of the schedule before its rescaling would be: five times too much at 900.
            assert found[900] == pytest.approx(0.00296, abs=1e-5)
            assert plain[900] == pytest.approx(0.0142, abs=1e-4)
    assert seen == 4000


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


def test_names_of_the_recipe_are_those_of_the_options() -> None:
    recipe, own = training.Objective.model_fields, {field.name: field for field in fields(Options)}
    draws = {field.name: field for field in fields(Draws)}
    assert set(recipe) == set(own) | set(draws) and not set(own) & set(draws) and len(own) == 14
    for name, literal in {
        "weighting": Weighting,
        "loss": Loss,
        "huber_schedule": HuberSchedule,
        "timestep_shape": Shape,
    }.items():
        assert get_args(recipe[name].annotation) == get_args(literal)
    assert get_args(recipe["prediction"].annotation) == ("auto", *PREDICTIONS)
    plain = training.Objective()
    assert Options(**plain.options()) == Options() and Draws(**plain.draws()) == Draws()


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
    "options",
    [
        {"prediction": "sample"},
        {"weighting": "p3"},
        {"loss": "l2"},
        {"huber_schedule": "linear"},
        {"timestep_shape": "beta"},
        {"snr_gamma": 0.0},
        {"p2_gamma": -1.0},
        {"p2_k": 0.0},
        {"huber_delta": -1.0},
        {"huber_delta": math.inf},
        {"logit_std": 0.0},
        {"logit_mean": math.nan},
        {"mode_scale": -1.1},
        {"mode_scale": 1.76},
        {"weighting": "as_epsilon"},
        {"weighting": "as_v", "prediction": "v_prediction"},
        {"zero_terminal_snr": True},
    ],
    ids=str,
)
def test_impossible_options_are_errors(options: dict[str, Any]) -> None:
    with pytest.raises(ObjectiveError):
        Options(**options)


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


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"snr_gamma": 5.0},
            "snr_gamma: has no effect: it belongs to weighting min_snr or soft",
        ),
        ({"weighting": "p2", "snr_gamma": 5.0}, "snr_gamma: has no effect"),
        ({"p2_gamma": 1.0}, "p2_gamma: has no effect"),
        ({"weighting": "min_snr", "p2_k": 1.0}, "p2_k: has no effect"),
        (
            {"loss": "l1", "huber_delta": 1.0},
            "huber_delta: has no effect: it belongs to loss huber or",
        ),
        ({"huber_schedule": "snr"}, "huber_schedule: has no effect"),
        ({"logit_mean": 0.0}, "logit_mean: has no effect"),
        ({"timestep_shape": "mode", "logit_std": 1.0}, "logit_std: has no effect"),
        ({"mode_scale": 1.0}, "mode_scale: has no effect"),
        (
            {"pyramid_levels": 3},
            "pyramid_levels: has no effect: it belongs to pyramid_noise, and",
        ),
        (
            {"zero_terminal_snr": True, "prediction": "epsilon"},
            "zero_terminal_snr: needs prediction v",
        ),
        ({"weighting": "as_v", "prediction": "v_prediction"}, "weighting: found as_v, which has no effect"),
        (
            {"weighting": "as_epsilon", "prediction": "epsilon"},
            "weighting: found as_epsilon, which has no",
        ),
        ({"timesteps": [5, 5]}, r"timesteps: found \[5, 5\]"),
    ],
    ids=str,
)
def test_keys_of_the_recipe_that_do_not_go_together(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=message):
        training.Objective(**keys)


@pytest.mark.parametrize(
    "keys",
    [
        {"weighting": "soft_min_snr", "snr_gamma": 4.0, "zero_terminal_snr": True},
        {"weighting": "p2", "p2_gamma": 0.5, "p2_k": 2.0, "loss": "smooth_l1", "huber_schedule": "snr"},
        {"timestep_shape": "logit_normal", "logit_mean": 0.5, "logit_std": 2.0, "timesteps": [0, 999]},
        {"timestep_shape": "mode", "mode_scale": -1.0, "loss": "huber", "huber_delta": 1.0},
    ],
    ids=str,
)
def test_the_recipes_choice_reaches_the_objective(keys: dict[str, Any]) -> None:
    chosen = training.Objective(**keys).options()
    options = Objective.from_scheduler_config({"prediction_type": "v_prediction"}, **chosen).options
    assert options.prediction == "v_prediction" and len(keys) >= 3
    for key, value in keys.items():
        assert getattr(options, key) == (tuple(value) if isinstance(value, list) else value)


def test_an_impossible_prediction_of_the_base_is_an_error_too() -> None:
    # The recipe says auto, so only here it is known what the base predicts.
    chosen = training.Objective(zero_terminal_snr=True).options()
    with pytest.raises(ObjectiveError, match="needs prediction v_prediction"):
        Objective.from_scheduler_config(STABLE_DIFFUSION, **chosen)

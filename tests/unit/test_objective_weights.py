from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import torch

from tuner.objective import Objective, ObjectiveError, Options
from tuner.weighting import Weighting, weights

STABLE_DIFFUSION: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
}


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

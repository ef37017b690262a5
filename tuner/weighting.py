"""How much each timestep counts: the weight of its loss, how often it is drawn, where its loss turns linear.

With a_bar = alphas_cumprod[t], snr = a_bar / (1 - a_bar). Everything is computed in float64.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["epsilon", "v_prediction"]
Weighting = Literal["none", "min_snr", "soft_min_snr", "debiased", "p2", "as_epsilon", "as_v", "as_x0"]
HuberSchedule = Literal["constant", "exponential", "snr"]
Shape = Literal["uniform", "logit_normal", "mode", "cosmap", "cubic"]

STEEPEST_MODE = 2 / (math.pi - 2)  # above it `mode` would fall in part


def weights(
    a_bar: Tensor,
    prediction: Prediction,
    weighting: Weighting,
    snr_gamma: float,
    p2_gamma: float,
    p2_k: float,
) -> Tensor:
    """The weight of each timestep's squared error, [T] from `a_bar` [T] float64; infinite where that is.

    For epsilon:

    - min_snr: min(snr, gamma) / snr (arXiv 2303.09556);
    - soft_min_snr: gamma / (snr + gamma), the same without the corner (arXiv 2401.11605);
    - p2: 1 / (k + snr)^gamma (arXiv 2204.00227, eq. 8);
    - as_v: (snr + 1) / snr, and as_x0: 1 / snr: the errors of v or of x0 that the prediction means;
    - debiased: 1 / sqrt(snr), what an error of epsilon is multiplied by to be one of x0 (arXiv 2310.08442).

    An error of v is one of epsilon divided by sqrt(a_bar), so for v each is a_bar = snr / (snr + 1) times
    that: min(snr, gamma) / (snr + 1) and so on, as_epsilon: snr / (snr + 1), as_x0: 1 / (snr + 1). Only
    debiased is again what turns an error of v into one of x0: 1 / sqrt(snr + 1).
    """
    signal, noise = a_bar, 1.0 - a_bar
    velocity = prediction == "v_prediction"
    if weighting == "none":
        return torch.ones_like(a_bar)
    if weighting == "debiased":
        return noise.sqrt() if velocity else (noise / signal).sqrt()
    # Written without snr, and for v without dividing by the signal, so that both ends have their limits.
    share = signal if velocity else torch.ones_like(signal)
    if weighting == "min_snr":
        # min(snr, gamma) / snr = min(1, gamma / snr); at no signal that is min(1, infinity).
        capped = snr_gamma * noise
        return torch.minimum(signal, capped) if velocity else (capped / signal).clamp(max=1.0)
    if weighting == "soft_min_snr":
        return share * snr_gamma * noise / (signal + snr_gamma * noise)
    if weighting == "p2":
        return share * (noise / (p2_k * noise + signal)) ** p2_gamma
    if weighting == "as_epsilon":
        return share
    if weighting == "as_v":
        return share / signal
    assert weighting == "as_x0", weighting
    return noise if velocity else noise / signal


def deltas(a_bar: Tensor, schedule: HuberSchedule, delta: float) -> Tensor:
    """Where huber turns linear at each timestep, [T] from `a_bar` [T] float64 (arXiv 2403.16728, section 4).

    constant: delta; exponential: delta^(t / T); snr: delta + (1 - delta) / (1 + sigma)^2 with sigma =
    1 / sqrt(snr). The last two begin at 1 and near 1, and end near delta.
    """
    if schedule == "constant":
        return torch.full_like(a_bar, delta)
    if schedule == "exponential":
        return delta ** (torch.arange(len(a_bar), dtype=a_bar.dtype) / len(a_bar))
    # 1 / (1 + sigma) = sqrt(a_bar) / (sqrt(a_bar) + sqrt(1 - a_bar)), whose divisor is at least 1.
    share = a_bar.sqrt() / (a_bar.sqrt() + (1.0 - a_bar).sqrt())
    return delta + (1.0 - delta) * share.square()


def shaped(u: Tensor, shape: Shape, logit_mean: float, logit_std: float, mode_scale: float) -> Tensor:
    """A share of the way from the first timestep to the last, [B] float64 in [0, 1], from `u` [B] in [0, 1).

    Each is the inverse of a distribution function, so that even numbers give that distribution:

    - uniform;
    - logit_normal: the logistic function of a normal number of this mean and standard deviation
      (arXiv 2403.03206, eq. 19);
    - mode: u + scale (u - sin(pi u / 2)^2), from -1 to 2 / (pi - 2); above 0 the middle is drawn more often,
      below it the ends (the same, eq. 20, with 1 - u for u);
    - cosmap: density 2 / (pi (1 - 2 s + 2 s^2)) at s (the same, eq. 21);
    - cubic: 1 - (1 - u)^3, mostly noisy timesteps (arXiv 2302.08453, section 3.4).
    """
    u = u.double()
    angle = u * (math.pi / 2)
    if shape == "logit_normal":
        return torch.sigmoid(logit_mean + logit_std * torch.special.ndtri(u))
    if shape == "mode":
        return u + mode_scale * (u - angle.sin().square())
    if shape == "cosmap":
        return angle.sin() / (angle.sin() + angle.cos())  # 1 - 1 / (tan + 1)
    if shape == "cubic":
        return 1.0 - (1.0 - u) ** 3
    assert shape == "uniform", shape
    return u


def zero_terminal(a_bar: Tensor) -> Tensor:
    """`a_bar` [T >= 2] with no signal left at the last timestep (arXiv 2305.08891, algorithm 1).

    sqrt(a_bar) is shifted so that its last is exactly zero, and scaled so that its first stays what it was.
    What has no signal left already stays as it is.
    """
    assert a_bar.ndim == 1 and len(a_bar) > 1 and bool(a_bar[0] > a_bar[-1]), "a schedule that falls"
    if a_bar[-1] == 0:
        return a_bar
    signal = a_bar.sqrt()
    return ((signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))).square()

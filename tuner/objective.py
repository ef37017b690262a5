"""Diffusion objectives: noise in, target and weight out. Pure tensors: no model, no random state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

Prediction = Literal["epsilon", "v_prediction"]
Weighting = Literal["none", "min_snr"]
Loss = Literal["mse", "huber"]


class ObjectiveError(ValueError):
    """An objective that was asked for and does not exist or cannot work."""


class Noised(NamedTuple):
    """A noised batch and what the denoiser should say about it."""

    x_t: Tensor  # [B,C,h,w] float32, the noised latents
    t: Tensor  # [B] int64 in [0, T)
    target: Tensor  # [B,C,h,w] float32, what the denoiser should predict
    weight: Tensor  # [B] float32, finite and not negative; the weight of each sample's loss


class Objective:
    """What the denoiser is trained to predict, and how errors count.

    With a_bar = alphas_cumprod[t] and snr = a_bar / (1 - a_bar):

    - x_t = sqrt(a_bar) x0 + sqrt(1 - a_bar) eps (DDPM, arXiv 2006.11239, eq. 4);
    - target: eps, or v = sqrt(a_bar) eps - sqrt(1 - a_bar) x0 (arXiv 2202.00512, appendix D);
    - weight "min_snr" (arXiv 2303.09556): min(snr, gamma) / snr for epsilon,
      min(snr, gamma) / (snr + 1) for v. At snr = 0 the first is 1 (its limit) and the second 0.
    """

    def __init__(
        self,
        alphas_cumprod: Tensor,
        prediction: Prediction = "epsilon",
        weighting: Weighting = "none",
        snr_gamma: float = 5.0,
        loss: Loss = "mse",
        huber_delta: float = 0.1,
        timesteps: tuple[int, int] | None = None,
    ) -> None:
        """`alphas_cumprod` [T] in [0, 1], not increasing. `timesteps` (start, end) limits training to
        start <= t < end; None is all of them. `huber_delta` is in units of the target.

        Raises:
            ObjectiveError: for an unknown name or a value out of range.
        """
        _known("prediction", prediction, get_args(Prediction))
        _known("weighting", weighting, get_args(Weighting))
        _known("loss", loss, get_args(Loss))
        for name, value in (("snr_gamma", snr_gamma), ("huber_delta", huber_delta)):
            if not (math.isfinite(value) and value > 0):
                raise ObjectiveError(f"{name} must be positive and finite, found {value}")
        a_bar = alphas_cumprod.detach().to("cpu", torch.float64)
        if a_bar.ndim != 1 or len(a_bar) == 0 or not bool(((a_bar >= 0) & (a_bar <= 1)).all()):
            raise ObjectiveError("alphas_cumprod must be a list of numbers in [0, 1]")
        if bool((a_bar.diff() > 0).any()):
            raise ObjectiveError("alphas_cumprod must not increase with t")
        start, end = timesteps if timesteps is not None else (0, len(a_bar))
        if not 0 <= start < end <= len(a_bar):
            raise ObjectiveError(
                f"timesteps must be start < end within 0 and {len(a_bar)}, found {start} and {end}"
            )
        self.alphas_cumprod = a_bar  # [T] float64
        self.prediction: Prediction = prediction
        self.loss_name: Loss = loss
        self.huber_delta = float(huber_delta)
        self.timesteps = (int(start), int(end))
        weights = _weights(a_bar, prediction, weighting, float(snr_gamma))
        # Square roots and weights are computed in float64 and rounded once.
        table = torch.stack([a_bar.sqrt(), (1.0 - a_bar).sqrt(), weights]).float()
        assert bool(table.isfinite().all())
        self._tables = {table.device: table}  # [3,T] on each device it was needed on

    @classmethod
    def from_scheduler_config(cls, config: Mapping[str, Any], **options: Any) -> Objective:
        """An objective for a diffusers scheduler's config; `options` are the constructor's.

        The prediction is the config's `prediction_type` unless `options` has `prediction`. Keys that are
        missing have the defaults of diffusers' DDPMScheduler.

        Raises:
            ObjectiveError: for a schedule or a prediction that is not supported.
        """
        prediction = options.pop("prediction", config.get("prediction_type", "epsilon"))
        return cls(alphas_cumprod(config), prediction=prediction, **options)

    def sample_t(self, u: Tensor) -> Tensor:
        """Timesteps [B] int64, evenly over `timesteps`, from `u` [B] in [0, 1)."""
        start, end = self.timesteps
        assert bool(((u >= 0) & (u < 1)).all()), "u must be in [0, 1)"
        # Never `end`: with n = end - start and u at most 1 - 2^-53, the product misses n by n 2^-53. That is
        # one unit in the last place where n is a power of two, and more than half a unit elsewhere, so
        # float64 rounds below n.
        return (u.double() * (end - start)).floor().long() + start

    def noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Noised:
        """Noises clean latents `x0` [B,C,h,w] with `eps` [B,C,h,w] at `t` [B] int64 in [0, T); in float32."""
        assert x0.shape == eps.shape and t.shape == x0.shape[:1], (x0.shape, eps.shape, t.shape)
        x0, eps = x0.float(), eps.float()
        signal, sigma = self._scales(t, x0)
        target = eps if self.prediction == "epsilon" else signal * eps - sigma * x0
        return Noised(signal * x0 + sigma * eps, t, target, self._table(t.device)[2, t])

    def loss(self, pred: Tensor, noised: Noised) -> Tensor:
        """The loss of each element [B,C,h,w] in float32, not yet weighted.

        "mse" is d^2 for d = pred - target. "huber" is the pseudo-Huber loss 2 delta (sqrt(d^2 + delta^2)
        - delta) (arXiv 2403.16728), d^2 for small d and 2 delta |d| for large.
        """
        assert pred.shape == noised.target.shape, (pred.shape, noised.target.shape)
        square = (pred.float() - noised.target).square()
        if self.loss_name == "mse":
            return square
        delta = self.huber_delta
        # The same number without subtracting two nearly equal ones: times (root + delta) / (root + delta).
        return 2.0 * delta * square / ((square + delta * delta).sqrt() + delta)

    def x0(self, pred: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The clean latents [B,C,h,w] float32 that the prediction `pred` [B,C,h,w] of `x_t` at `t` [B] means.

        Raises:
            ObjectiveError: for epsilon at a t where a_bar is 0, since x_t then holds no signal.
        """
        assert pred.shape == x_t.shape and t.shape == x_t.shape[:1], (pred.shape, x_t.shape, t.shape)
        pred, x_t = pred.float(), x_t.float()
        signal, sigma = self._scales(t, x_t)
        if self.prediction == "v_prediction":
            return signal * x_t - sigma * pred
        # The schedule is looked at first, on the CPU, so that ordinary ones cost no synchronisation.
        if self.alphas_cumprod[-1] == 0 and bool((signal == 0).any()):
            raise ObjectiveError("epsilon at zero signal says nothing about the picture; use v_prediction")
        return (x_t - sigma * pred) / signal

    def _scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(a_bar) and sqrt(1 - a_bar) at `t` [B], shaped [B,1,1,1] for `like` [B,C,h,w]."""
        table = self._table(t.device)
        shape = (-1,) + (1,) * (like.ndim - 1)
        return table[0, t].view(shape), table[1, t].view(shape)

    def _table(self, device: torch.device) -> Tensor:
        if device not in self._tables:
            self._tables[device] = next(iter(self._tables.values())).to(device)
        return self._tables[device]


def alphas_cumprod(config: Mapping[str, Any]) -> Tensor:
    """The cumulative product of 1 - beta, [T] float64, of a diffusers scheduler's config.

    Knows `beta_schedule` linear, scaled_linear (linear in sqrt(beta), as in latent diffusion) and
    squaredcos_cap_v2 (arXiv 2102.09672, eq. 17), `trained_betas`, and `rescale_betas_zero_snr`
    (arXiv 2305.08891, algorithm 1).

    Raises:
        ObjectiveError: for another schedule, or betas outside (0, 1).
    """
    betas = _betas(config)
    if betas.ndim != 1 or len(betas) == 0 or not bool(((betas > 0) & (betas < 1)).all()):
        raise ObjectiveError("the scheduler's betas must be numbers between 0 and 1")
    a_bar = torch.cumprod(1.0 - betas, dim=0)
    if not config.get("rescale_betas_zero_snr", False):
        return a_bar
    if len(betas) < 2:
        raise ObjectiveError("rescale_betas_zero_snr needs at least two timesteps")
    # Shift so that the last signal is exactly zero, and scale so that the first stays what it was.
    signal = a_bar.sqrt()
    return ((signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))).square()


def _betas(config: Mapping[str, Any]) -> Tensor:
    trained = config.get("trained_betas")
    if trained is not None:
        return torch.as_tensor(trained, dtype=torch.float64)
    name = config.get("beta_schedule", "linear")
    _known("beta_schedule", name, ("linear", "scaled_linear", "squaredcos_cap_v2"))
    count = int(config.get("num_train_timesteps", 1000))
    if count < 1:
        raise ObjectiveError(f"num_train_timesteps must be at least 1, found {count}")
    first, last = (float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02)))
    if name == "linear":
        return torch.linspace(first, last, count, dtype=torch.float64)
    if name == "scaled_linear":
        if first < 0 or last < 0:
            raise ObjectiveError(f"beta_start and beta_end must be positive, found {first} and {last}")
        return torch.linspace(first**0.5, last**0.5, count, dtype=torch.float64).square()
    level = torch.arange(count + 1, dtype=torch.float64) / count
    a_bar = ((level + 0.008) / 1.008 * (math.pi / 2)).cos().square()
    return (1.0 - a_bar[1:] / a_bar[:-1]).clamp(max=0.999)


def _weights(a_bar: Tensor, prediction: Prediction, weighting: Weighting, gamma: float) -> Tensor:
    """The weight of each timestep [T], in forms that divide by nothing that can make them NaN."""
    if weighting == "none":
        return torch.ones_like(a_bar)
    if prediction == "epsilon":
        # min(snr, gamma) / snr = min(1, gamma / snr); at a_bar = 0 this is min(1, infinity).
        return (gamma * (1.0 - a_bar) / a_bar).clamp(max=1.0)
    # 1 / (snr + 1) = 1 - a_bar, so that min(snr, gamma) / (snr + 1) = min(a_bar, gamma (1 - a_bar)).
    return torch.minimum(a_bar, gamma * (1.0 - a_bar))


def _known(what: str, found: object, names: tuple[str, ...]) -> None:
    if found not in names:
        raise ObjectiveError(f"{what} must be one of {', '.join(names)}, found {found!r}")

"""Diffusion objectives: noise in, target and weight out. Pure tensors: no model, no random state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from tuner import weighting
from tuner.weighting import STEEPEST_MODE, HuberSchedule, Prediction, Shape, Weighting

Loss = Literal["mse", "l1", "huber", "smooth_l1"]


class ObjectiveError(ValueError):
    """An objective that was asked for and does not exist or cannot work."""


class Noised(NamedTuple):
    """A noised batch and what the denoiser should say about it."""

    x_t: Tensor  # [B,C,h,w] float32, the noised latents
    t: Tensor  # [B] int64 in [0, T)
    target: Tensor  # [B,C,h,w] float32, what the denoiser should predict
    weight: Tensor  # [B] float32, finite and not negative; the weight of each sample's loss


@dataclass(frozen=True)
class Options:
    """What can be chosen; the names are the recipe's keys, and weighting.py has the formulas.

    Attributes:
        zero_terminal_snr: the schedule is changed to leave no signal at the last timestep.
        snr_gamma: above 0, for min_snr and soft_min_snr; p2_gamma and p2_k: above 0, for p2.
        huber_delta: above 0, in units of the target, for huber and smooth_l1, as huber_schedule.
        timesteps: (start, end) limits training to start <= t < end; None is all of them.
        timestep_shape: how often each of these is drawn; logit_mean, logit_std (above 0) and mode_scale (from
            -1 to 2 / (pi - 2)) belong to logit_normal and mode.

    Raises:
        ObjectiveError: for an unknown name or a number out of range.
    """

    prediction: Prediction = "epsilon"
    zero_terminal_snr: bool = False
    weighting: Weighting = "none"
    snr_gamma: float = 5.0
    p2_gamma: float = 1.0
    p2_k: float = 1.0
    loss: Loss = "mse"
    huber_delta: float = 0.1
    huber_schedule: HuberSchedule = "constant"
    timesteps: tuple[int, int] | None = None
    timestep_shape: Shape = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29

    def __post_init__(self) -> None:
        names = {
            "prediction": Prediction,
            "weighting": Weighting,
            "loss": Loss,
            "huber_schedule": HuberSchedule,
            "timestep_shape": Shape,
        }
        for name, known in names.items():
            _known(name, getattr(self, name), get_args(known))
        for name in ("snr_gamma", "p2_gamma", "p2_k", "huber_delta", "logit_std"):
            if not (math.isfinite(value := getattr(self, name)) and value > 0):
                raise ObjectiveError(f"{name} must be positive and finite, found {value}")
        if not math.isfinite(self.logit_mean):
            raise ObjectiveError(f"logit_mean must be finite, found {self.logit_mean}")
        if not -1.0 <= self.mode_scale <= STEEPEST_MODE:
            raise ObjectiveError(f"mode_scale must be in [-1, {STEEPEST_MODE:.4f}], found {self.mode_scale}")
        if self.zero_terminal_snr and self.prediction == "epsilon":
            raise ObjectiveError(
                "zero_terminal_snr: where no signal is left, epsilon says nothing about the picture; "
                "it needs prediction v_prediction, found epsilon"
            )
        if self.weighting == {"epsilon": "as_epsilon", "v_prediction": "as_v"}[self.prediction]:
            raise ObjectiveError(
                f"weighting {self.weighting} has no effect, since prediction is {self.prediction}; take none"
            )


class Objective:
    """What the denoiser is trained to predict, and how errors count.

    With a_bar = alphas_cumprod[t]:

    - x_t = sqrt(a_bar) x0 + sqrt(1 - a_bar) eps (DDPM, arXiv 2006.11239, eq. 4);
    - target: eps, or v = sqrt(a_bar) eps - sqrt(1 - a_bar) x0 (arXiv 2202.00512, appendix D).
    """

    def __init__(self, alphas_cumprod: Tensor, options: Options | None = None) -> None:
        """`alphas_cumprod` [T] in [0, 1], not increasing; `options` None: the defaults.

        Raises:
            ObjectiveError: for numbers that are no such schedule, timesteps outside of it, or a weighting
                that is infinite where no signal is left.
        """
        self.options = options = Options() if options is None else options
        a_bar = alphas_cumprod.detach().to("cpu", torch.float64)
        if a_bar.ndim != 1 or len(a_bar) == 0 or not bool(((a_bar >= 0) & (a_bar <= 1)).all()):
            raise ObjectiveError("alphas_cumprod must be a list of numbers in [0, 1]")
        if bool((a_bar.diff() > 0).any()):
            raise ObjectiveError("alphas_cumprod must not increase with t")
        start, end = options.timesteps if options.timesteps is not None else (0, len(a_bar))
        if not 0 <= start < end <= len(a_bar):
            raise ObjectiveError(
                f"timesteps must be start < end within 0 and {len(a_bar)}, found {start} and {end}"
            )
        # Before the weights, which must be those of the schedule that is trained on.
        if options.zero_terminal_snr:
            a_bar = _zero_terminal(a_bar)
        self.alphas_cumprod = a_bar  # [T] float64
        self.timesteps = (int(start), int(end))
        weights = weighting.weights(
            a_bar,
            options.prediction,
            options.weighting,
            options.snr_gamma,
            options.p2_gamma,
            options.p2_k,
        )
        if not bool(weights.isfinite().all()):
            raise ObjectiveError(
                f"weighting {options.weighting} of {options.prediction} is infinite where no signal is left, "
                "and the base's last timestep leaves none"
            )
        deltas = weighting.deltas(a_bar, options.huber_schedule, options.huber_delta)
        # Square roots, weights and deltas are computed in float64 and rounded once.
        table = torch.stack([a_bar.sqrt(), (1.0 - a_bar).sqrt(), weights, deltas]).float()
        self._tables = {table.device: table}  # [4,T] on each device it was needed on

    @classmethod
    def from_scheduler_config(cls, config: Mapping[str, Any], **options: Any) -> Objective:
        """An objective for a diffusers scheduler's config; `options` are those of Options.

        The prediction is the config's `prediction_type` unless `options` has `prediction`. Keys that are
        missing have the defaults of diffusers' DDPMScheduler.

        Raises:
            ObjectiveError: for a schedule or a prediction that is not supported.
        """
        prediction = options.pop("prediction", config.get("prediction_type", "epsilon"))
        return cls(alphas_cumprod(config), Options(prediction=prediction, **options))

    @property
    def prediction(self) -> Prediction:
        """What the denoiser predicts."""
        return self.options.prediction

    def sampling(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The base's scheduler `config`, changed to what sampling from a denoiser trained like this needs.

        Where the last timestep holds no signal, sampling has to start there: hence the trailing spacing
        (arXiv 2305.08891, section 3.3).
        """
        changes: dict[str, Any] = {"prediction_type": self.prediction}
        if self.options.zero_terminal_snr:
            changes |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        changed = {**config, **changes}
        # diffusers' list of keys that were not in the file: another class of scheduler takes its own defaults
        # for these, whatever the config says.
        unset = "_use_default_values"
        if unset in changed:
            changed[unset] = [key for key in changed[unset] if key not in changes]
        return changed

    def sample_t(self, u: Tensor) -> Tensor:
        """Timesteps [B] int64 within `timesteps`, spread as `timestep_shape` says, from `u` [B] in [0, 1)."""
        if u.device.type == "cpu":  # another device would have to be waited for, in each step
            assert bool(((u >= 0) & (u < 1)).all()), "u must be in [0, 1)"
        about, (start, end) = self.options, self.timesteps
        share = weighting.shaped(u, about.timestep_shape, about.logit_mean, about.logit_std, about.mode_scale)
        # A share may round to 1.
        return (share * (end - start)).floor().long().clamp(max=end - start - 1) + start

    def noise(self, x0: Tensor, eps: Tensor, t: Tensor, input_eps: Tensor | None = None) -> Noised:
        """Noises clean latents `x0` [B,C,h,w] with `eps` [B,C,h,w] at `t` [B] int64 in [0, T); in float32.

        `input_eps` [B,C,h,w] is the noise of x_t where it is not `eps`, which the target is made of
        (input perturbation, arXiv 2301.11706, algorithm 1).
        """
        assert x0.shape == eps.shape and t.shape == x0.shape[:1], (x0.shape, eps.shape, t.shape)
        x0, eps = x0.float(), eps.float()
        signal, sigma = self._scales(t, x0)
        target = eps if self.prediction == "epsilon" else signal * eps - sigma * x0
        if input_eps is not None:
            assert input_eps.shape == x0.shape, (input_eps.shape, x0.shape)
            eps = input_eps.float()
        return Noised(signal * x0 + sigma * eps, t, target, self._table(t.device)[2, t])

    def loss(self, pred: Tensor, noised: Noised) -> Tensor:
        """The loss of each element [B,C,h,w] in float32, not yet weighted; with d = pred - target:

        - mse: d^2; l1: |d|;
        - huber: the pseudo-Huber loss 2 delta (sqrt(d^2 + delta^2) - delta) (arXiv 2403.16728), d^2 for small
          d and 2 delta |d| for large;
        - smooth_l1: the same divided by delta, 2 |d| for large d whatever delta is.
        """
        assert pred.shape == noised.target.shape, (pred.shape, noised.target.shape)
        difference = pred.float() - noised.target
        if self.options.loss == "l1":
            return difference.abs()
        square = difference.square()
        if self.options.loss == "mse":
            return square
        delta = self._row(3, noised.t, square)
        # The same number without subtracting two nearly equal ones: times (root + delta) / (root + delta).
        slope = 2.0 * delta if self.options.loss == "huber" else 2.0
        return slope * square / ((square + delta * delta).sqrt() + delta)

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
        return self._row(0, t, like), self._row(1, t, like)

    def _row(self, row: int, t: Tensor, like: Tensor) -> Tensor:
        return self._table(t.device)[row, t].view((-1,) + (1,) * (like.ndim - 1))

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
    return _zero_terminal(a_bar) if config.get("rescale_betas_zero_snr", False) else a_bar


def _zero_terminal(a_bar: Tensor) -> Tensor:
    if len(a_bar) < 2 or not bool(a_bar[0] > a_bar[-1]):
        raise ObjectiveError("a schedule without signal at its end needs two timesteps that differ")
    return weighting.zero_terminal(a_bar)


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


def _known(what: str, found: object, names: tuple[str, ...]) -> None:
    if found not in names:
        raise ObjectiveError(f"{what} must be one of {', '.join(names)}, found {found!r}")

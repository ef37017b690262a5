"""How a ControlNet steers the two branches of classifier-free guidance, and with what weights.

Guidance (arXiv 2207.12598) predicts twice, with the prompt and without it (or with the negative prompt). A
ControlNet may steer both predictions or the conditional one alone, and each of its residuals, from the
encoder's first to the middle block's, may have a weight w_i. Three such weightings are in use and differ
much; all favour the deep blocks, where a cell covers more of the picture:

- the paper's w_i = 64 / h_i (arXiv 2302.05543, section 3.4), 1 to 8 in Stable Diffusion 1.x;
- w_i = 0.825 ** (12 - i), about 0.1 to 1, in the paper's published code and the web UIs made after it;
- ten to the power of evenly spaced numbers from -1 to 0, in diffusers' `guess_mode`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

BOTH, CONDITIONAL = "both", "conditional"
_ALONE = "control in the conditional branch only"
FORMULAS: Mapping[str, str] = {
    BOTH: "control in both branches, w_i = 1",
    CONDITIONAL: f"{_ALONE}, w_i = 1",
    "64/h": f"{_ALONE}, w_i = H / h_i, heights of the latent and of residual i (64 / h_i at 512 pixels)",
    "0.825^k": f"{_ALONE}, w_i = 0.825 ** (n - 1 - i), i from 0 to n - 1",
    "logspace": f"{_ALONE}, w_i = 10 ** (i / (n - 1) - 1), i from 0 to n - 1",
}
"""The choices, each with its formula; n residuals, the middle block's the last (n is 13 in SD 1.x)."""


def by_height(heights: Sequence[int]) -> list[float]:
    """H / h_i: the paper's weighting, for any size of the picture.

    Args:
        heights: of the residuals in cells, in their order; the first is the latent's own.
    """
    return [heights[0] / height for height in heights]


def by_power(heights: Sequence[int]) -> list[float]:
    """0.825 ** (n - 1 - i) for n residuals: 1 for the middle block's."""
    return [0.825 ** (len(heights) - 1 - i) for i in range(len(heights))]


def by_logspace(heights: Sequence[int]) -> list[float]:
    """10 ** (i / (n - 1) - 1) for n residuals: from 0.1 to 1."""
    return [10 ** (i / (len(heights) - 1) - 1) for i in range(len(heights))]


_WEIGHTS: Mapping[str, Callable[[Sequence[int]], list[float]]] = {
    "64/h": by_height,
    "0.825^k": by_power,
    "logspace": by_logspace,
}


def weights(choice: str, heights: Sequence[int]) -> list[float]:
    """The weight of each residual.

    Args:
        choice: one of FORMULAS.
        heights: of the residuals in cells, the latent's own first.
    """
    return _WEIGHTS[choice](heights) if choice in _WEIGHTS else [1.0] * len(heights)


def weighted(choice: str, down: Sequence[Tensor], middle: Tensor) -> tuple[list[Tensor], Tensor]:
    """Residuals [B, C_i, h_i, w_i] times their weights."""
    whole = [*down, middle]
    *rest, last = (
        residual if weight == 1.0 else residual * weight
        for residual, weight in zip(whole, weights(choice, [r.shape[-2] for r in whole]), strict=True)
    )
    return rest, last


def steer(control: nn.Module, choice: str) -> None:
    """Make a MultiControlNetModel of diffusers weight the sum of its residuals as chosen.

    The pipeline is then called with `guess_mode` for every choice but `both`: it gives the conditional branch
    alone to the network and zeros to the other. diffusers' own weights, which come with it, are left out.
    """

    def without_own(_: nn.Module, args: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**named, "guess_mode": False}

    def with_chosen(_: nn.Module, __: Any, output: tuple[Sequence[Tensor], Tensor]) -> Any:
        return weighted(choice, *output)

    control.register_forward_pre_hook(without_own, with_kwargs=True)
    control.register_forward_hook(with_chosen)

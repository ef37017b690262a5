"""Muon: momentum whose matrices are made orthogonal before they are applied; AdamW for everything else."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

SMALLEST = 16  # rows and columns from which a tensor counts as a matrix; below it orthogonal says little
# The quintic of Newton and Schulz whose five rounds bring singular values of (0, 1] near 1 (K. Jordan,
# "Muon: An optimizer for hidden layers in neural networks", 2024): a x + b x^3 + c x^5.
QUINTIC = (3.4445, -4.7750, 2.0315)
ROUNDS = 5


class Muon(Optimizer):
    """Muon for weights with at least 16 rows and 16 columns, AdamW for norms, biases and thin layers.

    A convolution's weight [out, in, h, w] is the matrix [out, in h w]. With gradient g, m = momentum m +
    (1 - momentum) g and the Nesterov step n = momentum m + (1 - momentum) g, the weight becomes
    (1 - lr weight_decay) w - 0.2 lr sqrt(max(rows, columns)) orthogonal(n). The factor gives the update the
    root mean square that AdamW's usually has (arXiv 2502.16982, section 2.2), so that AdamW's learning rates
    serve here. `betas` and `eps` are AdamW's, and `momentum` is Muon's.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        momentum: float = 0.95,
    ) -> None:
        """Raises ValueError for a number out of range."""
        if lr < 0 or weight_decay < 0 or eps < 0 or not all(0 <= b < 1 for b in (*betas, momentum)):
            raise ValueError(f"found {lr=}, {weight_decay=}, {betas=}, {eps=}, {momentum=}")
        options = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps, "momentum": momentum}
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; closures are not taken."""
        assert closure is None
        for group in self.param_groups:
            matrices: dict[Any, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if is_matrix(parameter):
                    key = (parameter.shape, parameter.device, parameter.dtype)
                    matrices[key].append(parameter)
                else:
                    self._adamw(parameter, group)
            for alike in matrices.values():
                self._orthogonal(alike, group)

    def _orthogonal(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """The step of matrices of one shape, all at once."""
        momentum = group["momentum"]
        steps = []
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(parameter.grad, 1 - momentum)
            steps.append(parameter.grad.lerp(state["momentum"], momentum).flatten(1))  # type: ignore[union-attr]
        rows, columns = steps[0].shape
        scale = 0.2 * math.sqrt(max(rows, columns)) * group["lr"]
        for parameter, update in zip(parameters, orthogonal(torch.stack(steps)), strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update.view_as(parameter), alpha=-scale)

    def _adamw(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """The step of any other parameter (arXiv 1711.05101, algorithm 2)."""
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["step"] = 0
            state["first"], state["second"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        (b1, b2), n = group["betas"], state["step"]
        state["first"].lerp_(gradient, 1 - b1)
        state["second"].mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
        root = (state["second"] / (1 - b2**n)).sqrt_().add_(group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.addcdiv_(state["first"], root, value=-group["lr"] / (1 - b1**n))


def is_matrix(parameter: Tensor) -> bool:
    """Whether Muon orthogonalises the steps of this parameter."""
    return parameter.ndim >= 2 and min(len(parameter), parameter[0].numel()) >= SMALLEST


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices [n, rows, columns] with their singular vectors, and singular values near 1 (0.7 to 1.2).

    Computed in bfloat16, whose errors the iteration corrects, to float32. A matrix of zeros stays one.
    """
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = (x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-12)).bfloat16()
    a, b, c = QUINTIC
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).float()

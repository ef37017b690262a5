"""Lion: the sign of a momentum as the step (arXiv 2302.06675)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer


class Lion(Optimizer):
    """With gradient g and momentum m: w <- (1 - lr weight_decay) w - lr sign(b1 m + (1 - b1) g), then
    m <- b2 m + (1 - b2) g (algorithm 2).

    Every number moves by lr at each step, so the learning rate is 3 to 10 times smaller than AdamW's, and
    the decay as much larger (section 5 of the paper). One tensor of state, where AdamW has two.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.99),
    ) -> None:
        """Raises ValueError for a number out of range."""
        if lr < 0 or weight_decay < 0 or not all(0 <= b < 1 for b in betas):
            raise ValueError(f"found {lr=}, {weight_decay=}, {betas=}")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "betas": betas})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient; closures are not taken."""
        assert closure is None
        for group in self.param_groups:
            b1, b2 = group["betas"]
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            gradients = [parameter.grad for parameter in parameters]
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["momentum"] = torch.zeros_like(parameter)
            momenta = [self.state[parameter]["momentum"] for parameter in parameters]
            # All tensors at once: adapters have hundreds of small ones.
            steps = torch._foreach_lerp(momenta, gradients, 1 - b1)
            torch._foreach_sign_(steps)
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, steps, alpha=-group["lr"])
            torch._foreach_lerp_(momenta, gradients, 1 - b2)

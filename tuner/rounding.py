"""Trained weights held in bfloat16, each update rounded stochastically (arXiv 2010.06192).

A weight in bfloat16 has 8 bits of precision: rounded to the nearest, an update below half of its last place
(a 512th of the weight) is lost, and training stands still. Rounded up or down at random, with probabilities
such that the mean is the exact result, small updates move it on average.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tuner import counted
from tuner.errors import UserError

LOT = 2**24
"""Numbers that are updated together, in float32: weights and gradients take four bytes each."""
LOW = 16
"""Bits of a float32 that a bfloat16 does not have."""
NARROWED = ("lora", "controlnet", "full")
"""Methods with so many trained weights that it saves something, and that nothing else moves."""
SINGLE = (
    "adamw",
    "adam",
    "sgd",
    "lion",
    "adamw8bit",
    "pagedadamw8bit",
    "pagedadamw32bit",
    "lion8bit",
    "pagedlion8bit",
)
"""Optimisers that update each tensor by itself, so that it can be done a lot at a time."""


def stochastic(wide: Tensor, generator: torch.Generator) -> Tensor:
    """float32 [...] -> bfloat16 [...]: one of the two neighbours, the nearer the likelier.

    The magnitude's low 16 bits, plus 16 random ones, carry into the high bits with a probability of exactly
    the share of the way to the next bfloat16 away from zero. What is a bfloat16 already stays, and so does
    what is no finite number.

    Args:
        generator: on the tensor's device.
    """
    assert wide.dtype == torch.float32, wide.dtype
    random = torch.empty(wide.shape, dtype=torch.int32, device=wide.device)
    random.random_(0, 1 << LOW, generator=generator)
    rounded = random.add_(wide.view(torch.int32)).bitwise_and_(-1 << LOW).view(torch.float32)
    return torch.where(wide.isfinite(), rounded, wide, out=rounded).to(torch.bfloat16)


def narrow(parameters: Iterable[nn.Parameter]) -> None:
    """Hold trained weights in bfloat16, rounded to the nearest once."""
    for parameter in parameters:
        parameter.data = parameter.data.to(torch.bfloat16)


def check(optimiser: str, methods: Sequence[str], precision: str, parted: bool) -> None:
    """Raises UserError where weights of these methods cannot be trained so, by this optimiser, in this run.

    Args:
        precision: what is computed in, as accelerate calls it.
        parted: the weights are shared out among processes (FSDP2).
    """
    key = "train.trained_precision: bf16"
    if optimiser.lower() not in SINGLE:
        raise UserError(
            f"{key} needs an optimiser that updates each tensor by itself, found {optimiser}; "
            f"take one of {', '.join(SINGLE)}, or fp32"
        )
    if other := [name for name in methods if name not in NARROWED]:
        raise UserError(
            f"{key} is for {', '.join(NARROWED)}; method {' + '.join(other)} needs float32: take fp32"
        )
    if parted:
        raise UserError(f"{key} does not go with FSDP2, which parts float32 weights: take fp32, or DDP")
    if precision != "bf16":
        raise UserError(
            f"{key} needs train.precision bf16, and auto is {precision.replace('no', 'fp32')} on this "
            "machine; ask for precision bf16"
        )


def scratch(sizes: Sequence[int]) -> int:
    """Bytes that an update takes at most besides weights, gradients and state: of parameters of so many
    numbers.

    Weight and gradient in float32, and while one parameter is rounded its random bits and results.
    """
    return max(
        (8 * sum(sizes[n] for n in lot) + 16 * max(sizes[n] for n in lot) for lot in _lots(sizes)), default=0
    )


def _lots(sizes: Sequence[int]) -> Iterator[list[int]]:
    """Numbers of parameters that are updated together."""
    lot: list[int] = []
    held = 0
    for number, size in enumerate(sizes):
        if lot and held + size > LOT:
            yield lot
            lot, held = [], 0
        lot.append(number)
        held += size
    if lot:
        yield lot


class Rounded(Optimizer):
    """An optimiser of SINGLE over bfloat16 parameters.

    It sees float32 copies, a lot of parameters at a time, and keeps its state for these: moments are in
    float32, or in 8 bits. The results are rounded stochastically. The random bits are a function of seed,
    step and the parameter's number: the same on every process, and after a resume; a CPU's are others than a
    GPU's.
    """

    def __init__(self, inner: Optimizer, seed: int) -> None:
        """
        Args:
            inner: the optimiser over the parameters, before its first step.
            seed: the run's.
        """
        super().__init__(inner.param_groups, dict(inner.defaults))
        assert all(p.dtype == torch.bfloat16 for group in self.param_groups for p in group["params"])
        self.inner, self.seed, self.taken = inner, seed, 0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step; parameters without a gradient stay as they are."""
        assert closure is None, "the loss is computed once a step"
        first = 0
        for group in self.param_groups:
            every: list[nn.Parameter] = group["params"]
            numbers = [n for n, p in enumerate(every) if p.grad is not None]
            for lot in _lots([every[n].numel() for n in numbers]):
                self._update(group, [(first + numbers[n], every[numbers[n]]) for n in lot])
            first += len(every)
        self.taken += 1

    def _update(self, group: Mapping[str, Any], lot: Sequence[tuple[int, nn.Parameter]]) -> None:
        wide = [nn.Parameter(p.detach().float()) for _, p in lot]
        for copy, (_, parameter) in zip(wide, lot, strict=True):
            assert parameter.grad is not None
            copy.grad = parameter.grad.float()
        self.inner.param_groups = [{**group, "params": wide}]
        self.inner.state = defaultdict(dict)
        for copy, (_, parameter) in zip(wide, lot, strict=True):
            if parameter in self.state:
                self.inner.state[copy] = self.state[parameter]
        self.inner.step()
        for copy, (number, parameter) in zip(wide, lot, strict=True):
            if copy in self.inner.state:
                self.state[parameter] = self.inner.state[copy]
            copy.grad = None
            draw = torch.Generator(parameter.device)
            draw.manual_seed(counted.choice(1 << 63, self.seed, self.taken, number, "rounding"))
            parameter.copy_(stochastic(copy.detach(), draw))
        self.inner.param_groups, self.inner.state = [], defaultdict(dict)

    def state_dict(self) -> dict[str, Any]:
        """The state with the number of steps taken."""
        return {**super().state_dict(), "taken": self.taken}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave; tensors keep their types, which torch would make the
        parameters'."""
        saved = state_dict["param_groups"]
        own = [len(group["params"]) for group in self.param_groups]
        if [len(group["params"]) for group in saved] != own:
            raise ValueError(f"the saved state has other groups than {own}")
        numbers = chain.from_iterable(group["params"] for group in saved)
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        by_number = dict(zip(numbers, parameters, strict=True))
        for group, other in zip(self.param_groups, saved, strict=True):
            group.update({name: value for name, value in other.items() if name != "params"})
        on_device = {
            p: bool(g.get("fused") or g.get("capturable")) for g in self.param_groups for p in g["params"]
        }
        self.state = defaultdict(dict)
        for number, values in state_dict["state"].items():
            parameter = by_number[number]
            for name, value in values.items():
                counts = name == "step" and not on_device[parameter]  # torch counts these steps on the CPU
                if isinstance(value, Tensor):
                    value = value.to("cpu" if counts else parameter.device, copy=True)
                self.state[parameter][name] = value
        self.taken = int(state_dict["taken"])

"""The bytes that an optimiser keeps for parameters of given shapes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from tuner import optimiser
from tuner.training import Optimiser

BLOCK = 256
"""Numbers of a state that share a scale in bitsandbytes' 8-bit optimisers (blockwise, arXiv 2110.02861)."""
SMALL = 4096
"""Parameters of fewer numbers keep a state in float32 there (bitsandbytes' min_8bit_size)."""
_BITSANDBYTES = {  # states a parameter, bytes of a number of them, whether they lie on the host
    "adamw8bit": (2, 1, False),
    "pagedadamw8bit": (2, 1, True),
    "pagedadamw32bit": (2, 4, True),
    "lion8bit": (1, 1, False),
    "pagedlion8bit": (1, 1, True),
}
_PROBE = (5, 6, 7, 3)
"""Sides of the small parameters on which an optimiser shows what it keeps: no two alike, none 1."""


def state(about: Optimiser, parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
    """Bytes on the device and on the host.

    Of a packaged 8-bit optimiser by its rule; of any other by what it keeps for small parameters of as many
    dimensions after a step: a state's side that is the parameter's grows with it, others stay.

    Raises:
        UserError: there is no such optimiser here, or it does not take the options.
    """
    shapes = [tuple(parameter.shape) for parameter in parameters]
    known = _BITSANDBYTES.get(about.name.lower())
    if known is not None:
        count, wide, paged = known
        kept = sum(count * _eight(math.prod(shape), wide) for shape in shapes)
        return (0, kept) if paged else (kept, 0)
    rules = {dimensions: _probe(about, dimensions) for dimensions in {len(shape) for shape in shapes}}
    return sum(_grown(shape, rules[len(shape)]) for shape in shapes), 0


def _eight(numbers: int, wide: int) -> int:
    """Bytes of one state of so many numbers."""
    if wide == 1 and numbers >= SMALL:
        return numbers + 4 * -(-numbers // BLOCK)
    return 4 * numbers


Rule = list[tuple[tuple[int | None, ...], int]]
"""Of each tensor that is kept: its sides, None one that is the parameter's; and bytes of a number."""


def _probe(about: Optimiser, dimensions: int) -> Rule:
    shape = _PROBE[:dimensions]
    parameter = nn.Parameter(torch.zeros(shape))
    parameter.grad = torch.ones(shape)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        made = optimiser.build([{"params": [parameter]}], **about.resolved(), learning_rate=1e-4)
        optimiser.Averaging(made)  # a schedule-free one is told that training begins
        made.step()
    kept = made.state[parameter].values()
    return [(_sides(tensor, shape), tensor.element_size()) for tensor in kept if isinstance(tensor, Tensor)]


def _sides(tensor: Tensor, shape: Sequence[int]) -> tuple[int | None, ...]:
    if tensor.ndim != len(shape):
        return (tensor.numel(),)
    return tuple(None if side == own else side for side, own in zip(tensor.shape, shape, strict=True))


def _grown(shape: Sequence[int], rule: Rule) -> int:
    total = 0
    for sides, wide in rule:
        own = shape if len(sides) == len(shape) else (1,) * len(sides)
        total += wide * math.prod(
            side if fixed is None else fixed for side, fixed in zip(own, sides, strict=True)
        )
    return total

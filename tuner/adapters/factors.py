"""Frozen layers with a trained low-rank change beside them: y = W x + b + up (down x).

A ControlNet's branch made of them shares weights and biases with the base that it was cloned from, and holds
what is trained alone: the factors, the norms, and the layers that the base has no counterpart for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Plain = nn.Linear | nn.Conv2d


class Factored(nn.Module):
    """A linear layer or a convolution that is another one, its weight changed by up @ down.

    The change is computed on its own, not added to the weight: beside a weight in half precision small steps
    would be lost in its rounding, and a product of the factors as large as the weight would be held. As `up`
    begins at zero, the layer gives at first what the other one gives, bitwise.

    Attributes:
        down: [rank, in] or [rank, in, kh, kw], uniform in +-1/sqrt(in * kh * kw) as a layer's own weight.
        up: [out, rank] or [out, rank, 1, 1], zero at first.
    """

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, layer: Plain, frozen: nn.Module | None, rank: int) -> None:
        """Draw `down` from torch's generator.

        Args:
            layer: what is changed.
            frozen: the layer that keeps weight and bias, which this one follows through casts and moves; None
                where none does: then those of `layer` are kept here.
        """
        super().__init__()
        out, *inner = layer.weight.shape
        self.conv: Any = None
        if isinstance(layer, nn.Conv2d):
            assert (layer.groups, layer.padding_mode) == (1, "zeros")
            self.conv = layer.stride, layer.padding, layer.dilation
        self.has_bias = layer.bias is not None
        self._frozen: list[Any] = [] if frozen is None else [frozen]  # in a list it is no part of this module
        for name, tensor in (("weight", layer.weight), ("bias", layer.bias)):
            kept = tensor.detach() if frozen is None and tensor is not None else None
            self.register_buffer(name, kept, persistent=False)
        self.down = nn.Parameter(torch.empty(rank, *inner))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.up = nn.Parameter(torch.zeros(out, rank, *[1] * (len(inner) - 1)))

    def frozen(self) -> tuple[Tensor, Tensor | None]:
        """Weight, [out, in] or [out, in, kh, kw], and bias, [out], in the precision that they are held in."""
        weight, bias = self.weight, self.bias
        if weight is None:
            weight, bias = self._frozen[0].weight, self._frozen[0].bias
        assert weight is not None
        return weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], or [B, in, h, w] -> [B, out, h', w']."""
        weight, bias = self.frozen()
        # Where memory is planned (tensors without numbers) torch knows no autocast.
        if x.is_meta or not torch.is_autocast_enabled(x.device.type):
            weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        if self.conv is None:
            return F.linear(x, weight, bias) + F.linear(F.linear(x, self.down), self.up)
        change = F.conv2d(F.conv2d(x, self.down, None, *self.conv), self.up)
        return F.conv2d(x, weight, bias, *self.conv) + change


def counterparts(branch: nn.Module, base: nn.Module) -> dict[str, nn.Module]:
    """The branch's linear layers and convolutions that the base has too, by path -> the base's layer."""
    own, found = dict(base.named_modules()), {}
    for path, layer in branch.named_modules():
        other = own.get(path)
        if isinstance(layer, Plain) and other is not None and _inputs(layer) == _inputs(other):
            found[path] = other
    assert found, "a branch is cloned from the base"
    return found


def put_in(
    branch: nn.Module, layers: Mapping[str, nn.Module], ranks: Mapping[str, int], copy: torch.dtype | None
) -> None:
    """Replace layers of a branch by factored ones, in place, drawn from torch's generator.

    Args:
        layers: path -> the layer that keeps the frozen weight.
        ranks: path -> rank; more than `full_rank` is of no use.
        copy: the precision in which weights and biases are kept here instead; None: they are not.
    """
    for path, rank in ranks.items():
        parent, _, name = path.rpartition(".")
        layer = branch.get_submodule(path)
        assert isinstance(layer, Plain)
        made = Factored(layer, layers[path] if copy is None else None, rank)
        for buffer in made.buffers():
            buffer.data = buffer.data.to(copy)
        setattr(branch.get_submodule(parent), name, made)


def full_rank(layer: nn.Module) -> int:
    """The rank that a layer's weight can have at most: the smaller side of it as a matrix."""
    assert isinstance(layer, Plain)
    return min(layer.weight.shape[0], math.prod(layer.weight.shape[1:]))


def factored(branch: nn.Module) -> Iterator[tuple[str, Factored]]:
    """The factored layers of a branch by path."""
    for path, layer in branch.named_modules():
        if isinstance(layer, Factored):
            yield path, layer


def frozen_names(branch: nn.Module) -> list[str]:
    """What a branch shares with its base, by the names that both have."""
    return [
        f"{path}.{name}"
        for path, layer in factored(branch)
        for name in (["weight", "bias"] if layer.has_bias else ["weight"])
    ]


def _inputs(layer: nn.Module) -> object:
    """What tells two layers of one path apart: an inpainting base's first convolution sees more channels."""
    return getattr(layer, "in_channels", None), getattr(layer, "in_features", None)

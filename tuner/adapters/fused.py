"""A linear layer with its LoRA as one operation.

peft adds an adapter's product to its layer's output in a chain of modules and operations. Here the products
are added up where they are made: fewer passes over memory, fewer calls (benchmarks/cpu.py). For
y = x W' + b + s (x A') B' with gradient g, the gradients are dx = g W + s (g B) A, dA = s (g B)' x and
dB = s g' (x A'), each a matrix product.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn


class _Product(torch.autograd.Function):
    """x [..., in], the frozen weight [out, in] and bias [out] or None, A [r, in], B [out, r], the scale."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y = flat @ weight.T if bias is None else torch.addmm(bias, flat, weight.T)
        inner = flat @ down.T
        torch.addmm(y, inner, up.T, alpha=scale, out=y)
        ctx.save_for_backward(flat, weight, down, up, inner)
        ctx.scale, ctx.shape = scale, x.shape
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, inner = ctx.saved_tensors
        g = gradients[0].reshape(-1, weight.shape[0])
        back = g @ up
        if ctx.scale != 1:
            back *= ctx.scale
            inner = inner * ctx.scale
        dx = None
        if ctx.needs_input_grad[0]:
            dx = g @ weight
            torch.addmm(dx, back, down, out=dx)
            dx = dx.view(ctx.shape)
        return dx, None, None, back.T @ x, g.T @ inner, None


class FusedLinear(Linear):  # type: ignore[misc]
    """peft's layer, computed so where nothing speaks against it."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., in] -> [..., out]."""
        if args or kwargs or x.is_meta or not self._plain() or torch.compiler.is_compiling():
            return cast(Tensor, super().forward(x, *args, **kwargs))
        base, (name,) = self.base_layer, self.active_adapters
        tensors = [x, base.weight, base.bias, self.lora_A[name].weight, self.lora_B[name].weight]
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            tensors = [None if tensor is None else tensor.to(dtype) for tensor in tensors]
        elif any(tensor is not None and tensor.dtype != x.dtype for tensor in tensors):
            return cast(Tensor, super().forward(x))
        return cast(Tensor, _Product.apply(*tensors, self.scaling[name]))  # type: ignore[no-untyped-call]

    def _plain(self) -> bool:
        """Whether the output is the layer's and one LoRA's of it, nothing else."""
        if self.disable_adapters or self.merged or len(self.active_adapters) != 1:
            return False
        name = self.active_adapters[0]
        dropout: nn.Module = self.lora_dropout[name]
        return isinstance(dropout, nn.Identity) or not dropout.training


def fuse(layer: Any) -> None:
    """Let a linear layer with one plain LoRA compute so; other layers stay as they are."""
    if type(layer) is not Linear or type(layer.base_layer) is not nn.Linear:
        return
    plain = not (layer.fan_in_fan_out or layer.lora_variant or any(layer.lora_bias.values()))
    if plain and not layer.base_layer.weight.requires_grad:
        layer.__class__ = FusedLinear  # in place: it stands where peft has put it

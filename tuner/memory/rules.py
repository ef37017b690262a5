"""What a device does with types and attention, on meta tensors, which neither autocast nor kernels know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tuner.attention import SmallOnCpu

# torch's own lists for autocast (aten/src/ATen/autocast_mode.h), of what diffusers and transformers call.
_LOWER = {
    F.conv2d,
    F.linear,
    F.scaled_dot_product_attention,
    torch.matmul,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.bmm,
    torch.Tensor.bmm,
    torch.baddbmm,
    torch.addmm,
}
_EXACT = {F.group_norm, F.layer_norm, F.softmax, torch.softmax, torch.Tensor.softmax}
"""What is computed in float32: by CUDA's autocast, not by the CPU's."""


class Rules(TorchFunctionMode):
    """Within it functions of torch get arguments in the types that autocast on a device would give them.

    And attention goes to the fused kernel, which keeps queries, keys, values, result and a number for each
    query: with meta tensors torch itself would take the plain one, which keeps the whole matrix.
    """

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        """
        Args:
            device: cpu or cuda.
            dtype: what is computed in; float32: no autocast.
        """
        super().__init__()
        self.dtype = dtype
        self._lower = _LOWER if dtype != torch.float32 else set()
        self._exact = _EXACT if device == "cuda" and dtype != torch.float32 else set()
        self._copies: dict[int, tuple[Tensor, Tensor]] | None = None

    def forward_pass(self) -> None:
        """From now on lower-precision copies of trained weights are kept, as autocast does it."""
        self._copies = {}

    def backward_pass(self) -> None:
        """From now on they live as long as the backward pass needs them."""
        self._copies = None

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if func in self._lower:
            args, named = [self._low(arg) for arg in args], {k: self._low(v) for k, v in named.items()}
        elif func in self._exact:
            args, named = [_full(arg) for arg in args], {k: _full(v) for k, v in named.items()}
        if func is F.scaled_dot_product_attention:
            return _fused(*args, **named)
        return func(*args, **named)

    def _low(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if self._copies is None or not (value.requires_grad and value.is_leaf):
            return value.to(self.dtype)
        if id(value) not in self._copies:
            self._copies[id(value)] = (value, value.to(self.dtype))
        return self._copies[id(value)][1]


def _full(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _fused(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The kernel that there is on the meta device; those of CUDA keep the same."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    seen: Tensor = kernel(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return seen


class _AsOnCpu(SmallOnCpu):
    """The attention that tuner.attention chooses on a CPU, for meta tensors."""

    on = "meta"


def choose_attention(network: Any, device: str) -> None:
    """Give a UNet or ControlNet on the meta device the attention that it has on a device."""
    from diffusers.models.attention_processor import AttnProcessor2_0

    network.set_attn_processor(_AsOnCpu() if device == "cpu" else AttnProcessor2_0())

"""Linear layers whose weights are stored in 4 or 8 bits by bitsandbytes: made, filled, moved, counted.

The libraries' own loaders quantise too, but refuse to without a GPU, although bitsandbytes computes on a CPU;
so the layers are put in here, the same ones that theirs would replace, in one way for every device.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

Scheme = Literal["nf4", "int8"]
BLOCK, NESTED = 64, 256
"""Weights that share a scale, and scales that share one of their own (arXiv 2305.14314, section 3)."""
OUTLIER = 6.0
"""Inputs beyond it are multiplied in full precision by int8 layers (arXiv 2208.07339, section 3.2)."""
KEPT = ("text_projection",)
"""A text encoder's output layer keeps its precision, as in transformers' own loader."""


def layers(network: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers that are stored quantised, or are to be, by path.

    Layers inside an adapter are not the base's; convolutions, norms and embeddings stay as they are.
    """
    for path, layer in network.named_modules():
        own = ".lora_" not in f".{path}" and path.removesuffix(".base_layer") not in KEPT
        if isinstance(layer, nn.Linear) and own:
            yield path, layer


def nbytes(rows: int, columns: int, scheme: Scheme) -> int:
    """Bytes of a stored weight [rows, columns] with all that belongs to it.

    nf4: half a byte a weight, a byte for each block's scale, a float32 for each block of scales and for their
    mean, and the tables of a weight's 16 and a scale's 256 values; int8: a byte a weight and a float32 for
    each row.
    """
    count = rows * columns
    if scheme == "int8":
        return count + 4 * rows
    blocks = -(-count // BLOCK)
    return -(-count // 2) + blocks + 4 * -(-blocks // NESTED) + 4 + 4 * (16 + 256)


def library() -> Any:
    """bitsandbytes, without what it has to say of kernels that are not there and of types that it
    converts."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    import bitsandbytes

    return bitsandbytes


def replace(network: nn.Module, scheme: Scheme, compute: torch.dtype) -> list[str]:
    """Put quantised layers without weights in the place of the linear ones; returns their paths.

    Args:
        network: on the meta device, or about to be thrown away: weights are not taken over.
        compute: what the layers multiply in.
    """
    found = list(layers(network))
    for path, layer in found:
        place, _, name = path.rpartition(".")
        setattr(network.get_submodule(place), name, _empty(layer, scheme, compute))
    marked: Any = network  # this is where peft looks before it chooses a kind of adapter
    marked.is_loaded_in_4bit, marked.is_loaded_in_8bit = scheme == "nf4", scheme == "int8"
    return [path for path, _ in found]


def _empty(layer: nn.Linear, scheme: Scheme, compute: torch.dtype) -> nn.Module:
    kinds, bias, meta = library().nn, layer.bias is not None, torch.device("meta")
    sides = (layer.in_features, layer.out_features, bias)
    made: Any
    if scheme == "int8":
        made = kinds.Linear8bitLt(*sides, has_fp16_weights=False, threshold=OUTLIER, device=meta)
    else:
        made = _kind_of_4_bits()(*sides, compute, quant_type="nf4", device=meta)
        # Where a CPU multiplies bfloat16 such a layer repacks its weights at the first call without
        # gradients, and from then on passes none back to its input.
        made.support_avx512bf16_for_cpu = False
    made.requires_grad_(False)
    whole: nn.Module = made
    return whole


@functools.cache
def _kind_of_4_bits() -> Any:
    """bitsandbytes' Linear4bit, with a right product on the CPU.

    Its CPU kernel (0.50.2) takes wrong scales for rows of a length that is no multiple of BLOCK. The UNets
    and text encoders of Stable Diffusion have none such; small ones do.
    """

    class Linear4bit(library().nn.Linear4bit):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            if x.device.type != "cpu" or self.in_features % BLOCK == 0:
                made: Tensor = super().forward(x)
                return made
            compute = x.dtype if self.compute_dtype is None else self.compute_dtype
            product: Tensor = _Product.apply(x.to(compute), self.weight)  # type: ignore[no-untyped-call]
            return (product if self.bias is None else product + self.bias.to(compute)).to(x.dtype)

    return Linear4bit


class _Product(torch.autograd.Function):
    """x [..., columns] times a 4-bit weight [rows, columns]; the weight is not kept in full."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any) -> Tensor:
        ctx.weight = weight
        return torch.nn.functional.linear(x, dense(weight, x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ dense(ctx.weight, gradient.dtype), None


def dense(weight: Any, dtype: torch.dtype | None = None) -> Tensor:
    """A 4-bit weight's numbers [rows, columns], value times its block's scale; None: in the type it had."""
    about = weight.quant_state
    scales = library().functional.dequantize_blockwise(about.absmax, about.state2) + about.offset
    pairs = weight.data.flatten()
    codes = torch.stack([pairs >> 4, pairs & 15], dim=1).flatten()[: math.prod(about.shape)]
    values: Tensor = about.code[codes.long()] * scales.repeat_interleave(BLOCK)[: len(codes)]
    return values.view(about.shape).to(about.dtype if dtype is None else dtype)


def fill(layer: Any, weight: Tensor, device: torch.device) -> None:
    """Quantise a weight [rows, columns], on the device, into a layer that `replace` made."""
    kinds = library().nn
    if isinstance(layer, kinds.Linear8bitLt):
        own = kinds.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
        layer.weight = own.to(device)
        layer.init_8bit_state()  # now, so that `move` finds its parts in one place
    else:
        own = kinds.Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer)
        layer.weight = own.to(device)


def is_quantised(layer: nn.Module) -> bool:
    """Whether a layer is one that `fill` filled."""
    weight = getattr(layer, "weight", None)
    return isinstance(layer, nn.Linear) and isinstance(weight, Tensor) and not weight.is_floating_point()


def move(network: nn.Module, device: torch.device) -> None:
    """Move a network; torch alone forgets the scales of int8 layers."""
    network.to(device)
    for layer in network.modules():
        if is_quantised(layer) and hasattr(layer, "state"):
            state: Any = layer.state
            assert isinstance(layer.weight, Tensor)
            state.CB, state.SCB = layer.weight.data, state.SCB.to(device)


@contextmanager
def exact(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Within it quantised layers multiply what they store in float32, as plain layers would.

    Else those of 8 bits round their inputs, too, and those of 4 bits compute in what training computes in: a
    small effect is lost in that.
    """
    found: list[Any] = [layer for network in networks for layer in network.modules() if is_quantised(layer)]
    eight = [layer for layer in dict.fromkeys(found) if hasattr(layer, "state")]
    four = [(layer, layer.compute_dtype) for layer in dict.fromkeys(found) if hasattr(layer, "compute_dtype")]
    try:
        for layer in eight:
            layer.forward = functools.partial(_plain, layer)  # a copy of the layer gets one of its own
        for layer, _ in four:
            layer.compute_dtype = torch.float32
        yield
    finally:
        for layer in eight:
            del layer.forward
        for layer, compute in four:
            layer.compute_dtype = compute


def _plain(layer: Any, x: Tensor) -> Tensor:
    """An 8-bit layer's product, its weight in full."""
    weight = layer.weight.data.to(x.dtype) * (layer.state.SCB / 127)[:, None].to(x.dtype)
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return torch.nn.functional.linear(x, weight, bias)

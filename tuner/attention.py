"""Attention of diffusers' networks as it is fastest where a run is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

SMALL = 1024 * 1024
"""Queries times keys up to which the matrix of an attention may be held: 1024 latents (256 x 256 pixels)."""


class SmallOnCpu:
    """A diffusers attention processor: plain matrix products for small attentions on the CPU.

    torch's fused CPU kernel costs more there: on two cores a training step of the embedded UNet takes
    1.28 times as long with it at 64 pixels, 1.17 times at 128 and 1.09 times at 256
    (benchmarks/attention.py). It is used elsewhere, and for long sequences, whose matrix would not fit.
    """

    on = "cpu"
    """The type of device where it is plain."""

    def __init__(self) -> None:
        from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

        self.plain: Any = AttnProcessor()
        self.fused: Any = AttnProcessor2_0()

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """What diffusers' own processors do: [B, S, C] (or [B, C, h, w]) in, the same shape out."""
        queries = hidden_states.shape[1:].numel() // hidden_states.shape[-1 if hidden_states.ndim == 3 else 1]
        keys = queries if encoder_hidden_states is None else encoder_hidden_states.shape[1]
        small = hidden_states.device.type == self.on and queries * keys <= SMALL
        seen: Tensor = (self.plain if small else self.fused)(
            attn, hidden_states, encoder_hidden_states, attention_mask, temb
        )
        return seen


def choose(network: Any) -> None:
    """Give a UNet or ControlNet of diffusers this attention."""
    network.set_attn_processor(SmallOnCpu())


WORTH = 0.97
"""An order of kernels is taken where it needs at most this share of the time of torch's own order."""
ORDERS: Mapping[str, tuple[SDPBackend, ...]] = {
    "flash": (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION),
    "cudnn": (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION),
    "efficient": (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION),
}
"""Which of a GPU's kernels is tried first; the last is always plain matrix products, which fit everything."""

_kept: list[object] = []  # contexts that stay entered: they would be left when they are collected


class Shape(NamedTuple):
    """One attention of a network."""

    heads: int
    width: int  # of a head
    queries: int
    keys: int


def shapes(network: Any, side: int, text: int) -> Counter[Shape]:
    """The attentions of a UNet of diffusers, and how often it has each.

    Args:
        side: of the latent's square.
        text: positions of the encoded caption.
    """
    from diffusers.models.attention_processor import Attention

    found: Counter[Shape] = Counter()
    last = len(network.down_blocks) - 1
    levels = [(level, block) for level, block in enumerate(network.down_blocks)]
    levels += [(last, network.mid_block)]
    levels += [(last - level, block) for level, block in enumerate(network.up_blocks)]
    for level, block in levels:
        seen = (-(-side // 2**level)) ** 2
        for layer in block.modules():
            if isinstance(layer, Attention):
                keys = text if layer.is_cross_attention else seen
                found[Shape(layer.heads, layer.inner_dim // layer.heads, seen, keys)] += 1
    return found


def settle(
    wanted: Mapping[Shape, int], seconds: Callable[[Shape, tuple[SDPBackend, ...] | None], float]
) -> str:
    """Try which order of kernels does a network's attentions fastest, and keep it for the whole process.

    An order is for all of them: what is chosen for each by itself would cut compiled graphs in pieces.

    Args:
        wanted: how often each is there.
        seconds: how long one takes, forward and backward, in an order; None: in torch's own. See `timed`.

    Returns:
        What was chosen, in a line. Where anything fails, torch's own order stays.
    """
    usual = (SDPBackend.MATH,)
    try:
        own = sum(count * seconds(shape, None) for shape, count in wanted.items())
        totals = {
            name: sum(count * seconds(shape, order + usual) for shape, count in wanted.items())
            for name, order in ORDERS.items()
        }
    except RuntimeError as error:
        return f"attention: in torch's own order of kernels, as trying others failed: {_first_line(error)}"
    best = min(totals, key=lambda name: totals[name])
    if totals[best] > WORTH * own:
        return "attention: in torch's own order of kernels, which is the fastest here"
    context = sdpa_kernel(list(ORDERS[best] + usual), set_priority=True)
    context.__enter__()
    _kept.append(context)
    return f"attention: {best} first, in {totals[best] / own:.0%} of the time of torch's own order of kernels"


def timed(
    batch: int, dtype: torch.dtype, device: torch.device, times: int = 10
) -> Callable[[Shape, tuple[SDPBackend, ...] | None], float]:
    """What `settle` asks on a GPU: seconds of an attention's forward and backward pass."""

    def seconds(shape: Shape, order: tuple[SDPBackend, ...] | None) -> float:
        def made(length: int) -> Tensor:
            drawn = torch.randn(batch, shape.heads, length, shape.width, device=device, dtype=dtype)
            return drawn.requires_grad_()

        query, key, value = made(shape.queries), made(shape.keys), made(shape.keys)

        def run(count: int) -> None:
            for _ in range(count):
                loss = F.scaled_dot_product_attention(query, key, value).sum()
                torch.autograd.backward(loss)

        def measured() -> float:
            run(3)
            events: Any = torch.cuda.Event  # without types
            start, end = (events(enable_timing=True) for _ in range(2))
            start.record()
            run(times)
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1000 / times

        if order is None:
            return measured()
        with sdpa_kernel(list(order), set_priority=True):
            return measured()

    return seconds


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

"""Attention of diffusers' networks as it is fastest where a run is."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

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

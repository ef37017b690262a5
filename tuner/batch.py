"""A batch: everything one forward pass needs, all randomness included."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tuner.family import Moments
from tuner.text import Text, Tokens


@dataclass(frozen=True)
class Batch:
    """Samples of one micro-batch on one process.

    Every random number of a sample (`u`, `noise`, `posterior`) is drawn by the loader as a function of
    (seed, epoch, position in the epoch, purpose), so a batch means the same wherever it is computed.
    """

    names: tuple[str, ...]  # of the samples, for messages
    captions: tuple[str, ...]  # as they are encoded
    weight: Tensor  # [B] >= 0; 0 for a sample that only fills a place
    total: float  # the sum of weights over the whole optimiser step: all processes and micro-batches
    u: Tensor  # [B] in [0, 1), the timestep's random number
    noise: Tensor  # [B, C, h, w] standard normal
    posterior: Tensor  # [B, C, h, w] standard normal, for sampling the autoencoder's posterior
    pixels: Tensor | None = None  # [B, 3, H, W] in [-1, 1]; or
    moments: Moments | None = None  # the cached posterior of them
    tokens: Tokens | None = None  # or
    text: Text | None = None  # the cached encoding of the captions
    condition: Tensor | None = None  # [B, k, H, W] in [0, 1]
    input_noise: Tensor | None = None  # [B, C, h, w], the noise of x_t where it is not `noise`
    sizes: Tensor | None = None  # [B, 6] pixels: original height, width; crop's top, left; height, width
    hole: Tensor | None = None  # [B, 1, H, W], 1 where an inpainting base is to fill the picture, else 0
    mask: Tensor | None = None  # [B, 1, h, w] >= 0, how much each place of the latents counts in the loss

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which copies to a GPU overlap with its work."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The same batch with every tensor changed."""

        def some(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else change(tensor)

        tokens, text = self.tokens, self.text
        return replace(
            self,
            weight=change(self.weight),
            u=change(self.u),
            noise=change(self.noise),
            posterior=change(self.posterior),
            pixels=some(self.pixels),
            moments=None if self.moments is None else Moments(*map(change, self.moments)),
            tokens=None if tokens is None else tokens.map(change),
            text=None if text is None else text.map(change),
            condition=some(self.condition),
            input_noise=some(self.input_noise),
            sizes=some(self.sizes),
            hole=some(self.hole),
            mask=some(self.mask),
        )

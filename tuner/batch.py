"""A batch: everything one forward pass needs, all randomness included."""

from __future__ import annotations

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

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return replace(
            self,
            weight=self.weight.to(device),
            u=self.u.to(device),
            noise=self.noise.to(device, non_blocking=True),
            posterior=self.posterior.to(device, non_blocking=True),
            pixels=move(self.pixels),
            moments=None if self.moments is None else Moments(*(m.to(device) for m in self.moments)),
            tokens=None if self.tokens is None else self.tokens.to(device),
            text=None if self.text is None else self.text.to(device),
            condition=move(self.condition),
        )

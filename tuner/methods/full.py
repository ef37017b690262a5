"""Full fine-tuning: the denoiser itself is trained."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from tuner.block import Block
from tuner.export.component import save_component
from tuner.export.metadata import Kind
from tuner.family import Family
from tuner.method import Card, Method, public_config


class Config(Block):
    """The recipe's block; nothing to choose yet."""


class Full(Method):
    """Trains all of the denoiser."""

    kind: ClassVar[Kind] = "full"
    TRAINS: ClassVar[tuple[str, ...]] = ("unet",)
    DROP_CAPTIONS: ClassVar[float] = 0.1

    def __init__(self, config: Config, family: Family, seed: int) -> None:
        super().__init__(config, family, seed)
        self.denoiser = family.denoiser.requires_grad_(True)

    def export(self, family: Family, folder: Path, card: Card) -> list[Path]:
        """The component folder `diffusers/unet`."""
        place = folder / "diffusers" / "unet"
        tensors = card.cast(self.denoiser.state_dict())
        return [save_component(place, public_config(self.denoiser), tensors, card.header(self.kind, tensors))]


METHOD = Full

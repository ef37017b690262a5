"""ControlNet: a trained clone of the denoiser's encoder, joined by zero convolutions (arXiv 2302.05543)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from tuner.batch import Batch
from tuner.block import Block
from tuner.data import conditions
from tuner.export import cldm
from tuner.export.component import save_component
from tuner.export.files import save
from tuner.export.metadata import Kind
from tuner.family import Cond, Family
from tuner.method import Card, Method, public_config


class Config(Block):
    """The recipe's block."""

    short: ClassVar[str | None] = "condition"

    condition: str = Field(
        "canny", description="kind of the condition picture: canny, or image for given ones"
    )

    @field_validator("condition")
    @classmethod
    def _known(cls, value: str) -> str:
        known = (*conditions.kinds(), "image")
        if value not in known:
            raise ValueError(f"expected one of {', '.join(known)}, found {value}")
        return value


class ControlNet(Method):
    """The clone with its condition encoder is trained; the whole base is frozen."""

    kind: ClassVar[Kind] = "controlnet"
    DROP_CAPTIONS: ClassVar[float] = 0.5

    config: Config

    def __init__(self, config: Config, family: Family, seed: int) -> None:
        super().__init__(config, family, seed)
        self._off = False
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # the condition encoder is drawn; the clone and the zeros are not
            self.branch = family.control_branch(conditioning_channels=3).float().requires_grad_(True)

    @property
    def condition(self) -> str | None:
        return self.config.condition

    def predict(self, family: Family, x_t: Tensor, t: Tensor, cond: Cond, batch: Batch) -> Tensor:
        if self._off:
            return super().predict(family, x_t, t, cond, batch)
        assert batch.condition is not None
        control = family.control(self.branch, x_t, t, cond, batch.condition)
        return family.predict(family.denoiser, x_t, t, cond, control)

    @contextmanager
    def off(self, family: Family) -> Iterator[None]:
        """The base is untouched; the branch is left out."""
        self._off = True
        try:
            yield
        finally:
            self._off = False

    def control_branch(self) -> nn.Module | None:
        return self.branch

    def export(self, family: Family, folder: Path, card: Card) -> list[Path]:
        """The folder `diffusers/` and, for the other tools, one file in the original layout."""
        config, state = public_config(self.branch), card.cast(self.branch.state_dict())
        whole = save_component(folder / "diffusers", config, state, card.header(self.kind, state))
        tensors = cldm.to_cldm(state, config)
        name = f"control_{family.version}_{card.name}.safetensors"
        return [whole, save(folder / name, tensors, card.header(self.kind, tensors))]


METHOD = ControlNet

"""The KL autoencoder, trained whole: how a base's latent space is made (arXiv 2112.10752, section 3.1)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from tuner import counted
from tuner.batch import Batch
from tuner.block import Block
from tuner.errors import UserError
from tuner.export.component import save_component
from tuner.export.metadata import Kind
from tuner.family import Family
from tuner.method import Card, Method, public_config


class Config(Block):
    """The recipe's block."""

    crop: int | None = Field(
        None,
        gt=0,
        description="side of a random crop that is trained on, in pixels; all of the picture if absent",
    )
    crop_choices: int = Field(
        1, ge=1, description="random crops of a picture, of which the one with the most contrast is taken"
    )
    l1: float = Field(1.0, ge=0, description="weight of the absolute error")
    mse: float = Field(1.0, ge=0, description="weight of the squared error")
    kl: float = Field(1e-6, ge=0, description="weight of the Kullback-Leibler term, per latent value")

    def unused(self) -> dict[str, str]:
        return {} if self.crop is not None else {"crop_choices": "crop is absent"}


class Autoencoder(Method):
    """Trains encoder and decoder on pixels; nothing else of the base is loaded."""

    kind: ClassVar[Kind] = "full"
    NEEDS: ClassVar[tuple[str, ...]] = ("vae",)
    TRAINS: ClassVar[tuple[str, ...]] = ("vae",)
    WHOLE_STEP: ClassVar[bool] = True
    CACHES_LATENTS: ClassVar[bool] = False

    config: Config

    def __init__(self, config: Config, family: Family, seed: int) -> None:
        super().__init__(config, family, seed)
        self.vae: Any = family.modules()["vae"].requires_grad_(True)
        if config.crop is not None and config.crop % family.factor:
            raise UserError(
                f"method.autoencoder.crop: {config.crop} is no multiple of the factor {family.factor}"
            )
        self.moments = nn.Buffer(torch.zeros(3, dtype=torch.float64))  # count, sum, sum of squares

    def loss(self, family: Family, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Reconstruction and KL terms of each sample [B]."""
        assert batch.pixels is not None
        pixels, noise = self._crop(family, batch)
        posterior = self.vae.encode(pixels).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        latents = mean + torch.exp(0.5 * logvar) * noise
        seen = self.vae.decode(latents).sample.float()
        error = seen - pixels
        kl = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar)
        self._count(latents)
        each = self.config.l1 * _mean(error.abs()) + self.config.mse * _mean(error.square())
        psnr = -10 * torch.log10(_mean(error.square()) / 4).mean()  # the pixels' range is 2
        return each + self.config.kl * _mean(kl), {
            "psnr": psnr.detach(),
            "latent_std": latents.detach().std(),
        }

    def _crop(self, family: Family, batch: Batch) -> tuple[Tensor, Tensor]:
        """A crop of each picture, a function of batch.u, and posterior noise; all of it when looking."""
        assert batch.pixels is not None
        side, size = self.config.crop, batch.pixels.shape[-1]
        if side is None or side >= size or not self.training:
            return batch.pixels, batch.posterior
        crops = []
        for picture, u in zip(batch.pixels, batch.u.tolist(), strict=True):
            places = counted.generator(int(u * 2**24), purpose="crop").random((self.config.crop_choices, 2))
            corners = (places * (size - side + 1)).astype(int).tolist()
            choices = [picture[:, top : top + side, left : left + side] for top, left in corners]
            crops.append(max(choices, key=lambda crop: float(crop.std())))
        cells = side // family.factor
        return torch.stack(crops), batch.posterior[..., :cells, :cells]

    def _count(self, latents: Tensor) -> None:
        """A slowly forgetting measure of the latents' scale, for scaling_factor."""
        if not self.training:
            return
        values = latents.detach().double()
        new = torch.stack(
            [torch.tensor(float(values.numel())), values.sum().cpu(), values.square().sum().cpu()]
        )
        self.moments.mul_(0.99).add_(new.to(self.moments))

    def tensors(self) -> dict[str, Tensor]:
        return {**super().tensors(), "moments": self.moments}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.moments.copy_(tensors["moments"])
        super().load_tensors({name: value for name, value in tensors.items() if name != "moments"})

    def export(self, family: Family, folder: Path, card: Card) -> list[Path]:
        """The component folder `diffusers/vae`, its scaling_factor the inverse of the latents' deviation."""
        count, total, squares = self.moments.tolist()
        config = public_config(self.vae)
        if count:
            config["scaling_factor"] = round((squares / count - (total / count) ** 2) ** -0.5, 5)
        tensors = card.cast(self.vae.state_dict())
        place = folder / "diffusers" / "vae"
        return [save_component(place, config, tensors, card.header(self.kind, tensors))]


def _mean(values: Tensor) -> Tensor:
    return values.mean(dim=(1, 2, 3))


METHOD = Autoencoder

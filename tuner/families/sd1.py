"""Stable Diffusion 1.x: one CLIP text encoder, read at its last layer (arXiv 2112.10752)."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from tuner.components import config_of
from tuner.stable_diffusion import StableDiffusion


class StableDiffusion1(StableDiffusion):
    """Clip skip 2 reads the layer before the last, as web UIs and the models made for it count."""

    name: ClassVar[str] = "sd1"
    version: ClassVar[str] = "sd15"


def fits(folder: Path) -> bool:
    """Whether a diffusers folder holds this family: one text encoder, no sizes, no linear projections."""
    unet = config_of(folder, "unet")
    return (
        unet.get("_class_name") == "UNet2DConditionModel"
        and unet.get("addition_embed_type") is None
        and not unet.get("use_linear_projection")
        and not (folder / "text_encoder_2").exists()
    )


FAMILY = StableDiffusion1

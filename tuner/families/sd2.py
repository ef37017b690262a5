"""Stable Diffusion 2.x: OpenCLIP's text encoder, read at the layer before its last; epsilon or v-prediction.

Its diffusers folders leave the text encoder's last layer out (23 of 24), so the last one there is the one
that is read. Which of the two predictions a model makes stands in its scheduler's config.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from tuner.components import config_of
from tuner.stable_diffusion import StableDiffusion


class StableDiffusion2(StableDiffusion):
    """Clip skip counts the layer that the folder leaves out: 2, the default, is the folder's last."""

    name: ClassVar[str] = "sd2"
    version: ClassVar[str] = "sd21"
    LAYER: ClassVar[int] = 2
    CUT_LAYERS: ClassVar[int] = 1


def fits(folder: Path) -> bool:
    """Whether a diffusers folder holds this family: as SD 1.x, but the UNet projects by linear layers."""
    unet = config_of(folder, "unet")
    return (
        unet.get("_class_name") == "UNet2DConditionModel"
        and unet.get("addition_embed_type") is None
        and bool(unet.get("use_linear_projection"))
        and not (folder / "text_encoder_2").exists()
    )


FAMILY = StableDiffusion2

"""Stable Diffusion XL: two text encoders, pooled text, the picture's size and crop (arXiv 2307.01952).

Both encoders are read at the layer before the last, without the final normalisation, and joined; the pooled
output is the second's alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from tuner.components import config_of
from tuner.family import Cond
from tuner.stable_diffusion import StableDiffusion
from tuner.text import Text, Tokens, pool


class StableDiffusionXL(StableDiffusion):
    """Clip skip 2 is what the model was made with; the pooled output is of the last layer in any case."""

    name: ClassVar[str] = "sdxl"
    version: ClassVar[str] = "sdxl"
    told_sizes: ClassVar[bool] = True
    ENCODERS: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    LAYER: ClassVar[int] = 2
    NORM: ClassVar[bool] = False
    PIPELINES: ClassVar[str] = "StableDiffusionXL"

    def _pools(self, encoder: str) -> bool:
        return encoder == "text_encoder_2"

    def encode_prompts(self, tokens: Tokens, rows: Mapping[str, Tensor] | None = None) -> Text:
        """Hidden states of both encoders side by side; the pooled output is the first window's."""
        assert tokens.second is not None
        first = self._read("text_encoder", tokens, rows)
        second = self._read("text_encoder_2", tokens.second, rows)
        at_end = pool(second.last, tokens.second.ends[:, 0])
        pooled: Tensor = self.networks["text_encoder_2"].text_projection(at_end)
        return Text(torch.cat([first.hidden, second.hidden], dim=-1), pooled)

    def _told(self, x_t: Tensor, cond: Cond, dtype: torch.dtype) -> dict[str, Any]:
        """Pooled text and sizes; the sizes stay in float32, as bfloat16 knows no 1023."""
        assert cond.text.pooled is not None
        sizes = cond.time_ids
        if sizes is None:
            height, width = (side * self.factor for side in x_t.shape[-2:])
            sizes = torch.tensor([[height, width, 0, 0, height, width]], device=x_t.device).float()
            sizes = sizes.expand(len(x_t), -1)
        return {"added_cond_kwargs": {"text_embeds": cond.text.pooled.to(dtype), "time_ids": sizes}}

    def _pipeline_settings(self) -> dict[str, Any]:
        # An empty prompt is encoded like any other here, as in training.
        return {"force_zeros_for_empty_prompt": False, "add_watermarker": False}

    def inputs(self, text: Text, negative: Text, size: int, picture: Tensor | None = None) -> dict[str, Any]:
        pooled = {
            "pooled_prompt_embeds": text.pooled,
            "negative_pooled_prompt_embeds": negative.pooled,
        }
        return super().inputs(text, negative, size, picture) | pooled


def fits(folder: Path) -> bool:
    """Whether a diffusers folder holds this family: a UNet that is told sizes, two text encoders.

    SDXL's refiner, which has the second text encoder alone, is another model.
    """
    unet = config_of(folder, "unet")
    return (
        unet.get("_class_name") == "UNet2DConditionModel"
        and unet.get("addition_embed_type") == "text_time"
        and all((folder / name).exists() for name in StableDiffusionXL.ENCODERS)
    )


FAMILY = StableDiffusionXL

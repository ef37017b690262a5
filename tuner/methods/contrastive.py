"""A CLIP pair trained by contrast: how a base's text encoder is made (arXiv 2103.00020, section 2.3)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from tuner.batch import Batch
from tuner.block import Block
from tuner.errors import UserError
from tuner.export.component import save_component
from tuner.export.metadata import Kind
from tuner.family import Family
from tuner.method import Card, Method, public_config
from tuner.text import pool

MAX_SCALE = math.log(100.0)


class Config(Block):
    """The recipe's block."""

    temperature: float = Field(0.07, gt=0, description="the temperature that the similarities start with")
    text_encoder: bool = Field(
        True, description="false: the text encoder stays, and the image encoder learns to agree with it"
    )


class Contrastive(Method):
    """Trains the text encoder and the image encoder so that a caption is nearest to its own picture.

    The text encoder's pooled output is the joint space itself (no text projection); the image encoder's
    projection leads into it.
    """

    kind: ClassVar[Kind] = "full"
    NEEDS: ClassVar[tuple[str, ...]] = ("text_encoder", "image_encoder")
    TRAINS: ClassVar[tuple[str, ...]] = ("text_encoder", "image_encoder")
    WHOLE_STEP: ClassVar[bool] = True
    CACHES_LATENTS: ClassVar[bool] = False
    CACHES_TEXT: bool = False

    config: Config

    def __init__(self, config: Config, family: Family, seed: int) -> None:
        super().__init__(config, family, seed)
        networks: Any = family.modules()
        self.text_encoder = networks["text_encoder"].requires_grad_(config.text_encoder)
        self.image_encoder = networks["image_encoder"].requires_grad_(True)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / config.temperature)))
        # The last hidden state behind the vision tower's pooled token is not used by CLIP.
        width = networks["text_encoder"].config.hidden_size
        joint = networks["image_encoder"].config.projection_dim
        if width != joint:
            raise UserError(
                f"image_encoder/config.json: projection_dim {joint} is not the text encoder's width {width}"
            )

    def networks(self) -> dict[str, nn.Module]:
        """What is trained, by component name."""
        trained: dict[str, nn.Module] = {"image_encoder": self.image_encoder}
        return trained | ({"text_encoder": self.text_encoder} if self.config.text_encoder else {})

    def loss(self, family: Family, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The symmetric InfoNCE loss of each sample [B]; needs the whole step's batch at once."""
        assert batch.pixels is not None and batch.tokens is not None
        if float(batch.weight.sum()) != batch.total:
            raise UserError(
                "method.contrastive compares within a batch: use one process and train.accumulate: 1"
            )
        words, looks = self.embed_text(batch), self.embed_images(batch.pixels)
        similar = self.log_scale.clamp(max=MAX_SCALE).exp() * looks @ words.T
        same = torch.tensor([[a == b for b in batch.captions] for a in batch.captions], device=similar.device)
        target = same / same.sum(dim=1, keepdim=True)  # equal captions are equally right
        each = (_cross_entropy(similar, target) + _cross_entropy(similar.T, target)) / 2
        right = target.gather(1, similar.argmax(dim=1, keepdim=True)) > 0
        return each, {"retrieved": right.float().mean()}

    def embed_text(self, batch: Batch) -> Tensor:
        """Unit vectors [B, D] of a batch's captions."""
        assert batch.tokens is not None
        longest = int(batch.tokens.ends.max()) + 1  # causal: what lies behind the end changes nothing
        hidden = self.text_encoder(batch.tokens.ids[:, 0, :longest]).last_hidden_state
        return F.normalize(pool(hidden, batch.tokens.ends[:, 0]).float(), dim=-1)

    def embed_images(self, pixels: Tensor) -> Tensor:
        """Unit vectors [B, D] of pixels [B, 3, H, W] in [-1, 1]."""
        return F.normalize(self.image_encoder(pixels).image_embeds.float(), dim=-1)

    def export(self, family: Family, folder: Path, card: Card) -> list[Path]:
        """Component folders: `diffusers/image_encoder` and, where it is trained, `diffusers/text_encoder`."""
        files = []
        for name, module in self.networks().items():
            tensors = card.cast(module.state_dict())
            header = card.header(self.kind, tensors)
            place = folder / "diffusers" / name
            files.append(save_component(place, public_config(module), tensors, header, "model.safetensors"))
        return files


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return -(target * F.log_softmax(logits, dim=1)).sum(dim=1)


METHOD = Contrastive

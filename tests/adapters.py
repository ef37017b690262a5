"""Random adapters on the tiny bases, and what diffusers makes of their files.

Reached through the fixture `adapters` of conftest.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from tuner.export.kohya import LoraModule
    from tuner.export.places import Base
    from tuner.export.spelling import Spelling

COMPONENTS = ("unet", "text_encoder", "text_encoder_2")


def pipeline(folder: Path) -> Any:
    """A pipeline of the folder's denoiser and text encoders alone."""
    from diffusers import (
        DDIMScheduler,
        StableDiffusionPipeline,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    parts: dict[str, Any] = {
        "unet": UNet2DConditionModel.from_pretrained(folder / "unet"),
        "text_encoder": CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
        "vae": None,
        "tokenizer": None,
        "scheduler": DDIMScheduler(),
    }
    if not (folder / "text_encoder_2").is_dir():
        return StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    second = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2", dtype=torch.float32)
    return StableDiffusionXLPipeline(**parts, text_encoder_2=second, tokenizer_2=None)


def networks(pipe: Any) -> dict[str, torch.nn.Module]:
    return {name: getattr(pipe, name) for name in COMPONENTS if getattr(pipe, name, None) is not None}


def loras(
    base: Base,
    rank: int = 2,
    scale: float = 1.0,
    only: Callable[[str], bool] = lambda path: True,
    seed: int = 1,
) -> dict[str, LoraModule]:
    """A LoRA with random factors on every layer that can hold one and that `only` takes."""
    from tuner.export.kohya import LoraModule

    generator = torch.Generator().manual_seed(seed)
    made = {}
    for path, shape in base.adaptable().items():
        if only(path):
            ones = [1] * (len(shape) - 2)
            down = torch.randn(rank, *shape[1:], generator=generator)
            up = torch.randn(shape[0], rank, *ones, generator=generator)
            made[path] = LoraModule(down, up, scale)
    return made


def spelled(base: Base, modules: Mapping[str, LoraModule], *spellings: Spelling) -> dict[str, torch.Tensor]:
    """The modules under kohya's endings, without alpha, called as the spellings say."""
    from tuner.export import cldm

    original, tensors = cldm.unet_names(base.unet), {}
    for spelling in spellings:
        for path, module in modules.items():
            if (name := spelling.spell(path, base.family, original)) is not None:
                tensors |= {f"{name}.lora_down.weight": module.down, f"{name}.lora_up.weight": module.up}
    return tensors


def loaded(pipe: Any) -> dict[str, LoraModule]:
    """The adapter that a pipeline holds, by module path."""
    from peft.tuners.lora import LoraLayer

    from tuner.export.kohya import LoraModule

    found = {}
    for component, network in networks(pipe).items():
        for path, layer in network.named_modules():
            if isinstance(layer, LoraLayer):
                (name,) = layer.lora_A.keys()
                down, up = layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach()
                found[f"{component}.{path}"] = LoraModule(down, up, float(layer.scaling[name]))
    return found


def differences(pipe: Any, bare: Any) -> dict[str, torch.Tensor]:
    """What fusing the adapter adds to each weight, by module path; those that stay as they are left out."""
    pipe.fuse_lora(components=list(networks(pipe)))
    found = {}
    for component, network in networks(pipe).items():
        old = networks(bare)[component].state_dict()
        for name, tensor in network.state_dict().items():
            plain = name.replace(".base_layer", "")
            if ".lora_" not in name and not torch.equal(tensor, old[plain]):
                found[f"{component}.{plain.removesuffix('.weight')}"] = tensor.double() - old[plain].double()
    return found

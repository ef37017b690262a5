"""The tables of tensors are those of the real networks, name by name and shape by shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tuner.export import places

CONFIGS = Path(places.__file__).parents[1] / "configs"
SMALL: dict[str, Any] = {
    "block_out_channels": (32, 64, 64, 64),
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
}
XL: dict[str, Any] = {
    "block_out_channels": (32, 64, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 3),
    "cross_attention_dim": 48,
    "attention_head_dim": (1, 2, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}
UNETS: dict[str, dict[str, Any]] = {
    "small": SMALL,
    "one layer": SMALL | {"layers_per_block": 1, "in_channels": 9},
    "linear": SMALL | {"use_linear_projection": True},
    "xl": XL,
    "two levels": {
        "block_out_channels": (64, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "layers_per_block": 3,
        "transformer_layers_per_block": 2,
    },
}
# As the papers' models have them, in millions: UNet and ControlNet.
SHIPPED = {"sd15": (859.52, 361.28), "sd21": (865.91, 364.23), "sdxl": (2567.46, 1251.0)}


def shapes(module: torch.nn.Module) -> places.Shapes:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def count(tensors: places.Shapes) -> float:
    return sum(torch.Size(shape).numel() for shape in tensors.values()) / 1e6


@pytest.mark.parametrize("name", UNETS)
def test_unet_and_controlnet(name: str) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[name])
        control = ControlNetModel.from_unet(unet, conditioning_channels=5)
    assert places.unet_tensors(unet.config) == shapes(unet)
    assert places.controlnet_tensors(control.config) == shapes(control)
    of_unet = {**unet.config, "conditioning_channels": 5}
    assert places.controlnet_tensors(of_unet) == shapes(control)
    assert len(shapes(unet)) > len(shapes(control)) > 100


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_configurations_at_full_size(name: str) -> None:
    config = json.loads((CONFIGS / name / "unet" / "config.json").read_text())
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config)
    assert places.unet_tensors(config) == shapes(unet)
    assert round(count(shapes(unet)), 2) == SHIPPED[name][0]
    assert round(count(places.controlnet_tensors(config)), 0 if name == "sdxl" else 2) == SHIPPED[name][1]
    assert places.family_of(config) == {"sd15": "sd1", "sd21": "sd2", "sdxl": "sdxl"}[name]


@pytest.mark.parametrize("kind", [CLIPTextModel, CLIPTextModelWithProjection])
def test_text_encoders(kind: type) -> None:
    config = CLIPTextConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=20,
    )
    with torch.device("meta"):
        model = kind(config)
    public = {"architectures": [kind.__name__], **config.to_dict()}
    public["architectures"] = [kind.__name__]
    assert places.text_tensors(public) == shapes(model)


def test_a_bases_layers_are_the_modules_with_weights() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**XL)
    found = places.base("x", {"unet": unet.config})
    assert found.family == "sdxl"
    modules = {f"unet.{name}": module for name, module in unet.named_modules()}
    layers = {p: tuple(m.weight.shape) for p, m in modules.items() if "weight" in m._parameters}
    assert found.layers() == layers
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    assert found.adaptable() == {p: s for p, s in layers.items() if isinstance(modules[p], kinds)}
    assert len(layers) > len(found.adaptable()) > 100


def test_width_of_heads() -> None:
    assert list(places.widths_of_heads({"block_out_channels": (320, 640), "attention_head_dim": 8})) == [
        40,
        80,
    ]
    assert list(
        places.widths_of_heads({"block_out_channels": (320, 640), "attention_head_dim": [5, 10]})
    ) == [64, 64]


def test_what_is_not_known_is_told() -> None:
    with pytest.raises(places.ConfigError, match="AttnDownBlock2D is not known"):
        places.unet_tensors(
            {**dict(UNet2DConditionModel(**SMALL).config), "down_block_types": ["AttnDownBlock2D"]}
        )
    with pytest.raises(places.ConfigError, match="layers_per_block"):
        places.unet_tensors(XL | {"layers_per_block": (1, 2, 2)})
    with pytest.raises(places.ConfigError, match="no unet"):
        places.base("x", {})
    with pytest.raises(places.ConfigError, match="T5EncoderModel"):
        places.text_tensors({"architectures": ["T5EncoderModel"]})
    with pytest.raises(places.ConfigError, match="class_embed_type"):
        places.unet_tensors(XL | {"layers_per_block": 2, "class_embed_type": "timestep"})

"""ControlNet and UNet in the names of the original Stable Diffusion code (ldm, and cldm for ControlNet).

The original lists its layers in order of use: `input_blocks.0` is conv_in, then one entry for each residual
block (`.0`) with its attention (`.1`), and one for each downsampling (`.0.op`). Tensors are the same in both
layouts; only names change. One table serves SD1.x, SD2.x (projections are linear layers, not convolutions)
and SDXL (three levels, several transformer blocks in one attention, `label_emb`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tuner.errors import UserError

PREFIX = "control_model."

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_TIME = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
# SDXL's embedding of sizes and pooled text (sgm's `num_classes: sequential`).
_LABEL = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
_ATTENTION_BLOCKS = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")


class LayoutError(UserError):
    """Weights or a configuration that the original layout has no place for."""


def to_cldm(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """State dict of a diffusers ControlNetModel -> cldm names below `control_model.`; values untouched.

    `config` is the model's own. Any `block_out_channels`, `layers_per_block`, and linear or convolutional
    projections fit, and SDXL's `addition_embed_type: text_time`; ComfyUI and A1111 build the condition
    encoder with 16, 32, 96, 256 channels whatever the file says, so that others load in diffusers alone.
    diffusers does not read an SDXL ControlNet in these names (it does not convert `label_emb`).

    Raises:
        LayoutError: an unknown or missing key, or a configuration that the layout has no place for.
    """
    pairs = controlnet_names(config)
    named = rename(state, pairs)
    needed = {new for old, new in pairs.items() if not old.startswith(("down_blocks.", "mid_block."))}
    if missing := sorted(name for name in needed if f"{name}.weight" not in named):
        raise LayoutError(f"{missing[0]} is missing ({len(missing)} of {len(needed)} places are empty)")
    return {f"{PREFIX}{key}": value for key, value in named.items()}


def from_cldm(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The exact inverse of `to_cldm`; keys with and without `control_model.` are taken.

    Raises:
        LayoutError: an unknown key, or a configuration that the layout has no place for.
    """
    bare = {key.removeprefix(PREFIX): value for key, value in state.items()}
    if len(bare) != len(state):
        raise LayoutError(f"the same key is there with and without {PREFIX}")
    return rename(bare, inverse(controlnet_names(config)))


def controlnet_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Module prefixes of a ControlNetModel -> those of cldm's ControlNet (without `control_model.`).

    Raises:
        LayoutError: `layers_per_block` is not one number, or the condition encoder is not four levels deep.
    """
    names = down_names(config)
    names["controlnet_mid_block"] = "middle_block_out.0"
    levels, layers = len(config["block_out_channels"]), _layers(config)
    for index in range(levels * (layers + 1)):  # conv_in, each layer, and each downsampling but the last's
        names[f"controlnet_down_blocks.{index}"] = f"zero_convs.{index}.0"
    depth = len(config["conditioning_embedding_out_channels"])
    if depth != 4:
        raise LayoutError(f"conditioning_embedding_out_channels has {depth} entries; the layout has 4")
    # Convolutions at even places, SiLU at odd ones: conv_in, two for each further level, conv_out.
    names["controlnet_cond_embedding.conv_in"] = "input_hint_block.0"
    for index in range(2 * (depth - 1)):
        names[f"controlnet_cond_embedding.blocks.{index}"] = f"input_hint_block.{2 * index + 2}"
    names["controlnet_cond_embedding.conv_out"] = f"input_hint_block.{4 * depth - 2}"
    return names


def unet_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Module prefixes of a UNet2DConditionModel -> those of ldm's UNet (without `model.diffusion_model.`).

    Raises:
        LayoutError: `layers_per_block` is not one number.
    """
    names = down_names(config)
    levels, layers = len(config["block_out_channels"]), _layers(config)
    for level in range(levels):
        attention = config["up_block_types"][level] in _ATTENTION_BLOCKS
        for layer in range(layers + 1):
            place = f"output_blocks.{level * (layers + 1) + layer}"
            names |= _resnet(f"up_blocks.{level}.resnets.{layer}", f"{place}.0")
            if attention:
                names[f"up_blocks.{level}.attentions.{layer}"] = f"{place}.1"
        if level < levels - 1:
            last = level * (layers + 1) + layers
            names[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{last}.{1 + attention}.conv"
    return names | {"conv_norm_out": "out.0", "conv_out": "out.2"}


def down_names(config: Mapping[str, Any]) -> dict[str, str]:
    """What UNet and ControlNet share: embeddings, conv_in, the downward half and the middle.

    Raises:
        LayoutError: `layers_per_block` is not one number, or an embedding besides time's that is not SDXL's.
    """
    levels, layers = len(config["block_out_channels"]), _layers(config)
    added = config.get("addition_embed_type")
    if added not in (None, "text_time"):
        raise LayoutError(
            f"addition_embed_type is {added}; the original layout has text_time (SDXL), or none"
        )
    names = _TIME | (_LABEL if added else {}) | {"conv_in": "input_blocks.0.0"}
    for level in range(levels):
        for layer in range(layers):
            place = f"input_blocks.{1 + level * (layers + 1) + layer}"
            names |= _resnet(f"down_blocks.{level}.resnets.{layer}", f"{place}.0")
            if config["down_block_types"][level] in _ATTENTION_BLOCKS:
                names[f"down_blocks.{level}.attentions.{layer}"] = f"{place}.1"
        if level < levels - 1:
            place = f"input_blocks.{(level + 1) * (layers + 1)}"
            names[f"down_blocks.{level}.downsamplers.0.conv"] = f"{place}.0.op"
    names |= _resnet("mid_block.resnets.0", "middle_block.0")
    names["mid_block.attentions.0"] = "middle_block.1"
    return names | _resnet("mid_block.resnets.1", "middle_block.2")


def rename(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """The state under new keys: the longest prefix (ending at a dot) that `names` holds is replaced.

    Raises:
        LayoutError: a key that no prefix fits, or two keys that become one.
    """
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        prefix = key
        while prefix and prefix not in names:
            prefix = prefix.rpartition(".")[0]
        if not prefix:
            raise LayoutError(f"{key}: no place for it in the other layout")
        new = names[prefix] + key[len(prefix) :]
        if new in renamed:
            raise LayoutError(f"{key}: another key is named {new} already")
        renamed[new] = value
    return renamed


def inverse(names: Mapping[str, str]) -> dict[str, str]:
    """The names read backwards."""
    backwards = {new: old for old, new in names.items()}
    assert len(backwards) == len(names), "two prefixes share one place"
    return backwards


def _resnet(old: str, new: str) -> dict[str, str]:
    return {f"{old}.{part}": f"{new}.{place}" for part, place in _RESNET.items()}


def _layers(config: Mapping[str, Any]) -> int:
    layers = config["layers_per_block"]
    if not isinstance(layers, int):
        raise LayoutError(f"layers_per_block is {layers}; the original layout has one number for all levels")
    return layers

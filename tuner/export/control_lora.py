"""A low-rank ControlNet as a small file ("Control-LoRA"), which is read beside the base that it was made for.

Facts, read in the tools' own code: Stability-AI/stability-ComfyUI-nodes control_lora_save.py writes such
files, as those of stabilityai/control-lora (SDXL, rank 128 and 256) and the control_lora_rank128_* of
comfyanonymous/ControlNet-v1-1_fp16_safetensors (SD 1.5) are:

- cldm's names without `control_model.`, and an empty tensor `lora_controlnet` that marks the file;
- what the UNet has too and has at least two dimensions, as `NAME.up` [out, rank] or [out, rank, 1, 1] and
  `NAME.down` [rank, in] or [rank, in, kh, kw], without `.weight`; there is no alpha;
- what the UNet has too and has one dimension, biases and norms, whole;
- what the UNet does not have (input_hint_block, zero_convs, middle_block_out), whole.

Readers: weight = base's + (up.flatten(1) @ down.flatten(1)).reshape, which ComfyUI (comfy/controlnet.py,
ControlLora) and Forge (backend/patcher/controlnet.py) do on any base, sd-webui-controlnet
(scripts/controlnet_lora.py) on SD 1.5 and SDXL, diffusers since 0.37 by `load_lora_adapter` (PR 10686) on a
branch that was cloned from the base. A tensor that is there whole takes the place of the base's. The last two
take a file for SDXL's that lacks the norm `input_blocks.11.0.in_layers.0.weight`, and sd-webui-controlnet has
nothing in place of absent norms and biases: so all are in it. diffusers 0.42 (run) leaves the biases of
layers with factors at the base's: so those must be the base's, and norms alone be trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tuner.export import cldm
from tuner.export.cldm import LayoutError

MARKER = "lora_controlnet"
"""The key of the empty tensor by which tools tell such a file."""

FOLDER = "control_lora"
"""Where such a file lies: not beside the complete ones, for which it could be taken."""

RANK = "tuner.rank"
"""The rank in the metadata; small layers have a smaller one."""


def file_name(version: str, name: str) -> str:
    """`control_lora_sd15_NAME.safetensors`: sd-webui-controlnet looks for the version in it."""
    return f"control_lora_{version}_{name}.safetensors"


def to_file(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a low-rank branch in diffusers' names -> the file's; values untouched.

    Args:
        state: `PATH.up` and `PATH.down` of factored layers, everything else whole, their biases too.
        config: the ControlNetModel's own.

    Raises:
        LayoutError: a key or a configuration that the original layout has no place for.
    """
    kind = next(iter(state.values())).dtype
    named = cldm.rename(state, cldm.controlnet_names(config))
    return {MARKER: torch.empty(0, dtype=kind), **named}


def from_file(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The exact inverse of `to_file`.

    Raises:
        LayoutError: a key that has no place in such a branch.
    """
    bare = {key: tensor for key, tensor in tensors.items() if key != MARKER}
    return cldm.rename(bare, cldm.inverse(cldm.controlnet_names(config)))


def ranks(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Path of each factored layer -> its rank."""
    return {key.removesuffix(".down"): len(state[key]) for key in state if key.endswith(".down")}


def whole(state: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The complete ControlNet's tensors in float32, in diffusers' names.

    Args:
        state: as `to_file` takes it.
        weights: the base's tensors, by the names that they have in the ControlNet too; what `state` lacks is
            taken from them.

    Raises:
        LayoutError: a factor without the other, or two that do not fit the base's weight.
    """
    made = {name: tensor.float() for name, tensor in weights.items()}
    for key, tensor in state.items():
        path, _, end = key.rpartition(".")
        if end not in ("up", "down"):
            made[key] = tensor.float()
        elif end == "up":
            weight, down = weights.get(f"{path}.weight"), state.get(f"{path}.down")
            if weight is None or down is None:
                raise LayoutError(f"{key}: there is no {'down' if down is None else 'weight'} for it")
            made[f"{path}.weight"] = weight.to(tensor.device).float() + change(tensor, down, weight)
        elif f"{path}.up" not in state:
            raise LayoutError(f"{key}: there is no up for it")
    return made


def change(up: Tensor, down: Tensor, weight: Tensor) -> Tensor:
    """What two factors add to a weight, in float32 and the weight's shape.

    Raises:
        LayoutError: they do not fit it.
    """
    rows, columns = up.float().flatten(1), down.float().flatten(1)
    size = (len(rows), columns.shape[1])
    if rows.shape[1] != len(columns) or size != weight.flatten(1).shape:
        raise LayoutError(
            f"factors {list(up.shape)} and {list(down.shape)} for a weight {list(weight.shape)}"
        )
    return (rows @ columns).reshape(weight.shape)

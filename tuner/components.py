"""One network of a base from its diffusers folder: loaded, initialised afresh, or stored quantised."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tuner.errors import UserError

KINDS = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    "image_encoder": ("transformers", "CLIPVisionModelWithProjection"),
}


def load(name: str, place: Path) -> nn.Module:
    """The network `name` from its folder, in float32 on the CPU.

    Raises:
        UserError: there is none, or it does not load.
    """
    return _loaded(name, place, {"torch_dtype": torch.float32})


def load_quantised(name: str, place: Path, scheme: str, compute: torch.dtype) -> nn.Module:
    """The network with its linear layers stored as `nf4` or `int8` by bitsandbytes, on the GPU.

    nf4: four bits a weight in blocks, the blocks' scales quantised too (QLoRA, arXiv 2305.14314); int8: eight
    bits, outlying columns in half precision (arXiv 2208.07339). What is not a linear layer has `compute`.

    Raises:
        UserError: there is no such network, or it does not load.
    """
    import diffusers
    import transformers

    kind = {"diffusers": diffusers, "transformers": transformers}[KINDS[name][0]].BitsAndBytesConfig
    config = (
        kind(load_in_8bit=True)
        if scheme == "int8"
        else kind(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        )
    )
    return _loaded(name, place, {"torch_dtype": compute, "quantization_config": config})


def fresh(name: str, place: Path, seed: int) -> nn.Module:
    """The network with the configuration in its folder and weights drawn from `seed`, in float32.

    Raises:
        UserError: there is no configuration.
    """
    kind = _kind(name, place)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if KINDS[name][0] == "diffusers":
            made: nn.Module = kind.from_config(kind.load_config(place))
        else:
            made = kind(kind.config_class.from_pretrained(place))
    return made.float()


def config_of(folder: Path, name: str) -> dict[str, Any]:
    """The config.json of a component of a diffusers folder; empty where there is none."""
    place = folder / name / "config.json"
    if not place.is_file():
        return {}
    config: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
    return config


def _kind(name: str, place: Path) -> Any:
    import diffusers
    import transformers

    if not (place / "config.json").is_file():
        raise UserError(f"base {place.parent}: the component {name} is missing (no {place.name}/config.json)")
    library, class_name = KINDS[name]
    return getattr({"diffusers": diffusers, "transformers": transformers}[library], class_name)


def _loaded(name: str, place: Path, how: dict[str, Any]) -> nn.Module:
    kind = _kind(name, place)
    try:
        loaded: nn.Module = kind.from_pretrained(place, use_safetensors=True, local_files_only=True, **how)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"base {place.parent}: the component {name} does not load: {error}") from error
    return loaded


def misfit(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str | None:
    """The first name or shape that differs from a network's, and how many do; None where none does."""
    wrong = dict.fromkeys(tensors.keys() - wanted.keys(), "has no place in it")
    wrong |= dict.fromkeys(wanted.keys() - tensors.keys(), "is missing")
    for name in wanted.keys() & tensors.keys():
        if tensors[name].shape != wanted[name].shape:
            wrong[name] = f"is {list(tensors[name].shape)}, expected {list(wanted[name].shape)}"
    if not wrong:
        return None
    name = min(wrong)
    return f"{name} {wrong[name]} ({len(wrong)} of {len(wanted)} tensors differ)"

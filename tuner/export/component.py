"""A network as a component folder of a diffusers model: config.json and one safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tuner.export.files import folder_whole, save, write_whole

PRIVATE = ("_name_or_path",)
"""Keys of a configuration that hold a path of the machine it was made on."""


def save_component(
    place: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    weights: str = "diffusion_pytorch_model.safetensors",
) -> Path:
    """Write the folder `place`, whole; an older one is replaced.

    Args:
        config: what config.json says; private keys are left out.
        tensors: the network's tensors by name, in the precision they are stored in.
        metadata: the safetensors header.
        weights: name of the weights' file; transformers models want `model.safetensors`.

    Returns:
        The weights' file.
    """
    public = {name: value for name, value in config.items() if name not in PRIVATE}
    place.parent.mkdir(parents=True, exist_ok=True)
    with folder_whole(place) as beside:
        write_whole(beside / "config.json", json.dumps(public, indent=2, sort_keys=True) + "\n")
        save(beside / weights, tensors, {"format": "pt", **metadata})
    return place / weights

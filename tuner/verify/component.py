"""A network's component folder, read back by its own library."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from tuner.method import Card, public_config
from tuner.verify.compare import LOADING, VerifyError, load, same_config, same_tensors


def read_back(path: Path, trained: nn.Module, card: Card, but: Sequence[str] = ()) -> tuple[nn.Module, int]:
    """The network in the folder of the weights' file `path`, loaded by from_pretrained in float32.

    Args:
        trained: the network that was exported; the file must hold its tensors in the card's type.
        but: keys of the configuration that may differ.

    Returns:
        The loaded network, on the trained one's device, and how many tensors it has.

    Raises:
        VerifyError: keys, tensors or the configuration differ, or the folder does not load.
    """
    where = f"{folder_name(path)}{path.name}"
    count = same_tensors(where, load(path), trained.state_dict(), card.dtype)
    kind = type(trained)
    config = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))
    said = config.get("_class_name") or (config.get("architectures") or [None])[0]
    if said != kind.__name__:
        raise VerifyError(f"{folder_name(path)}: config.json says class {said}, trained was {kind.__name__}")
    try:
        loaded, info = kind.from_pretrained(  # type: ignore[attr-defined]
            path.parent, torch_dtype=torch.float32, output_loading_info=True, local_files_only=True
        )
    except LOADING as error:
        raise VerifyError(f"{folder_name(path)} does not load as {kind.__name__}: {error}") from error
    for problem, keys in info.items():
        if keys:
            raise VerifyError(f"{folder_name(path)}: loading leaves {problem} {sorted(map(str, keys))[:3]}")
    same_config(folder_name(path), public_config(loaded), public_config(trained), but)
    device = next(trained.parameters()).device
    made: nn.Module = loaded.to(device).eval().requires_grad_(False)
    return made, count


def folder_name(path: Path) -> str:
    """`diffusers/unet/` of a weights' file there: the folder below the export's."""
    parts = path.parent.parts
    last = len(parts) - 1 - parts[::-1].index("diffusers") if "diffusers" in parts else len(parts) - 1
    return "/".join(parts[last:]) + "/"

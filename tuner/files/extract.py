"""`tuner extract`: a LoRA of what full fine-tuning changed."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tuner.errors import UserError
from tuner.export.adapter import Adapter
from tuner.export.places import COMPONENTS
from tuner.files import bases, write
from tuner.files.lowrank import Cut, Kept, nearest, report


def extract(base: Path, tuned: Path, cut: Cut, out: Path) -> list[str]:
    """Write the LoRA that comes nearest to `tuned - base` in each linear layer and convolution.

    Args:
        base, tuned: two diffusers folders, or the folders of one component of each.

    Returns:
        Lines that say what was kept, and what has changed that a LoRA cannot hold.

    Raises:
        UserError: no cut or two, folders that are no bases or of different sizes, or no difference.
    """
    cut.check()
    made, component = bases.folder_of(base)
    places = [component] if component else [p for p in COMPONENTS if (tuned / p).is_dir()]
    if not places:
        raise UserError(f"{tuned}: expected a diffusers folder with {' or '.join(COMPONENTS)}")
    adaptable, kept, lost, same = made.adaptable(), dict[str, Kept](), list[str](), 0
    for part in places:
        olds = bases.weights(base if component else base / part)
        news = bases.weights(tuned if component else tuned / part)
        for name, new in news.items():
            change = _change(f"{part}.{name}", olds.get(name), new)
            path = f"{part}.{name.removesuffix('.weight')}"
            if not change.any():
                same += 1
            elif name.endswith(".weight") and path in adaptable:
                kept[path] = nearest(change, cut, new.dtype)
            else:
                lost.append(f"{part}.{name}")
        if missing := sorted(olds.keys() - news.keys()):
            raise UserError(f"{tuned}: {part}.{missing[0]} is missing there")
    if not kept:
        raise UserError(f"{tuned}: no linear layer or convolution differs from {base}")
    modules = {path: each.module for path, each in kept.items()}
    write.kohya(out, Adapter(dict(modules), {}), made, {}, {"ss_network_module": "networks.lora"})
    lines = [f"{tuned.name} - {base.name} -> {out.name}", *report(kept), f"{same} tensors have not changed"]
    if lost:
        named = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
        lines.append(
            f"{len(lost)} changed tensors are not in the LoRA, which holds no norms or biases: {named}"
        )
    return lines


def _change(key: str, old: Tensor | None, new: Tensor) -> Tensor:
    """new - old in float64."""
    if old is None or old.shape != new.shape:
        found = "is missing" if old is None else f"is {list(old.shape)}"
        raise UserError(f"{key} {found} in the base, and {list(new.shape)} in the fine-tune")
    return new.to(torch.float64) - old.to(torch.float64)

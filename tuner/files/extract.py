"""`tuner extract`: a LoRA of what full fine-tuning changed."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from tuner.errors import UserError
from tuner.export.adapter import Adapter
from tuner.export.places import COMPONENTS
from tuner.files import account, bases, write
from tuner.files.lowrank import Cut, Kept, nearest, report


def extract(base: Path, tuned: Path, cut: Cut, out: Path) -> list[str]:
    """Write the LoRA that comes nearest to `tuned - base` in each linear layer and convolution.

    Args:
        base, tuned: two diffusers folders or checkpoints in one file, or folders of one component of each.

    Returns:
        Lines that say what was kept, and what has changed that a LoRA cannot hold.

    Raises:
        UserError: no cut or two, folders that are no bases or of different sizes, or no difference.
    """
    cut.check()
    write.check_free(out, base, tuned)
    names = (base.resolve().name, tuned.resolve().name)
    base, tuned = bases.unpacked(base), bases.unpacked(tuned)
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
            raise UserError(f"{names[1]}: {part}.{missing[0]} is missing there")
    if not kept:
        raise UserError(f"{names[1]}: no linear layer or convolution differs from {names[0]}")
    modules = {path: each.module for path, each in kept.items()}
    predicts = _prediction(tuned, component) or _prediction(base, component)
    told = {} if predicts is None else {"modelspec.prediction_type": predicts}
    asked = f"rank {cut.rank}" if cut.rank is not None else f"energy {cut.energy:g}"
    stems = [name.removesuffix(".safetensors") for name in names]
    changes = {write.DERIVED: f"extract {asked} of {stems[1]} - {stems[0]}"}
    write.kohya(out, Adapter(dict(modules), {}), made, told, changes)
    lines = [f"{names[1]} - {names[0]} -> {out.name}", *report(kept), f"{same} tensors have not changed"]
    if lost:
        named = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
        lines.append(
            f"{len(lost)} changed tensors are not in the LoRA, which holds no norms or biases: {named}"
        )
    return [*lines, account.summary(out, made)]


def _prediction(place: Path, component: str | None) -> str | None:
    """What a base predicts, as modelspec writes it (epsilon, v); None where no scheduler lies there."""
    file = (place.parent if component else place) / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        return None
    told = json.loads(file.read_text(encoding="utf-8")).get("prediction_type", "epsilon")
    return str(told).removesuffix("_prediction")


def _change(key: str, old: Tensor | None, new: Tensor) -> Tensor:
    """new - old in float64."""
    if old is None or old.shape != new.shape:
        found = "is missing" if old is None else f"is {list(old.shape)}"
        raise UserError(f"{key} {found} in the base, and {list(new.shape)} in the fine-tune")
    return new.to(torch.float64) - old.to(torch.float64)

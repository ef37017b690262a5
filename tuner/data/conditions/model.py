"""What a transformers model sees in the picture: how near everything is, or what it is."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from tuner.data.conditions import _palettes
from tuner.data.conditions._seam import Draw, Kind, Picture, three
from tuner.errors import UserError


class Config(Kind):
    """Which model, and how its answer becomes a picture."""

    path: str = Field(
        min_length=1, description="a transformers model: a folder with its image processor, or a Hub id"
    )
    task: Literal["depth", "segmentation"] = Field(description="what the model was made for")
    revision: str | None = Field(None, description="branch, tag or commit of a Hub id")
    distance: bool = Field(
        False, description="the model's depth grows with the distance (metric depth), and is turned round"
    )
    palette: Literal["ade", "voc"] = Field(
        "ade", description="colours of the classes: ADE20K's 150, or PASCAL VOC's for any number to 256"
    )

    def unused(self) -> dict[str, str]:
        other = "palette" if self.task == "depth" else "distance"
        return {other: f"task is {self.task}"}


def make(picture: Picture, config: Config, draw: Draw | None = None) -> Picture:
    """uint8 RGB [H, W, 3] -> uint8 [H, W, 3], by a model that is loaded once in a process and kept.

    On the CPU in float32, one picture at a time, so that the answer does not depend on what else is computed.
    Depth is scaled from its least to its greatest value in the picture, the nearest 255. A class is the one
    with the greatest logit after bilinear enlarging.

    Raises:
        UserError: the model does not load, or has not the palette's number of classes.
        ValueError: it has no answer for this picture.
    """
    network, processor = _loaded(config.path, config.revision, config.task)
    # What is cut off or added would move the answer against the pixels.
    whole = {key: False for key in ("do_center_crop", "do_pad") if getattr(processor, key, None)}
    inputs = processor(images=picture, return_tensors="pt", **whole)
    with torch.inference_mode():
        answer = network(**inputs)
    size = (picture.shape[0], picture.shape[1])
    if config.task == "depth":
        return _depth(answer.predicted_depth, size, config.distance)
    return _segments(answer.logits, size, colours(config.palette, network.config.num_labels))


def _depth(predicted: Tensor, size: tuple[int, int], distance: bool) -> Picture:
    """[1, h, w] of any scale -> uint8 [H, W, 3], 255 where it is nearest."""
    predicted = predicted.float()
    # Seen before it is enlarged: the rounding of that, scaled up, would look like depth.
    if not bool(torch.isfinite(predicted).all()) or not bool(predicted.max() > predicted.min()):
        raise ValueError("the model finds no depth in it: it says the same everywhere, or no numbers")
    depth = functional.interpolate(predicted.unsqueeze(1), size, mode="bicubic", align_corners=False)
    least, most = depth.aminmax()
    share = (depth[0, 0] - least) / (most - least)
    return three(((1 - share if distance else share) * 255).round().to(torch.uint8).numpy())


def _segments(logits: Tensor, size: tuple[int, int], palette: Picture) -> Picture:
    """[1, classes, h, w] -> uint8 [H, W, 3]; palette: uint8 [classes, 3]."""
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("the model's answer is no number")
    grown = functional.interpolate(logits.float(), size, mode="bilinear", align_corners=False)
    return np.ascontiguousarray(palette[grown[0].argmax(dim=0).numpy()])


def colours(palette: Literal["ade", "voc"], classes: int) -> Picture:
    """A colour for each class, uint8 [classes, 3].

    Raises:
        UserError: the palette has another number.
    """
    found = f"condition model: found a model of {classes} classes"
    if palette == "ade":
        if classes != len(_palettes.ade()):
            raise UserError(f"{found}, palette ade has {len(_palettes.ade())} colours; take palette: voc")
        return _palettes.ade()
    if classes > 256:
        raise UserError(f"{found}, palette voc has 256 colours")
    return _palettes.voc(classes)


@functools.cache
def _loaded(path: str, revision: str | None, task: str) -> tuple[Any, Any]:
    """The network and its image processor."""
    import transformers

    local = Path(path).is_dir()
    if local and revision is not None:
        raise UserError(
            f"condition model {path}: revision {revision} has no effect: it is here, and not a Hub id"
        )
    if not local and (path.count("/") > 1 or path.startswith((".", "/", "~"))):
        raise UserError(f"condition model {path}: no such folder (expected a model's folder, or a Hub id)")
    kind: Any = (
        transformers.AutoModelForDepthEstimation
        if task == "depth"
        else transformers.AutoModelForSemanticSegmentation
    )
    where: dict[str, Any] = {
        "revision": revision or "main",
        "local_files_only": local,
        "trust_remote_code": False,
    }
    try:
        # Pillow's backend everywhere: torchvision's, where it is installed, resizes a little differently.
        processor = transformers.AutoImageProcessor.from_pretrained(path, backend="pil", **where)
        network, told = kind.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **where
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise UserError(f"condition model {path}: does not load for {task}: {error}") from error
    if missing := sorted(told["missing_keys"]):
        raise UserError(
            f"condition model {path}: {len(missing)} tensors are missing in its file ({missing[0]} ...); "
            f"expected a model trained for {task}"
        )
    return network.eval().requires_grad_(False), processor

"""How pictures are kept: their files' names, and what each says about itself, which is no path."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from tuner import __version__
from tuner.errors import UserError
from tuner.export.files import write_whole
from tuner.generate.draw import How
from tuner.guidance import FORMULAS
from tuner.sample import Picture
from tuner.samplers import SAMPLERS

PARAMETERS, OWN = "parameters", "tuner"  # the PNG's text chunks: as web UIs write theirs, and JSON


@dataclass(frozen=True)
class About:
    """What the pictures of one call have in common.

    Attributes:
        base, family: the base's name, and its family's.
        how: sampler, steps and so on.
        negative: the negative prompt.
        adapters: for each its kind, name and weight, and what else there is to say.
        started: whether a picture was started from, or a mask of one was filled: `image`, `mask`, or empty.
        precision: fp32, bf16 or fp16.
    """

    base: str
    family: str
    how: How
    negative: str
    adapters: tuple[Mapping[str, Any], ...]
    started: str
    precision: str

    def one(self, prompt: str, seed: int, picture: Picture) -> dict[str, Any]:
        """What one picture says about itself."""
        height, width = picture.shape[:2]
        told: dict[str, Any] = {
            "prompt": prompt,
            "negative": self.negative,
            "seed": seed,
            "sampler": self.how.sampler,
            "steps": self.how.steps,
            "guidance": self.how.guidance,
            "size": [width, height],
            "base": self.base,
            "family": self.family,
            "adapters": [dict(adapter) for adapter in self.adapters],
            "precision": self.precision,
            "version": __version__,
        }
        if self.started:
            told |= {"started_from": self.started, "strength": self.how.strength}
        if self.how.scales:
            told["control_guidance"] = {"name": self.how.control, "formula": FORMULAS[self.how.control]}
        return told


def parameters(told: Mapping[str, Any]) -> str:
    """What a picture says, in the lines that AUTOMATIC1111's web UI writes and reads."""
    lines = [told["prompt"]]
    if told["negative"]:
        lines.append(f"Negative prompt: {told['negative']}")
    width, height = told["size"]
    values: dict[str, Any] = {
        "Steps": told["steps"],
        "Sampler": SAMPLERS[told["sampler"]].title,
        "CFG scale": f"{told['guidance']:g}",
        "Seed": told["seed"],
        "Size": f"{width}x{height}",
        "Model": told["base"],
    }
    if "strength" in told:
        values["Denoising strength"] = f"{told['strength']:g}"
    if told["adapters"]:
        values["Adapters"] = ", ".join(_short(adapter) for adapter in told["adapters"])
    if "control_guidance" in told:
        values["Control guidance"] = told["control_guidance"]["name"]
    values["Version"] = f"tuner {told['version']}"
    return "\n".join([*lines, ", ".join(f"{key}: {_quoted(value)}" for key, value in values.items())])


def _short(adapter: Mapping[str, Any]) -> str:
    weight = f" {adapter['weight']:g}" if "weight" in adapter else ""
    return f"{adapter['kind']} {adapter['name']}{weight}"


def _quoted(value: Any) -> str:
    """As the web UI does: in JSON's quotes where it would not be read back as one value."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ',:\n"') else text


def place(folder: Path, prompt: int, seed: int) -> Path:
    """Where the picture of a prompt (counted from 1) and a seed is kept."""
    return folder / f"prompt{prompt:02d}-seed{seed}.png"


def check_free(folder: Path, places: Sequence[Path]) -> None:
    """Raises UserError where the folder is a file, or a picture would replace another one."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder}: is a file; expected a folder, or nothing yet")
    if taken := [str(path) for path in places if path.exists()]:
        more = f" and {len(taken) - 1} more" if len(taken) > 1 else ""
        raise UserError(f"{taken[0]}{more}: is there already; take another place or another --seed")


def write(path: Path, picture: Picture, told: Mapping[str, Any]) -> Path:
    """Write one picture as a PNG that says how it was made."""
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text(PARAMETERS, parameters(told))
    chunks.add_text(OWN, json.dumps(told, ensure_ascii=False))
    made = io.BytesIO()
    Image.fromarray(picture).save(made, "PNG", pnginfo=chunks)
    return write_whole(path, made.getvalue())


def write_grid(path: Path, image: Image.Image) -> Path:
    """Write the contact sheet; its suffix says the format.

    Raises:
        UserError: Pillow writes no such format.
    """
    made = io.BytesIO()
    image.save(made, grid_format(path))
    return write_whole(path, made.getvalue())


def grid_format(path: Path) -> str:
    """Pillow's format for a file's name.

    Raises:
        UserError: it is none that holds one picture for viewing.
    """
    formats = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
    if path.suffix.lower() not in formats:
        raise UserError(f"--grid {path.name}: expected a name that ends in {', '.join(formats)}")
    return formats[path.suffix.lower()]

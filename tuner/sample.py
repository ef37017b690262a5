"""Pictures from an adapted base, through the diffusers pipelines that users have."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tuner.data.captions import CaptionRule
from tuner.data.conditions import values
from tuner.data.loader import Feed
from tuner.data.plan import Slot
from tuner.export.files import write_whole
from tuner.task import Task

if TYPE_CHECKING:
    from accelerate import Accelerator

Picture = npt.NDArray[np.uint8]
AT_ONCE = 16
PIXELS = AT_ONCE * 512 * 512
"""Pixels that are drawn together at most: 16 pictures up to 512 pixels a side, 4 of 1024."""


@dataclass(frozen=True)
class Sampler:
    """How pictures are made: the task's base with or without its methods.

    Attributes:
        size: pixels of a side.
        steps: sampling steps (DDIM, arXiv 2010.02502).
        guidance: scale of classifier-free guidance (arXiv 2207.12598); 1 is none.
        seed: picture i starts from the noise of seed + i.
    """

    task: Task
    accelerator: Accelerator
    size: int
    steps: int = 20
    guidance: float = 5.0
    negative: str = ""
    seed: int = 0

    @torch.no_grad()
    def pictures(
        self, prompts: Sequence[str], conditions: Sequence[Picture] | None = None, adapted: bool = True
    ) -> list[Picture]:
        """One picture for each prompt, uint8 [size, size, 3].

        Args:
            prompts: captions, with the method's own words in place.
            conditions: for each prompt a condition picture uint8 [size, size, 3]; None: without the method's
                branch.
            adapted: with the methods; False: the base alone.
        """
        methods = self.task.each()
        out: list[Picture] = []
        with ExitStack() as stack:
            for method in methods:
                method.train_mode(False)
                if not adapted:
                    stack.enter_context(method.off(self.task.family))
            count = pictures_at_once(self.size)
            for start in range(0, len(prompts), count):
                part = slice(start, start + count)
                looks = None if conditions is None or not adapted else conditions[part]
                out += self._some(prompts[part], looks, start)
        return out

    def _some(
        self, prompts: Sequence[str], conditions: Sequence[Picture] | None, first: int
    ) -> list[Picture]:
        family, device = self.task.family, self.accelerator.device
        branches = [b for b in (m.control_branch() for m in self.task.each()) if b is not None]
        branch = branches[0] if branches and conditions is not None else None
        pipe = family.pipeline(branch)
        rule = CaptionRule(replace=tuple(pair for m in self.task.each() for pair in m.replacements()))
        looks = None
        if branch is not None and conditions is not None:
            looks = torch.from_numpy(np.stack([values(c) for c in conditions])).to(device)
            for method in self.task.each():
                looks = method.look(looks)
        with self.accelerator.autocast():
            text = self.task.encode(family.tokenize([rule.final(p) for p in prompts]).to(device))
            negative = self.task.encode(family.tokenize([self.negative] * len(prompts)).to(device))
            latents = pipe(
                **family.inputs(text, negative, self.size, looks),
                num_inference_steps=self.steps,
                # Where both branches read the same, guidance changes nothing: one branch is enough.
                guidance_scale=1.0 if set(prompts) == {self.negative} else self.guidance,
                latents=self._noise(first, len(prompts)).to(device, text.hidden.dtype),
                output_type="latent",
                return_dict=False,
            )[0]
        return to_pictures(family.decode_latents(latents))

    def _noise(self, first: int, count: int) -> Tensor:
        """Starting noise [count, C, h, w]; of picture i it depends on seed + i alone."""
        family = self.task.family
        side = self.size // family.factor
        seeds = range(self.seed + first, self.seed + first + count)
        made = [torch.Generator().manual_seed(seed) for seed in seeds]
        return torch.stack([torch.randn(family.latent_channels, side, side, generator=g) for g in made])


def pictures_at_once(size: int) -> int:
    """How many pictures of this side, in pixels, are drawn together."""
    return max(1, min(AT_ONCE, PIXELS // size**2))


def to_pictures(pixels: Tensor) -> list[Picture]:
    """[B, 3, H, W] in [-1, 1] -> uint8 [H, W, 3] each."""
    unit = ((pixels.float() + 1) / 2).clamp(0, 1).mul(255).round().to(torch.uint8)
    return list(unit.permute(0, 2, 3, 1).cpu().numpy())


def heldout_prompts(feed: Feed, count: int) -> tuple[list[str], list[Picture]]:
    """The first captions of the first held-out samples, and their pictures."""
    count = min(count, len(feed.samples))
    prompts = [feed.captions.final(feed.samples[i].captions[0]) for i in range(count)]
    return prompts, [feed.picture(Slot(i, 0, i, 1.0)) for i in range(count)]


class Previews:
    """The same pictures again and again: condition, base alone and adapted, a row for each prompt.

    Without condition pictures there is no such column, and no base alone where the base itself is trained.
    """

    def __init__(self, sampler: Sampler, heldout: Feed | None, prompts: Sequence[str], count: int) -> None:
        """
        Args:
            heldout: where conditions, and prompts if none are given, come from.
            prompts: empty: captions of held-out samples.
            count: rows.
        """
        shown, originals = heldout_prompts(heldout, count) if heldout is not None else ([], [])
        self.sampler = sampler
        self.prompts = list(prompts)[:count] or shown
        self.conditions: list[Picture] | None = None
        if heldout is not None and heldout.condition is not None:
            slots = [Slot(i % len(originals), 0, i, 1.0) for i in range(len(self.prompts))]
            self.conditions = [heldout.condition_picture(slot, None) for slot in slots]
        # Where the base itself is trained, there is none left to show.
        self._shows_base = all(method.kind != "full" for method in sampler.task.each())
        self._base: list[Picture] = []  # made once: nothing changes it

    def write(self, place: Path) -> list[Picture]:
        """Write the sheet as a PNG, and prompts and columns as JSON beside it; returns the adapted."""
        columns = {} if self.conditions is None else {"condition": self.conditions}
        if self._shows_base:
            self._base = self._base or self.sampler.pictures(self.prompts, adapted=False)
            columns |= {"base alone": self._base}
        adapted = self.sampler.pictures(self.prompts, self.conditions)
        columns |= {"adapted": adapted}
        write_png(place, sheet(columns, self.prompts))
        about = {"prompts": self.prompts, "columns": list(columns), "seed": self.sampler.seed}
        write_whole(place.with_suffix(".json"), json.dumps(about, indent=2))
        return adapted


def write_png(place: Path, image: Image.Image) -> Path:
    """Write a picture so that it appears whole. Returns `place`."""
    made = io.BytesIO()
    image.save(made, "PNG")
    return write_whole(place, made.getvalue())


def sheet(columns: dict[str, list[Picture]], rows: Sequence[str], scale: int = 1) -> Image.Image:
    """A contact sheet: a column for each name, a row with its prompt above each line of pictures.

    Args:
        columns: uint8 [H, W, 3] each, all of one size.
        scale: how often a pixel is repeated in width and height.
    """
    names, gap, head, line = list(columns), 6, 22, 18
    high, wide = (side * scale for side in next(iter(columns.values()))[0].shape[:2])
    font = ImageFont.load_default(13)
    width = gap + (wide + gap) * len(names)
    image = Image.new("RGB", (width, head + len(rows) * (high + line + gap)), "white")
    draw = ImageDraw.Draw(image)
    for x, name in enumerate(names):
        draw.text((gap + x * (wide + gap), 4), _fitted(name, wide, font), "black", font)
    for y, prompt in enumerate(rows):
        top = head + y * (high + line + gap)
        # A line break would be drawn over the pictures.
        shown = _fitted(" ".join(prompt.split()) or "(no prompt)", width - 2 * gap, font)
        draw.text((gap, top), shown, "#555555", font)
        for x, name in enumerate(names):
            picture = Image.fromarray(columns[name][y]).resize((wide, high), Image.Resampling.NEAREST)
            image.paste(picture, (gap + x * (wide + gap), top + line))
    return image


def _fitted(text: str, width: int, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """A text cut to a width in pixels."""
    while font.getlength(text) > width and len(text) > 4:
        text = text[:-4] + "..."
    return text

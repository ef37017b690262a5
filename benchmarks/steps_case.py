"""The cases of benchmarks/steps.py: a recipe, its pictures, and the run that the product makes of them."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METHODS = {
    "lora": "{lora: {rank: 16}}",
    "textual_inversion": "{textual_inversion: {token: <new>, init: random}}",
    "controlnet": "controlnet",
    "full": "{full: {checkpoint_file: false, pipeline: false}}",
}
SIDES = {"embedded": 128, "sd15": 512, "sd21": 768, "sdxl": 1024}
"""The families, each with the resolution that it was made for; the embedded one for what its recipes have."""

ENDLESS = 10**9  # optimiser steps: the measurement ends it
RECIPE = """\
base: {base}
method: {method}
data:
  source: {source}
  resolution: {side}
  cache: {cache}
train:
  steps: {steps}
  batch_size: {batch}
  learning_rate: 1e-5
  precision: {precision}
{more}log: {{tensorboard: false}}
output: {output}
"""


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        threads: of the CPU; None: as the product chooses.
        compile: `train.compile`; None: as the product chooses.
        cached: latents, and text where the method allows it, are encoded before.
        base: a diffusers folder in place of the family's own.
    """

    method: str
    family: str
    batch: int
    precision: str
    side: int
    threads: int | None = None
    compile: str | None = None
    cached: bool = True
    base: str | None = None

    def title(self) -> str:
        """In a few words."""
        more = "" if self.cached else ", nothing cached"
        more += "" if self.compile is None else f", compile {self.compile}"
        return f"{self.method} {self.family} {self.side} px, batch {self.batch}, {self.precision}{more}"


def recipe_of(case: Case, folder: Path) -> Any:
    """The recipe of a case, as `tuner train` loads it; its pictures are drawn into the folder.

    Raises:
        UserError: there is no such base, or a key is not known.
    """
    from tuner import recipe

    word = " <new>" if case.method == "textual_inversion" else ""
    draw(folder / "pictures", max(16, 2 * case.batch), case.side, f"a picture of a{word} thing")
    more = {"threads": case.threads, "compile": case.compile}
    text = RECIPE.format(
        base=base_of(case, folder / "base"),
        method=METHODS[case.method],
        source=folder / "pictures",
        side=case.side,
        cache=folder / "cache" if case.cached else "off",
        steps=ENDLESS,
        batch=case.batch,
        precision=case.precision,
        more="".join(f"  {key}: {value}\n" for key, value in more.items() if value is not None),
        output=folder / "output",
    )
    path = folder / "case.yaml"
    beside = folder / f"{os.getpid()}.yaml"
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)  # whole, as several processes may read it
    return recipe.load(path)


def base_of(case: Case, folder: Path) -> str:
    """The recipe's `base`: one that is here, or the family's configurations, of random weights."""
    if case.base is not None or case.family == "embedded":
        return case.base or "embedded"
    from tuner import single_file

    source = single_file.CONFIGS / case.family
    networks = [
        name for name in ("unet", "vae", "text_encoder", "text_encoder_2") if (source / name).is_dir()
    ]
    for name in networks:
        shutil.copytree(source / name, folder / name)
    for place in sorted(source.glob("tokenizer*")):
        single_file.write_tokenizer(place, folder / place.name)
    shutil.copytree(source / "scheduler", folder / "scheduler")
    shutil.copy(source / "model_index.json", folder)
    return f"{{path: {folder}, new: [{', '.join(networks)}]}}"


def draw(folder: Path, count: int, side: int, caption: str) -> None:
    """Pictures of soft colours with a sharp square in each, and captions, all different; but once."""
    if folder.exists():
        return
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    drawn, lines = np.random.default_rng(0), []
    for number in range(count):
        small = Image.fromarray(drawn.integers(0, 255, (4, 4, 3), dtype=np.uint8))
        picture = np.array(small.resize((side, side), Image.Resampling.BICUBIC))
        top, left = drawn.integers(0, side // 2, 2)
        picture[top : top + side // 4, left : left + side // 4] = drawn.integers(0, 255, 3, dtype=np.uint8)
        Image.fromarray(picture).save(folder / f"{number:04d}.png")
        lines.append(json.dumps({"file_name": f"{number:04d}.png", "text": f"{caption} number {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

"""Folders of finished runs, as `tuner push` takes them; reached through the fixture `finished_runs`."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image

from tuner import build, recipe, sample
from tuner.export import metadata
from tuner.log import Log
from tuner.method import Card

RECIPE = """\
base: someone/tiny-sd1
method: {lora: {rank: 2}}
data:
  source: [{path: /home/somebody/pictures of a cat}, {path: gone/away/cats}]
  resolution: 32
train: {steps: 7, batch_size: 2, learning_rate: 1e-3}
preview: {every: 7, prompts: [a red toy, ""], steps: 3}
export: {name: thing, every: 4}
output: OUTPUT
"""
PROMPTS = ["a red toy", "", "three", "four", "five"]


def columns(*names: str) -> dict[str, list[sample.Picture]]:
    """Pictures of noise, 16 pixels wide, below these names."""
    draw = np.random.default_rng(0)
    return {name: [draw.integers(0, 256, (16, 16, 3), np.uint8) for _ in PROMPTS] for name in names}


def finish(output: Path, method: Any, family: Any, text: str) -> Path:
    """A finished run's folder around real exports."""
    (output / "previews").mkdir(parents=True)
    given = output.with_suffix(".yaml")
    given.write_text(text.replace("OUTPUT", str(output)))
    loaded = recipe.load(given)
    (output / "recipe.yaml").write_text(loaded.resolved_yaml())
    (output / "versions.json").write_text(json.dumps(build.versions()))
    title = (
        loaded.base.path if "/" in loaded.base.path and not Path(loaded.base.path).exists() else family.title
    )
    about = metadata.build(
        method.kind,
        name=loaded.name,
        recipe_text=metadata.recipe_text(loaded.resolved()),
        versions=build.versions(),
        base_name=title,
        base_digest="{}",
        data_digests={},
        extra={"family": family.name, **method.labels()},
    )
    card = Card(loaded.name, torch.float16, {method.kind: about})
    for place in (output / "export", output / "export" / "step-4"):
        place.mkdir(parents=True)
        method.export(family, place, card)
    drawn = (
        columns("condition", "base alone", "adapted")
        if method.condition
        else columns("base alone", "adapted")
    )
    for step in (4, 7):
        sheet = output / "previews" / f"step-{step:06d}.png"
        sample.sheet(drawn, PROMPTS).save(sheet)
        sheet.with_suffix(".json").write_text(json.dumps({"prompts": PROMPTS, "columns": list(drawn)}))
    (output / "evaluation").mkdir()
    Image.new("RGB", (8, 8)).save(output / "evaluation" / "style.png")
    with Log(output, False, None, True, None) as log:
        log.scalars(4, {"validation_loss": 0.5})
        log.scalars(7, {"validation_loss": 0.25})
        rows = {"floor": [0.1], "LoRA": [0.9]}
        about_style = {"verdict": "style | of <it>", "columns": ["share"], "rows": rows}
        log.measures("style", about_style | {"picture": "evaluation/style.png"})
        log.event(7, "finished")
    return output


def lora(models: ModuleType, base: Path, place: Path) -> Path:
    """A finished run of a LoRA on this base, below this folder."""
    family = models.family_of(base, "lora")
    method = models.move(models.method_of("lora", family, rank=2))
    (place / "gone" / "away" / "cats").mkdir(parents=True)
    with contextlib.chdir(place):  # there while it was trained, not when it is pushed
        return finish(place / "thing", method, family, RECIPE)

"""How long a run takes, from a few steps that are really done; nothing of them is kept."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from tuner import build, device, gather, loop
from tuner.check.data import Looked
from tuner.check.part import part
from tuner.data import encode
from tuner.data.cache import Hashes
from tuner.data.loader import stream
from tuner.log import Log
from tuner.recipe import Recipe

WARM = 2
"""Steps before the measured ones: first ones choose algorithms and fill the loader."""
MEASURED = 4


def measure(
    recipe: Recipe, accelerator: Accelerator, looked: Looked, hashes: Hashes, plan: dict[str, Any]
) -> dict[str, Any]:
    """Seconds of a step and of all, without encoding, previews, validation and export.

    The base is loaded; of the data only what these steps see is encoded, into the cache. What the steps
    change is given up.

    Args:
        plan: what `schedule.plan` found.
    """
    stages = plan["stages"] or [plan]
    task = build.adapted(recipe, accelerator, hashes)
    first, steps = 0, list[int]()
    for stage in stages:
        steps += range(first, first + min(WARM + MEASURED, stage["steps"]))
        first += stage["steps"]
    some, few = part(looked, steps)
    began = time.monotonic()
    feed = encode.feed(some, looked.asked, task.family)
    encoding = (time.monotonic() - began) / len(some.samples)
    if accelerator.mixed_precision != "no":
        task.family.cast(device.DTYPES[accelerator.mixed_precision], task.parameters())
    unseen = recipe.model_copy(update={"preview": type(recipe.preview)()})
    assert looked.plan is not None
    run = build.joined(unseen, accelerator, task, gather.Gathered(feed, looked.plan, ""), None, hashes)
    made = loop.make(run, Log(Path(recipe.output), False, None, main=False, resume_step=None))
    batches = stream(feed, few, run.division, 0, len(steps), 0)  # type: ignore[arg-type]
    seconds = []
    for step in range(len(steps)):
        start = time.monotonic()
        loss, _ = loop.one_step(run, made, batches, step)
        loss.item()  # waits for the device
        seconds.append(time.monotonic() - start)
    return {
        **_summed(stages, seconds),
        "device": accelerator.device.type,
        "threads": torch.get_num_threads(),
        "seconds_encoding_a_sample": encoding,
    }


def _summed(stages: list[dict[str, Any]], seconds: list[float]) -> dict[str, Any]:
    """Of all stages together, from the seconds of their measured steps, stage after stage."""
    total, images, measured, first = 0.0, 0, 0, 0
    for stage in stages:
        count = min(WARM + MEASURED, stage["steps"])
        own = seconds[first : first + count]
        counted = own[min(WARM, count - 1) :]
        first += count
        measured += len(counted)
        total += statistics.median(counted) * stage["steps"]
        images += stage["steps"] * stage["batch_size"]
    steps = sum(stage["steps"] for stage in stages)
    return {
        "seconds_per_step": total / steps,
        "images_per_second": images / total,
        "steps": steps,
        "seconds": total,
        "measured_steps": measured,
    }

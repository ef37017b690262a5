"""The output folder and the disks: what an earlier run there means, what is written, and whether it fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator

from tuner import build, disk, gather, loop, resume
from tuner.check.data import Looked
from tuner.check.findings import Findings
from tuner.data import encode
from tuner.data.cache import Hashes
from tuner.recipe import Recipe
from tuner.task import Task

PICTURE = 0.7
"""A preview's bytes as PNG, of those that its pixels have."""


def output(
    recipe: Recipe,
    accelerator: Accelerator,
    task: Task | None,
    looked: Looked | None,
    hashes: Hashes,
    found: Findings,
) -> None:
    """Whether the output can be written to, holds another run, and has room; nothing is written there."""
    place, cache = Path(recipe.output), gather.cache(recipe)
    before = len(found.problems)
    free = found.attempt("output", lambda: disk.free(place))
    if free is None:
        return
    about: dict[str, Any] = {"output": {"free": free}, "cache": {}}
    found.facts["disk"] = about
    found.attempt("output", lambda: disk.check_writable(place, "output"))
    if cache is not None:
        about["cache"] = {"free": disk.free(cache)}
    if task is None or looked is None or looked.plan is None or looked.passing:
        passing = looked is not None and looked.passing
        why = ": samples are read in passing" if passing else ": see the problems"
        found.unchecked.append(f"what the run writes, and whether the output holds another run{why}")
        return
    if cache is not None:
        about["cache"] |= cached(looked, task)
        if about["cache"]["bytes"] > about["cache"]["free"]:
            found.note(
                f"{cache}: all that this run encodes takes {size(about['cache']['bytes'])}, and "
                f"{size(about['cache']['free'])} are free; what is there already needs no more"
            )
    plan = found.facts["plan"]
    run = found.attempt("output", lambda: _run(recipe, accelerator, task, looked, hashes))
    if run is None:
        return
    about["output"] |= written(run, plan)
    if before == len(found.problems):
        _earlier(run, found)


def _run(recipe: Recipe, accelerator: Accelerator, task: Task, looked: Looked, hashes: Hashes) -> loop.Run:
    """The run that would start, without weights and without encodings."""
    assert looked.plan is not None
    feed = encode.feed(looked.whole, looked.uncached(), task.family)
    gathered = gather.Gathered(feed, looked.plan, looked.whole.digest())
    return build.joined(recipe, accelerator, task, gathered, None, hashes)


def _earlier(run: loop.Run, found: Findings) -> None:
    """What lies in the output: nothing, this run, or another; and room for the rest of this one."""
    about = found.facts["disk"]["output"]
    if resume.finished(run):
        about["holds"] = "this run, finished: it would not start again"
        return
    before = len(found.problems)
    state = found.attempt("output", lambda: resume.start_from(run))
    if len(found.problems) > before:
        return
    about["holds"] = "nothing to go on from" if state is None else f"this run, {state.step} steps of it"
    found.attempt("disk", lambda: resume.check_room(run, state))


def written(run: loop.Run, plan: dict[str, Any]) -> dict[str, int]:
    """Bytes that the run writes into its output, about."""
    one, export = resume.checkpoint_size(run), resume.export_size(run)
    preview = int(run.recipe.preview.count * run.data.size**2 * 3 * PICTURE)
    kept = plan["checkpoints"]["kept"]
    about = {
        # One more is there while a new one is written.
        "checkpoints": one * (kept + (plan["checkpoints"]["written"] > kept)),
        "exports": export * plan["exports"],
        "previews": preview * plan["previews"],
    }
    return {"checkpoint": one, **about, "bytes": sum(about.values())}


def cached(looked: Looked, task: Task) -> dict[str, Any]:
    """What the cache holds of this run when all pictures are encoded; and what is not kept, and why.

    What is there already from an earlier run is not written again.
    """
    asked, family = looked.asked, task.family
    anew = encode.uncached(asked, family)
    told: dict[str, Any] = {"uncached": anew, "pictures": 0, "bytes": 0}
    if "vae" in family.modules() and "pictures" not in anew:
        about = looked.opened.assigned
        ways = 2 if asked.flip else 1
        for number, shape in enumerate(about.shapes):
            rows = int((about.bucket == number).sum()) + len(looked.classes)
            cells = (shape.height // family.factor) * (shape.width // family.factor)
            told["pictures"] += rows * ways
            told["bytes"] += rows * ways * 2 * family.latent_channels * cells * 4  # mean and deviation
    return told


def size(count: int) -> str:
    """Bytes in words, by powers of 1024: 640 B, 1.5 GiB."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.3g} {units[0]}"

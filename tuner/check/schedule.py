"""How much a run does: steps, epochs, pictures seen, and what it writes on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from accelerate import Accelerator

from tuner import gather, prior
from tuner.check.data import Looked
from tuner.check.findings import Findings
from tuner.data import assemble, buckets
from tuner.data.assemble import Opened
from tuner.data.cache import default_folder
from tuner.data.index import Memory
from tuner.data.plan import Beside, Plan, Stages
from tuner.data.samples import Sample
from tuner.method import Prior
from tuner.recipe import Recipe
from tuner.sample import Sampler
from tuner.task import Task


def planned(
    recipe: Recipe, task: Task | None, accelerator: Accelerator, looked: Looked, found: Findings
) -> Looked:
    """With the plan of its samples, class pictures beside."""
    for line in buckets.warnings(looked.opened.assigned, lambda n: looked.opened.samples[n].picture.name):
        found.note(line)
    about = next((one for block in recipe.method.values() if (one := getattr(block, "prior", None))), None)
    classes: Sequence[Sample] = ()
    if about is not None and task is None:
        found.unchecked.append("class pictures: they belong to the base")
    elif isinstance(about, Prior) and task is not None:
        sampler = Sampler(
            task, accelerator, looked.asked.size, about.steps, about.guidance, seed=looked.asked.seed
        )
        classes = found.attempt("data", lambda: prior.samples(about, sampler, looked.asked.cache)) or ()
    looked = _with_classes(recipe, looked, classes, found)
    weight = about.weight if isinstance(about, Prior) else 1.0
    beside = Beside(len(looked.opened.samples), len(classes), weight) if classes else None
    plan = found.attempt("plan", lambda: _plan(recipe, looked, beside, accelerator))
    return looked._replace(plan=plan)


def _with_classes(recipe: Recipe, looked: Looked, classes: Sequence[Sample], found: Findings) -> Looked:
    """With the class pictures behind the samples, where all are there."""
    if not classes:
        return looked
    there = sum(one.picture.stamp() is not None for one in classes)
    found.facts["data"]["class_pictures"] = {"wanted": len(classes), "there": there}
    whole: Opened | None = None
    if there == len(classes):
        memory = Memory(gather.cache(recipe) or default_folder())
        # They take the batch's bucket.
        plain = replace(looked.asked, condition=None, buckets=(), unreadable=0)
        whole = found.attempt("data", lambda: assemble.look_at(classes, np.ones(there), plain, memory))
    behind = looked.opened if whole is None else looked.opened.beside(whole)
    return looked._replace(classes=classes, whole=behind)


def _plan(recipe: Recipe, looked: Looked, beside: Beside | None, accelerator: Accelerator) -> Plan | Stages:
    sizes = gather.batch_sizes(recipe)
    plans = [
        Plan(
            one.repeats,
            min(size, len(one.repeats)) if looked.passing else size,
            recipe.train.seed,
            beside,
            one.assigned,
            gather.loss_weights(one),
            "smaller" if recipe.data.buckets is None else recipe.data.buckets.last,
            recipe.train.accumulate * accelerator.num_processes,
        )
        for one, size in zip(looked.stages, sizes, strict=True)
    ]
    return plans[0] if len(plans) == 1 else Stages(plans, gather.lengths(recipe))


def plan(recipe: Recipe, looked: Looked, accelerator: Accelerator) -> dict[str, Any]:
    """Counts of what the run will do; `images` are pictures that count, class pictures too."""
    first, train, processes = looked.plans[0], recipe.train, accelerator.num_processes
    steps = train.steps or first.steps_in(train.epochs or 0)
    sizes = gather.batch_sizes(recipe)
    about = {
        "samples": len(looked.opened.samples),
        "steps": steps,
        "batch_size": train.batch_size,
        "accumulate": train.accumulate,
        "processes": processes,
        "micro_batch": train.batch_size // (train.accumulate * processes),
        "checkpoints": _checkpoints(recipe, steps),
        "exports": _times(recipe.export.every, steps) + 1,
        "previews": _previews(recipe, steps),
        "validations": _times(recipe.validation.every, steps),
        "evaluated": recipe.evaluate.samples,
    }
    if looked.passing:
        return {**about, "samples": None, "images": steps * train.batch_size}
    lengths = [steps] if len(looked.plans) == 1 else gather.lengths(recipe)
    stages = [
        _stage(one, length, size, train.accumulate * processes)
        for one, length, size in zip(looked.plans, lengths, sizes, strict=True)
    ]
    return {
        **about,
        "entries_per_epoch": stages[0]["entries_per_epoch"],
        "steps_per_epoch": stages[0]["steps_per_epoch"],
        "epochs": round(sum(stage["epochs"] for stage in stages), 6),
        "images": sum(stage["images"] for stage in stages),
        "stages": stages if len(stages) > 1 else [],
    }


def _stage(made: Plan, steps: int, batch_size: int, passes: int) -> dict[str, Any]:
    return {
        "steps": steps,
        "batch_size": batch_size,
        "micro_batch": batch_size // passes,
        "entries_per_epoch": int(made.sizes.sum()),
        "steps_per_epoch": made.steps_per_epoch,
        "epochs": round(steps / made.steps_per_epoch, 6),
        "images": images(made, steps),
    }


def bucket_rows(looked: Looked) -> list[dict[str, Any]]:
    """The table of buckets, of one stage after the other."""
    told = []
    for number, (one, made) in enumerate(zip(looked.stages, looked.plans, strict=True), 1):
        for row in buckets.rows(one.assigned, made.sizes, made.own):
            counts = {key: value for key, value in row._asdict().items() if key != "bucket"}
            shape = {"stage": number, "width": row.bucket.width, "height": row.bucket.height}
            told.append({**shape, **counts, "crop_loss": round(row.crop_loss, 6)})
    return told


def images(made: Plan, steps: int) -> int:
    """Pictures that count in the first so many steps: in every cycle of epochs there are as many."""
    period = made.steps_in(made.cycle)
    cycles, rest = divmod(steps, period)
    whole = _counting(made, period) if cycles else 0
    return cycles * whole + _counting(made, rest)


def _counting(made: Plan, steps: int) -> int:
    return sum(slot.weight > 0 for step in range(steps) for slot in made.step(step))


def _times(every: int | None, steps: int) -> int:
    return steps // every if every else 0


def _previews(recipe: Recipe, steps: int) -> int:
    """How often previews are made: at the last step too."""
    every = recipe.preview.every
    return -(-steps // every) if every else 0


def _checkpoints(recipe: Recipe, steps: int) -> dict[str, int]:
    """How many are written, and how many are there at the end, those of the last hours not counted."""
    about = recipe.train.checkpoint
    written = {steps} if not about.every else {*range(about.every, steps + 1, about.every), steps}
    newest = set(sorted(written)[-about.keep :])
    for_good = {step for step in written if about.keep_every and step % about.keep_every == 0}
    return {"written": len(written), "kept": len(newest | for_good)}

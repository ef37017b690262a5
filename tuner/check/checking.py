"""Everything that can be known before a run's first step; nothing is trained, and no output is touched."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from tuner import build, device, disk, gather, loop, optimiser, surroundings
from tuner.check import figures, inputs, room, schedule, sheet, table, timing
from tuner.check.asked import Asked
from tuner.check.data import Looked, data
from tuner.check.findings import Findings
from tuner.check.needs import needs
from tuner.check.outline import look
from tuner.data.cache import Hashes, default_folder
from tuner.errors import UserError
from tuner.recipe import Recipe, load, micro_batch
from tuner.task import Task


def check(wish: Asked) -> int:
    """Look at everything, and print it; what is told on the way goes to standard error.

    Returns:
        The exit code: 0 where a run would start, 2 where there are problems.

    Raises:
        UserError: the wish cannot be fulfilled as it is.
    """
    if wish.out is not None and not wish.contact_sheet:
        raise UserError("--out has no effect without --contact-sheet")
    if wish.samples < 1:
        raise UserError(f"--samples: found {wish.samples}, expected 1 or more")
    if wish.device not in (None, "cpu", "cuda"):
        raise UserError(f"--device: found {wish.device}, expected cpu or cuda")
    found = Findings()
    with contextlib.redirect_stdout(sys.stderr):
        recipe = found.attempt("recipe", lambda: load(wish.recipe, wish.overrides or ()))
        if recipe is None:
            found.unchecked.append("everything else: the recipe cannot be read")
        else:
            every(recipe, wish, found)
    if wish.as_json:
        print(json.dumps(found.as_json(), indent=2))
    else:  # a file's name may be no valid text
        print("\n".join(table.lines(found)).encode(errors="backslashreplace").decode())
    return 2 if found.problems else 0


def every(recipe: Recipe, wish: Asked, found: Findings) -> None:
    """All checks of a recipe, each as far as the others' problems let it."""
    accelerator = _machine(recipe, found)
    with _cached(recipe, found) as usable:
        _every(usable, wish, accelerator, found)


@contextlib.contextmanager
def _cached(recipe: Recipe, found: Findings) -> Iterator[Recipe]:
    """The recipe; where its cache cannot be written to, with another, which is thrown away."""
    place = gather.cache(recipe) or default_folder()
    before = len(found.problems)
    found.attempt("machine", lambda: disk.check_writable(place, "data.cache"))
    if len(found.problems) == before:
        yield recipe
        return
    with tempfile.TemporaryDirectory() as folder:
        yield recipe.model_copy(update={"data": recipe.data.model_copy(update={"cache": folder})})


def _every(recipe: Recipe, wish: Asked, accelerator: Accelerator, found: Findings) -> None:
    found.attempt("recipe", lambda: micro_batch(recipe, accelerator.num_processes))
    hashes = build.remembered(recipe)
    task = look(recipe, accelerator, hashes, found)
    found.attempt("train", lambda: _optimiser(recipe, task))
    looked = data(recipe, task, accelerator, found)
    if looked is not None:
        looked = schedule.planned(recipe, task, accelerator, looked, found)
        found.facts["sizes"] = figures.sizes(looked)
    if looked is not None and looked.plan is not None:
        captions = found.attempt("captions", lambda: figures.captions(task, looked))
        found.facts |= {} if captions is None else {"captions": captions}
        found.facts["buckets"] = schedule.bucket_rows(looked)
        found.facts["plan"] = schedule.plan(recipe, looked, accelerator)
    else:
        found.unchecked.append("the plan of steps and buckets: there are no samples to plan with")
    found.attempt("machine", lambda: surroundings.check(recipe))
    room.output(recipe, accelerator, task, looked, hashes, found)
    if task is None:
        found.unchecked.append("memory: it is not known what is loaded and trained")
    else:
        needs(recipe, accelerator, wish.device, wish.memory, found)
    if wish.time:
        _time(recipe, accelerator, task, looked, hashes, found)
    if wish.contact_sheet:
        _sheet(recipe, wish, accelerator, task, looked, found)


def _optimiser(recipe: Recipe, task: Task | None) -> None:
    """See that the optimiser can be made; where it is not known what is trained, for any number."""
    if task is not None:
        loop.build_optimiser(task.each(), recipe.train)
        return
    groups: list[dict[str, Any]] = [{"params": [nn.Parameter(torch.zeros(1))]}]
    try:
        optimiser.build(groups, **recipe.train.optimiser.resolved(), learning_rate=recipe.train.learning_rate)
    except optimiser.OptimiserError as error:
        raise UserError(f"train.optimiser: {error}") from error


def _machine(recipe: Recipe, found: Findings) -> Accelerator:
    """What a run would find here; where it cannot be had, a plain one to look on with."""
    train = recipe.train
    accelerator = found.attempt("machine", lambda: device.start(train.precision, train.threads))
    if accelerator is None:
        accelerator = device.start("fp32", train.threads)
    found.facts["recipe"] = {
        "name": recipe.name,
        "method": list(recipe.method),
        "precision": device.precision(train.precision),
        "device": accelerator.device.type,
        "processes": accelerator.num_processes,
        "output": recipe.output,
        "resolved": json.loads(json.dumps(recipe.resolved())),
    }
    return accelerator


def _time(
    recipe: Recipe,
    accelerator: Accelerator,
    task: Task | None,
    looked: Looked | None,
    hashes: Hashes,
    found: Findings,
) -> None:
    if task is None or looked is None or looked.plan is None or found.problems:
        found.unchecked.append("how long it takes: a step is measured where there are no problems")
        return
    if looked.passing:
        found.unchecked.append("how long it takes: what is read in passing is not measured")
        return
    plan = found.facts["plan"]
    told = found.attempt("time", lambda: timing.measure(recipe, accelerator, looked, hashes, plan))
    if told is not None:
        found.facts["time"] = told


def _sheet(
    recipe: Recipe,
    wish: Asked,
    accelerator: Accelerator,
    task: Task | None,
    looked: Looked | None,
    found: Findings,
) -> None:
    """Write the page; where the base or the data cannot be used, one that says so."""
    shown: list[inputs.Shown] = []
    if task is None or looked is None or looked.plan is None:
        found.unchecked.append("the first samples: the base or the data cannot be used")
    else:
        made = found.attempt("data", lambda: inputs.first(task, looked, accelerator, wish.samples))
        shown = [] if made is None else made[0]
    place = wish.out or Path(f"{recipe.name}-contact-sheet.html")
    written = found.attempt("contact sheet", lambda: sheet.write(place, recipe.name, shown, found))
    if written is not None:
        found.facts["contact_sheet"] = str(written)
        found.note(f"contact sheet: {written}")

"""What an output folder that is there already means for a run: skip it, continue it, refuse it, clear it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from tuner import checkpoint, loop
from tuner.checkpoint import State
from tuner.errors import UserError
from tuner.log import FILE as METRICS
from tuner.progress import say

DONE = "finished.json"


def summary(run: loop.Run) -> dict[str, Any]:
    """What a finished run is recognised by: everything its result depends on, and its looks."""
    recipe = {key: value for key, value in run.recipe.resolved().items() if key not in ("log",)}
    summary = {"steps": run.steps, "fingerprint": run.fingerprint, "recipe": recipe}
    return dict(json.loads(json.dumps(summary)))


def finished(run: loop.Run) -> bool:
    """Whether the output holds this run, finished."""
    place = run.output / DONE
    return place.is_file() and json.loads(place.read_text(encoding="utf-8")) == summary(run)


def start_from(run: loop.Run) -> State | None:
    """The checkpoint that the run continues from.

    Raises:
        UserError: the output holds another run.
    """
    asked = run.recipe.train.resume
    if asked == "never":
        return None
    anew = "Choose another output, or start anew there with train.resume=never."
    folder = run.output if asked == "auto" else Path(asked)
    state = checkpoint.newest(folder) if asked == "auto" else checkpoint.at(folder)
    if state is None:
        if asked != "auto":
            raise UserError(f"train.resume: {asked}: no whole checkpoint there")
        if (run.output / DONE).is_file():
            raise UserError(f"{run.output} holds a finished run without a checkpoint to compare.\n{anew}")
        return None
    found = checkpoint.differences(state, run.fingerprint)
    if found or state.step > run.steps:
        found = found or [f"the checkpoint has {state.step} steps, the run {run.steps}"]
        lines = "".join(f"\n  {line}" for line in found)
        raise UserError(f"{state.folder} belongs to another run:{lines}\n{anew}")
    say(f"continuing from {state.folder} ({state.step} of {run.steps} steps are done)")
    return state


def clear(output: Path, state: State | None) -> None:
    """Take away what an earlier run left and this one does not continue; in no other folder anything."""
    (output / DONE).unlink(missing_ok=True)
    checkpoint.drop_ahead(output, 0 if state is None else state.step)
    if state is None and (output / METRICS).is_file():
        for name in ("previews", "export", "evaluation", "tensorboard"):
            if (output / name).is_dir():
                shutil.rmtree(output / name)

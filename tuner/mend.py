"""When the guard has found something: the bad batch is written down, and the run goes back or ends.

The recipe's `train.guard` decides (training.Guard).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from tuner import checkpoint, guard
from tuner.checkpoint import State
from tuner.data.flow import Flow, parts
from tuner.data.loader import Division, Feed
from tuner.data.plan import Plan, Stages
from tuner.export.files import write_whole
from tuner.guard import Diverged, Fault
from tuner.task import Task

WRITTEN = re.compile(r"bad-step-\d+\.json")


def clear(output: Path) -> None:
    """Take away the bad batches of an earlier run, which a new one in its folder knows nothing of."""
    for place in output.glob("bad-step-*.json"):
        if WRITTEN.fullmatch(place.name):
            place.unlink()


def last_good(output: Path, fault: Fault) -> State | None:
    """The newest whole checkpoint of an output folder that is older than the fault; None: there is none.

    A step's loss tells of the weights after the step before it, so these are taken last.
    """
    steps = [step for step in checkpoint.steps(output) if step < fault.since]
    before = [step for step in steps if step < fault.since - 1]
    for step in [*reversed(before), *(step for step in steps if step not in before)]:
        state = checkpoint.at(output / checkpoint.FOLDER / f"step-{step:07d}")
        if state is not None:
            return state
    return None


def slow_down(schedule: torch.optim.lr_scheduler.LambdaLR, rates: Sequence[float], times: float) -> None:
    """Make every learning rate of a schedule `times` what it was made with; its own state holds that.

    Args:
        rates: the groups' full learning rates, as the schedule was made with.
    """
    schedule.base_lrs = [rate * times for rate in rates]
    for group, rate, factor in zip(
        schedule.optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True
    ):
        group["lr"] = rate * factor(schedule.last_epoch)
    schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]


@torch.no_grad()
def samples(
    task: Task,
    feed: Feed,
    plan: Plan | Stages | Flow,
    division: Division,
    step: int,
    losses: Accelerator | None,
) -> list[dict[str, Any]]:
    """The batch of optimiser step `step`, counted from 1, of all processes: it is a function of the step.

    Args:
        losses: computes each sample's loss with the weights as they are; None: they are left out.
    """
    found = []
    for micro, rank, mine, batch in parts(feed, plan, division, step - 1):
        whole = task.each()[0].WHOLE_STEP
        times = [None] * len(mine) if whole else task.objective.sample_t(batch.u).tolist()
        each: list[float | None] = [None] * len(mine)
        if losses is not None:
            with losses.autocast():
                each = task.evaluate(batch.to(losses.device)).float().tolist()
        about = zip(batch.names, batch.captions, mine, times, each, strict=True)
        found += [
            {
                "name": name,
                "caption": caption,
                "process": rank,
                "micro_batch": micro,
                "epoch": slot.epoch,
                "position": slot.position,
                "weight": slot.weight,
                "timestep": t,
                "loss": None if loss is None else _number(loss),
            }
            for name, caption, slot, t, loss in about
        ]
    return found


def write(output: Path, diverged: Diverged, batch: Sequence[Mapping[str, Any]], weights: int | None) -> str:
    """Write OUTPUT/bad-step-N.json: what went wrong, and the batch of the first step that shows it.

    Args:
        batch: as `samples` gives it.
        weights: the step whose weights the samples' losses were computed with; None: they are left out.

    Returns:
        Where it is, and of which samples the loss is no finite number although the weights were good.
    """
    fault = diverged.fault
    place = output / f"bad-step-{fault.since}.json"
    about = {
        "step": fault.since,
        "found_at_step": fault.step,
        "what": fault.what,
        "figures": {name: _number(value) for name, value in diverged.figures.items()},
        "losses_with_weights_of_step": weights,
        "samples": list(batch),
    }
    write_whole(place, json.dumps(about, indent=2, allow_nan=False) + "\n")
    told = f"Names, captions and timesteps of its {len(batch)} samples: {place}."
    blamed = [one["name"] for one in batch if isinstance(one["loss"], str)]
    if blamed:
        more = f" and {len(blamed) - 1} others" if len(blamed) > 1 else ""
        told += (
            f" With the weights of step {weights}, too, the loss is no finite number of {blamed[0]}{more}."
        )
    return told


def ending(fault: Fault, policy: str, precise: bool, times: int, good: State | None, described: str) -> str:
    """What the user reads when the guard ends a run.

    Args:
        precise: the run computes in float32.
        times: how often it went back.
        good: the last good checkpoint.
    """
    kept = (
        "there is no checkpoint before it" if good is None else f"the last good checkpoint is {good.folder}"
    )
    again = f" after going back {times} {'time' if times == 1 else 'times'}" if times else ""
    tries = [one for one in fault.advice if not (precise and one in guard.PRECISION)]
    if policy == "stop" and fault.curable:
        tries.append("train.guard: back, which goes back and lowers the rate by itself")
    lines = [f"step {fault.step}: {fault.what}. Training stopped{again}; {kept}.", described]
    lines.append(f"What may help: {'; '.join(tries)}.")
    return "\n".join(line for line in lines if line)


def _number(value: float) -> float | str:
    """JSON has no word for what is not finite."""
    return value if math.isfinite(value) else str(value)

"""The only training loop."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from tuner import checkpoint, counted, optimiser, sample
from tuner.batch import Batch
from tuner.checkpoint import Parts, State
from tuner.data.loader import Division, Feed, stream
from tuner.data.plan import Plan, Slot
from tuner.ema import Ema
from tuner.errors import UserError
from tuner.evaluate.measures import probe
from tuner.family import Family
from tuner.log import Log
from tuner.method import Card, Method
from tuner.progress import Progress
from tuner.recipe import Recipe
from tuner.signals import Stop
from tuner.task import Task
from tuner.training import Train

FLUSH = 10
"""Steps between two looks at the losses: each look waits for the device."""


class TrainingError(UserError):
    """Training cannot go on; the message says why and what was kept."""


@dataclass(frozen=True)
class Run:
    """What a run holds while it trains."""

    recipe: Recipe
    steps: int
    accelerator: Accelerator
    family: Family
    methods: list[Method]
    task: Task
    plan: Plan
    data: Feed
    division: Division
    heldout: Feed | None
    workers: int
    output: Path
    fingerprint: dict[str, Any]  # what a checkpoint must agree with to be continued
    card: Card

    def previews(self) -> sample.Previews | None:
        """What makes the previews, on the process that does."""
        about = self.recipe.preview
        if not about.every or not self.accelerator.is_main_process:
            return None
        size = self.data.size
        sampler = sample.Sampler(
            self.task, self.accelerator, size, about.steps, about.guidance, about.negative, about.seed
        )
        return sample.Previews(sampler, self.heldout, about.prompts, about.count)


def train(run: Run, log: Log, state: State | None, stop: Stop) -> bool:
    """Train from `state` (None: from the start) to the run's last step.

    Returns:
        False if the run was asked to stop before; a checkpoint is written then.

    Raises:
        TrainingError: the loss or the gradient is no finite number.
    """
    recipe, accelerator = run.recipe.train, run.accelerator
    made = build_optimiser(run.methods, recipe)
    averaging = optimiser.Averaging(made)
    schedule = optimiser.schedule(
        made, recipe.schedule, recipe.warmup, run.steps, **recipe.schedule_options()
    )
    ema = None if recipe.ema is None else Ema(run.task.named_trained(), recipe.ema)
    task, prepared = accelerator.prepare(run.task, made)
    parts = Parts(run.task, made, schedule, ema, accelerator.scaler)
    start = 0 if state is None else checkpoint.restore(state, parts)
    batches = stream(
        run.data, run.plan, run.division, start, run.steps, run.workers, accelerator.device.type == "cuda"
    )
    meter, previews = Meter(accelerator, log), run.previews()
    with Progress("training", run.steps, start) as progress:
        for done in range(start + 1, run.steps + 1):
            loss, figures = _step(run, task, prepared, batches, done - 1)
            meter.add(done, {"loss": loss, **figures}, float(schedule.get_last_lr()[0]))
            schedule.step()
            if ema is not None:
                ema.update(done)
            stopping = (done % FLUSH == 0 or accelerator.num_processes == 1) and stop.agreed(accelerator)
            # Before a look, so that the log's lines come in the same order however often a run is stopped.
            if done % FLUSH == 0 or done in (start + 1, run.steps) or stopping or looks(run, done):
                meter.flush(progress.images_per_second)
            progress.update(done, meter.last, run.plan.batch_size)
            if looks(run, done):
                with nullcontext() if ema is None else ema.swap(), averaging.swap():
                    _settle(run, ema, averaging)
                    _look(run, log, previews, done)
            if stopping or done == run.steps or due(done, recipe.checkpoint.every):
                meter.flush(progress.images_per_second)
                checkpoint.write(
                    run.output, done, parts, run.fingerprint, recipe.checkpoint.keep, accelerator
                )
            if stopping and done < run.steps:
                return False
    if ema is not None:
        ema.keep()
    averaging.keep()
    _settle(run, ema, averaging)
    return True


def _settle(run: Run, ema: Ema | None, averaging: optimiser.Averaging) -> None:
    """Averages of weights, where there are some, are put where the weights have to stay, too."""
    if ema is not None or averaging.kept:
        for method in run.methods:
            method.after_update()


def build_optimiser(methods: Sequence[Method], recipe: Train) -> torch.optim.Optimizer:
    """The recipe's optimiser over what the methods train.

    Raises:
        UserError: there is no such optimiser, or it does not take these options.
    """
    groups = [group for method in methods for group in method.groups(recipe.learning_rate)]
    return optimiser.build(groups, **recipe.optimiser.resolved(), learning_rate=recipe.learning_rate)


def _step(
    run: Run, task: nn.Module, prepared: Any, batches: Iterator[Batch], step: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """One optimiser step over all its micro-batches; this process's part of the loss, and the figures."""
    accelerator, accumulate = run.accelerator, run.division.accumulate
    for method in run.methods:
        method.train_mode(True)
    total = torch.zeros((), device=accelerator.device)
    figures: dict[str, Tensor] = {}
    for micro in range(accumulate):
        batch = next(batches).to(accelerator.device)
        counted.seed_libraries(run.recipe.train.seed, step, micro, run.division.rank)
        with accelerator.no_sync(task) if micro + 1 < accumulate else nullcontext():
            loss, figures = task(batch)
            # DDP takes the mean over processes; the loss is this process's part of the mean over the batch.
            accelerator.backward(loss * run.division.processes)
        total += loss.detach()
    for method in run.methods:
        method.before_update(step)
    if run.recipe.train.clip is not None:
        figures["gradient_norm"] = accelerator.clip_grad_norm_(run.task.trained(), run.recipe.train.clip)
    prepared.step()
    prepared.zero_grad()
    for method in run.methods:
        method.after_update()
        figures |= method.figures()
    return total, figures


def due(done: int, every: int | None) -> bool:
    """Whether something that is done every so many steps (0 or None: never) is due."""
    return bool(every) and done % every == 0  # type: ignore[operator]


def looks(run: Run, done: int) -> list[str]:
    """What is due after a step besides training; the same on every process."""
    recipe = run.recipe
    wanted = {
        "validation": due(done, recipe.validation.every) and run.heldout is not None,
        "preview": bool(recipe.preview.every) and (due(done, recipe.preview.every) or done == run.steps),
        "export": due(done, recipe.export.every),
    }
    return [name for name, is_due in wanted.items() if is_due]


def _look(run: Run, log: Log, previews: sample.Previews | None, done: int) -> None:
    """Do what is due after a step besides training."""
    recipe, wanted = run.recipe, looks(run, done)
    for method in run.methods:
        method.train_mode(False)
    if "validation" in wanted:
        assert run.heldout is not None
        log.scalars(done, {"validation_loss": validate(run, run.heldout)})
    if run.accelerator.is_main_process:
        if "preview" in wanted:
            assert previews is not None
            pictures = previews.write(run.output / "previews" / f"step-{done:06d}.png")
            figures = probe(list(recipe.method), previews.conditions, pictures)
            if figures:
                log.scalars(done, figures)
        if "export" in wanted:
            run.task.export(run.output / "export" / f"step-{done}", run.card)
    run.accelerator.wait_for_everyone()


def validate(run: Run, heldout: Feed) -> float:
    """The mean loss over a fixed grid: held-out samples, each with the same noise and timestep every time.

    The timesteps of n samples are the midpoints of n equal parts of what training draws from.
    """
    count = min(run.recipe.validation.samples, len(heldout.samples))
    feed = replace(heldout, u=lambda slot: (slot.position + 0.5) / count)
    size = max(1, min(run.plan.batch_size, 64))
    total = torch.zeros((), dtype=torch.float64)
    division = run.division
    for number, start in enumerate(range(0, count, size)):
        if number % division.processes != division.rank:
            continue
        slots = [Slot(i, 0, i, 1.0) for i in range(start, min(start + size, count))]
        batch = feed.batch(slots, float(len(slots))).to(run.accelerator.device)
        with run.accelerator.autocast():
            total += run.task.evaluate(batch).double().sum().cpu()
    return float(run.accelerator.reduce(total.to(run.accelerator.device), "sum")) / count


class Meter:
    """Collects what steps report and writes it in lots, so that the device is waited for seldom."""

    def __init__(self, accelerator: Accelerator, log: Log) -> None:
        self.accelerator, self.log = accelerator, log
        self.rows: list[tuple[int, dict[str, Tensor], float]] = []
        self.last = math.nan

    def add(self, step: int, figures: dict[str, Tensor], learning_rate: float) -> None:
        """Keep a step's figures; tensors stay on the device."""
        self.rows.append((step, figures, learning_rate))

    def flush(self, speed: float) -> None:
        """Write what was kept.

        Raises:
            TrainingError: a loss or a gradient norm is not finite.
        """
        if not self.rows:
            return
        names = list(self.rows[0][1])
        table = torch.stack(
            [torch.stack([figures[n].detach().float() for n in names]) for _, figures, _ in self.rows]
        )
        summed = self.accelerator.reduce(table, "sum").cpu()
        for (step, _, rate), values in zip(self.rows, summed.tolist(), strict=True):
            row = dict(zip(names, values, strict=True))
            others = {n: v / self.accelerator.num_processes for n, v in row.items() if n != "loss"}
            self.log.scalars(
                step, {"loss": row["loss"], **others, "learning_rate": rate, "images_per_second": speed}
            )
            self.last = row["loss"]
            if not all(math.isfinite(v) for v in row.values()):
                wrong = ", ".join(f"{n} {v}" for n, v in row.items())
                raise TrainingError(
                    f"step {step}: no finite number ({wrong}). Training stopped; "
                    "checkpoints before it are kept. Try a lower train.learning_rate, a warm-up "
                    "(train.warmup), or train.precision: fp32."
                )
        self.rows.clear()

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

from tuner import checkpoint, counted, mend, optimiser, processes, sample
from tuner.batch import Batch
from tuner.checkpoint import Parts, State
from tuner.compiled import Compiling
from tuner.compiling import align
from tuner.data import encode
from tuner.data.flow import EndedError, Flow, batches, begun
from tuner.data.loader import Division, Feed, Waited
from tuner.data.plan import Plan, Slot, Stages
from tuner.ema import Ema
from tuner.errors import UserError
from tuner.evaluate.measures import probe
from tuner.family import Family
from tuner.guard import Diverged, Watch
from tuner.log import Log
from tuner.meter import Meter
from tuner.method import Card, Method
from tuner.progress import Progress, say
from tuner.recipe import Recipe
from tuner.rounding import Rounded
from tuner.signals import Stop
from tuner.task import Task
from tuner.training import Train

FLUSH = 10
"""Steps between two looks at the losses: each look waits for the device."""
ENOUGH, WAITS = 100, 0.1  # steps, and the share of their time in which data is waited for, that is told


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
    plan: Plan | Stages | Flow
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
        more = (self.data.size, about.steps, about.guidance, about.negative, about.seed)
        sampler = sample.Sampler(self.task, self.accelerator, *more)
        return sample.Previews(sampler, self.heldout, about.prompts, about.count)


@dataclass(frozen=True)
class Made:
    """What a run makes to train with."""

    log: Log
    task: nn.Module  # as accelerate prepared it
    prepared: Any  # so the optimiser
    averaging: optimiser.Averaging
    parts: Parts
    rates: list[float]  # the groups' learning rates, as the recipe has them
    watch: Watch
    meter: Meter
    previews: sample.Previews | None
    compiled: Compiling


def train(run: Run, log: Log, state: State | None, stop: Stop) -> bool:
    """Train from `state` (None: from the start) to the run's last step.

    Returns:
        False if the run was asked to stop before; a checkpoint is written then.

    Raises:
        TrainingError: the run went wrong (tuner/guard.py), and the recipe lets it end there.
    """
    made = make(run, log)
    done = 0 if state is None else checkpoint.restore(state, made.parts)
    align(made.parts.optimiser)
    earlier = None if state is None else state.fingerprint.get("made with", {}).get("compile")
    if told := made.compiled.start(earlier):
        _tell(run, made, done, told)
    if state is None and run.accelerator.is_main_process:
        mend.clear(run.output)
    if state is None and run.recipe.train.guard.policy == "back":
        _keep(run, made, 0)
    looked = [run.heldout] if run.heldout is not None and run.recipe.validation.every else []
    aside = encode.unneeded([run.data, *looked], run.family)
    if aside and run.accelerator.device.type != "cpu":
        say(f"{', '.join(aside)}: what they encode is cached, so they wait in main memory")
    with run.family.without(aside):
        while True:
            try:
                finished = _steps(run, made, done, stop)
                break
            except Diverged as diverged:
                done = _mend(run, made, diverged)
    if finished:
        if made.parts.ema is not None:
            made.parts.ema.keep()
        made.averaging.keep()
        _settle(run, made)
    return finished


def make(run: Run, log: Log) -> Made:
    recipe, accelerator = run.recipe.train, run.accelerator
    for method in run.methods:
        method.train_mode(True)
    watch = Watch(run.task, accelerator.scaler, recipe.guard.policy != "off")
    run.task.share_out(accelerator)
    made = build_optimiser(run.methods, recipe)
    averaging = optimiser.Averaging(made)
    schedule = optimiser.schedule(
        made, recipe.schedule, recipe.warmup, run.steps, **recipe.schedule_options()
    )
    ema = None if recipe.ema is None else Ema(run.task.named_trained(), recipe.ema)
    task, prepared = run.task.prepared(accelerator, made)
    parts = Parts(run.task, made, schedule, ema, accelerator.scaler, watch)
    meter = Meter(accelerator, log, watch)
    return Made(
        log,
        task,
        prepared,
        averaging,
        parts,
        [float(rate) for rate in schedule.base_lrs],
        watch,
        meter,
        run.previews(),
        Compiling.of(run.recipe, run.task, run.plan, run.division, accelerator, run.steps),
    )


def _steps(run: Run, made: Made, start: int, stop: Stop) -> bool:
    """Train from step `start` to the last one; False if asked to stop before.

    Raises:
        Diverged: the guard found something.
    """
    recipe, accelerator, parts, meter = run.recipe.train, run.accelerator, made.parts, made.meter
    asked = (run.division, start, run.steps, run.workers, accelerator.device.type == "cuda")
    with stop.at_once():  # nothing would be lost
        coming = Waited(begun(batches(run.data, run.plan, *asked)))
    meter.waits = coming.lately
    with Progress("training", run.steps, start) as progress:
        for done in range(start + 1, run.steps + 1):
            try:
                loss, figures = one_step(run, made, coming, done - 1)
            except EndedError:
                if accelerator.num_processes == 1 and done - 1 > start:  # others would have to know of it
                    meter.flush(progress.images_per_second)
                    meter.check_weights(done - 1)
                    _keep(run, made, done - 1)
                raise
            meter.add(done, {"loss": loss, **figures}, float(parts.schedule.get_last_lr()[0]))
            processes.brisk()  # the first step, which may wait for data or a compiler, is done
            parts.schedule.step()
            if parts.ema is not None:
                parts.ema.update(done)
            stopping = stop.agreed(accelerator)
            keeping = stopping or done == run.steps or due(done, recipe.checkpoint.every)
            # Before a look, so that the log's lines come in the same order however often a run is stopped.
            if (
                waits_for_nothing(accelerator)
                or done % FLUSH == 0
                or done == start + 1
                or keeping
                or looks(run, done)
            ):
                meter.flush(progress.images_per_second)
            if told := made.compiled.tick(done):
                meter.flush(progress.images_per_second)
                _tell(run, made, done, told)
            if keeping:
                meter.check_weights(done)
            progress.update(done, meter.last, run.plan.pictures(done - 1))
            if looks(run, done):
                with nullcontext() if parts.ema is None else parts.ema.swap(), made.averaging.swap():
                    _settle(run, made)
                    with processes.patient(), run.task.whole():
                        _look(run, made, done)
            if keeping:
                _keep(run, made, done)
            if stopping and done < run.steps:
                return False
    if run.steps - start >= ENOUGH and coming.all() > WAITS:
        say(f"the steps waited {coming.all():.0%} of the time for data: raise data.workers ({run.workers})")
    return True


def _tell(run: Run, made: Made, done: int, told: str) -> None:
    """Say what was decided about compiling; checkpoints have it from now on, too."""
    run.fingerprint["made with"]["compile"] = made.compiled.state
    say(told)
    made.log.event(done, told)


def _keep(run: Run, made: Made, done: int) -> None:
    """Write a checkpoint."""
    checkpoint.write(run.output, done, made.parts, run.fingerprint, run.recipe, run.accelerator)


def _mend(run: Run, made: Made, diverged: Diverged) -> int:
    """Go back to the last good checkpoint with a lower learning rate, as often as the recipe says.

    The order of the data stays, and so does every random number: only the rate is another. The checkpoint is
    written again with it, so that a run that is stopped afterwards continues with that rate, too.

    Returns:
        The step to go on from.

    Raises:
        TrainingError: the run has to end.
    """
    fault, about, watch, main = diverged.fault, run.recipe.train.guard, made.watch, run.accelerator
    times, slowed = watch.times, watch.slowed
    good = checkpoint.agreed(lambda: mend.last_good(run.output, fault))
    step = None if good is None else checkpoint.restore(good, made.parts)
    align(made.parts.optimiser)
    with run.task.whole():
        described = _describe(run, diverged, step) if fault.curable and main.is_main_process else ""
    main.wait_for_everyone()  # all have read the checkpoint, and the batch is written down
    if step is None or not fault.curable or about.policy != "back" or times >= about.times:
        made.log.event(fault.step, f"stopped at step {fault.step}: {fault.what}")
        precise = main.mixed_precision == "no"
        raise TrainingError(mend.ending(fault, about.policy, precise, times, good, described))
    watch.times, watch.slowed = times + 1, slowed * about.factor
    mend.slow_down(made.parts.schedule, made.rates, watch.slowed)
    happened = (
        f"step {fault.step}: {fault.what}; went back to step {step} "
        f"with the learning rate times {watch.slowed:g} ({watch.times} of {about.times})"
    )
    say(f"{happened}\n{described}")
    if main.is_main_process:
        made.log.back(step, happened)
        checkpoint.drop_ahead(run.output, step)
    _keep(run, made, step)
    return step


def _describe(run: Run, diverged: Diverged, weights: int | None) -> str:
    """Write the bad batch down, with its losses under the weights of a step; says where."""
    for method in run.methods:
        method.train_mode(False)
    losses = None if weights is None else run.accelerator
    batch = mend.samples(run.task, run.data, run.plan, run.division, diverged.fault.since, losses)
    return mend.write(run.output, diverged, batch, weights)


def _settle(run: Run, made: Made) -> None:
    """Averages of weights, where there are some, are put where the weights have to stay, too."""
    if made.parts.ema is not None or made.averaging.kept:
        for method in run.methods:
            method.after_update()


def build_optimiser(methods: Sequence[Method], recipe: Train) -> torch.optim.Optimizer:
    """The recipe's optimiser over what the methods train.

    Raises:
        UserError: there is no such optimiser, or it does not take these options.
    """
    groups = [group for method in methods for group in method.groups(recipe.learning_rate)]
    try:
        made = optimiser.build(groups, **recipe.optimiser.resolved(), learning_rate=recipe.learning_rate)
        return made if recipe.trained_precision == "fp32" else Rounded(made, recipe.seed)
    except optimiser.OptimiserError as error:
        raise UserError(f"train.optimiser: {error}") from error


def one_step(run: Run, made: Made, batches: Iterator[Batch], step: int) -> tuple[Tensor, dict[str, Tensor]]:
    """One optimiser step over all its micro-batches; this process's part of the loss, and the figures."""
    accelerator, accumulate = run.accelerator, run.division.accumulate
    for method in run.methods:
        if not method.training:  # since a look; it goes through every layer
            method.train_mode(True)
    total = torch.zeros((), device=accelerator.device)
    figures: dict[str, Tensor] = {}
    for micro in range(accumulate):
        batch = next(batches).to(accelerator.device)
        counted.seed_libraries(run.recipe.train.seed, step, micro, run.division.rank)
        last = micro + 1 == accumulate
        with run.task.gathering(made.task, accelerator, last), made.compiled.on(batch):
            loss, figures = made.task(batch)
            # DDP takes the mean over processes; the loss is this process's part of the mean over the batch.
            accelerator.backward(loss * run.division.processes)
        total += loss.detach()
    made.watch.gradients()
    for method in run.methods:
        method.before_update(step)
    made.watch.kept()
    # Without a limit it is measured all the same: a gradient that is not finite is found here first.
    most = math.inf if run.recipe.train.clip is None else run.recipe.train.clip
    figures["gradient_norm"] = run.task.clip(accelerator, most)
    made.prepared.step()
    made.prepared.zero_grad()
    for method in run.methods:
        method.after_update()
        figures |= method.figures()
    return total, figures


def waits_for_nothing(accelerator: Accelerator) -> bool:
    """Whether what a step reports can be looked at after each one, as it is there already."""
    return bool(accelerator.num_processes == 1 and accelerator.device.type == "cpu")


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


def _look(run: Run, made: Made, done: int) -> None:
    """Do what is due after a step besides training."""
    recipe, wanted, log, previews = run.recipe, looks(run, done), made.log, made.previews
    for method in run.methods:
        method.train_mode(False)
    if "validation" in wanted:
        assert run.heldout is not None
        log.scalars(done, {"validation_loss": validate(run, run.heldout)})
    if run.accelerator.is_main_process and {"preview", "export"} & set(wanted):
        with run.family.complete():
            if "preview" in wanted:
                assert previews is not None
                pictures = previews.write(run.output / "previews" / f"step-{done:06d}.png")
                if figures := probe(list(recipe.method), previews.conditions, pictures):
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
    for number, start in enumerate(range(0, count, size)):
        if number % run.division.processes != run.division.rank:
            continue
        slots = [Slot(i, 0, i, 1.0) for i in range(start, min(start + size, count))]
        batch = feed.batch(slots, float(len(slots))).to(run.accelerator.device)
        with run.accelerator.autocast():
            total += run.task.evaluate(batch).double().sum().cpu()
    return float(run.accelerator.reduce(total.to(run.accelerator.device), "sum")) / count

"""One run, from the recipe to the report; reads top to bottom."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

from tuner import build, checkpoint, device, loop, report, resume, sample, verify
from tuner.errors import UserError
from tuner.evaluate.measures import Look, measure, weights
from tuner.export.files import write_whole
from tuner.log import FILE as METRICS
from tuner.log import FINISHED, Log
from tuner.log import read as read_log
from tuner.progress import say
from tuner.recipe import Recipe
from tuner.signals import Stop


def train(recipe: Recipe) -> int:
    """Train a recipe: load, train, export, verify, evaluate, report.

    Returns:
        The exit code: 0, or 130 after Ctrl-C (a checkpoint is written then).

    Raises:
        UserError: what the user can mend.
    """
    started = time.monotonic()
    accelerator = device.start(recipe.train.precision, recipe.train.threads)
    if Path(recipe.output).exists() and not Path(recipe.output).is_dir():
        raise UserError(f"output: {recipe.output} is a file; expected a folder, or nothing yet")
    run = build.build(recipe, accelerator)
    output = run.output
    if resume.finished(run):
        say(
            f"{output}: finished before with this recipe, base and data; nothing to do. "
            f"The report: {output / 'report.html'}"
        )
        return 0
    state = resume.start_from(run)
    if accelerator.is_main_process:
        resume.clear(output, state)
        write_whole(output / "recipe.yaml", recipe.resolved_yaml())
        write_whole(output / "versions.json", json.dumps(build.versions(), indent=2))
        if run.data.left_out:
            write_whole(output / "left_out.txt", "\n".join(run.data.left_out) + "\n")
    accelerator.wait_for_everyone()
    done_before = None if state is None else state.step
    config = recipe.resolved()
    with Log(
        output, recipe.log.tensorboard, recipe.log.wandb, accelerator.is_main_process, done_before, config
    ) as log:
        with Stop() as stop:
            done = loop.train(run, log, state, stop)
        if accelerator.is_main_process:
            if done:
                _finish(run, log)
            records = read_log(output / METRICS)
            before = sum(seconds for _, seconds in records.scalars.get("seconds", [])[-1:])
            log.scalars(records.last_step, {"seconds": before + time.monotonic() - started})
            if done:
                log.event(run.steps, FINISHED)
    if accelerator.is_main_process:
        page = report.write(output)
        if done:
            write_whole(output / resume.DONE, json.dumps(resume.summary(run), indent=2, sort_keys=True))
            say(f"finished in {time.monotonic() - started:.0f} s: {page}")
        else:
            say(f"stopped; the same command continues from the checkpoint in {output / checkpoint.FOLDER}")
    accelerator.wait_for_everyone()
    return 130 if not done and stop.signal == signal.SIGINT else 0


def _finish(run: loop.Run, log: Log) -> None:
    """Export, prove, measure."""
    say("exporting")
    files = export(run)
    told = read_log(run.output / METRICS).events  # by an attempt that did not come to its end
    for line in verify.check(run.family, run.methods, files, run.card):
        say(f"verified: {line}")
        if (run.steps, f"verified: {line}") not in told:
            log.event(run.steps, f"verified: {line}")
    for name, values in weights(run.task, list(run.recipe.method)).items():
        log.measures(name, values)
    about = run.recipe.evaluate
    if about.samples and run.heldout is not None:
        sampler = sample.Sampler(
            run.task, run.accelerator, run.data.size, about.steps, about.guidance, "", about.seed
        )
        curves = read_log(run.output / METRICS).scalars
        look = Look(sampler, run.data.samples, run.heldout, about.samples, run.output, curves)
        for name, values in measure(look, list(run.recipe.method)).items():
            log.measures(name, values)
            if "verdict" in values:
                say(f"{name}: {values['verdict']}")


def export(run: loop.Run) -> list[Path]:
    """Write OUTPUT/export/ with every method's files."""
    return run.task.export(run.output / "export", run.card)

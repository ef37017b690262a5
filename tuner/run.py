"""One run, from the recipe to the report; reads top to bottom."""

from __future__ import annotations

import json
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from tuner import build, device, disk, loop, memory, processes, report, resume, sample, surroundings, verify
from tuner.disk import DiskError
from tuner.errors import UserError
from tuner.evaluate.measures import Look, measure, weights
from tuner.export.files import write_whole
from tuner.log import FILE as METRICS
from tuner.log import FINISHED, Log
from tuner.log import read as read_log
from tuner.progress import say
from tuner.recipe import Recipe
from tuner.signals import Stop, Stopped


def train(recipe: Recipe) -> int:
    """Train a recipe: load, train, export, verify, evaluate, report.

    Returns:
        The exit code: 0, also after SIGTERM or SIGUSR1, or 130 after Ctrl-C; while it trains a checkpoint is
        written then. 1 where another process of the run is gone.

    Raises:
        UserError: what the user can mend.
    """
    output = Path(recipe.output)
    disk.check_writable(output, "output")
    surroundings.check(recipe)
    with Stop() as stop:
        try:
            return _train(recipe, stop)
        except Stopped:
            return _stopped(recipe, stop)
        except KeyboardInterrupt:
            say(f"stopped at once. {resume.kept(output)}")
            return 130
        except DiskError as error:
            raise DiskError(error.path, error.reason, resume.kept(output)) from error
        except OSError as error:
            if error.errno not in disk.OURS:
                raise
            place = error.filename or f"{output} or the cache"
            raise UserError(f"{place}: {error.strerror}. {resume.kept(output)}") from error
        except RuntimeError as error:
            if stop.signal is not None:  # the processes that it talked to have stopped
                return _stopped(recipe, stop)
            if (reason := processes.lost(error)) is not None:
                return _alone(recipe, reason)
            if "deterministic" not in str(error) or not recipe.train.deterministic:
                raise
            raise UserError(f"train.deterministic: {str(error).splitlines()[0]}; set false") from error


def _stopped(recipe: Recipe, stop: Stop) -> int:
    """Say how a run that was asked to stop goes on; its exit code."""
    say(f"stopped. {resume.kept(Path(recipe.output))}{_anew(recipe)}")
    return 130 if stop.signal == signal.SIGINT else 0


def _alone(recipe: Recipe, reason: str) -> int:
    """Say how a run goes on of which a process is gone; 1, so that torchrun starts it again if it may."""
    if processes.first("alone"):
        kept = f"{resume.kept(Path(recipe.output))}{_anew(recipe)}"
        print(f"a process of this run is gone, or cannot be reached ({reason}). {kept}", file=sys.stderr)
    return 1


def _anew(recipe: Recipe) -> str:
    if recipe.train.resume != "never":
        return ""
    return " Leave out train.resume=never, which would start anew."


def _train(recipe: Recipe, stop: Stop) -> int:
    """The run itself, which a signal ends at once but for the training."""
    started = time.monotonic()
    with stop.at_once():
        about = recipe.train
        accelerator = device.start(about.precision, about.threads, about.deterministic)
        run = build.build(recipe, accelerator)
        output = run.output
        resume.check_alike(run)
        if resume.finished(run):
            say(
                f"{output}: finished before with this recipe, base and data; nothing to do. "
                f"The report: {output / 'report.html'}"
            )
            return 0
        state = resume.start_from(run)
        resume.check_room(run, state)
        if accelerator.is_main_process:
            resume.clear(output, state)
            write_whole(output / "recipe.yaml", recipe.resolved_yaml())
            write_whole(output / "versions.json", json.dumps(build.versions(), indent=2))
            if run.data.left_out:
                write_whole(output / "left_out.txt", "\n".join(run.data.left_out) + "\n")
        processes.check_same_folder(output, "output", resume.TOGETHER)
        accelerator.wait_for_everyone()
    done_before = None if state is None else state.step
    main = accelerator.is_main_process
    with Log(output, recipe.log.tensorboard, recipe.log.wandb, main, done_before, recipe.resolved()) as log:
        done = loop.train(run, log, state, stop)
        whole = run.task.whole() if done else nullcontext()
        with processes.patient(), stop.at_once() if done else nullcontext(), whole:
            if main:
                _end(run, log, done, started)
            accelerator.wait_for_everyone()
    return 0 if done else _stopped(recipe, stop)


def _end(run: loop.Run, log: Log, done: bool, started: float) -> None:
    """Export and measure what came to its end; the report of what did not, too."""
    if done:
        _finish(run, log)
    records = read_log(run.output / METRICS)
    before = sum(seconds for _, seconds in records.scalars.get("seconds", [])[-1:])
    log.scalars(records.last_step, {"seconds": before + time.monotonic() - started})
    if done:
        log.event(run.steps, FINISHED)
    page = report.write(run.output)
    if done:
        write_whole(run.output / resume.DONE, json.dumps(resume.summary(run), indent=2, sort_keys=True))
        say(f"finished in {time.monotonic() - started:.0f} s: {page}")


def _finish(run: loop.Run, log: Log) -> None:
    """Export, prove, measure."""
    say("exporting")
    files = export(run)
    told = read_log(run.output / METRICS).events  # by an attempt that did not come to its end
    for line in _proved(run, files):
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


def _proved(run: loop.Run, files: list[Path]) -> list[str]:
    """What is proved of the exports, line by line."""
    place = memory.place_of_proof(run.recipe, run.accelerator)
    _move(run, place)
    try:
        return verify.check(run.family, run.methods, files, run.card)
    finally:
        _move(run, run.accelerator.device)


def _move(run: loop.Run, device: torch.device) -> None:
    run.family.to(device)
    run.task.to(device)


def export(run: loop.Run) -> list[Path]:
    """Write OUTPUT/export/ with every method's files."""
    return run.task.export(run.output / "export", run.card)

"""One run, from the recipe to the report; reads top to bottom."""

from __future__ import annotations

import importlib
import json
import shutil
import signal
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator

from tuner import base, checkpoint, device, loop, report, sample, verify
from tuner.checkpoint import State
from tuner.data import assemble
from tuner.data.cache import Hashes, default_folder
from tuner.data.captions import CaptionRule
from tuner.data.loader import Division, Feed
from tuner.data.plan import Plan
from tuner.data.sources import Sample
from tuner.errors import UserError
from tuner.evaluate.measures import Look, measure, measured
from tuner.export import metadata
from tuner.export.files import write_whole
from tuner.family import Family
from tuner.log import FILE as METRICS
from tuner.log import FINISHED, Log
from tuner.log import read as read_log
from tuner.method import Card, Method
from tuner.objective import Objective
from tuner.progress import say
from tuner.recipe import Recipe, micro_batch
from tuner.signals import Stop
from tuner.task import Task

DONE = "finished.json"
VERSIONS = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy")


def train(recipe: Recipe, source: Path) -> int:
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
    run = build(recipe, accelerator)
    output = run.output
    if _finished(run):
        say(
            f"{output}: finished before with this recipe, base and data; nothing to do. "
            f"The report: {output / 'report.html'}"
        )
        return 0
    state = _resume(run)
    if accelerator.is_main_process:
        _clear(output, state)
        write_whole(output / "recipe.yaml", recipe.resolved_yaml())
        write_whole(output / "versions.json", json.dumps(versions(), indent=2))
    accelerator.wait_for_everyone()
    resume = None if state is None else state.step
    config = recipe.resolved()
    with Log(
        output, recipe.log.tensorboard, recipe.log.wandb, accelerator.is_main_process, resume, config
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
            write_whole(output / DONE, json.dumps(_summary(run), indent=2, sort_keys=True))
            say(f"finished in {time.monotonic() - started:.0f} s: {page}")
        else:
            say(f"stopped; the same command continues from the checkpoint in {output / checkpoint.FOLDER}")
    accelerator.wait_for_everyone()
    return 130 if not done and stop.signal == signal.SIGINT else 0


def build(recipe: Recipe, accelerator: Accelerator) -> loop.Run:
    """Everything a run needs before its first step."""
    seed = recipe.train.seed
    processes, rank = accelerator.num_processes, accelerator.process_index
    micro_batch(recipe, processes)
    hashes = Hashes(_cache(recipe) or default_folder())
    kinds = {name: importlib.import_module(f"tuner.methods.{name}").METHOD for name in recipe.method}
    needs = sorted({need for kind in kinds.values() for need in kind.NEEDS})
    family = base.load(recipe.base.path, recipe.base.revision, recipe.base.new, needs, seed, hashes)
    family.to(accelerator.device)
    methods: list[Method] = [kind(recipe.method[name], family, seed) for name, kind in kinds.items()]
    _check_size(recipe, family)
    _check_looks(recipe, methods)
    loop.build_optimiser(methods, recipe.train)  # now, because a mistake is told before anything is written

    places = [(source.path, source.repeats) for source in recipe.data.source]
    samples, times = assemble.read_sources(places, accelerator.is_main_process, accelerator.wait_for_everyone)
    plan = Plan(times, recipe.train.batch_size, seed)
    wanted = _wanted(recipe, methods, accelerator)
    _check_captions(methods, samples, wanted.captions)
    data = assemble.feed(samples, wanted, family, hashes)
    heldout = _heldout(recipe, wanted, accelerator, family, hashes)

    try:
        objective = Objective.from_scheduler_config(family.scheduler_config, **recipe.objective.options())
    except ValueError as error:
        raise UserError(f"objective: {error}") from error
    task = Task(family, methods, objective).to(accelerator.device)
    if accelerator.mixed_precision != "no":
        family.cast(device.DTYPES[accelerator.mixed_precision], task.trained())
    steps = recipe.train.steps or (recipe.train.epochs or 0) * plan.steps_per_epoch
    digests = {"base": family.digests, "data": assemble.digest(samples, hashes)}
    fingerprint = {
        "recipe": recipe.decisive(),
        **digests,
        "threads": torch.get_num_threads(),
        "precision": str(accelerator.mixed_precision),
    }
    _announce(recipe, family, task, plan, steps, accelerator)
    return loop.Run(
        recipe,
        steps,
        accelerator,
        family,
        methods,
        task,
        plan,
        data,
        Division(recipe.train.accumulate, processes, rank),
        heldout,
        recipe.data.workers or 0,
        Path(recipe.output),
        fingerprint,
        _card(recipe, family, objective, methods, digests),
    )


def _announce(
    recipe: Recipe, family: Family, task: Task, plan: Plan, steps: int, accelerator: Accelerator
) -> None:
    """One line that says what the run will do."""
    where = f"{accelerator.device.type} x {accelerator.num_processes}"
    if accelerator.device.type == "cpu":
        where += f" ({torch.get_num_threads()} threads)"
    trained = sum(parameter.numel() for parameter in task.trained())
    say(
        f"{recipe.name}: {' + '.join(recipe.method)} on {family.title} ({family.name}), "
        f"{len(plan.entries)} samples an epoch, {steps} steps of {plan.batch_size} pictures "
        f"({steps / plan.steps_per_epoch:.3g} epochs), {trained:,} trained numbers, "
        f"{accelerator.mixed_precision.replace('no', 'fp32')}, {where}"
    )


def _check_size(recipe: Recipe, family: Family) -> None:
    """Raises UserError where the base does not take pictures of this resolution."""
    side, networks = recipe.data.resolution, family.modules()
    if "vae" in networks and side % family.factor:
        raise UserError(
            f"data.resolution: {side} is no multiple of {family.factor}, the autoencoder's factor"
        )
    if "image_encoder" in networks:
        fixed = int(cast(Any, networks["image_encoder"]).config.image_size)
        if side != fixed:
            raise UserError(
                f"data.resolution: {side}, but the base's image encoder takes {fixed} pixels only"
            )


def _check_looks(recipe: Recipe, methods: list[Method]) -> None:
    """Raises UserError where pictures or measures are asked for that there cannot be."""
    names, preview = " + ".join(recipe.method), recipe.preview
    pictures = not any(method.WHOLE_STEP for method in methods)
    problems = []
    if preview.every and not pictures:
        problems.append(f"preview.every: method {names} makes no pictures from prompts; set 0")
    elif preview.every and not recipe.data.heldout:
        if any(method.condition is not None for method in methods):
            problems.append(
                "preview.every: the conditions of previews come from held-out samples: "
                "set data.heldout, or 0 here"
            )
        elif not preview.prompts:
            problems.append("preview.every: there is nothing to show: set preview.prompts or data.heldout")
    if recipe.evaluate.samples and not (pictures and measured(list(recipe.method))):
        problems.append(f"evaluate.samples: there are no measures for method {names}; set 0")
    if problems:
        raise UserError("\n".join(problems))


def _cache(recipe: Recipe) -> Path | None:
    """The cache's folder; None where nothing is cached."""
    if recipe.data.cache == "off":
        return None
    return Path(recipe.data.cache) if recipe.data.cache is not None else default_folder()


def _wanted(recipe: Recipe, methods: list[Method], accelerator: Accelerator) -> assemble.Wanted:
    """What the run asks of its data."""
    about = recipe.data.captions
    drops = [method.DROP_CAPTIONS for method in methods]
    kinds = [kind for kind in (method.condition for method in methods) if kind is not None]
    captions = CaptionRule(
        about.choose,
        tuple(about.templates),
        about.prefix,
        min(drops) if about.drop is None else about.drop,
        tuple(pair for method in methods for pair in method.replacements()),
    )
    return assemble.Wanted(
        size=recipe.data.resolution,
        seed=recipe.train.seed,
        crop=recipe.data.crop,
        flip=recipe.data.flip,
        captions=captions,
        condition=kinds[0] if kinds else None,
        cache=_cache(recipe),
        latents=all(method.CACHES_LATENTS for method in methods),
        text=all(method.CACHES_TEXT for method in methods),
        rank=accelerator.process_index,
        processes=accelerator.num_processes,
        wait=accelerator.wait_for_everyone,
    )


def _heldout(
    recipe: Recipe, wanted: assemble.Wanted, accelerator: Accelerator, family: Family, hashes: Hashes
) -> Feed | None:
    """The held-out samples, as many as are looked at, without anything random in their making."""
    places = [(source.path, 1) for source in recipe.data.heldout]
    if not places:
        return None
    samples, _ = assemble.read_sources(places, accelerator.is_main_process, accelerator.wait_for_everyone)
    looked = max(
        recipe.validation.samples if recipe.validation.every else 0,
        recipe.evaluate.samples,
        recipe.preview.count,
    )
    return assemble.feed(samples[:looked], wanted.plain(), family, hashes)


def _check_captions(methods: list[Method], samples: list[Sample], rule: CaptionRule) -> None:
    """Raises UserError with the list of captions that a method cannot learn from."""
    captions = set().union(*(rule.every(s.captions) for s in samples))
    for method in methods:
        if wrong := method.check_captions(captions):
            shown = "".join(f"\n  {caption!r}" for caption in wrong[:10])
            more = f"\n  ... and {len(wrong) - 10} more" if len(wrong) > 10 else ""
            raise UserError(
                f"{len(wrong)} of {len(captions)} captions lack the token that is to be learned:{shown}{more}"
            )


def versions() -> dict[str, str]:
    """The versions of what a run's result depends on."""
    return {
        "tuner": version("tuner") if _installed() else "source",
        **{name: version(name) for name in VERSIONS},
    }


def _installed() -> bool:
    try:
        version("tuner")
    except ModuleNotFoundError:
        return False
    return True


def _card(
    recipe: Recipe, family: Family, objective: Objective, methods: list[Method], digests: Mapping[str, Any]
) -> Card:
    """What the exports say of themselves: no time, host, user, output folder or path."""
    return Card(
        recipe.name,
        device.DTYPES[recipe.export.dtype],
        {
            method.kind: metadata.build(
                method.kind,
                name=recipe.name,
                recipe_text=metadata.recipe_text(recipe.resolved()),
                versions=versions(),
                base_name=family.title,
                base_digest=json.dumps(digests["base"], sort_keys=True),
                data_digests={source.path: digests["data"] for source in recipe.data.source},
                extra={
                    "family": family.name,
                    "resolution": recipe.data.resolution,
                    "prediction_type": objective.prediction,
                    **method.labels(),
                },
            )
            for method in methods
        },
    )


def _summary(run: loop.Run) -> dict[str, Any]:
    """What a finished run is recognised by: everything its result depends on, and its looks."""
    recipe = {key: value for key, value in run.recipe.resolved().items() if key not in ("log",)}
    summary = {"steps": run.steps, "fingerprint": run.fingerprint, "recipe": recipe}
    return dict(json.loads(json.dumps(summary)))


def _finished(run: loop.Run) -> bool:
    """Whether the output holds this run, finished."""
    place = run.output / DONE
    return place.is_file() and json.loads(place.read_text(encoding="utf-8")) == _summary(run)


def _resume(run: loop.Run) -> State | None:
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


def _clear(output: Path, state: State | None) -> None:
    """Take away what an earlier run left and this one does not continue; in no other folder anything."""
    (output / DONE).unlink(missing_ok=True)
    checkpoint.drop_ahead(output, 0 if state is None else state.step)
    if state is None and (output / METRICS).is_file():
        for name in ("previews", "export", "evaluation", "tensorboard"):
            if (output / name).is_dir():
                shutil.rmtree(output / name)


def _finish(run: loop.Run, log: Log) -> None:
    """Export, prove, measure."""
    say("exporting")
    files = export(run)
    told = read_log(run.output / METRICS).events  # by an attempt that did not come to its end
    for line in verify.check(run.family, run.methods, files, run.card):
        say(f"verified: {line}")
        if (run.steps, f"verified: {line}") not in told:
            log.event(run.steps, f"verified: {line}")
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
    folder = run.output / "export"
    folder.mkdir(parents=True, exist_ok=True)
    return [path for method in run.methods for path in method.export(run.family, folder, run.card)]

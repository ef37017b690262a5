"""Everything a run needs before its first step, made from the recipe and checked."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator

from tuner import (
    __version__,
    attention,
    base,
    compiling,
    device,
    fits,
    gather,
    loop,
    memory,
    resume,
    rounding,
    verify,
)
from tuner.data.cache import Hashes, default_folder
from tuner.data.conditions import Condition, parameters
from tuner.data.flow import Flow
from tuner.data.loader import Division, Feed
from tuner.data.plan import Plan, Stages
from tuner.data.samples import Sample
from tuner.errors import UserError
from tuner.export import metadata
from tuner.family import Family, Options
from tuner.method import Card, Method
from tuner.objective import Objective
from tuner.progress import say
from tuner.recipe import Recipe, micro_batch
from tuner.task import Task
from tuner.text import WINDOW

VERSIONS = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy")


def build(recipe: Recipe, accelerator: Accelerator) -> loop.Run:
    """Everything a run needs before its first step."""
    micro_batch(recipe, accelerator.num_processes)
    fits.check_rounded(recipe, accelerator)
    memory.admit(recipe, accelerator)
    hashes = remembered(recipe)
    task = adapted(recipe, accelerator, hashes)
    family, methods = task.family, task.each()
    if device.sharding() is not None and accelerator.num_processes > 1:
        from tuner import sharding  # torch's part of it takes long to import

        sharding.check(family, methods, recipe.train, str(accelerator.mixed_precision))
    loop.build_optimiser(methods, recipe.train)  # now, because a mistake is told before anything is written

    wanted = gather.wanted(recipe, task, accelerator)
    gathered = gather.gather(recipe, task, wanted, accelerator)
    heldout = gather.heldout(recipe, task, wanted, accelerator)
    if accelerator.mixed_precision != "no":
        # All of a network of which a part is trained stays in float32, if that part does.
        kept = task.parameters() if recipe.train.trained_precision == "fp32" else ()
        family.cast(device.DTYPES[accelerator.mixed_precision], kept)
    if accelerator.device.type == "cuda":
        _arrange(recipe, family, methods, accelerator)
    run = joined(recipe, accelerator, task, gathered, heldout, hashes)
    _announce(recipe, family, task, gathered.plan, run.steps, accelerator)
    return run


def _arrange(recipe: Recipe, family: Family, methods: list[Method], accelerator: Accelerator) -> None:
    """Lay the networks out, and choose among kernels, for the GPU that they are on."""
    if device.sharding() is None or accelerator.num_processes == 1:  # what is parted has to be contiguous
        compiling.layout(family, methods, accelerator.device.type)
    unet = family.modules().get("unet")
    if unet is None or recipe.train.deterministic:
        return
    found = attention.shapes(unet, recipe.data.side // family.factor, WINDOW * recipe.base.windows)
    size = micro_batch(recipe, accelerator.num_processes)
    precision = device.DTYPES.get(accelerator.mixed_precision, torch.float32)
    say(attention.settle(found, attention.timed(size, precision, accelerator.device)))


def joined(
    recipe: Recipe,
    accelerator: Accelerator,
    task: Task,
    gathered: gather.Gathered,
    heldout: Feed | None,
    hashes: Hashes,
) -> loop.Run:
    """A run of its parts; its fingerprint and what its exports say need no weights."""
    data, plan, digest = gathered
    steps = recipe.train.steps
    if steps is None:
        assert isinstance(plan, Plan), "stages and what is read in passing have steps"
        steps = plan.steps_in(recipe.train.epochs or 0)
    digests = {**origins(task, hashes), "data": digest}
    fingerprint = {
        "recipe": recipe.decisive(),
        # Other names than the recipe's own keys, among which these stand in a checkpoint.
        **{f"{name} files": digest for name, digest in digests.items()},
        "precision": str(accelerator.mixed_precision).replace("no", "fp32"),
        "threads": torch.get_num_threads(),
        **_divided(recipe, accelerator, plan),
        "made with": resume.circumstances(recipe, accelerator, versions()),
    }
    return loop.Run(
        recipe,
        steps,
        accelerator,
        task.family,
        task.each(),
        task,
        plan,
        data,
        Division(recipe.train.accumulate, accelerator.num_processes, accelerator.process_index),
        heldout,
        gather.workers(recipe, plan),
        Path(recipe.output),
        fingerprint,
        card(recipe, task, digests, versions(), tags(recipe, data.samples)),
    )


def _divided(recipe: Recipe, accelerator: Accelerator, plan: Plan | Stages | Flow) -> dict[str, Any]:
    """How what is read in passing is divided: which samples a step sees depends on it."""
    if not isinstance(plan, Flow):
        return {}
    divided = f"{accelerator.num_processes} processes x {recipe.train.accumulate} accumulated"
    return {"what is read in passing is divided among": divided}


def remembered(recipe: Recipe) -> Hashes:
    """Where content hashes are remembered, and beside them what was made of a base."""
    return Hashes(gather.cache(recipe) or default_folder())


def adapted(recipe: Recipe, accelerator: Accelerator, hashes: Hashes) -> Task:
    """The base with the methods on it, as they begin, and their objective; no data is looked at."""
    seed = recipe.train.seed
    kinds = {name: importlib.import_module(f"tuner.methods.{name}").METHOD for name in recipe.method}
    needs = sorted({need for kind in kinds.values() for need in kind.NEEDS})
    fits.check_quantised(recipe, needs, {name for kind in kinds.values() for name in kind.TRAINS})
    options = base_options(recipe, accelerator, kinds)
    asked = recipe.base
    family = base.load(asked.path, asked.revision, asked.new, needs, seed, hashes, options)
    family.to(accelerator.device)
    methods: list[Method] = [kind(recipe.method[name], family, seed) for name, kind in kinds.items()]
    if recipe.train.gradient_checkpointing:
        memory.switch_on(family, methods)
    fits.check_size(recipe, family)
    fits.check_uses(recipe, methods)
    compiling.check(recipe.train.compile, family, methods, accelerator)
    verify.check_names(recipe.name, family, methods)
    task = Task(family, methods, make_objective(recipe, family)).to(accelerator.device)
    if recipe.train.trained_precision == "bf16":
        rounding.narrow(task.trained())
    return task


def origins(task: Task, hashes: Hashes) -> dict[str, Any]:
    """Digests of what training begins from besides the data: the base's files, and those of recipe's keys."""
    begins = {key: path for method in task.each() for key, path in method.depends().items()}
    found = hashes.of(begins.values())
    start = {"start": {key: found[path] for key, path in begins.items()}} if begins else {}
    return {"base": task.family.digests, **start}


def make_objective(recipe: Recipe, family: Family) -> Objective:
    """The objective; the family's scheduler configuration becomes the one that its pictures are drawn by."""
    try:
        objective = Objective.from_scheduler_config(family.scheduler_config, **recipe.objective.options())
    except ValueError as error:
        raise UserError(f"objective: {error}") from error
    family.scheduler_config = objective.sampling(family.scheduler_config)
    return objective


def _announce(
    recipe: Recipe,
    family: Family,
    task: Task,
    plan: Plan | Stages | Flow,
    steps: int,
    accelerator: Accelerator,
) -> None:
    """One line that says what the run will do."""
    where = f"{accelerator.device.type} x {accelerator.num_processes}"
    if accelerator.device.type == "cpu":
        where += f" ({torch.get_num_threads()} threads)"
    trained = sum(parameter.numel() for parameter in task.trained())
    say(
        f"{recipe.name}: {' + '.join(recipe.method)} on {family.title} ({_kind(family, task)}), "
        f"{plan.words(steps)}, {trained:,} trained numbers, "
        f"{accelerator.mixed_precision.replace('no', 'fp32')}, {where}"
    )


def _kind(family: Family, task: Task) -> str:
    """What the base was recognised as, in words."""
    words = [family.name, task.objective.prediction]
    if family.inpainting:
        words.append("inpainting: parts of the pictures are hidden at random")
    return ", ".join(words)


def base_options(recipe: Recipe, accelerator: Accelerator, kinds: Mapping[str, type[Method]]) -> Options:
    """How the recipe wants the base."""
    about = recipe.base
    precision = device.DTYPES.get(accelerator.mixed_precision, torch.float32)
    narrow = {"full"} if recipe.train.trained_precision == "bf16" else set()
    exact = {
        part for name, kind in kinds.items() if name not in narrow for part in kind.exact(recipe.method[name])
    }
    branch = recipe.method.get("controlnet")
    if any(getattr(branch, key, None) is not None for key in ("unlock_decoder_at", "rank")):
        exact.add("unet")  # its decoder is trained, or its weights are a part of the branch
    return Options(
        vae=None if about.vae is None else Path(about.vae),
        clip_skip=about.clip_skip,
        windows=about.windows,
        prediction=about.prediction,
        quantise=about.quantise,
        compute=precision,
        hold=precision,
        exact=tuple(sorted(exact)),
    )


def versions() -> dict[str, str]:
    """The versions of what a run's result depends on."""
    return {"tuner": __version__, **{name: version(name) for name in VERSIONS}}


def tags(recipe: Recipe, samples: Sequence[Sample]) -> dict[str, int] | None:
    """How many captions have each tag, where the export is to tell it; in small letters, as kohya does."""
    if not recipe.export.tag_frequency:
        return None
    asked = recipe.data.captions.tags
    separator = "," if asked is None else asked.separator
    captions = (caption for sample in samples if not sample.fixed for caption in sample.captions)
    found = (tag.strip().lower() for caption in captions for tag in caption.split(separator))
    return dict(sorted(Counter(tag for tag in found if tag).items()))


def card(
    recipe: Recipe,
    task: Task,
    digests: Mapping[str, Any],
    made_with: Mapping[str, str],
    frequency: Mapping[str, int] | None,
) -> Card:
    """What the exports say of themselves: no time, host, user, output folder or path.

    Args:
        digests: of what `origins` names, and of the data.
        made_with: versions, as `versions` gives them.
        frequency: what `tags` gives.
    """
    return Card(
        recipe.name,
        device.DTYPES[recipe.export.dtype],
        {
            method.kind: metadata.build(
                method.kind,
                name=recipe.name,
                recipe_text=metadata.recipe_text(recipe.resolved()),
                versions=made_with,
                base_name=task.family.title,
                base_digest=json.dumps(digests["base"], sort_keys=True),
                data_digests={source.path: digests["data"] for source in recipe.data.source},
                extra={
                    "start": digests.get("start", {}),
                    **_about(recipe, task, method),
                    **({"tag_frequency": frequency} if frequency and method.kind == "lora" else {}),
                },
            )
            for method in task.each()
        },
    )


def _about(recipe: Recipe, task: Task, method: Method) -> dict[str, Any]:
    """What one method's exports tell of the base, and how they are meant to be used."""
    family, asked = task.family, recipe.export
    words = [found for one in task.each() if (found := one.labels().get("trigger_phrase")) is not None]
    known = {
        "clip_skip": recipe.base.clip_skip,
        "licence": asked.licence,
        "trigger_phrase": asked.trigger or ", ".join(words) or None,
    }
    return {
        "family": family.name,
        "resolution": recipe.data.side,
        "prediction_type": task.objective.prediction,
        "inpainting": family.inpainting,
        "zero_terminal_snr": bool(family.scheduler_config.get("rescale_betas_zero_snr")),
        **{key: value for key, value in known.items() if value is not None},
        **method.labels(),
        **_conditions(recipe, method),
    }


def _conditions(recipe: Recipe, method: Method) -> dict[str, Any]:
    """The conditions of all sources, where some have their own: the method's first."""
    own = [source.condition for source in recipe.data.source if source.condition is not None]
    if method.condition is None or not own:
        return {}
    every = [parameters(one) for one in (cast(Condition, method.condition), *own)]
    return {"condition": [one for n, one in enumerate(every) if one not in every[:n]]}

"""The data of a run, from its recipe: what is wanted of it, which samples there are, and when each comes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt
from accelerate import Accelerator

from tuner import blocks, prior
from tuner.data import assemble, buckets, caption_check, encode, pictures
from tuner.data.assemble import Opened, Wanted
from tuner.data.buckets import Assigned, Buckets
from tuner.data.cache import default_folder
from tuner.data.caption_block import Captions
from tuner.data.captions import CaptionRule
from tuner.data.conditions import Condition
from tuner.data.flow import Flow
from tuner.data.index import Memory, shared_out
from tuner.data.loader import Feed
from tuner.data.noise import Draws
from tuner.data.passing import Gate
from tuner.data.plan import Beside, Plan, Stages, balanced
from tuner.data.samples import Joined, Sample, Samples, sources, weights
from tuner.data.sources.stream import Stream
from tuner.data.views import Masks
from tuner.errors import UserError
from tuner.method import Method
from tuner.progress import say
from tuner.recipe import Recipe
from tuner.sample import Sampler
from tuner.task import Task

STEPS = (64, 32, 16, 8)
"""Of buckets where the recipe names none: the first that divides every resolution."""

LEFT_OUT = "left_out.txt"
"""In the output: the samples that could not be used, a line each."""


class Gathered(NamedTuple):
    """All that is trained on, class pictures last, and when.

    What is read in passing is not in the feed, but comes from the plan, which is a Flow then.
    """

    feed: Feed
    plan: Plan | Stages | Flow
    digest: str


def cache(recipe: Recipe) -> Path | None:
    """The cache's folder; None where nothing is cached."""
    if recipe.data.cache == "off":
        return None
    return Path(recipe.data.cache) if recipe.data.cache is not None else default_folder()


def wanted(recipe: Recipe, task: Task, accelerator: Accelerator) -> Wanted:
    """What the run asks of its data."""
    about, methods = recipe.data, task.each()
    conditions = [cast(Condition, method.condition) for method in methods if method.condition is not None]
    for number, source in enumerate(about.source):
        if source.condition is not None and not conditions:
            names = " + ".join(recipe.method)
            raise UserError(f"data.source.{number}.condition: method {names} sees no conditions; set null")
    latent = _latent(task)
    own = [(number, source) for number, source in enumerate(about.source)]
    return Wanted(
        size=about.side,
        seed=recipe.train.seed,
        crop=about.crop,
        flip=about.flip,
        captions=_rule(about.captions, methods),
        condition=conditions[0] if conditions else None,
        cache=cache(recipe),
        latents=all(method.CACHES_LATENTS for method in methods),
        text=all(method.CACHES_TEXT for method in methods),
        draws=Draws(**recipe.objective.draws()),
        share=shared_out(cache(recipe) or default_folder(), accelerator.wait_for_everyone),
        buckets=tuple(buckets_of(about, source, latent) for source in about.source),
        reading=pictures.Reading(about.background, about.alpha, about.max_pixels),
        masks=about.masks,
        jitter=about.jitter,
        unreadable=about.unreadable,
        captions_of=tuple((n, _rule(s.captions, methods)) for n, s in own if s.captions is not None),
        condition_of=tuple((n, s.condition) for n, s in own if s.condition is not None),
    )


def _latent(task: Task) -> int:
    return task.family.factor if "vae" in task.family.modules() else 1


def sides(resolution: int | Sequence[int]) -> tuple[int, ...]:
    """The sides of the squares whose areas are trained at."""
    return (resolution,) if isinstance(resolution, int) else tuple(resolution)


def _rule(about: Captions, methods: Sequence[Method]) -> CaptionRule:
    return about.rule(
        tuple(line for method in methods for line in method.templates()),
        min(method.DROP_CAPTIONS for method in methods),
        tuple(pair for method in methods for pair in method.replacements()),
    )


def buckets_of(about: blocks.Data, source: blocks.Source, latent: int, stage: int = -1) -> Buckets:
    """The buckets of a source in a stage; without the recipe's block the square alone."""
    wide = about.sizes[stage] if source.resolution is None else sides(source.resolution)
    asked = about.buckets
    if asked is None:
        return Buckets(wide, latent, latent=latent)
    step = asked.step or next((step for step in STEPS if not any(side % step for side in wide)), latent)
    return Buckets(wide, step, asked.longest, asked.upscale, latent)


def gather(recipe: Recipe, task: Task, asked: Wanted, accelerator: Accelerator) -> Gathered:
    """Open, look at, check and encode everything that is trained on.

    Raises:
        UserError: a source, a sample or a caption cannot be used; the batch does not fit the set.
    """
    memory = Memory(cache(recipe) or default_folder())
    parts = assemble.open_parts(recipe.data.source, asked, accelerator.is_main_process)
    if streams := [part for part in parts if isinstance(part, Stream)]:
        return _passing(recipe, task, asked, memory, accelerator, streams)
    samples = Joined([part for part in parts if isinstance(part, Samples)])
    each = samples.repeats.astype(np.float64)
    opened = assemble.look_at(samples, each, asked, memory, samples.problems())
    asked = with_masks(recipe, task, opened, asked)
    rules = dict(asked.captions_of)
    for number in range(len(recipe.data.source)):
        _check_captions(recipe, task, opened.of_source(number), rules.get(number, asked.captions))
    stages = [with_shares(recipe, one) for one in in_stages(recipe, task, opened, asked)]
    sizes = batch_sizes(recipe)
    opened, beside = _beside(recipe, task, asked, memory, accelerator, stages[-1])
    passes = recipe.train.accumulate * accelerator.num_processes
    plans = [
        Plan(
            one.repeats,
            size,
            recipe.train.seed,
            beside,
            one.assigned,
            loss_weights(one),
            "smaller" if recipe.data.buckets is None else recipe.data.buckets.last,
            passes,
        )
        for one, size in zip(stages, sizes, strict=True)
    ]
    for one, plan in zip(stages, plans, strict=True):
        _tell(one, plan)
    for what, why in encode.uncached(asked, task.family).items():
        say(f"{what} are encoded in each step, not cached: {why}")
    every = opened._replace(assigned=buckets.together([one.assigned for one in stages]))
    feed = encode.feed(every, asked, task.family)
    whole = plans[0] if len(plans) == 1 else Stages(plans, lengths(recipe))
    return Gathered(feed, whole, opened.digest())


def batch_sizes(recipe: Recipe) -> list[int]:
    """Pictures in an optimiser step, stage after stage."""
    given = [stage.batch_size for stage in recipe.data.stages or []] or [None]
    return [recipe.train.batch_size if size is None else size for size in given]


def lengths(recipe: Recipe) -> list[int]:
    """Optimiser steps, stage after stage."""
    stages, steps = recipe.data.stages or [], recipe.train.steps
    assert steps is not None, "stages have steps"
    before = [stage.steps or 0 for stage in stages[:-1]]
    return [*before, steps - sum(before)]


def in_stages(recipe: Recipe, task: Task, opened: Opened, asked: Wanted) -> list[Opened]:
    """The same samples in the buckets of each stage."""
    about, latent = recipe.data, _latent(task)
    if about.stages is None:
        return [opened]
    every = []
    for stage in range(len(about.stages)):
        shapes = tuple(buckets_of(about, source, latent, stage) for source in about.source)
        assigned = assemble.assign(opened.samples, opened.known, replace(asked, buckets=shapes))
        every.append(opened._replace(assigned=assigned))
    return every


def workers(recipe: Recipe, plan: Plan | Stages | Flow) -> int:
    """How many processes load pictures."""
    asked = recipe.data.workers
    if isinstance(plan, Flow):
        return 1 if asked is None else min(asked, 1)
    return asked or 0


def heldout(recipe: Recipe, task: Task, asked: Wanted, accelerator: Accelerator) -> Feed | None:
    """The held-out samples, as many as are looked at, without anything random in their making."""
    if not recipe.data.heldout:
        return None
    looked = max(
        recipe.validation.samples if recipe.validation.every else 0,
        recipe.evaluate.samples,
        recipe.preview.count,
    )
    memory = Memory(cache(recipe) or default_folder())
    plain = asked.plain()
    opened = assemble.open_sources(recipe.data.heldout, plain, memory, accelerator.is_main_process, looked)
    return encode.feed(opened, plain, task.family)


def with_masks(recipe: Recipe, task: Task, opened: Opened, asked: Wanted) -> Wanted:
    """Masks weigh the loss where there are any; asking for them where there are none is an error."""
    count = int(opened.known.masks.there.sum())
    about = f"{count} of {len(opened.samples)} samples have a mask"
    return _masked(recipe, task, asked, about if count else None)


def _masked(recipe: Recipe, task: Task, asked: Wanted, there: str | None) -> Wanted:
    """`there`: what is said of the masks that there are; None: there are none."""
    if any(method.WHOLE_STEP for method in task.each()):
        own = " + ".join(recipe.method)
        if recipe.data.masks is not None or recipe.data.alpha == "mask":
            key = "masks" if recipe.data.masks is not None else "alpha"
            raise UserError(f"data.{key}: method {own} has a loss of its own, which masks do not weigh")
        if there is not None:
            say(f"{there}, which is not used: method {own} has a loss of its own, which it does not weigh")
        return asked
    if there is None and recipe.data.alpha != "mask":
        if recipe.data.masks is not None:
            raise UserError(
                "data.masks: no sample has a mask; name where they are with data.source.mask_from or columns"
            )
        return asked
    if there is not None:
        say(f"{there}, which weighs their loss")
    return replace(asked, masks=recipe.data.masks or Masks())


def _passing(
    recipe: Recipe,
    task: Task,
    asked: Wanted,
    memory: Memory,
    accelerator: Accelerator,
    streams: Sequence[Stream],
) -> Gathered:
    """What is trained on where it is read in passing."""
    if problems := refused(recipe, task, streams):
        raise UserError("\n".join(problems))
    masked = [stream.place for stream in streams if stream.shards.masked]
    asked = _masked(recipe, task, asked, f"{', '.join(masked)}: each sample has a mask" if masked else None)
    numbers = range(len(streams))
    conditions, rules = dict(asked.condition_of), dict(asked.captions_of)
    gate = Gate(
        asked.reading,
        [conditions.get(number, asked.condition) for number in numbers],
        [rules.get(number, asked.captions) for number in numbers],
        task.each(),
        task.family.tokenize if task.family.text_encoders else None,
        recipe.base.windows,
    )
    shares = [source.share or 1.0 for source in recipe.data.source]
    flow = Flow(streams, shares, asked.buckets, gate, recipe.train.batch_size, recipe.train.seed)
    main = accelerator.is_main_process
    tell = say if main else partial(_say_of, accelerator.process_index)
    flow.tell(tell, asked.unreadable, Path(recipe.output) / LEFT_OUT)
    if asked.cache is not None:
        say("pictures and captions are encoded in each step, not cached: they are read in passing")
    if (recipe.data.workers or 0) > 1:
        say("data.workers: one process loads what is read in passing, as it comes in one order")
    nothing = assemble.look_at((), np.zeros(0), asked, memory)
    return Gathered(encode.feed(nothing, replace(asked, cache=None), task.family), flow, flow.digest())


def _say_of(rank: int, line: str) -> None:
    """What another process than the main one has to say of its part."""
    print(f"process {rank}: {line}", flush=True)


def refused(recipe: Recipe, task: Task, streams: Sequence[Stream]) -> list[str]:
    """What a run on samples that are read in passing cannot have, and the ways out."""
    about, place, problems = recipe.data, streams[0].place, []
    passing = f"{place} is read in passing"
    if len(streams) < len(about.source):
        other = next(source.path for source in about.source if not source.streamed)
        problems.append(
            f"data.source: {passing} and {other} is not; set streaming: true for all, "
            "or download the first and give its path"
        )
    elif len(streams) > 1 and about.source[0].share is None:
        problems.append(
            f"data.source: {passing}, so it is not known how long it is: give each source a share"
        )
    if recipe.train.steps is None:
        problems.append(f"train.epochs: {passing}, so an epoch's length is not known; give train.steps")
    if about.stages is not None:
        problems.append(
            f"data.stages: {passing}, which stages do not divide; train one after another "
            "with a recipe for each resolution, the second from the first's result"
        )
    if about.buckets is not None and about.buckets.last != "smaller":
        problems.append(f"data.buckets.last: has no effect: {passing}, so that all batches are full")
    if any(method.prior is not None for method in task.each()):
        problems.append(f"prior: {passing}, beside which class pictures do not come; set it to null")
    if recipe.export.tag_frequency:
        problems.append(f"export.tag_frequency: {passing}, so its tags are not counted; set false")
    if recipe.evaluate.samples and any(m.kind in ("lora", "textual_inversion") for m in task.each()):
        problems.append(
            f"evaluate.samples: its measures look at all that was trained on, but {passing}; set 0"
        )
    return problems


def loss_weights(opened: Opened) -> npt.NDArray[np.float64]:
    """Of the sources' samples in the loss, float64 [N].

    Raises:
        UserError: some are 0.
    """
    every: npt.NDArray[np.float64] = weights(opened.samples)[: len(opened.repeats)]
    nothing = np.flatnonzero(every == 0)
    if len(nothing):
        name = opened.samples[int(nothing[0])].picture.name
        raise UserError(
            f"{name}: its weight is 0{f', as of {len(nothing) - 1} others' if len(nothing) > 1 else ''}: "
            "it would never count; leave it out, or give it a weight above 0"
        )
    return every


def with_shares(recipe: Recipe, opened: Opened) -> Opened:
    """Sources with shares come as often as these say."""
    shares = [source.share for source in recipe.data.source]
    given = [share for share in shares if share is not None]
    if not given:
        return opened
    of = sources(opened.samples)
    rows = opened.assigned.sample  # with several areas a sample comes several times
    counts = np.bincount(of[rows], opened.repeats[rows], len(shares))
    if len(empty := np.flatnonzero(counts == 0)):
        place = recipe.data.source[int(empty[0])].path
        raise UserError(f"data.source: {place} has a share of the epoch, but no sample that can be used")
    times = np.array(balanced(given, counts.tolist()))
    return opened._replace(repeats=opened.repeats * times[of])


def _check_captions(recipe: Recipe, task: Task, samples: Sequence[Sample], rule: CaptionRule) -> None:
    tokenize = task.family.tokenize if task.family.text_encoders else None
    if line := caption_check.check(samples, rule, task.each(), tokenize, recipe.base.windows):
        say(line)


def _beside(
    recipe: Recipe, task: Task, asked: Wanted, memory: Memory, accelerator: Accelerator, opened: Opened
) -> tuple[Opened, Beside | None]:
    """With class pictures, which are drawn where they lack; last, as that takes long."""
    about = next((method.prior for method in task.each() if method.prior is not None), None)
    if about is None:
        return opened, None
    sampler = Sampler(task, accelerator, asked.size, about.steps, about.guidance, seed=asked.seed)
    classes = prior.samples(about, sampler, asked.cache)
    # The batch is checked before they are drawn.
    beside = Beside(len(opened.samples), len(classes), about.weight)
    for size in batch_sizes(recipe):
        Plan(opened.repeats, size, recipe.train.seed, beside)
    prior.draw(about, sampler, classes, asked.share)
    accelerator.wait_for_everyone()
    plain = replace(asked, condition=None, buckets=(), unreadable=0)  # they take the batch's bucket
    more = assemble.look_at(classes, np.ones(len(classes)), plain, memory)
    return opened.beside(more), beside


def _tell(opened: Opened, plan: Plan) -> None:
    """The table of buckets where there are several, and what is enlarged."""
    about: Assigned = opened.assigned
    if len(about.shapes) > 1:
        for line in buckets.lines(buckets.rows(about, plan.sizes, plan.own)):
            say(line)
    for line in buckets.warnings(about, lambda number: opened.samples[number].picture.name):
        say(line)


def every_side(recipe: Recipe) -> tuple[int, ...]:
    """Every side that pictures are trained at, of all sources."""
    own = [sides(source.resolution) for source in recipe.data.source if source.resolution is not None]
    return tuple(sorted({side for one in [*recipe.data.sizes, *own] for side in one}))

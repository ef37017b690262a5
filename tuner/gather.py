"""The data of a run, from its recipe: what is wanted of it, which samples there are, and when each comes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
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
from tuner.data.index import Memory, Share
from tuner.data.loader import Feed
from tuner.data.noise import Draws
from tuner.data.plan import Beside, Plan, balanced
from tuner.data.samples import Sample
from tuner.data.views import Masks
from tuner.errors import UserError
from tuner.method import Method
from tuner.progress import say
from tuner.recipe import Recipe
from tuner.sample import Sampler
from tuner.task import Task

STEPS = (64, 32, 16, 8)
"""Of buckets where the recipe names none: the first that divides every resolution."""


class Gathered(NamedTuple):
    """All that is trained on, class pictures last, and when."""

    feed: Feed
    plan: Plan
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
    latent = task.family.factor if "vae" in task.family.modules() else 1
    own = [(number, source) for number, source in enumerate(about.source)]
    return Wanted(
        size=max(sides(about.resolution)),
        seed=recipe.train.seed,
        crop=about.crop,
        flip=about.flip,
        captions=_rule(about.captions, methods),
        condition=conditions[0] if conditions else None,
        cache=cache(recipe),
        latents=all(method.CACHES_LATENTS for method in methods),
        text=all(method.CACHES_TEXT for method in methods),
        draws=Draws(**recipe.objective.draws()),
        share=Share(accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone),
        buckets=tuple(_buckets(about, source, latent) for source in about.source),
        reading=pictures.Reading(about.background, about.alpha, about.max_pixels),
        masks=about.masks,
        jitter=about.jitter,
        unreadable=about.unreadable,
        captions_of=tuple((n, _rule(s.captions, methods)) for n, s in own if s.captions is not None),
        condition_of=tuple((n, s.condition) for n, s in own if s.condition is not None),
    )


def sides(resolution: int | Sequence[int]) -> tuple[int, ...]:
    """The sides of the squares whose areas are trained at."""
    return (resolution,) if isinstance(resolution, int) else tuple(resolution)


def _rule(about: Captions, methods: Sequence[Method]) -> CaptionRule:
    return about.rule(
        tuple(line for method in methods for line in method.templates()),
        min(method.DROP_CAPTIONS for method in methods),
        tuple(pair for method in methods for pair in method.replacements()),
    )


def _buckets(about: blocks.Data, source: blocks.Source, latent: int) -> Buckets:
    """The buckets of a source; without the recipe's block the square alone."""
    wide = sides(about.resolution if source.resolution is None else source.resolution)
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
    opened = assemble.open_sources(recipe.data.source, asked, memory, accelerator.is_main_process)
    asked = _with_masks(recipe, task, opened, asked)
    opened = _shares(recipe, opened)
    rules = dict(asked.captions_of)
    for number in range(len(recipe.data.source)):
        _check_captions(recipe, task, opened.of_source(number), rules.get(number, asked.captions))
    opened, beside = _beside(recipe, task, asked, memory, accelerator, opened)
    plan = Plan(
        opened.repeats,
        recipe.train.batch_size,
        recipe.train.seed,
        beside,
        opened.assigned,
        _weights(opened),
        "smaller" if recipe.data.buckets is None else recipe.data.buckets.last,
        recipe.train.accumulate * accelerator.num_processes,
    )
    _tell(opened, plan)
    for what, why in encode.uncached(asked, task.family).items():
        say(f"{what} are encoded in each step, not cached: {why}")
    feed = encode.feed(opened, asked, task.family)
    return Gathered(feed, plan, opened.digest())


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


def _with_masks(recipe: Recipe, task: Task, opened: Opened, asked: Wanted) -> Wanted:
    """Masks weigh the loss where there are any; asking for them where there are none is an error."""
    count = sum(known is not None for known in opened.known.masks)
    if any(method.WHOLE_STEP for method in task.each()):
        own = " + ".join(recipe.method)
        if recipe.data.masks is not None or recipe.data.alpha == "mask":
            key = "masks" if recipe.data.masks is not None else "alpha"
            raise UserError(f"data.{key}: method {own} has a loss of its own, which masks do not weigh")
        if count:
            say(f"{count} masks are not used: method {own} has a loss of its own, which they do not weigh")
        return asked
    if not count and recipe.data.alpha != "mask":
        if recipe.data.masks is not None:
            raise UserError(
                "data.masks: no sample has a mask; name where they are with data.source.mask_from or columns"
            )
        return asked
    if count:
        say(f"{count} of {len(opened.samples)} samples have a mask, which weighs their loss")
    return replace(asked, masks=recipe.data.masks or Masks())


def _weights(opened: Opened) -> npt.NDArray[np.float64]:
    """Of the sources' samples in the loss, float64 [N].

    Raises:
        UserError: some are 0.
    """
    some = opened.samples[: len(opened.repeats)]
    weights = np.array([sample.weight for sample in some], np.float64)
    nothing = np.flatnonzero(weights == 0)
    if len(nothing):
        name = some[int(nothing[0])].picture.name
        raise UserError(
            f"{name}: its weight is 0{f', as of {len(nothing) - 1} others' if len(nothing) > 1 else ''}: "
            "it would never count; leave it out, or give it a weight above 0"
        )
    return weights


def _shares(recipe: Recipe, opened: Opened) -> Opened:
    """Sources with shares come as often as these say."""
    shares = [source.share for source in recipe.data.source]
    given = [share for share in shares if share is not None]
    if not given:
        return opened
    of = np.array([sample.source for sample in opened.samples], np.int64)
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
    Plan(opened.repeats, recipe.train.batch_size, recipe.train.seed, beside)
    prior.draw(about, sampler, classes)
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
    asked = [recipe.data.resolution, *(source.resolution for source in recipe.data.source)]
    return tuple(sorted({side for one in asked if one is not None for side in sides(one)}))

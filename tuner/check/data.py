"""The data of a run as it will be gathered, with every problem of it; nothing is encoded or drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from accelerate import Accelerator

from tuner import gather
from tuner.block import Block
from tuner.blocks import Source
from tuner.check.findings import Findings
from tuner.data import assemble, buckets, caption_check, pictures
from tuner.data.assemble import Opened, Wanted
from tuner.data.cache import default_folder
from tuner.data.conditions import Condition
from tuner.data.index import Memory, Share, UnreadableError
from tuner.data.noise import Draws
from tuner.data.plan import Plan, Stages
from tuner.data.samples import Joined, Sample, Samples, sources
from tuner.data.sources.opening import look
from tuner.data.sources.spec import SourceSpec
from tuner.data.sources.stream import First, LeftOut, Stream
from tuner.data.sources.tree import scan, stem_of
from tuner.recipe import Recipe
from tuner.task import Task

STREAMED = 256
"""Samples that are looked at of a source that is read in passing; they stand for all of it."""


class Looked(NamedTuple):
    """What is trained on, as far as it is known without the base's weights.

    Attributes:
        opened: the sources' samples that can be used, in the buckets of all stages.
        asked: what the run asks of them.
        stages: the same samples in the buckets of each stage, as often as they come in it.
        plan: when each comes; None: there is a problem. What is read in passing comes in another order.
        classes: the class pictures, which the plan has behind the others; some may not be drawn yet.
        whole: the samples with the class pictures behind them, where all are there.
        passing: the samples are the first ones of what is read in passing.
    """

    opened: Opened
    asked: Wanted
    stages: Sequence[Opened]
    plan: Plan | Stages | None
    whole: Opened
    classes: Sequence[Sample] = ()
    passing: bool = False

    @property
    def plans(self) -> Sequence[Plan]:
        """Of each stage."""
        if self.plan is None:
            return ()
        return self.plan.plans if isinstance(self.plan, Stages) else (self.plan,)

    def uncached(self) -> Wanted:
        """What the run asks of its data, with which a feed encodes nothing."""
        return replace(self.asked, cache=None)


def data(recipe: Recipe, task: Task | None, accelerator: Accelerator, found: Findings) -> Looked | None:
    """Open and look at everything that is trained on and held out; None where nothing of it can be used.

    Args:
        task: the base's outline with the methods on it; None: what depends on it is not looked at.
    """
    memory = Memory(gather.cache(recipe) or default_folder())
    asked = _wanted(recipe, task, accelerator, found)
    about: dict[str, Any] = {"sources": [], "heldout": [], "left_out": []}
    found.facts["data"] = about
    opened, streams = _open(recipe.data.source, asked, memory, found, about["sources"])
    if streams and task is not None:
        found.problems_of("data", gather.refused(recipe, task, streams))
    if recipe.data.heldout:
        held, _ = _open(
            recipe.data.heldout, asked.plain(), memory, found, about["heldout"], most=_looked(recipe)
        )
        if held is not None:
            _refuse(held, asked, found)
    if opened is None:
        return None
    about["left_out"] = list(opened.left_out)
    _refuse(opened, asked, found)
    if not len(opened.samples):
        return None
    about |= _counts(opened)
    if task is not None:
        some = opened
        masked = found.attempt("data", lambda: gather.with_masks(recipe, task, some, asked))
        asked = asked if masked is None else masked
    _captions(recipe, task, opened, asked, found)
    stages = _stages(recipe, task, opened, asked, found)
    every = opened._replace(assigned=buckets.together([one.assigned for one in stages]))
    return Looked(every, asked, stages, None, every, passing=bool(streams))


def _refuse(opened: Opened, asked: Wanted, found: Findings) -> None:
    """Tell of samples that cannot be used where they are more than may be left out."""
    if len(opened.left_out) <= asked.unreadable:
        return
    found.problems_of("data", opened.left_out)
    refused = UnreadableError(opened.left_out, len(opened.samples) + len(opened.left_out), asked.unreadable)
    found.problem("data", str(refused).splitlines()[-1])  # as a run counts them


def _stages(
    recipe: Recipe, task: Task | None, opened: Opened, asked: Wanted, found: Findings
) -> list[Opened]:
    """The samples as each stage has them."""
    stages = [opened]
    if task is not None:
        stages = found.attempt("data", lambda: gather.in_stages(recipe, task, opened, asked)) or stages
    shared = found.attempt("data", lambda: [gather.with_shares(recipe, one) for one in stages])
    return stages if shared is None else shared


def _wanted(recipe: Recipe, task: Task | None, accelerator: Accelerator, found: Findings) -> Wanted:
    """What the run asks of its data; where the base or the recipe's buckets cannot be used, what is left."""
    if task is not None:
        asked = found.attempt("data", lambda: gather.wanted(recipe, task, accelerator))
        if asked is not None:
            return asked
    about = recipe.data
    conditions = [one for one in (_own(block, "condition") for block in recipe.method.values()) if one]
    asked = Wanted(
        size=about.side,
        seed=recipe.train.seed,
        crop=about.crop,
        flip=about.flip,
        captions=about.captions.rule((), 0.0, ()),
        condition=cast(Condition, conditions[0]) if conditions else None,
        cache=gather.cache(recipe),
        latents=True,
        text=True,
        draws=Draws(**recipe.objective.draws()),
        share=Share(),
        reading=pictures.Reading(about.background, about.alpha, about.max_pixels),
        masks=about.masks,
        jitter=about.jitter,
        unreadable=about.unreadable,
        captions_of=tuple(
            (n, s.captions.rule((), 0.0, ())) for n, s in enumerate(about.source) if s.captions is not None
        ),
        condition_of=tuple((n, s.condition) for n, s in enumerate(about.source) if s.condition is not None),
    )
    made = found.attempt("data", lambda: tuple(gather.buckets_of(about, one, 8) for one in about.source))
    return asked if made is None else replace(asked, buckets=made)


def _own(block: Block, key: str) -> Block | None:
    """A block of a method's own that has this name."""
    value = getattr(block, key, None)
    return value if isinstance(value, Block) else None


def _looked(recipe: Recipe) -> int:
    """How many held-out samples a run looks at."""
    validated = recipe.validation.samples if recipe.validation.every else 0
    return max(validated, recipe.evaluate.samples, recipe.preview.count)


def _open(
    specs: Sequence[Source],
    asked: Wanted,
    memory: Memory,
    found: Findings,
    about: list[dict[str, Any]],
    most: int | None = None,
) -> tuple[Opened | None, list[Stream]]:
    """The samples of all sources that can be used, and what is read in passing; every problem is told."""
    place = None if asked.cache is None else asked.cache / "tars"
    parts: list[Samples] = []
    streams: list[Stream] = []
    for number, spec in enumerate(specs):
        told: dict[str, Any] = {"path": spec.path, "kind": spec.kind}
        about.append(told)
        part = found.attempt("data", lambda n=number, s=spec: look(s, found.note, n, place))  # type: ignore[misc]
        if part is None:
            continue
        if isinstance(part, Stream):
            streams.append(part)
            part.left_out = LeftOut(asked.unreadable, found.note)
            part = found.attempt("data", lambda p=part: First(p, STREAMED))  # type: ignore[misc]
            if part is None:
                continue
            found.note(f"{spec.path} is read in passing: its first {len(part)} samples stand for all here")
        wrong = list(part.problems())
        found.problems_of("data", part.faults())
        told |= {
            "samples": len(part),
            "repeats": sorted({int(times) for times in np.unique(part.repeats)}),
            "weight": spec.weight,
            "captions_by": _captions_by(spec),
            "wrong": len(wrong),
        }
        parts.append(part)
    samples: Sequence[Sample] = Joined(parts)
    before = Joined(parts).problems()
    if not len(samples):
        found.problems_of("data", before)
        return None, streams
    repeats = Joined(parts).repeats.astype(np.float64)
    if most is not None:
        samples, repeats = samples[:most], repeats[:most]
    every = replace(asked, unreadable=len(samples) + len(before))
    opened = found.attempt("data", lambda: assemble.look_at(samples, repeats, every, memory, before))
    if opened is None:  # of the buckets; what can be read is known all the same
        squares = replace(every, buckets=())
        opened = found.attempt("data", lambda: assemble.look_at(samples, repeats, squares, memory, before))
    return opened, streams


def _captions_by(spec: SourceSpec) -> dict[str, int] | str:
    """What kinds of files a folder's captions are in, with their numbers; of other sources where they are."""
    if spec.kind in ("tars", "urls"):
        return "members of the archives"
    if spec.kind != "folder":
        return f"column {spec.columns.caption or 'text'}"
    tree = scan(Path(spec.path))
    if tree.listings and spec.captions_from in (None, "listing"):
        return ", ".join(tree.listings)
    if spec.captions_from == "name":
        return "the pictures' names"
    stems = {stem_of(name) for name in tree.pictures}
    files = (name for stem, names in tree.captions.items() if stem in stems for name in names)
    return dict(sorted(Counter(Path(name).suffix for name in files).items()))


def _counts(opened: Opened) -> dict[str, Any]:
    """How many samples there are, and what they have."""
    of = Counter(sources(opened.samples).tolist())
    return {
        "samples": len(opened.samples),
        "usable_by_source": [of[number] for number in sorted(of)],
        "masks": int(opened.known.masks.there.sum()),
        "conditions": int(opened.known.conditions.there.sum()),
        "digest": opened.digest(),
    }


def _captions(recipe: Recipe, task: Task | None, opened: Opened, asked: Wanted, found: Findings) -> None:
    """Every source's captions as a run looks at them before it starts."""
    rules = dict(asked.captions_of)
    tokenize = task.family.tokenize if task is not None and task.family.text_encoders else None
    methods = [] if task is None else task.each()
    if task is None:
        found.unchecked.append("captions against the base's tokens, and the method's words in them")
    for number in range(len(recipe.data.source)):
        some, rule = opened.of_source(number), rules.get(number, asked.captions)
        line = found.attempt(
            "captions",
            lambda some=some, rule=rule: caption_check.check(  # type: ignore[misc]
                some, rule, methods, tokenize, recipe.base.windows
            ),
        )
        if line is not None:
            found.note(line)

"""Statistics of captions and sizes, as plain numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from tuner.check.data import Looked
from tuner.data.captions import CaptionRule
from tuner.data.plan import Plan, Slot
from tuner.task import Task
from tuner.text import Tokens

MOST = 10_000
"""Captions that are looked at, the first of the first epoch: tokenising takes most of a check's time."""
BARS = 24
"""Of a histogram, at most."""
AT_ONCE = 1024
WORDS = 12
"""First words that are told."""


def slots(plan: Plan, epoch: int = 0) -> Iterator[Slot]:
    """The samples of an epoch in their order; places that are only filled are left out."""
    for step in range(plan.steps_in(epoch), plan.steps_in(epoch + 1)):
        yield from (slot for slot in plan.step(step) if slot.weight > 0)


def captions(task: Task | None, looked: Looked) -> dict[str, Any]:
    """What the captions of the first epoch are like, as they are trained with.

    Lengths are in tokens of the first text encoder, start and end not counted; without one in words.
    """
    count = len(looked.opened.samples)
    own = (slot for slot in slots(looked.plans[0]) if slot.sample < count)
    texts = [caption(looked, slot) for slot in islice(own, MOST)]
    told = [text for text in texts if text]
    reads = task is not None and bool(task.family.text_encoders)
    lengths, cut = _lengths(task, told) if reads else ([len(text.split()) for text in told], 0)
    words = (text.split()[0].strip(",.;:").lower() for text in told if text.split())
    first = Counter(word for word in words if word)
    several = sum(len(sample.captions) > 1 for sample in islice(iter(looked.opened.samples), MOST))
    rules = {"all": looked.asked.captions, **{str(n): rule for n, rule in looked.asked.captions_of}}
    return {
        "looked_at": len(texts),
        "empty": len(texts) - len(told),
        "different": len(set(told)),
        "unit": "tokens" if reads else "words",
        "length": spread(lengths),
        "histogram": histogram(lengths),
        "cut": cut,
        "first_words": [list(pair) for pair in first.most_common(WORDS)],
        "samples_with_several": several,
        "operators": {name: operators(rule) for name, rule in rules.items()},
    }


def caption(looked: Looked, slot: Slot) -> str:
    """The caption of a slot, as the feed makes it."""
    sample, asked = looked.opened.samples[slot.sample], looked.asked
    if sample.fixed:
        return sample.captions[0]
    rule = dict(asked.captions_of).get(sample.source, asked.captions)
    return rule(sample.captions, asked.seed, slot.epoch, slot.position, sample.kinds)


def _lengths(task: Task | None, texts: Sequence[str]) -> tuple[list[int], int]:
    """Of each text its number of tokens, and how many texts are cut."""
    assert task is not None
    lengths: list[int] = []
    cut = 0
    for start in range(0, len(texts), AT_ONCE):
        tokens: Tokens = task.family.tokenize(texts[start : start + AT_ONCE])
        read = (tokens.ends - 1).sum(dim=1).tolist()
        lengths += [inside + over for inside, over in zip(read, tokens.cut, strict=True)]
        cut += sum(any(each) for each in zip(*(one.cut for one in tokens.each()), strict=True))
    return lengths, cut


def operators(rule: CaptionRule) -> list[str]:
    """What a rule does, in its order, in words."""
    steps = []
    if rule.drop:
        steps.append(f"empty instead with chance {rule.drop:g}")
    if not isinstance(rule.choose, str):
        pairs = rule.choose.items() if not isinstance(rule.choose, tuple) else enumerate(rule.choose, 1)
        steps.append("one of several by weight: " + ", ".join(f"{name} {weight:g}" for name, weight in pairs))
    else:
        steps.append("one of several, each with equal chances" if rule.choose == "any" else "the first one")
    if rule.wildcards != "keep":
        steps.append("wildcards {a|b} are written out")
    if rule.tags is not None:
        if rule.tags.drop:
            steps.append(f"each tag left out with chance {rule.tags.drop:g}")
        if rule.tags.shuffle:
            steps.append(f"tags shuffled behind the first {rule.tags.keep}")
    if rule.templates:
        steps.append(f"put into one of {len(rule.templates)} templates")
    if rule.trigger is not None:
        steps.append(f"{rule.trigger!r} in front where it is missing")
    if rule.prefix:
        steps.append(f"{rule.prefix!r} in front")
    if rule.suffix:
        steps.append(f"{rule.suffix!r} behind")
    steps += [f"{word!r} becomes {other!r}" for word, other in rule.replace]
    return steps


def sizes(looked: Looked) -> dict[str, Any]:
    """What the pictures' sizes are like, in pixels, and what becomes of them."""
    known, about = looked.opened.known.sizes, looked.opened.assigned
    height, width = known[:, 0], known[:, 1]
    larger = np.unique(about.sample[about.scale > 1])
    return {
        "pictures": len(known),
        "width": spread(width),
        "height": spread(height),
        "megapixels": [round(float(x), 3) for x in np.sort(height * width / 1e6)[[0, len(known) // 2, -1]]],
        "aspect": [round(float(x), 3) for x in np.sort(width / height)[[0, len(known) // 2, -1]]],
        "histogram": histogram(np.rint(np.sqrt(height * width)).astype(np.int64)),
        "enlarged": len(larger),
        "most_enlarged": round(float(about.scale.max()), 3),
        "crop_loss": {
            "mean": round(float(about.crop_loss.mean(dtype=np.float64)), 6),
            "most": round(float(about.crop_loss.max()), 6),
        },
    }


def spread(values: Sequence[int] | npt.NDArray[np.int64]) -> dict[str, int] | None:
    """The least, the middle (the lower of two), the 95th percentile (the higher) and the most."""
    if not len(values):
        return None
    ordered = sorted(int(value) for value in values)
    last = len(ordered) - 1
    return {
        "min": ordered[0],
        "median": ordered[last // 2],
        "p95": ordered[math.ceil(0.95 * last)],
        "max": ordered[-1],
    }


def histogram(values: Sequence[int] | npt.NDArray[np.int64]) -> list[list[int]]:
    """[from, to, how many] of neighbouring ranges of whole numbers, equally wide, from the least value on."""
    if not len(values):
        return []
    every = np.asarray(values, np.int64)
    low, high = int(every.min()), int(every.max())
    wide = -(-(high - low + 1) // BARS)
    counts = np.bincount((every - low) // wide)
    return [[low + i * wide, low + (i + 1) * wide - 1, n] for i, n in enumerate(counts.tolist())]

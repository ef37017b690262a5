"""The measures of a finished run: one file a method, found by the method's name."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tuner.data.loader import Feed
from tuner.data.plan import Slot
from tuner.data.samples import Sample
from tuner.evaluate.captions import Named
from tuner.evaluate.compare import score
from tuner.evaluate.judge import read
from tuner.progress import say
from tuner.sample import Sampler
from tuner.task import Task

Picture = npt.NDArray[np.uint8]
Values = dict[str, Any]


@dataclass(frozen=True)
class Look:
    """What a measure looks at.

    Attributes:
        trained: the samples trained on.
        heldout: the held-out samples, `count` of which are measured.
        output: the run's folder, for pictures.
        curves: what was logged while training, as (step, value) by name.
    """

    sampler: Sampler
    trained: Sequence[Sample]
    heldout: Feed
    count: int
    output: Path
    curves: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)

    def originals(self) -> list[Picture]:
        """The held-out pictures that are measured, at training resolution."""
        return [self.heldout.picture(slot) for slot in self.slots()]

    def slots(self) -> list[Slot]:
        """The held-out samples that are measured."""
        return [Slot(i, 0, i, 1.0) for i in range(min(self.count, len(self.heldout.samples)))]

    def prompts(self, form: str) -> list[str]:
        """For each held-out sample its caption of a form (`short`, `long`), or its first."""
        return [self.heldout.captions.final(caption_of(s, form)[0]) for s in self._samples()]

    def named(self, form: str) -> list[Named] | None:
        """What those captions name; None where scene records are missing."""
        found = [caption_of(s, form)[1] for s in self._samples()]
        return None if any(n is None for n in found) else [n for n in found if n is not None]

    def _samples(self) -> list[Sample]:
        return [self.heldout.samples[slot.sample] for slot in self.slots()]


def caption_of(sample: Sample, form: str) -> tuple[str, Named | None]:
    """A sample's caption of a form and what it names; the first caption where there is no such form."""
    records = (sample.scene or {}).get("captions", [])
    for text, record in zip(sample.captions, records, strict=False):
        if record["form"] == form:
            return text, Named.from_json(record["named"])
    return sample.captions[0], Named.from_json(records[0]["named"]) if records else None


def measured(methods: Sequence[str]) -> list[str]:
    """Those of the methods that have measures."""
    return [name for name in methods if importlib.util.find_spec(f"tuner.evaluate.{name}") is not None]


def measure(look: Look, methods: Sequence[str]) -> dict[str, Values]:
    """Every measure of the methods by its name, for the log and the report."""
    found: dict[str, Values] = {}
    for name in measured(methods):
        found |= importlib.import_module(f"tuner.evaluate.{name}").measure(look)
    return found


def weights(task: Task, methods: Sequence[str]) -> dict[str, Values]:
    """What can be told of the trained weights without a picture, by name, for the log and the report."""
    found: dict[str, Values] = {}
    for name in measured(methods):
        module = importlib.import_module(f"tuner.evaluate.{name}")
        found |= module.weights(task) if hasattr(module, "weights") else {}
    return found


def probe(
    methods: Sequence[str], conditions: Sequence[Picture] | None, pictures: Sequence[Picture]
) -> dict[str, float]:
    """What a run's previews tell of it, as scalars for the log."""
    if conditions is None or "controlnet" not in methods:
        return {}
    return dict(importlib.import_module("tuner.evaluate.controlnet").probe(conditions, pictures))


def judged(pictures: Sequence[Picture], named: Sequence[Named]) -> dict[str, float]:
    """The share of pictures in which each named attribute is right, by attribute; over those that name it."""
    rows = [score(read(picture), wanted) for picture, wanted in zip(pictures, named, strict=True)]
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return {key: float(np.mean([row[key] for row in rows if key in row])) for key in keys}


def table(rows: Mapping[str, Mapping[str, float]], verdict: str, **more: Any) -> Values:
    """Rows of shares as the report shows them; columns that only some rows have are filled with None."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    return {
        "verdict": verdict,
        "columns": columns,
        "rows": {name: [row.get(column) for column in columns] for name, row in rows.items()},
        **more,
    }


def without_records(what: str) -> None:
    """Say that figures are left out."""
    say(f"{what}: the held-out pictures have no scene records, so the exact judge's figures are left out")

"""The part of the data that a few steps see: nothing else of it has to be encoded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from tuner.check.data import Looked
from tuner.data.assemble import Opened
from tuner.data.plan import Slot
from tuner.data.samples import Chosen


class Steps:
    """Steps of a plan whose slots name the samples of a part."""

    def __init__(self, steps: dict[int, list[Slot]], batch_size: int) -> None:
        self._steps, self.batch_size = steps, batch_size

    def step(self, step: int) -> list[Slot]:
        """The slots of one of them, counted from 0."""
        return self._steps[step]

    def steps_in(self, epochs: int) -> int:
        """How many steps there are, whatever the epochs."""
        return len(self._steps)


def part(looked: Looked, steps: Iterable[int]) -> tuple[Opened, Steps]:
    """The samples of some steps, each in the buckets that it comes in there, and the steps.

    Class pictures that are not drawn yet are left out.
    """
    assert looked.plan is not None
    whole, plan = looked.whole, looked.plan
    taken = {
        place: [slot for slot in plan.step(s) if slot.sample < len(whole.samples)]
        for place, s in enumerate(steps)
    }
    return among(whole, taken), Steps(renamed(taken), plan.batch_size)


def among(whole: Opened, taken: dict[int, list[Slot]]) -> Opened:
    """The samples of these slots alone, in their order."""
    kept = _kept(taken)
    wanted = {(slot.sample, slot.bucket) for slots in taken.values() for slot in slots}
    about = whole.assigned
    rows = [
        row
        for row, (sample, bucket) in enumerate(zip(about.sample.tolist(), about.bucket.tolist(), strict=True))
        if (sample, about.shapes[bucket]) in wanted
    ]
    number = {sample: index for index, sample in enumerate(kept)}
    own = [sample for sample in kept if sample < len(whole.repeats)]
    assigned = about.__class__(
        about.shapes,
        np.array([number[sample] for sample in about.sample[rows].tolist()], np.int64),
        about.bucket[rows],
        about.crop_loss[rows],
        about.scale[rows],
    )
    return Opened(Chosen(whole.samples, kept), whole.known.only(kept), whole.repeats[own], assigned, ())


def renamed(taken: dict[int, list[Slot]]) -> dict[int, list[Slot]]:
    """The slots with the numbers that their samples have among these."""
    number = {sample: index for index, sample in enumerate(_kept(taken))}
    return {s: [slot._replace(sample=number[slot.sample]) for slot in slots] for s, slots in taken.items()}


def _kept(taken: dict[int, Sequence[Slot]] | dict[int, list[Slot]]) -> list[int]:
    return sorted({slot.sample for slots in taken.values() for slot in slots})

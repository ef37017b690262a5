"""Which samples a step sees: each once an epoch, however the step is divided."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.data.plan import Beside, Plan, share
from tuner.errors import UserError

REPEATS = st.lists(st.integers(0, 3), min_size=1, max_size=25).filter(any)
FEW = st.integers(1, 4)


@given(repeats=REPEATS, data=st.data(), seed=st.integers(0, 10), epoch=st.integers(0, 5))
def test_an_epoch_has_every_sample_as_often_as_it_repeats(
    repeats: list[int], data: st.DataObject, seed: int, epoch: int
) -> None:
    batch_size = data.draw(st.integers(1, sum(repeats)))
    plan = Plan(repeats, batch_size, seed)
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    slots = [slot for step in steps for slot in plan.step(step)]
    assert len(slots) == batch_size * plan.steps_per_epoch
    real = [slot for slot in slots if slot.weight]
    assert {slot.weight for slot in slots} <= {0.0, 1.0}
    assert {slot.epoch for slot in slots} == {epoch}
    assert [slot.position for slot in real] == list(range(sum(repeats)))
    counts = Counter(slot.sample for slot in real)
    assert [counts[index] for index in range(len(repeats))] == repeats
    # Only the epoch's last batch has places that are only filled, and never all of them.
    filled = [step for step in steps if any(not slot.weight for slot in plan.step(step))]
    assert filled in ([], [steps[-1]])
    assert any(slot.weight for slot in plan.step(steps[-1]))


@given(micro=FEW, accumulate=FEW, processes=FEW, step=st.integers(0, 20))
def test_the_shares_of_a_step_are_the_step_in_order(
    micro: int, accumulate: int, processes: int, step: int
) -> None:
    size = micro * accumulate * processes
    slots = Plan([1] * (size + 3), size, seed=5).step(step)
    shares = [
        share(slots, m, rank, accumulate, processes) for m in range(accumulate) for rank in range(processes)
    ]
    assert len(shares) == accumulate * processes
    assert {len(part) for part in shares} == {micro}
    assert [slot for part in shares for slot in part] == slots


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    def order(plan: Plan, epoch: int) -> list[int]:
        return [slot.sample for step in range(4) for slot in plan.step(epoch * 4 + step)]

    plan = Plan([1] * 16, 4, seed=3)
    first, second = order(plan, 0), order(plan, 1)
    assert first != second and sorted(first) == sorted(second) == list(range(16))
    assert order(Plan([1] * 16, 4, seed=4), 0) != first
    # Asked in any order, the same answer: a run that is continued sees what it would have seen.
    other = Plan([1] * 16, 4, seed=3)
    assert order(other, 1) == second and order(other, 0) == first


def test_a_batch_larger_than_an_epoch_is_an_error_that_names_the_choice() -> None:
    with pytest.raises(UserError, match=r"train\.batch_size: 7 .* only 6"):
        Plan([1, 2, 3], 7, seed=0)
    assert Plan([1, 2, 3], 6, seed=0).steps_per_epoch == 1


@given(
    own=st.integers(1, 12),
    batch_size=st.integers(2, 9),
    number=st.integers(1, 7),
    seed=st.integers(0, 5),
)
def test_half_of_each_batch_is_of_the_samples_beside(
    own: int, batch_size: int, number: int, seed: int
) -> None:
    half = batch_size // 2
    if batch_size - half > own:
        with pytest.raises(UserError, match=r"no class pictures, but an epoch has only"):
            Plan([1] * own, batch_size, seed, Beside(own, number, 0.5))
        return
    plan = Plan([1] * own, batch_size, seed, Beside(own, number, 0.5))
    steps = 3 * number + 2 * plan.steps_per_epoch
    batches = [plan.step(step) for step in range(steps)]
    beside = [[slot for slot in batch if slot.sample >= own] for batch in batches]
    assert {len(part) for part in beside} == {half} and {len(batch) for batch in batches} == {batch_size}
    seen = [slot.sample - own for part in beside for slot in part]
    for start in range(0, len(seen) - number + 1, number):  # all of them once, then all of them again
        assert sorted(seen[start : start + number]) == list(range(number))
    for batch, part in zip(batches, beside, strict=True):
        real = sum(slot.weight for slot in batch if slot.sample < own)
        assert sum(slot.weight for slot in part) == 0.5 * min(half, real)
        assert {slot.weight for slot in part} <= {0.0, 0.5}
    whole = range(0, steps - steps % plan.steps_per_epoch, plan.steps_per_epoch)
    for start in whole:  # the others' epochs are as without, and no place is another's
        slots = [slot for batch in batches[start : start + plan.steps_per_epoch] for slot in batch]
        weighed = [slot for slot in slots if slot.weight]
        assert sorted(slot.sample for slot in weighed if slot.sample < own) == list(range(own))
        assert len({(slot.epoch, slot.position) for slot in weighed}) == len(weighed)


def test_places_of_a_batch_alternate_so_that_each_share_has_both() -> None:
    batch = Plan([1] * 8, 8, 0, Beside(8, 5, 1.0)).step(3)
    assert [slot.sample >= 8 for slot in batch] == [False, True] * 4
    odd = Plan([1] * 8, 5, 0, Beside(8, 5, 1.0)).step(0)
    assert [slot.sample >= 8 for slot in odd] == [False, True, False, True, False]
    with pytest.raises(
        UserError, match=r"train\.batch_size: found 1; with class pictures expected at least 2"
    ):
        Plan([1] * 8, 1, 0, Beside(8, 5, 1.0))

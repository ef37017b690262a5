"""Which samples a step sees: each once an epoch, however the step is divided."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.data.buckets import Assigned, Bucket, Buckets
from tuner.data.plan import Beside, Plan, Slot, Stages, balanced, share
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


def sizes(data: st.DataObject, least: int = 1) -> Assigned:
    """Samples of any shapes, in one area or two."""
    side = st.integers(16, 300)
    found = data.draw(st.lists(st.tuples(side, side), min_size=least, max_size=25))
    sides = data.draw(st.sampled_from([(64,), (64, 96)]))
    return Buckets(sides, 16, data.draw(st.sampled_from([1.0, 4.0]))).assign(found, str)


def rows_of(assigned: Assigned) -> list[tuple[int, Bucket]]:
    return [(int(i), assigned.shapes[b]) for i, b in zip(assigned.sample, assigned.bucket, strict=True)]


@given(data=st.data(), last=st.sampled_from(["smaller", "padded"]), parts=FEW, epoch=st.integers(0, 4))
def test_each_sample_comes_once_an_epoch_in_each_of_its_buckets(
    data: st.DataObject, last: Literal["smaller", "padded"], parts: int, epoch: int
) -> None:
    assigned = sizes(data, least=parts)
    wanted = rows_of(assigned)
    batch_size = data.draw(st.integers(1, len(wanted) // parts)) * parts
    samples = max(i for i, _ in wanted) + 1
    plan = Plan([1] * samples, batch_size, 3, None, assigned, None, last, parts)
    n = plan.steps_per_epoch
    batches = [plan.step(step) for step in range(epoch * n, (epoch + 1) * n)]
    real = [[slot for slot in batch if slot.weight] for batch in batches]
    came = [(slot.sample, slot.bucket) for part in real for slot in part]
    assert sorted(came) == sorted(wanted)
    # One bucket a batch, and every place of a bucket that the sample has.
    assert all(len({slot.bucket for slot in batch}) == 1 for batch in batches)
    assert {(slot.sample, slot.bucket) for batch in batches for slot in batch} == set(wanted)
    # Places are counted through the epoch; a filled one shows what another place shows.
    assert [slot.position for part in real for slot in part] == list(range(len(wanted)))
    places = {slot[:3] for part in real for slot in part}
    assert {slot[:3] for batch in batches for slot in batch} == places
    assert {slot.epoch for batch in batches for slot in batch} == {epoch}
    full = Counter(bucket for _, bucket in wanted)
    assert n == sum(-(-count // batch_size) for count in full.values())
    for batch, part in zip(batches, real, strict=True):
        assert batch[: len(part)] == part and len(batch) % parts == 0
        assert len(batch) == batch_size if last == "padded" else len(batch) - len(part) < parts
    assert plan.sizes.tolist() == [full[shape] for shape in assigned.shapes]


@given(data=st.data(), beside=st.booleans(), last=st.sampled_from(["smaller", "padded"]))
def test_what_counts_in_a_step_does_not_depend_on_how_it_is_divided(
    data: st.DataObject, beside: bool, last: Literal["smaller", "padded"]
) -> None:
    assigned = sizes(data, least=12)
    samples = int(assigned.sample.max()) + 1
    others = Beside(samples, 5, 0.5) if beside else None
    divisions = [(1, 1), (2, 1), (1, 3), (2, 2), (3, 4), (12, 1)]
    seen: list[list[list[Slot]]] = []
    for processes, accumulate in divisions:
        plan = Plan([1] * samples, 12, 1, others, assigned, None, last, processes * accumulate)
        seen.append([])
        for step in range(2 * plan.steps_per_epoch):
            batch = plan.step(step)
            shares = [
                share(batch, m, rank, accumulate, processes)
                for m in range(accumulate)
                for rank in range(processes)
            ]
            assert len({len(part) for part in shares}) == 1 and len(shares[0]) > 0
            joined = [slot for part in shares for slot in part]
            assert joined == batch
            seen[-1].append([slot for slot in joined if slot.weight])
    assert len(seen) == 6 and all(one == seen[0] for one in seen[1:]) and len(seen[0]) > 1


@given(data=st.data(), seed=st.integers(0, 5))
def test_a_step_is_the_same_whenever_it_is_asked_for(data: st.DataObject, seed: int) -> None:
    assigned = sizes(data)
    samples = int(assigned.sample.max()) + 1
    repeats = data.draw(st.lists(st.sampled_from([0.5, 1.0, 1.25]), min_size=samples, max_size=samples))

    def made() -> Plan:
        return Plan(repeats, 2, seed, Beside(len(repeats), 3, 1.0), assigned, None, "smaller")

    plan = made()
    steps = range(plan.steps_in(3))
    forward = [plan.step(step) for step in steps]
    assert [made().step(step) for step in reversed(steps)] == forward[::-1]
    assert all(plan.epoch_of(step)[0] == batch[0].epoch for step, batch in zip(steps, forward, strict=True))


REAL = st.sampled_from([0.0, 0.01, 0.25, 0.5, 0.75, 1.0, 1.3, 2.5])


@given(repeats=st.lists(REAL, min_size=1, max_size=12).filter(lambda r: sum(r) >= 1), data=st.data())
def test_fractional_repeats_are_exact_over_a_cycle(repeats: list[float], data: st.DataObject) -> None:
    count = len(repeats)
    shapes = [data.draw(st.sampled_from([(64, 64), (64, 200)])) for _ in repeats]
    assigned = Buckets((64,), 16, 4).assign(shapes, str)
    plan = Plan(repeats, 1, 9, assigned=assigned)
    hundredths = [round(times * 100) for times in repeats]
    assert plan.cycle in (1, 2, 4, 5, 10, 20, 100) and all(h * plan.cycle % 100 == 0 for h in hundredths)
    came = [Counter[int]() for _ in range(2 * plan.cycle)]
    for step in range(plan.steps_in(2 * plan.cycle)):
        (slot,) = plan.step(step)
        came[slot.epoch][slot.sample] += 1
    assert sum(sum(epoch.values()) for epoch in came) == plan.steps_in(2 * plan.cycle) > 0
    for number, epoch in enumerate(came):
        assert sum(epoch.values()) == plan.steps_in(number + 1) - plan.steps_in(number)
        assert all(epoch[i] in (h // 100, -(-h // 100)) for i, h in enumerate(hundredths))
    for begins in (0, plan.cycle):
        total = sum(came[begins : begins + plan.cycle], Counter[int]())
        assert [total[i] for i in range(count)] == [h * plan.cycle // 100 for h in hundredths]


def test_of_a_source_with_half_a_repeat_half_comes_each_epoch() -> None:
    plan = Plan([1.0] * 6 + [0.5] * 10, 11, seed=2)
    assert plan.cycle == 2 and plan.steps_per_epoch == 1 and len(plan.entries) == 11
    halves = [{slot.sample for slot in plan.step(epoch)} for epoch in range(8)]
    assert all(set(range(6)) <= half and len(half) == 11 for half in halves)
    for first, second in zip(halves[::2], halves[1::2], strict=True):
        assert first | second == set(range(16))
    assert len({frozenset(half) for half in halves[::2]}) == 4  # drawn anew
    # An odd number of them, each a step: epochs differ, and it is said how.
    odd = Plan([0.5] * 3, 1, seed=2)
    assert [odd.steps_in(epochs) for epochs in range(5)] == [0, 2, 3, 5, 6] and odd.steps_per_epoch == 2
    with pytest.raises(UserError, match=r"data\.source\.repeats: found 0\.333, .* such as 0\.33"):
        Plan([1, 0.333], 1, seed=0)
    with pytest.raises(UserError, match=r"data\.source\.repeats: found -1, expected 0\.01 or more"):
        Plan([-1, 2], 1, seed=0)


def test_weights_of_samples_are_those_of_their_slots() -> None:
    weights = [0.5, 2.0, 1.0, 0.25, 4.0]
    plan = Plan([1, 2, 1, 1, 1], 4, seed=0, weights=weights)
    slots = [slot for step in range(4) for slot in plan.step(step)]
    assert Counter(slot.weight for slot in slots) == {0.0: 4, 0.5: 2, 2.0: 4, 1.0: 2, 0.25: 2, 4.0: 2}
    assert all(slot.weight in (0, weights[slot.sample]) for slot in slots)


@given(data=st.data(), batch_size=st.integers(2, 7), number=st.integers(1, 6), parts=st.integers(1, 3))
def test_samples_beside_all_come_before_one_comes_again_in_smaller_batches_too(
    data: st.DataObject, batch_size: int, number: int, parts: int
) -> None:
    assigned = sizes(data, least=batch_size)
    samples = int(assigned.sample.max()) + 1
    beside, half = Beside(samples, number, 0.5), batch_size // 2
    repeats = data.draw(st.sampled_from([1.0, 1.5]))
    plan = Plan([repeats] * samples, batch_size, 4, beside, assigned, None, "smaller", parts)
    batches = [plan.step(step) for step in range(plan.steps_in(4))]
    seen, counts = [], Counter[int]()
    for batch in batches:
        real = [slot for slot in batch if slot.sample < samples and slot.weight]
        others = [slot for slot in batch if slot.sample >= samples]
        assert len(others) == min(half, len(real)) and {slot.weight for slot in others} <= {0.5}
        assert len({slot.bucket for slot in batch}) == 1 and len(batch) % parts == 0
        seen += [slot.sample - samples for slot in others]
        counts.update(slot.epoch for slot in real)
    for start in range(0, len(seen) - number + 1, number):
        assert sorted(seen[start : start + number]) == list(range(number))
    slots = [slot[1:3] for batch in batches for slot in batch if slot.weight]
    assert len(set(slots)) == len(slots)
    assert sum(counts.values()) == 4 * repeats * len(assigned.sample) and len(counts) == 4


def test_batches_of_buckets_are_mixed() -> None:
    assigned = Buckets((64,), 16, 4).assign([(64, 64)] * 40 + [(64, 200)] * 40, str)
    plan = Plan([1] * 80, 4, 0, assigned=assigned)
    orders = [[plan.step(e * 20 + i)[0].bucket for i in range(20)] for e in range(3)]
    assert plan.steps_per_epoch == 20 and len({tuple(order) for order in orders}) == 3
    for order in orders:
        assert sum(a != b for a, b in pairwise(order)) > 4
        assert len(set(order)) == 2


@given(data=st.data())
def test_stages_are_plans_one_after_another(data: st.DataObject) -> None:
    plans = [Plan([1] * n, 2, 7) for n in data.draw(st.lists(st.integers(2, 9), min_size=1, max_size=4))]
    steps = [data.draw(st.integers(1, 12)) for _ in plans]
    stages = Stages(plans, steps)
    assert stages.steps == sum(steps)
    found = [stages.find(step) for step in range(stages.steps)]
    assert found == [(stage, within) for stage, n in enumerate(steps) for within in range(n)]
    batches = [stages.step(step) for step in range(stages.steps)]
    epochs = [batch[0].epoch for batch in batches]
    assert epochs[0] == 0 and all(b - a in (0, 1) for a, b in pairwise(epochs))
    begins = {step for step in range(1, stages.steps) if found[step][1] == 0}
    assert all(epochs[step] == epochs[step - 1] + 1 for step in begins)
    slots = [slot[1:3] for batch in batches for slot in batch if slot.weight]
    assert len(set(slots)) == len(slots)  # nothing is drawn twice
    assert batches[: steps[0]] == [plans[0].step(step) for step in range(steps[0])]
    assert [stages.step(step) for step in reversed(range(stages.steps))] == batches[::-1]


def test_sources_are_balanced_by_their_repeats() -> None:
    assert balanced([1, 1], [100, 1000]) == [10, 1]
    assert balanced([0.7, 0.3], [30, 1000]) == [77.78, 1]
    assert balanced([2, 1, 1], [10, 5, 5]) == [1, 1, 1]
    counts, weights = [123, 4567, 89], [0.2, 0.5, 0.3]
    entries = [times * n for times, n in zip(balanced(weights, counts), counts, strict=True)]
    assert [e / sum(entries) for e in entries] == pytest.approx(weights, rel=0.005)


def test_a_hundred_thousand_samples_are_arrays() -> None:
    heights, widths = np.divmod(np.arange(100_000) * 7919 % 1_000_000, 1000)
    assigned = Buckets((512,), 64, 2).assign(np.stack([heights + 100, widths + 100], axis=1), str)
    plan = Plan(np.ones(100_000), 16, 0, assigned=assigned, last="smaller")
    held = [v for v in vars(plan).values() if isinstance(v, list | tuple | dict)]
    assert all(len(part) < 1000 for part in held)
    batch = plan.step(10_000_000)
    assert len({slot.bucket for slot in batch}) == 1 and len({slot.sample for slot in batch}) == len(batch)
    assert int(plan.sizes.sum()) == 100_000
    assert plan.steps_per_epoch == int((-(-plan.sizes // 16)).sum())

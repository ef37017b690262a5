"""When a fidelity curve jumps, and how fidelity is measured, on curves and pictures made for it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tuner.data import conditions
from tuner.evaluate.controlnet import CURVE, fidelity, jump, probe, share_of_way
from tuner.evaluate.measures import Picture
from tuner.evaluate.measures import probe as probe_of
from tuner.evaluate.render import render
from tuner.evaluate.world import draw_scene

COUNT = 4


def steps(count: int) -> list[int]:
    return [50 * (i + 1) for i in range(count)]


def test_a_step_jumps_at_one_point() -> None:
    values = [0.2] * 6 + [0.8] * 6
    assert jump(steps(12), values) == (350, 350, 350)


def test_a_ramp_passes_its_levels_in_turn() -> None:
    # From 0 to 1 in tenths: the start is the first point alone, the rise 1.
    values = [i / 10 for i in range(11)]
    assert jump(list(range(11)), values) == (1, 5, 9)


def test_the_start_is_the_mean_of_the_first_tenth() -> None:
    # Of 20 points the first two: mean 0.1; from there to 1.1 the levels are 0.2, 0.6, 1.0.
    values = [0.0, 0.2, 0.15] + [0.2] * 7 + [0.6] * 5 + [1.0] * 4 + [1.1]
    assert jump(list(range(20)), values) == (1, 10, 15)


@pytest.mark.parametrize(
    "values",
    [[0.3] * 8, [0.3, 0.35, 0.32, 0.39, 0.38], [0.9, 0.7, 0.5, 0.3], [0.0, 1.0, 1.0], []],
    ids=["flat", "too little", "falling", "short", "empty"],
)
def test_what_is_no_jump(values: list[float]) -> None:
    assert jump(steps(len(values)), values) is None


def test_a_dip_after_the_jump_changes_nothing() -> None:
    assert jump(steps(6), [0.1, 0.1, 0.9, 0.2, 0.9, 0.9]) == (150, 150, 150)


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    return [render(draw_scene("heldout", index)) for index in range(COUNT)]


@pytest.fixture(scope="module")
def edges(pictures: list[Picture]) -> list[Picture]:
    how = conditions.Condition(kind="canny")
    found = [conditions.make_condition(how, picture, conditions.Draw(), "x") for picture in pictures]
    assert len(found) == COUNT
    return found


def test_fidelity_orders_pictures(pictures: list[Picture], edges: list[Picture]) -> None:
    own = fidelity(pictures, edges)
    moved = fidelity([np.roll(picture, 1, axis=1) for picture in pictures], edges)
    far = fidelity([np.roll(picture, 9, axis=1) for picture in pictures], edges)
    blank = fidelity([np.full_like(pictures[0], 128)] * COUNT, edges)
    for key in ("strict F1", "F1 within 1 pixel"):
        assert blank[key] == 0.0 < far[key] < moved[key] < own[key] <= 1.0
    assert own["F1 within 1 pixel"] > 0.9 and moved["F1 within 1 pixel"] > 0.8
    assert own["strict F1"] > moved["strict F1"] + 0.2


def test_the_way_from_floor_to_ceiling() -> None:
    assert [share_of_way(value, 0.25, 0.75) for value in (0.25, 0.5, 0.75, 1.0, 0.0)] == [
        0,
        0.5,
        1,
        1.5,
        -0.5,
    ]
    assert math.isnan(share_of_way(0.5, 0.5, 0.5))


def test_a_preview_tells_its_fidelity(pictures: list[Picture], edges: list[Picture]) -> None:
    assert probe(edges, pictures) == {CURVE: fidelity(pictures, edges)["F1 within 1 pixel"]}
    assert probe_of(["controlnet"], edges, pictures) == probe(edges, pictures)
    assert probe_of(["lora"], edges, pictures) == {}
    assert probe_of(["controlnet"], None, pictures) == {}

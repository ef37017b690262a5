"""Buckets: which shapes there are, and which picture has which."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.data import buckets
from tuner.data.buckets import Assigned, Bucket, Buckets
from tuner.data.plan import Plan
from tuner.data.transform import Transform
from tuner.errors import UserError

TABLES = st.builds(
    lambda steps, step, longest: Buckets((steps * step,), step, longest),
    st.integers(1, 12),
    st.sampled_from([8, 16, 64]),
    st.floats(1, 5),
)
SIZE = st.tuples(st.integers(1, 4000), st.integers(1, 4000))


def name(index: int) -> str:
    return f"{index}.png"


@given(table=TABLES)
def test_shapes_fill_the_area_and_never_pass_it(table: Buckets) -> None:
    (side,), step = table.sides, table.step
    shapes = table.shapes
    assert Bucket(side, side) in shapes and len(set(shapes)) == len(shapes)
    assert {Bucket(b.width, b.height) for b in shapes} == set(shapes)
    for height, width in shapes:
        short, long = sorted((height, width))
        assert height % step == 0 and width % step == 0
        assert short * long <= side**2 < (short + step) * long or short == long == side
        assert long <= table.longest * short
    # None is missing: a step longer has no partner that is short enough.
    long = max(max(shape) for shape in shapes) + step
    short = side**2 // long // step * step
    assert long > table.longest * short


@given(table=TABLES, size=SIZE)
def test_a_picture_has_the_nearest_log_aspect(table: Buckets, size: tuple[int, int]) -> None:
    def distance(bucket: Bucket) -> Fraction:
        """exp |log aspect - log aspect'|, exactly."""
        ratio = Fraction(size[1] * bucket.height, size[0] * bucket.width)
        return max(ratio, 1 / ratio)

    found = table.of(*size)
    nearest = min(map(distance, table.shapes))
    assert found == max((b for b in table.shapes if distance(b) == nearest), key=lambda b: b.height)


def test_halfway_between_two_shapes_the_taller_is_taken() -> None:
    table = Buckets((120,), 1, 6)  # a rare case: neighbours whose aspects' product is a square
    for taller, wider, (height, width) in (
        (Bucket(289, 49), Bucket(288, 50), (204, 35)),
        (Bucket(50, 288), Bucket(49, 289), (35, 204)),
    ):
        assert {taller, wider} <= set(table.shapes)
        assert (
            Fraction(taller.width * wider.width, taller.height * wider.height) == Fraction(width, height) ** 2
        )
        assert table.of(height, width) == table.of(3 * height, 3 * width) == taller
        assert table.of(height * 1000, width * 1000 + 1) == wider


def test_the_shapes_of_1024_are_those_that_sdxl_users_know() -> None:
    shapes = Buckets((1024,), 64, 2.5).shapes
    known = [(1024, 1024), (896, 1152), (832, 1216), (768, 1344), (640, 1536), (704, 1408), (960, 1088)]
    assert {Bucket(*shape) for shape in known} <= set(shapes) and len(known) == 7
    assert min(b.height * b.width for b in shapes) >= 0.9 * 1024**2


@given(size=SIZE)
def test_squares_only_is_one_bucket(size: tuple[int, int]) -> None:
    assert Buckets((512,), 8).of(*size) == Bucket(512, 512)
    assert Buckets((512,), 8).shapes == (Bucket(512, 512),)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((512,), 24, 2, True, 64), r"data\.buckets\.step: found 24, .* multiple of 64, such as 64"),
        (((512,), 0), r"data\.buckets\.step: found 0"),
        (((512,), 64, 0.5), r"data\.buckets\.longest: found 0\.5, expected 1"),
        (((520,), 64), r"data\.resolution: 520 is no multiple of 64, .* choose 512 or 576"),
        (((32,), 64), r"data\.resolution: 32 is no multiple of 64, .* choose 64$"),
        (((512, 512), 64), r"data\.resolution: found \[512, 512\], expected different numbers"),
    ],
)
def test_a_table_that_cannot_be_is_an_error(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Buckets(*arguments)  # type: ignore[arg-type]


@given(sizes=st.lists(SIZE, min_size=1, max_size=20), upscale=st.booleans())
def test_every_sample_comes_at_every_area(sizes: list[tuple[int, int]], upscale: bool) -> None:
    table = Buckets((64, 128), 16, 2, upscale)
    sizes = [(max(h, 16), max(w, 16)) for h, w in sizes]
    assigned = table.assign(sizes, name)
    expected = [(i, bucket) for i, size in enumerate(sizes) for bucket in table.every(*size)]
    found = [(i, assigned.shapes[b]) for i, b in zip(assigned.sample, assigned.bucket, strict=True)]
    assert found == expected and {i for i, _ in found} == set(range(len(sizes)))
    assert set(assigned.shapes) == {bucket for _, bucket in expected}
    for (index, bucket), loss, scale in zip(found, assigned.crop_loss, assigned.scale, strict=True):
        look = Transform(*bucket)
        assert loss == np.float32(look.crop_loss(*sizes[index]))
        assert scale == np.float32(look.scale(*sizes[index]))
    if upscale:
        assert len(found) == 2 * len(sizes)
    else:
        assert len(set(found)) == len(found) and assigned.scale.max() <= 1


def test_what_is_not_enlarged_has_the_largest_bucket_that_it_covers() -> None:
    table = Buckets((128,), 16, 2, upscale=False)
    assert table.of(1000, 1000) == table.of(128, 128) == Bucket(128, 128)
    assert table.of(127, 127) == Bucket(112, 112) and table.of(16, 16) == Bucket(16, 16)
    assert Buckets((64, 128), 16, 2, upscale=False).every(70, 75) == (Bucket(64, 64),)
    assert Buckets((64, 128), 16, 2, upscale=True).every(70, 75) == (Bucket(64, 64), Bucket(128, 128))
    with pytest.raises(UserError) as error:
        table.assign([(15, 200)] * 23 + [(200, 200)], name)
    told = str(error.value).splitlines()
    assert told[0].startswith("0.png: 200x15 pixels, smaller than the smallest bucket 16x16")
    assert len(told) == 21 and told[-1] == "and 3 more"


def test_sources_with_different_buckets_are_joined() -> None:
    one = Buckets((64,), 16, 2).assign([(64, 64), (40, 90)], name)
    two = Buckets((128, 64), 16, 1).assign([(300, 300), (5, 9), (1, 1)], name)
    both = Assigned.join([(one, 2), (two, 3)])
    found = [(i, both.shapes[b]) for i, b in zip(both.sample, both.bucket, strict=True)]
    square, wide, large = Bucket(64, 64), Bucket(48, 80), Bucket(128, 128)
    assert found[:2] == [(0, square), (1, wide)]
    assert found[2:] == [(2, large), (2, square), (3, large), (3, square), (4, large), (4, square)]
    assert both.shapes == (wide, square, large)
    assert np.array_equal(both.scale, np.concatenate([one.scale, two.scale]))
    assert np.array_equal(both.crop_loss, np.concatenate([one.crop_loss, two.crop_loss]))


def test_the_table_is_shown() -> None:
    assigned = Buckets((64,), 16, 2).assign([(64, 64)] * 3 + [(128, 128), (60, 100), (32, 32)], name)
    plan = Plan([1, 1, 1, 2, 1, 1], 4, 0, assigned=assigned, last="smaller")
    rows = buckets.rows(assigned, plan.sizes, plan.own)
    assert [row[:5] for row in rows] == [(Bucket(48, 80), 1, 1, 1, 1), (Bucket(64, 64), 5, 6, 2, 2)]
    assert [row.enlarged for row in rows] == [0, 1] and rows[1].crop_loss == 0
    assert rows[0].crop_loss == pytest.approx(Transform(48, 80).crop_loss(60, 100))
    assert sum(row.batches for row in rows) == plan.steps_per_epoch
    assert buckets.lines(rows) == [
        "bucket  samples  an epoch  batches  last  crop loss  enlarged",
        " 80x48        1         1        1     1       0.0%         0",
        " 64x64        5         6        2     2       0.0%         1",
    ]
    assert buckets.warnings(assigned, name) == [
        "1 of 6 pictures are enlarged, the most 2 times, to 64x64: 5.png"
    ]
    fine = Buckets((64,), 16, 2).assign([(64, 64)], name)
    assert buckets.warnings(fine, name) == []

from __future__ import annotations

import cv2
import numpy as np
import pytest

from tuner.evaluate.edges import canny, edge_f1
from tuner.evaluate.render import render
from tuner.evaluate.world import draw_scene


def line(column: int, first: int = 0, last: int = 16) -> np.ndarray:
    edges = np.zeros((16, 16), np.uint8)
    edges[first:last, column] = 255
    return edges


def test_f1_of_equal_edges_is_one() -> None:
    assert edge_f1(line(5), line(5), 0) == 1.0
    assert edge_f1(line(5), line(5), 1) == 1.0


def test_f1_of_no_edges() -> None:
    none = np.zeros((16, 16), np.uint8)
    assert edge_f1(none, none, 0) == edge_f1(none, none, 1) == 1.0
    assert edge_f1(line(3), none, 1) == edge_f1(none, line(3), 1) == 0.0


def test_f1_tolerates_one_pixel_and_no_more() -> None:
    assert edge_f1(line(5), line(6), 0) == 0.0
    assert edge_f1(line(5), line(6), 1) == 1.0
    assert edge_f1(line(5), line(7), 1) == 0.0


def test_f1_closed_form() -> None:
    # 12 of 12 found pixels are wanted, 12 of 16 wanted are found: 2 * 1 * 0.75 / 1.75
    assert edge_f1(line(5, 0, 12), line(5), 0) == pytest.approx(6 / 7, abs=1e-12)
    # with tolerance the pixel below the found ones counts too: 13 of 16
    assert edge_f1(line(5, 0, 12), line(5), 1) == pytest.approx(2 * (13 / 16) / (1 + 13 / 16), abs=1e-12)
    # a quarter of what is found is wanted, and all that is wanted is found
    found = line(5) | line(9) | line(12) | line(14)
    assert edge_f1(found, line(5), 0) == pytest.approx(2 * 0.25 / 1.25, abs=1e-12)
    assert edge_f1(line(5), found, 0) == pytest.approx(2 * 0.25 / 1.25, abs=1e-12)


def test_f1_rejects_what_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="sizes"):
        edge_f1(line(5), np.zeros((16, 17), np.uint8), 1)
    with pytest.raises(ValueError, match="tolerance"):
        edge_f1(line(5), line(5), 2)  # type: ignore[arg-type]


def test_canny_is_the_plain_one() -> None:
    picture = render(draw_scene("heldout", 3))
    edges = canny(picture)
    assert edges.dtype == np.uint8 and edges.shape == (128, 128)
    assert set(np.unique(edges).tolist()) == {0, 255}
    assert np.array_equal(edges, cv2.Canny(picture, 100, 200))
    assert np.array_equal(
        canny(picture[:, ::-1]), cv2.Canny(np.ascontiguousarray(picture[:, ::-1]), 100, 200)
    )


def test_canny_rejects_other_arrays() -> None:
    for wrong in (np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32), np.zeros((0, 8, 3), np.uint8)):
        with pytest.raises(ValueError, match="uint8"):
            canny(wrong)


def test_measure_tells_right_from_wrong() -> None:
    """At 128 pixels: noise hardly moves the smoothed measure, another scene scores low."""
    rng = np.random.default_rng(0)
    noisy, other = [], []
    pictures = [render(draw_scene("heldout", index)) for index in range(60)]
    for index, picture in enumerate(pictures):
        wanted = canny(picture, smooth=True)
        grainy = np.clip(picture + rng.normal(0, 8, picture.shape), 0, 255).astype(np.uint8)
        noisy.append(edge_f1(canny(grainy, smooth=True), wanted, 1))
        other.append(edge_f1(canny(pictures[index - 1], smooth=True), wanted, 1))
    assert len(noisy) == len(other) == 60
    assert np.mean(noisy) > 0.97
    assert np.mean(other) < 0.25

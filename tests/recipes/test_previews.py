"""Previews: a sheet with a row for each prompt, the same noise each time, the base alone made once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tuner.log import read
from tuner.sample import Sampler, sheet

SIDE, STEPS = 64, 3
GAP, HEAD, LINE = 6, 22, 18  # pixels between, above and over the pictures


def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int]]:
    """Notes each call of Sampler.pictures: adapted or not, and how many."""
    calls: list[tuple[bool, int]] = []
    real = Sampler.pictures

    def pictures(self: Sampler, prompts: Any, conditions: Any = None, adapted: bool = True) -> Any:
        calls.append((adapted, len(prompts)))
        return real(self, prompts, conditions, adapted)

    monkeypatch.setattr(Sampler, "pictures", pictures)
    return calls


def cells(file: Path, columns: int, rows: int) -> np.ndarray:
    """The pictures of a sheet: uint8 [rows, columns, side, side, 3]."""
    image = np.asarray(Image.open(file).convert("RGB"))
    assert image.shape == (HEAD + rows * (SIDE + LINE + GAP), GAP + (SIDE + GAP) * columns, 3)
    found = np.empty((rows, columns, SIDE, SIDE, 3), np.uint8)
    for y in range(rows):
        for x in range(columns):
            top, left = HEAD + y * (SIDE + LINE + GAP) + LINE, GAP + x * (SIDE + GAP)
            found[y, x] = image[top : top + SIDE, left : left + SIDE]
    return found


@pytest.mark.parametrize(
    "recipe, columns",
    [
        ("controlnet_canny.yaml", ["condition", "base alone", "adapted"]),
        ("lora.yaml", ["base alone", "adapted"]),
        ("embedded/4_unet_128.yaml", ["adapted"]),
    ],
)
def test_sheets(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, columns: list[str]
) -> None:
    calls = counted(monkeypatch)
    more = {"train.steps": STEPS, "preview.count": 2, "evaluate.samples": 0, "validate.every": 0}
    assert tiny.start(recipe, tmp_path / "out", **more, train__learning_rate=0.02) == 0
    assert calls.count((False, 2)) == ("base alone" in columns)
    assert calls.count((True, 2)) == STEPS and len(calls) == STEPS + ("base alone" in columns)
    shown = []
    for step in range(1, STEPS + 1):
        place = tmp_path / "out" / "previews" / f"step-{step:06d}.png"
        about = json.loads(place.with_suffix(".json").read_text())
        assert about["columns"] == columns and len(about["prompts"]) == 2
        shown.append(cells(place, len(columns), rows=2))
    first, last = shown[0], shown[-1]
    assert np.array_equal(first[:, :-1], last[:, :-1])  # what does not change while it trains
    assert not np.array_equal(first[:, -1], last[:, -1])
    assert not np.array_equal(first[0, -1], first[1, -1])
    scalars = read(tmp_path / "out" / "metrics.jsonl").scalars
    if "condition" in columns:
        assert set(np.unique(first[:, 0])) == {0, 255}
        assert [step for step, _ in scalars["edge_f1"]] == [1, 2, 3]
    else:
        assert "edge_f1" not in scalars


def test_given_prompts_are_shown_in_their_order(tiny: Any, tmp_path: Path) -> None:
    more = {"preview.prompts": '["a toy", ""]', "preview.count": 4, "preview.every": 5}
    assert tiny.start("lora.yaml", tmp_path / "out", **more, train__steps=1, evaluate__samples=0) == 0
    # An interval longer than the run is no error: the last step is shown.
    files = sorted(p.name for p in (tmp_path / "out" / "previews").iterdir())
    assert files == ["step-000001.json", "step-000001.png"]
    about = json.loads((tmp_path / "out" / "previews" / "step-000001.json").read_text())
    assert about["prompts"] == ["a toy", ""]


def test_a_sheet_holds_the_pictures_unchanged() -> None:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8) for _ in range(4)]
    image = sheet({"left": pictures[:2], "right": pictures[2:]}, ["one", "a long prompt " * 20])
    found = np.asarray(image)
    for x in range(2):
        for y in range(2):
            top, left = HEAD + y * (SIDE + LINE + GAP) + LINE, GAP + x * (SIDE + GAP)
            assert np.array_equal(found[top : top + SIDE, left : left + SIDE], pictures[2 * x + y])

"""Whole runs at one resolution and then at another."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tuner import build, cli, device, recipe
from tuner.data.flow import batches
from tuner.data.plan import Stages
from tuner.errors import UserError

SHAPES = ((64, 64), (70, 66), (48, 96), (100, 50), (64, 64))  # height, width
RECIPE = """
base: {base}
method: {{lora: {{rank: 2}}}}
data:
  source: {source}
  stages: {stages}
  buckets: {{step: 8}}
  flip: true
  cache: {cache}
train:
  steps: {steps}
  batch_size: 2
  learning_rate: 0.01
  precision: fp32
  threads: 1
  checkpoint: {{every: 2, keep: 9}}
preview: {{every: 50, prompts: [a toy], steps: 1, count: 1}}
export: {{name: made}}
log: {{tensorboard: false}}
output: {output}
"""
STAGES = "[{resolution: 32, steps: 5}, {resolution: [48, 64], batch_size: 1, steps: 4}]"
EXPORT = "export/made.safetensors"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, (high, wide) in enumerate(SHAPES):
        blocks = np.random.default_rng(number).integers(0, 256, (5, 5, 3), np.uint8)
        look = Image.fromarray(blocks).resize((wide, high), Image.Resampling.NEAREST)
        look.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"{'abcde'[number]} toy")
    return folder


@pytest.fixture
def written(sd1_folder: Path, pictures: Path, tmp_path: Path) -> Callable[..., Path]:
    def write(stages: str = STAGES, steps: Any = 9, output: str = "out", **more: Any) -> Path:
        place = tmp_path / f"{output}.yaml"
        about = {"base": sd1_folder, "source": pictures, "cache": tmp_path / "cache"} | more
        place.write_text(RECIPE.format(stages=stages, steps=steps, output=tmp_path / output, **about))
        return place

    return write


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_each_step_has_the_size_of_its_stage_and_every_latent_is_cached(
    written: Callable[..., Path], folders: dict[str, Path], family: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = build.build(recipe.load(written(base=folders[family])), device.start("fp32", 1))
    said = capsys.readouterr().out
    words = "5 samples an epoch, 5 steps of 2 pictures (1.25 epochs); then 10 samples an epoch, 4 steps of 1"
    assert words in said
    assert isinstance(run.plan, Stages) and run.steps == 9 and run.data.size == 64
    assert run.data.latents.store is not None
    found = list(batches(run.data, run.plan, run.division, 0, 9, 0))
    assert len(found) == 9
    for step, batch in enumerate(found):
        high, wide = (side * 8 for side in batch.noise.shape[2:])
        most = 2 if step < 5 else 1
        assert run.plan.pictures(step) == most and 1 <= len(batch.names) <= most
        assert batch.moments is not None and batch.pixels is None
        assert batch.moments.mean.shape == batch.noise.shape
        limits = (0, 32**2) if step < 5 else (32**2, 64**2)
        assert limits[0] < high * wide <= limits[1]
        if family == "sdxl":
            assert batch.sizes is not None
            assert batch.sizes[:, 4:].tolist() == [[high, wide]] * len(batch.names)
            of = [int(Path(name).stem) for name in batch.names]
            assert batch.sizes[:, :2].tolist() == [list(map(float, SHAPES[n])) for n in of]
    # The first stage ends in the middle of its second epoch; the next begins with the third.
    slots = [run.plan.step(step) for step in range(9)]
    assert [{slot.epoch for slot in step} for step in slots] == [{0}] * 4 + [{1}] + [{2}] * 4
    assert Counter(s.sample for step in slots[:4] for s in step if s.weight) == dict.fromkeys(range(5), 1)
    places = [(slot.epoch, slot.position) for step in slots for slot in step if slot.weight]
    assert len(set(places)) == len(places) == 5 + len(slots[4]) + 4


def test_a_run_that_is_stopped_in_any_stage_ends_as_one_that_was_not(
    written: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", str(written())]) == 0
    whole = load_file(tmp_path / "out" / EXPORT)
    preview = Image.open(tmp_path / "out" / "previews" / "step-000009.png")
    assert min(preview.size) >= 64, "of the last stage's size"
    for step in (2, 4, 6):
        name, start = f"from{step}", tmp_path / "out" / "checkpoints" / f"step-{step:07d}"
        assert cli.main(["train", str(written(output=name)), f"train.resume={start}"]) == 0
        assert f"({step} of 9 steps are done)" in capsys.readouterr().out
        other = load_file(tmp_path / name / EXPORT)
        assert len(whole) > 10 and all(torch.equal(whole[key], other[key]) for key in whole)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "32, then 48 x 64 px" in page


def test_a_longer_last_stage_continues_a_shorter_one(
    written: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    open_ended = STAGES.replace(", steps: 4", "")
    assert cli.main(["train", str(written(open_ended, 7))]) == 0
    assert cli.main(["train", str(written(open_ended, 9))]) == 0
    assert "(7 of 9 steps are done)" in capsys.readouterr().out
    assert cli.main(["train", str(written(output="whole"))]) == 0
    one, other = (load_file(tmp_path / name / EXPORT) for name in ("out", "whole"))
    assert len(one) > 10 and all(torch.equal(one[key], other[key]) for key in other)
    for step in range(1, 10):  # their losses, too
        rows = []
        for name in ("out", "whole"):
            lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
            rows.append(
                [row["loss"] for row in map(json.loads, lines) if row.get("step") == step and "loss" in row]
            )
        assert rows[0] == rows[1] and len(rows[0]) == 1
    # Another first stage is another run.
    other_first = open_ended.replace("steps: 5", "steps: 4")
    assert cli.main(["train", str(written(other_first, 9))]) == 2
    assert "data.stages: the checkpoint has" in capsys.readouterr().err


@pytest.mark.parametrize(
    "stages, steps, changes, told",
    [
        (STAGES, 8, [], "data.stages: found 9 steps, but train.steps is 8"),
        ("[{resolution: 32, steps: 4}, {resolution: 64}]", 4, [], "found 4 steps before the last"),
        ("[{resolution: 32}, {resolution: 64}]", 4, [], "data.stages.0.steps: is missing; only the last"),
        ("[{resolution: 32, steps: 4}]", 4, [], "data.stages"),
        (STAGES, "null", ["train.epochs=2"], "data.stages: needs train.steps"),
        (STAGES, 9, ["data.resolution=64"], "data.resolution: found together with stages"),
        ("null", 9, [], "data.resolution: is missing"),
        (STAGES.replace("48, 64", "64, 64"), 9, [], r"stages.1.resolution: found \[64, 64\], expected"),
        (STAGES.replace("48, 64", "44"), 9, [], "44"),
        (STAGES.replace("batch_size: 1", "batch_size: 3"), 9, ["train.accumulate=2"],
         "data.stages.1.batch_size: found 3, which 1 process x 2"),
    ],
)  # fmt: skip
def test_stages_that_do_not_go_together(
    written: Callable[..., Path], stages: str, steps: Any, changes: list[str], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        build.build(recipe.load(written(stages, steps), changes), device.start("fp32", 1))

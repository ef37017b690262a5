"""Whole runs on pictures as users have them: of many shapes, from several sources, with masks and changes."""

from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tuner import build, cli, device, loop, recipe
from tuner.batch import Batch
from tuner.data import encode
from tuner.data.loader import stream
from tuner.data.plan import Slot
from tuner.errors import UserError

SHAPES = ((64, 64), (70, 66), (48, 96), (100, 50), (64, 64), (40, 90), (110, 50))  # height, width
RECIPE = """
base: {base}
method: {method}
data: {data}
train:
  steps: {steps}
  batch_size: 2
  learning_rate: 0.01
  precision: fp32
  threads: 1
export: {{name: made}}
log: {{tensorboard: false}}
output: {output}
"""
LORA = "{lora: {rank: 2}}"
CONTROLNET = "{controlnet: {condition: canny}}"
Start = Callable[..., loop.Run]


def drawn(folder: Path, shapes: Sequence[tuple[int, int]] = SHAPES, seed: int = 0, more: str = "") -> Path:
    """Pictures of coloured blocks with captions; `more`: a folder of others of the same names beside."""
    for number, (high, wide) in enumerate(shapes):
        blocks = np.random.default_rng((seed, number)).integers(0, 256, (5, 5, 3), np.uint8)
        look = Image.fromarray(blocks).resize((wide, high), Image.Resampling.NEAREST)
        (folder / more).mkdir(parents=True, exist_ok=True)
        look.save(folder / more / f"{number}.png")
        if not more:
            (folder / f"{number}.txt").write_text(f"{'abcdefgh'[number]} toy")
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return drawn(tmp_path / "pictures")


@pytest.fixture
def written(sd1_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """A recipe's file; its data as YAML."""
    names = (f"{number}.yaml" for number in itertools.count())

    def write(
        data: str, method: str = LORA, steps: int = 4, output: str = "out", cache: str = "cache"
    ) -> Path:
        place = tmp_path / next(names)
        where = tmp_path / cache if cache != "off" else cache
        whole = f"{{{data}, cache: {where}}}"
        about = {"base": sd1_folder, "output": tmp_path / output, "steps": steps}
        place.write_text(RECIPE.format(data=whole, method=method, **about))
        return place

    return write


@pytest.fixture
def start(written: Callable[..., Path]) -> Start:
    """Builds a run."""

    def built(*args: Any, **more: Any) -> loop.Run:
        return build.build(recipe.load(written(*args, **more)), device.start("fp32", 1))

    return built


def slots(run: loop.Run, epochs: int = 1, first: int = 0) -> list[list[Slot]]:
    """The slots of whole epochs that count, step by step."""
    steps = range(run.plan.steps_in(first), run.plan.steps_in(first + epochs))
    return [[slot for slot in run.plan.step(step) if slot.weight] for step in steps]


def batches(run: loop.Run, epochs: int = 1) -> list[Batch]:
    return list(stream(run.data, run.plan, run.division, 0, run.plan.steps_in(epochs), 0))


def run_latents(batch: Batch, run: loop.Run) -> torch.Tensor:
    with torch.no_grad():
        return run.task.latents(batch)


def test_buckets_have_each_picture_once_an_epoch_and_cached_is_uncached(
    start: Start, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = f"source: {pictures}, resolution: 64, flip: true, buckets: {{step: 16}}"
    run = start(data)
    told = capsys.readouterr().out
    assert "crop loss" in told and "pictures are enlarged" in told and "not cached" not in told
    for epoch in range(3):
        found = slots(run, first=epoch)
        assert Counter(slot.sample for step in found for slot in step) == dict.fromkeys(range(7), 1)
        assert all(len({slot.bucket for slot in step}) == 1 for step in found)
    shapes = {slot.bucket for step in slots(run) for slot in step}
    assert len(shapes) >= 3 and all(
        shape is not None and shape.height * shape.width <= 64**2 for shape in shapes
    )
    other = start(data, cache="off")
    assert run.data.latents.store is not None and other.data.latents.store is None
    one, two = batches(run, 2), batches(other, 2)
    assert len(one) == len(two) == run.plan.steps_in(2) >= 8
    seen = set()
    for cached, plain in zip(one, two, strict=True):
        assert cached.names == plain.names and cached.captions == plain.captions
        assert cached.pixels is None and plain.pixels is not None and plain.noise.shape == cached.noise.shape
        assert torch.equal(cached.noise, plain.noise) and torch.equal(cached.weight, plain.weight)
        height, width = plain.pixels.shape[2:]
        assert tuple(cached.noise.shape[2:]) == (height // 8, width // 8)
        torch.testing.assert_close(run_latents(cached, run), run_latents(plain, other), rtol=1e-4, atol=1e-5)
        seen.add((height, width))
    assert seen == {tuple(shape) for shape in shapes if shape is not None}
    with torch.no_grad():
        assert all(bool(run.task.evaluate(batch).isfinite().all()) for batch in one[:3])


def test_a_run_that_stops_and_goes_on_gives_equal_bytes(written: Callable[..., Path], pictures: Path) -> None:
    data = (
        f"source: {pictures}, resolution: [64, 48], flip: true, crop: random, buckets: {{step: 16}}, "
        "jitter: {brightness: 0.3, hue: 0.1}, captions: {drop: 0.2}"
    )
    for steps in (3, 11):  # into the second epoch
        assert cli.main(["train", str(written(data, steps=steps, output="parts"))]) == 0
    assert cli.main(["train", str(written(data, steps=11, output="whole"))]) == 0
    root = pictures.parent
    files = [root / output / "export" / "made.safetensors" for output in ("parts", "whole")]
    assert files[0].read_bytes() == files[1].read_bytes() and files[0].stat().st_size > 1000


def test_what_is_not_cached_is_told_with_why(
    start: Start, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = f"source: {pictures}, resolution: 32"
    lines = {
        "crop: random": "data.crop: random shows another part of a picture each time",
        "jitter: {contrast: 0.2}": "data.jitter changes colours each time",
    }
    for more, why in lines.items():
        run = start(f"{plain}, {more}")
        assert run.data.latents.store is None and run.data.texts.store is not None
        assert f"pictures are encoded in each step, not cached: {why}\n" in capsys.readouterr().out
    run = start(f"{plain}, crop: random", method="{lora: {rank: 2, text_encoder: true}}")
    assert run.data.texts.store is None
    assert (
        "captions are encoded in each step, not cached: what reads them is trained" in capsys.readouterr().out
    )
    start(f"{plain}, jitter: {{hue: 0.2}}", cache="off")
    start(plain)
    assert "not cached" not in capsys.readouterr().out


def test_jitter_and_random_crops_differ_from_epoch_to_epoch(start: Start, pictures: Path) -> None:
    run = start(f"source: {pictures}, resolution: 32, crop: random, jitter: {{brightness: 0.5}}")
    looks: dict[str, list[torch.Tensor]] = {}
    for batch in batches(run, 2):
        assert batch.pixels is not None
        real = [n for n, weight in enumerate(batch.weight.tolist()) if weight]
        for number in real:
            looks.setdefault(batch.names[number], []).append(batch.pixels[number])
    assert len(looks) == 7 and all(len(both) == 2 for both in looks.values())
    assert not any(torch.equal(*both) for both in looks.values())


def test_two_resolutions_show_each_picture_at_each(start: Start, pictures: Path) -> None:
    run = start(f"source: {pictures}, resolution: [64, 32], buckets: {{step: 16}}")
    found = [slot for step in slots(run) for slot in step]
    assert Counter(slot.sample for slot in found) == dict.fromkeys(range(7), 2)
    areas: dict[int, set[bool]] = {}
    for slot in found:
        assert slot.bucket is not None
        areas.setdefault(slot.sample, set()).add(slot.bucket.height * slot.bucket.width > 32**2)
    assert len(areas) == 7 and set(map(frozenset, areas.values())) == {frozenset({True, False})}
    assert run.data.latents.store is not None and len(run.data.latents.store) == 14
    assert len({tuple(batch.noise.shape[2:]) for batch in batches(run)}) >= 4


def test_sources_with_shares_and_rules_of_their_own(start: Start, pictures: Path, tmp_path: Path) -> None:
    other = drawn(tmp_path / "other", SHAPES[:2], seed=1)
    drawn(other, SHAPES[:2], seed=2, more="edges")
    data = (
        f"source: [{{path: {pictures}, share: 1}}, {{path: {other}, condition_from: edges/, share: 3, "
        "resolution: 32, captions: {prefix: 'new ', drop: 0}, condition: image}], resolution: 64, "
        "captions: {drop: 0}"
    )
    run = start(data, method=CONTROLNET)
    found = Counter(slot.sample for step in slots(run, 2) for slot in step)
    assert [found[n] for n in range(7)] == [2] * 7 and [found[n] for n in (7, 8)] == [21, 21]  # 10.5 an epoch
    own = 0
    for batch in batches(run):
        assert batch.condition is not None
        for name, caption, condition in zip(batch.names, batch.captions, batch.condition, strict=True):
            if Path(name).parent == other:
                assert caption.startswith("new ") and condition.shape == (3, 32, 32)
                given = Image.open(other / "edges" / Path(name).name).convert("RGB")
                colours = torch.from_numpy(np.asarray(given)[::12, ::12] / 255)
                assert float(condition.mean()) > 0 and len(condition.unique()) > 2
                assert abs(float(condition.mean()) - float(colours.mean())) < 0.1
                own += 1
            else:
                assert not caption.startswith("new ") and condition.shape == (3, 64, 64)
                assert set(condition.unique().tolist()) <= {0.0, 1.0}
    assert own >= 20
    told = json.loads(run.card.metadata["controlnet"]["tuner.condition"])  # of both, the method's first
    assert [one["condition"] for one in told] == ["canny", "image"] and "low" in told[0]
    with torch.no_grad():
        assert bool(run.task.evaluate(batches(run)[0]).isfinite().all())


def test_masks_weigh_the_loss(start: Start, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, (high, wide) in enumerate(SHAPES):
        mask = np.zeros((high, wide), np.uint8)
        mask[:, : wide // 2] = 255
        (pictures / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(pictures / "masks" / f"{number}.png")
    data = f"source: {{path: {pictures}, mask_from: masks/}}, resolution: 64, buckets: {{step: 16}}"
    run = start(f"{data}, masks: {{outside: 0.2, normalise: false}}")
    assert "7 of 7 samples have a mask, which weighs their loss" in capsys.readouterr().out
    assert run.data.latents.store is not None
    for batch in batches(run):
        assert batch.mask is not None and batch.mask.shape == batch.noise[:, :1].shape
        columns = batch.mask.mean(dim=(0, 1, 2))
        assert columns[0] == 1 and abs(float(columns[-1]) - 0.2) < 1e-6
        with torch.no_grad():
            found = run.task.losses(batch)
            plain = run.task.losses(replace(batch, mask=None))
            left = run.task.losses(replace(batch, mask=(batch.mask > 0.99).float()))
            each = run.task.losses(replace(batch, mask=batch.mask.square()))
        assert bool((left < found).all()) and bool((found < plain).all())
        assert bool((each <= found).all())
    run = start(data)  # normalised
    for batch in batches(run):
        assert batch.mask is not None
        torch.testing.assert_close(batch.mask.mean(dim=(1, 2, 3)), torch.ones(len(batch.names)))
    with pytest.raises(UserError, match=r"data\.masks: no sample has a mask"):
        start(f"source: {drawn(pictures.parent / 'plain')}, resolution: 64, masks: {{outside: 0.5}}")


def test_alpha_and_the_background_are_part_of_a_cached_name(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "clear"
    folder.mkdir()
    for number in range(2):
        both = np.random.default_rng(number).integers(0, 256, (32, 32, 4), np.uint8)
        Image.fromarray(both).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("x")
    means = []
    for more in ("background: [255, 255, 255]", "background: [0, 0, 0]", "alpha: mask"):
        run = start(f"source: {folder}, resolution: 32, {more}")
        (batch,) = batches(run)
        assert batch.moments is not None and (batch.mask is not None) == (more == "alpha: mask")
        order = np.argsort(batch.names)
        means.append(batch.moments.mean[torch.from_numpy(order)])
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(means, 2)) and len(means) == 3


def test_what_cannot_be_read_is_left_out_where_allowed_before_anything_is_encoded(
    start: Start, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("1.png", "3.png"):
        whole = (pictures / name).read_bytes()
        (pictures / name).write_bytes(whole[: len(whole) * 2 // 3])
    encoded: list[int] = []
    real = encode._latents

    def counting(opened: Any, *more: Any) -> Any:
        encoded.append(len(opened.samples))
        return real(opened, *more)

    monkeypatch.setattr(encode, "_latents", counting)
    data = f"source: {pictures}, resolution: 32"
    with pytest.raises(UserError) as caught:
        start(data)
    told = str(caught.value).splitlines()
    assert len(told) == 3 and told[-1].startswith("2 of 7 samples cannot be used;") and not encoded
    assert all(
        f"{number}.png: this picture cannot be read" in line
        for number, line in zip((1, 3), told, strict=False)
    )
    capsys.readouterr()
    run = start(f"{data}, unreadable: 2")
    assert encoded == [5] and len(run.data.samples) == 5
    assert "2 of 7 samples cannot be used and are left out:" in capsys.readouterr().out
    assert Counter(s.sample for step in slots(run) for s in step) == dict.fromkeys(range(5), 1)
    assert {Path(sample.picture.name).name for sample in run.data.samples} == {
        f"{n}.png" for n in (0, 2, 4, 5, 6)
    }


@pytest.mark.parametrize(
    ("data", "method", "message"),
    [
        ("resolution: 32, heldout: [{path: P, resolution: 16}]", LORA, "heldout.0.resolution: has no effect"),
        ("resolution: 32, heldout: [{path: P, repeats: 2}]", LORA, "heldout.0.repeats: has no effect"),
        ("resolution: 32, heldout: [{path: P, weight: 0.5}]", LORA, "heldout.0.weight: has no effect"),
        (
            "resolution: 32, alpha: mask",
            "{autoencoder: {}}",
            "data.alpha: method autoencoder has a loss of its",
        ),
        ("resolution: 32, buckets: {step: 16}", "{contrastive: {}}", "data.buckets: .* takes squares only"),
        ("resolution: 60, buckets: {step: 16}", LORA, "data.resolution: 60"),
        (
            "resolution: 64, buckets: {step: 12}",
            LORA,
            "data.buckets.step: found 12, expected a multiple of 8",
        ),
    ],
)
def test_what_has_no_effect_is_an_error(
    start: Start, pictures: Path, data: str, method: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        start(f"source: {pictures}, {data.replace('P', str(pictures))}", method=method)


def test_rules_of_a_source_that_nothing_comes_of(start: Start, pictures: Path) -> None:
    with pytest.raises(UserError, match=r"data\.source\.0\.condition: method lora sees no conditions"):
        start(f"source: {{path: {pictures}, condition: canny}}, resolution: 32")
    with pytest.raises(UserError, match=r"0\.png: its weight is 0, as of 6 others"):
        start(f"source: {{path: {pictures}, weight: 0}}, resolution: 32")
    with pytest.raises(UserError, match="0.png: no conditioning_image, which condition: image asks for"):
        start(f"source: {{path: {pictures}, condition: image}}, resolution: 32", method=CONTROLNET)


def test_what_was_left_out_is_listed_in_the_output(tiny: Any, tmp_path: Path) -> None:
    folder = tmp_path / "style"
    shutil.copytree(tiny.shapes / "style", folder)
    damaged = min(folder.glob("*.png"))
    damaged.write_bytes(damaged.read_bytes()[:200])
    more = {"data.source": folder, "data.unreadable": 1, "preview.every": 0, "evaluate.samples": 0}
    assert tiny.start("lora.yaml", tmp_path / "out", **more) == 0
    (line,) = (tmp_path / "out" / "left_out.txt").read_text().splitlines()
    assert line.startswith(f"{damaged}: this picture cannot be read")
    shutil.copy(max(folder.glob("*.png")), damaged)  # mended: the list of the run before would mislead
    assert tiny.start("lora.yaml", tmp_path / "out", **more, **{"train.resume": "never"}) == 0
    assert not (tmp_path / "out" / "left_out.txt").exists()

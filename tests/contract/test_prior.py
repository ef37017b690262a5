"""Class pictures: drawn by the base where they lack, once; half of each batch; weighed in the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from tuner import build, device, loop, recipe, sample
from tuner.data.loader import stream
from tuner.data.samples import Sample
from tuner.errors import UserError
from tuner.log import Log
from tuner.signals import Stop

RECIPE = """
base: {base}
method:
  {method}:
    prior: {prior}
    {own}
data:
  source: {data}
  resolution: 32
  cache: {cache}
  captions: {{drop: 0.5, prefix: "new "}}
train:
  steps: 3
  batch_size: {batch}
  accumulate: 2
  learning_rate: 0.001
  precision: fp32
  threads: 1
log: {{tensorboard: false}}
output: {output}
"""
DRAWN = "{{prompt: a toy, count: {count}, steps: 2, weight: {weight}}}"
OWN = {"full": "checkpoint_file: false", "lora": "rank: 2"}
Start = Callable[..., loop.Run]


@pytest.fixture
def start(
    sd1_folder: Path, samples: list[Sample], tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Start]:
    """Builds a run with class pictures: of DreamBooth, or of the method that is asked for."""
    method = getattr(request, "param", "full")
    for one in samples:
        one.picture.path.with_suffix(".txt").write_text(one.captions[0])

    def built(prior: str, cache: str = "cache", batch: int = 4) -> loop.Run:
        AcceleratorState._reset_state(True)
        place = tmp_path / "recipe.yaml"
        more = {"base": sd1_folder, "data": samples[0].picture.path.parent, "output": tmp_path / "out"}
        where = tmp_path / cache if cache != "off" else cache
        own = {"method": method, "own": OWN[method], "prior": prior}
        place.write_text(RECIPE.format(cache=where, batch=batch, **own, **more))
        return build.build(recipe.load(place), device.start("fp32", 1))

    yield built
    AcceleratorState._reset_state(True)


def drawn(tmp_path: Path, cache: str = "cache") -> dict[str, bytes]:
    folders = list((tmp_path / cache / "class").iterdir())
    assert len(folders) == 1
    return {path.name: path.read_bytes() for path in sorted(folders[0].iterdir())}


def test_the_base_draws_what_lacks_and_only_that(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.prior.pictures_at_once", lambda size: 2)
    run = start(DRAWN.format(count=3, weight=1.0))
    first = drawn(tmp_path)
    assert list(first) == ["00000.png", "00001.png", "00002.png"] and len(set(first.values())) == 3
    sampler = sample.Sampler(run.task, run.accelerator, 32, 2, 5.0)
    expected = sampler.pictures(["a toy"] * 3)
    found = [np.asarray(Image.open(tmp_path / "x" / one.picture.path)) for one in run.data.samples[6:]]
    assert len(found) == 3
    for one, other in zip(expected, found, strict=True):  # drawn in other lots: equal up to rounding
        assert np.abs(one.astype(int) - other.astype(int)).max() <= 1

    calls: list[int] = []
    real = sample.Sampler.pictures

    def pictures(self: sample.Sampler, prompts: list[str], *more: object) -> list[sample.Picture]:
        calls.append(self.seed)
        return real(self, prompts, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(sample.Sampler, "pictures", pictures)
    start(DRAWN.format(count=3, weight=0.5))  # the weight is not in the name
    assert calls == [] and drawn(tmp_path) == first
    start(DRAWN.format(count=5, weight=1.0))  # more of them: those that are whole lots stay
    assert calls == [2, 4] and drawn(tmp_path).keys() > first.keys()
    assert {name: drawn(tmp_path)[name] for name in first} == first
    (next((tmp_path / "cache" / "class").iterdir()) / "00001.png").unlink()
    start(DRAWN.format(count=5, weight=1.0))
    assert calls == [2, 4, 0] and {name: drawn(tmp_path)[name] for name in first} == first


@pytest.mark.parametrize("start", OWN, indirect=True)
def test_they_are_half_of_each_batch_with_their_caption_and_weight(start: Start) -> None:
    run = start(DRAWN.format(count=3, weight=0.25))
    assert run.plan.steps_per_epoch == 3 and len(run.data.samples) == 9
    run.task.train()
    batches = list(stream(run.data, run.plan, run.division, 0, 3, 0))
    assert len(batches) == 6
    for batch in batches:
        ours, theirs = batch.captions[0], batch.captions[1]
        assert theirs == "a toy" and (ours == "" or ours.startswith("new a toy"))
        assert batch.weight.tolist() == [1.0, 0.25] and batch.total == 2.5
    each = [run.task.evaluate(batch) for batch in batches[:2]]
    with torch.no_grad():
        loss = sum(float(run.task(batch)[0]) for batch in batches[:2])
    instance, others = (sum(float(pair[i]) for pair in each) / 2 for i in (0, 1))
    assert loss == pytest.approx((instance + 0.25 * others) / 1.25, rel=1e-5)


@pytest.mark.parametrize("start", OWN, indirect=True)
def test_a_run_with_them_trains(start: Start) -> None:
    run = start(DRAWN.format(count=3, weight=1.0))
    before = {name: tensor.clone() for name, tensor in run.task.tensors().items()}
    with Log(run.output, False, None, True, None, {}) as log, Stop() as stop:
        assert loop.train(run, log, None, stop)
    after = run.task.tensors()
    assert len(after) > 50 and any(not torch.equal(after[name], before[name]) for name in after)


def test_given_ones_are_taken(start: Start, tmp_path: Path) -> None:
    folder = tmp_path / "toys"
    (folder / "more").mkdir(parents=True)
    for name in ("a.png", "more/b.jpg"):
        Image.new("RGB", (40, 36), "red").save(folder / name)
    run = start(f"{{prompt: a toy, source: {folder}}}")
    assert [s.picture.path.name for s in run.data.samples[6:]] == ["a.png", "b.jpg"]
    assert all(s.fixed and s.captions == ("a toy",) for s in run.data.samples[6:])
    assert not (tmp_path / "cache" / "class").exists()
    with pytest.raises(UserError, match=r"method\.full\.prior\.source: .*: no pictures there"):
        start(f"{{prompt: a toy, source: {tmp_path / 'nowhere'}}}")


@pytest.mark.parametrize("start", ["lora"], indirect=True)
def test_an_adapter_begins_as_the_base_that_draws_them(start: Start, tmp_path: Path) -> None:
    start("{prompt: a toy, count: 2, steps: 2}")
    made = drawn(tmp_path)
    full = tmp_path / "recipe.yaml"
    full.write_text(full.read_text().replace("lora:", "full:").replace("rank: 2", "checkpoint_file: false"))
    AcceleratorState._reset_state(True)
    build.build(recipe.load(full, [f"data.cache={tmp_path / 'other'}"]), device.start("fp32", 1))
    assert len(made) == 2 and drawn(tmp_path, "other") == made
    merged = "{prompt: a toy}, merge: {file: x.safetensors}".removesuffix("}") + "}"
    with pytest.raises(UserError, match=r"method\.lora\.prior\.source: is missing; the base alone draws"):
        start(merged.replace("}, merge", "}\n    merge"))


def test_what_cannot_be(start: Start) -> None:
    with pytest.raises(UserError, match="data.cache: found off, but class pictures are drawn into the cache"):
        start(DRAWN.format(count=3, weight=1.0), cache="off")
    with pytest.raises(UserError, match="14 pictures in a batch, 7 of them no class pictures, .* only 6"):
        start(DRAWN.format(count=3, weight=1.0), batch=14)

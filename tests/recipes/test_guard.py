"""Runs that go wrong: they stop with the last good checkpoint kept, or go back to it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tuner import counted, guard, loop
from tuner.family import Control
from tuner.methods.controlnet import ControlNet
from tuner.stable_diffusion import StableDiffusion

LORA, INVERSION, CONTROLNET = "lora.yaml", "textual_inversion.yaml", "controlnet_canny.yaml"
QUIET = {"preview.every": 0, "validate.every": 0}
PLAIN = QUIET | {
    "train.steps": 12,
    "train.checkpoint.every": 2,
    "evaluate.samples": 0,
    "method.lora.dropout": 0.1,
    "train.learning_rate": 1e-3,
}
# From the sixth update on a rate of 1e30: the loss of step 7 is no number.
HIGH = {"train.schedule": "piecewise_constant", "train.schedule_pieces": "[[5, 1e33]]"}
BACK = {"train.guard": "{policy: back, times: 2, factor: 1e-33}"}
TIMES = {"images_per_second", "data_wait", "seconds"}
SAMPLE_KEYS = {
    "name",
    "caption",
    "process",
    "micro_batch",
    "epoch",
    "position",
    "weight",
    "timestep",
    "loss",
}


def rows(output: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without its times."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def steps_of(output: Path) -> list[int]:
    return sorted(int(place.name[5:]) for place in (output / "checkpoints").glob("step-*"))


def trained(output: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(output / "checkpoints" / f"step-{step:07d}" / "trained.safetensors")


def assert_finite(output: Path, count: int) -> None:
    """No checkpoint holds anything that is not finite."""
    assert len(steps_of(output)) == count
    for step in steps_of(output):
        tensors = trained(output, step)
        assert len(tensors) > 10 and all(bool(tensor.isfinite().all()) for tensor in tensors.values())


@pytest.fixture
def in_lots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are read in lots, as on a GPU."""
    monkeypatch.setattr(loop, "waits_for_nothing", lambda accelerator: False)


@pytest.mark.parametrize("lots", [False, True])
def test_a_run_that_goes_wrong_stops_with_its_last_good_checkpoint(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], request: Any, lots: bool
) -> None:
    if lots:
        request.getfixturevalue("in_lots")
    output = tmp_path / "out"
    more = PLAIN | HIGH | {"train.checkpoint.every": 4, "train.accumulate": 2}
    assert tiny.start(LORA, output, **more) == 2
    told = capsys.readouterr().err
    place = output / "bad-step-7.json"
    assert "step 7: no finite number: loss is nan" in told and "Traceback" not in told
    assert f"the last good checkpoint is {output}/checkpoints/step-0000004" in told
    assert str(place) in told and "a lower train.learning_rate" in told and "train.guard: back" in told
    assert "fp32" not in told  # it is computed in float32 already
    assert_finite(output, 1)
    assert not (output / "finished.json").exists() and not (output / "export").exists()
    about = json.loads(place.read_text())
    assert about["step"] == about["found_at_step"] == 7 and about["losses_with_weights_of_step"] == 4
    assert about["figures"]["loss"] == "nan"
    assert len(about["samples"]) == 4 and {s["micro_batch"] for s in about["samples"]} == {0, 1}
    for sample in about["samples"]:
        assert sample.keys() == SAMPLE_KEYS
        assert Path(sample["name"]).is_file() and isinstance(sample["caption"], str)
        assert 0 <= sample["timestep"] < 1000 and 0 < sample["loss"] < 100
    assert [row["step"] for row in rows(output) if "loss" in row] == list(range(1, 8))
    assert rows(output)[-1]["event"].startswith("stopped at step 7: no finite number")


def test_what_was_kept_goes_on_when_the_recipe_goes_back(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert tiny.start(LORA, output, **PLAIN | HIGH) == 2
    capsys.readouterr()
    assert tiny.start(LORA, output, **PLAIN | HIGH | BACK) == 0
    said = capsys.readouterr().out
    assert "continuing from" in said and "went back to step 4" in said
    assert (output / "export" / "lora.safetensors").is_file()


class Killed(BaseException):
    """Ends a run where it is, as a kill would."""


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int, time: int) -> None:
    """Raise Killed when step `step` (from 0) begins for the n-th time."""
    real, seen = counted.seed_libraries, [0]

    def seed(seed: int, at: int, micro: int, rank: int) -> None:
        seen[0] += at == step
        if at == step and seen[0] == time:
            raise Killed
        real(seed, at, micro, rank)

    monkeypatch.setattr(counted, "seed_libraries", seed)


@pytest.fixture(scope="module")
def back(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run that went back once and was never killed."""
    output: Path = tmp_path_factory.mktemp("back") / "out"
    assert tiny.start(LORA, output, **PLAIN | HIGH | BACK | {"train.ema": 0.9}) == 0
    return output


def test_going_back_lowers_the_rate_and_keeps_the_order(back: Path) -> None:
    assert_finite(back, 2)
    scalars = [row for row in rows(back) if "loss" in row]
    assert [row["step"] for row in scalars] == list(range(1, 13))  # those that were given up are cut
    rates = [row["learning_rate"] for row in scalars]
    assert rates[:4] == [1e-3] * 4 and rates[4] == pytest.approx(1e-36)
    assert rates[5:] == pytest.approx([1e-3] * 7)  # 1e-3 x 1e33 x 1e-33
    (event,) = [row for row in rows(back) if "went back" in row.get("event", "")]
    assert event["step"] == 4 and event["event"].startswith("step 7: no finite number: loss is nan")
    assert event["event"].endswith("went back to step 4 with the learning rate times 1e-33 (1 of 2)")
    assert (back / "bad-step-7.json").is_file()


@pytest.mark.parametrize("step, time", [(5, 2), (9, 1)])  # before any checkpoint after going back; later
def test_a_kill_after_going_back_changes_nothing(
    tiny: Any, back: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, time: int
) -> None:
    output = tmp_path / "out"
    about = PLAIN | HIGH | BACK | {"train.ema": 0.9}
    with monkeypatch.context() as patch:
        kill_at(patch, step, time)
        with pytest.raises(Killed):
            tiny.start(LORA, output, **about)
    assert steps_of(output)[-1] == (4 if step == 5 else 8)
    assert tiny.start(LORA, output, **about) == 0
    assert_as(output, back)


def test_a_kill_while_going_back_changes_nothing(
    tiny: Any, back: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    about = PLAIN | HIGH | BACK | {"train.ema": 0.9}
    real = loop._keep

    def keep(run: Any, made: Any, done: int) -> None:
        if made.watch.times:  # the log's line is written, the checkpoint with the lower rate is not
            raise Killed
        real(run, made, done)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_keep", keep)
        with pytest.raises(Killed):
            tiny.start(LORA, output, **about)
    assert sum("went back" in row.get("event", "") for row in rows(output)) == 1
    assert tiny.start(LORA, output, **about) == 0
    assert_as(output, back)


def assert_as(output: Path, other: Path) -> None:
    """The same bytes, trained and exported, and the same lines."""
    assert steps_of(output) == steps_of(other) == [10, 12]
    for name in ("checkpoints/step-0000012/trained.safetensors", "export/lora.safetensors"):
        assert (output / name).read_bytes() == (other / name).read_bytes(), name
    seen = [row for row in rows(output) if row.keys() != {"step"}]
    assert seen == [row for row in rows(other) if row.keys() != {"step"}]


def test_without_a_checkpoint_it_goes_back_to_the_start_and_at_last_stops(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    more = PLAIN | {"train.learning_rate": 1e35, "train.checkpoint.every": 1}
    more |= {"train.guard": "{policy: back, times: 2, factor: 0.1}"}
    assert tiny.start(LORA, output, **more) == 2
    told = capsys.readouterr()
    assert "went back to step 0 with the learning rate times 0.1 (1 of 2)" in told.out
    assert "went back to step 0 with the learning rate times 0.01 (2 of 2)" in told.out
    assert "Training stopped after going back 2 times" in told.err and "train.guard: back" not in told.err
    assert_finite(output, 2)
    assert len(json.loads((output / "bad-step-2.json").read_text())["samples"]) == 4


@pytest.mark.slow
def test_two_processes_go_back_together(tiny: Any, tmp_path: Path) -> None:
    """The bad step is found in a lot, and the batch of both is written down."""
    outputs = [tmp_path / "back", tmp_path / "stop"]
    codes = []
    for output, more in zip(outputs, (BACK, {}), strict=True):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        command += [str(tiny.root / "tuner" / "train.py"), str(tiny.root / "recipes" / LORA)]
        command += tiny.overrides(LORA, output, **PLAIN | HIGH | {"train.checkpoint.every": 4} | more)
        env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
        codes.append(done.returncode)
        assert "step 7: no finite number: loss is nan" in done.stdout + done.stderr, done.stderr[:3000]
    assert codes[0] == 0 and codes[1] != 0
    back, stop = outputs
    assert steps_of(back) == [8, 12] and steps_of(stop) == [4]
    assert_finite(back, 2)
    assert [row["step"] for row in rows(back) if "loss" in row] == list(range(1, 13))
    assert sum("went back to step 4" in row.get("event", "") for row in rows(back)) == 1
    for output in outputs:
        samples = json.loads((output / "bad-step-7.json").read_text())["samples"]
        assert [sample["process"] for sample in samples] == [0, 0, 1, 1]
        assert all(isinstance(sample["loss"], float) for sample in samples)
    assert (back / "export" / "lora.safetensors").is_file() and not (stop / "export").exists()


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short memory of losses, for short runs."""
    for name, value in {"RECENT": 4, "OVER": 3, "ENOUGH": 6, "WINDOW": 8, "FIRST": 3}.items():
        monkeypatch.setattr(guard, name, value)


@pytest.mark.usefixtures("short")
def test_a_loss_outside_its_history_goes_back_before_it_began_and_a_kill_changes_nothing(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, whole, parts = "embedded/4_unet_128.yaml", tmp_path / "whole", tmp_path / "parts"
    more = QUIET | {"train.steps": 22, "train.checkpoint.every": 3, "train.learning_rate": 1e-4}
    more |= {"train.checkpoint.keep": 4, "train.schedule": "piecewise_constant"}
    more |= {"train.schedule_pieces": "[[13, 1e4]]"}  # a rate of 1: nothing overflows, and nothing is left
    more |= {"train.guard": "{policy: back, factor: 1e-4}", "export.name": "same", "preview.every": ...}
    more |= {"method.full.pipeline": False, "method.full.checkpoint_file": False}
    assert tiny.start(recipe, whole, **more) == 0, capsys.readouterr().err
    (event,) = [row for row in rows(whole) if "went back" in row.get("event", "")]
    assert "the loss left its history" in event["event"] and event["step"] == 12
    assert "(1 of 2)" in event["event"]
    about = json.loads((whole / "bad-step-15.json").read_text())
    assert about["step"] == 15 < about["found_at_step"] <= 19 and about["losses_with_weights_of_step"] == 12
    assert all(isinstance(sample["loss"], float) for sample in about["samples"])
    for step, time in ((15, 1), (20, 1)):  # while it goes astray; later
        with monkeypatch.context() as patch:
            kill_at(patch, step, time)
            with pytest.raises(Killed):
                tiny.start(recipe, parts, **more)
    assert tiny.start(recipe, parts, **more) == 0
    assert steps_of(parts) == steps_of(whole) and steps_of(whole)[-1] == 22
    name = "checkpoints/step-0000022/trained.safetensors"
    assert (whole / name).read_bytes() == (parts / name).read_bytes()
    assert [row for row in rows(parts) if len(row) > 1] == [row for row in rows(whole) if len(row) > 1]


def test_a_sample_that_is_no_number_is_named(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    real = StableDiffusion.encode_images

    def encode(self: StableDiffusion, pixels: torch.Tensor) -> Any:
        moments = real(self, pixels)
        return moments._replace(mean=moments.mean / (pixels.mean(dim=(1, 2, 3), keepdim=True) > mean))

    pictures = sorted((tiny.shapes / "style").glob("*.png"))
    means = {str(p): float(pixels_of(p).mean()) for p in pictures}
    darkest, next_one = sorted(means, key=lambda name: means[name])[:2]
    mean = (means[darkest] + means[next_one]) / 2
    monkeypatch.setattr(StableDiffusion, "encode_images", encode)
    again = {"data.cache": "off", "train.guard": "{policy: back, times: 1}"}
    assert tiny.start(LORA, output, **PLAIN | again) == 2
    told = capsys.readouterr().err
    (place,) = output.glob("bad-step-*.json")
    about = json.loads(place.read_text())
    bad = [sample["name"] for sample in about["samples"] if isinstance(sample["loss"], str)]
    assert bad == [darkest] and len(about["samples"]) == 4
    assert f"With the weights of step 0, too, the loss is no finite number of {darkest}." in told
    assert "after going back 1 time;" in told


def pixels_of(path: Path) -> torch.Tensor:
    """As the trainer reads a picture: values in [-1, 1]."""
    import numpy as np
    from PIL import Image

    with Image.open(path) as opened:
        small = opened.convert("RGB").resize((64, 64), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(small).astype(np.float32) / 127.5 - 1)


def test_names_and_captions_are_data_only(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are written as they are, whatever they would mean to a template."""
    import shutil

    data, caption = tmp_path / "data", '{0} %s {{ 7 * 7 }} <b>"x"</b> [red]'
    shutil.copytree(tiny.shapes / "style", data)
    lines = [json.loads(line) for line in (data / "metadata.jsonl").read_text().splitlines()]
    key = next(key for key in lines[0] if key in ("text", "caption"))
    (data / "metadata.jsonl").write_text("".join(json.dumps(row | {key: caption}) + "\n" for row in lines))
    output = tmp_path / "out"
    more = {"train.learning_rate": 1e30, "data.source": data, "data.captions.drop": 0.0}
    assert tiny.start(LORA, output, **PLAIN | more) == 2
    assert "Traceback" not in capsys.readouterr().err
    samples = json.loads((output / "bad-step-2.json").read_text())["samples"]
    assert [sample["caption"] for sample in samples] == [caption] * 4


def test_a_gradient_alone_is_found_without_a_limit_of_its_norm(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, output = guard.Watch.gradients, tmp_path / "out"

    def gradients(self: guard.Watch) -> None:
        real(self)
        seen.append(1)
        if len(seen) == 3:
            self.task.trained()[0].grad.view(-1)[0] = torch.inf  # type: ignore[union-attr]

    seen: list[int] = []
    monkeypatch.setattr(guard.Watch, "gradients", gradients)
    assert tiny.start(LORA, output, **PLAIN | {"train.clip": None, "train.checkpoint.every": 1}) == 2
    assert "step 3: no finite number: gradient norm is inf" in capsys.readouterr().err
    assert_finite(output, 2)


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are judged early, to be quick."""
    monkeypatch.setattr(guard, "WITHIN", 6)


@pytest.mark.usefixtures("soon")
def test_tensors_without_a_gradient_are_named(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = StableDiffusion.control

    def control(*args: Any) -> Control:
        made = real(*args)
        return made._replace(middle=made.middle.detach())

    monkeypatch.setattr(StableDiffusion, "control", control)
    code = tiny.start(CONTROLNET, tmp_path / "out", **QUIET | {"train.steps": 8, "train.guard": "back"})
    told = capsys.readouterr().err
    assert code == 2, told
    assert "step 6: after 6 steps 48 trained tensors never had a gradient" in told
    assert "0.branch.controlnet_mid_block.weight, 0.branch.controlnet_mid_block.bias" in told
    assert "and 44 more" in told and "Traceback" not in told and "train.guard: back" not in told
    assert not list((tmp_path / "out").glob("bad-step-*"))  # no batch is to blame


@pytest.mark.usefixtures("soon")
def test_zero_convolutions_that_never_move_are_named(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = ControlNet.groups

    def groups(self: ControlNet, learning_rate: float) -> list[dict[str, Any]]:
        zeros = {id(p) for n, p in self.named_parameters() if "controlnet_down_blocks.0" in n}
        (group,) = real(self, learning_rate)
        assert len(zeros) == 2
        return [{"params": [p for p in group["params"] if id(p) not in zeros]}]

    monkeypatch.setattr(ControlNet, "groups", groups)
    code = tiny.start(CONTROLNET, tmp_path / "out", **QUIET | {"train.steps": 8})
    told = capsys.readouterr().err
    assert code == 2, told
    assert (
        "2 trained tensors began as zeros and never moved: 0.branch.controlnet_down_blocks.0.weight" in told
    )
    assert "never had a gradient" not in told


def test_an_embedding_that_explodes_stops(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = QUIET | {"train.steps": 4, "train.learning_rate": 1e4, "train.checkpoint.every": 1}
    assert tiny.start(INVERSION, tmp_path / "out", **more) == 2
    told = capsys.readouterr().err
    assert "step 1: a new row of text_encoder has norm " in told and "the longest known one" in told
    assert "norm: kept" in told and (tmp_path / "out" / "bad-step-1.json").is_file()
    off = tiny.start(INVERSION, tmp_path / "off", **more | {"train.guard": "off", "evaluate.samples": 0})
    assert off == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    "change", [{"train.guard": "{times: 3}"}, {"train.guard": "{policy: off, factor: 0.5}"}]
)
def test_numbers_without_going_back_are_refused(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any]
) -> None:
    assert tiny.start(LORA, tmp_path / "out", **change) == 2
    assert "it belongs to policy back" in capsys.readouterr().err


RECIPES: tuple[tuple[str, dict[str, Any]], ...] = (
    (LORA, {"train.warmup": 2}),
    (CONTROLNET, {"train.warmup": 2}),
    (CONTROLNET, {"method.controlnet.rank": 2}),
    (CONTROLNET, {"method.controlnet.unlock_decoder_at": 100}),
    (INVERSION, {}),
    ("embedded/1_autoencoder.yaml", {}),
    ("embedded/2_clip.yaml", {}),
    ("embedded/4_unet_128.yaml", {}),
)


HEALTHY = [pytest.param(*one, marks=[] if n % 3 == 0 else pytest.mark.slow) for n, one in enumerate(RECIPES)]


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("recipe, more", HEALTHY)
def test_a_healthy_run_raises_nothing(
    tiny: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    recipe: str,
    more: dict[str, Any],
) -> None:
    judged: list[int] = []
    real: Callable[..., Any] = guard.Watch._still

    def still(self: guard.Watch, step: int) -> Any:
        due = self._seen is not None and self._counted >= guard.WITHIN
        judged.extend([step] * due)
        return real(self, step)

    monkeypatch.setattr(guard.Watch, "_still", still)
    more = {"validate.every": 0, "train.steps": 9} | more
    if recipe in (LORA, CONTROLNET, INVERSION):
        more |= QUIET | {"evaluate.samples": 0}
    code = tiny.start(recipe, tmp_path / "out", **more)
    assert code == 0, capsys.readouterr().err
    assert len(judged) == 1, "the verdict on gradients was given"

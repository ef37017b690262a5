"""ControlNet with the base's decoder unlocked late: locked bitwise until then, exact on resume, exported."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor

from tuner import build, checkpoint, device, loop, recipe, verify
from tuner.checkpoint import State
from tuner.data.samples import Sample
from tuner.export import files
from tuner.log import Log
from tuner.signals import Stop

RECIPE = """
base: {base}
method:
  controlnet: {{condition: canny, unlock_decoder_at: {at}, decoder_learning_rate: 0.003}}
data:
  source: {data}
  resolution: 32
  cache: {cache}
train:
  steps: {steps}
  batch_size: 2
  learning_rate: 0.01
  optimiser: {{name: adamw, weight_decay: 0.5}}
  ema: {ema}
  precision: {precision}
  threads: 1
  checkpoint: {{every: 1, keep: 9}}
log: {{tensorboard: false}}
output: {output}
"""
Start = Callable[..., loop.Run]
DECODER = ("up_blocks.", "conv_norm_out.", "conv_out.")


@pytest.fixture
def start(folders: dict[str, Path], samples: list[Sample], tmp_path: Path) -> Iterator[Start]:
    """Builds a run and trains it, from a checkpoint if one is given."""
    for one in samples:
        one.picture.path.with_suffix(".txt").write_text(one.captions[0])

    def trained(output: str, steps: int, state: State | None = None, **more: Any) -> loop.Run:
        AcceleratorState._reset_state(True)
        place = tmp_path / f"{output}.yaml"
        asked = {
            "base": folders[more.pop("name", "sd1")],
            "at": 2,
            "ema": "null",
            "precision": "fp32",
            **more,
        }
        asked |= {
            "data": samples[0].picture.path.parent,
            "output": tmp_path / output,
            "cache": tmp_path / "cache",
        }
        place.write_text(RECIPE.format(steps=steps, **asked))
        about = recipe.load(place)
        run = build.build(about, device.start(about.train.precision, 1))
        with Log(run.output, False, None, True, None, {}) as log, Stop() as stop:
            assert loop.train(run, log, state, stop)
        return run

    yield trained
    AcceleratorState._reset_state(True)


def decoder(run: loop.Run) -> dict[str, Tensor]:
    state = run.family.denoiser.state_dict()
    return {name: t.clone() for name, t in state.items() if name.startswith(DECODER)}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    assert one.keys() == other.keys() and len(one) > 50
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("ema", ["null", "0.5"])
def test_it_stays_bitwise_until_its_step_and_a_run_continues_bitwise(
    start: Start, models: ModuleType, sd1_folder: Path, ema: str
) -> None:
    base = models.family_of(sd1_folder, "controlnet").denoiser.state_dict()
    base = {name: t for name, t in base.items() if name.startswith(DECODER)}
    locked = start("locked", 2, ema=ema)
    assert same(decoder(locked), base)
    assert any(bool(p.any()) for p in locked.methods[0].branch.controlnet_mid_block.parameters())
    whole = start("whole", 4, ema=ema)
    moved = decoder(whole)
    assert all(not torch.equal(moved[name], base[name]) for name in moved if name.endswith("weight"))
    # Nothing but the decoder moves in the base.
    rest = {n: t for n, t in whole.family.denoiser.state_dict().items() if not n.startswith(DECODER)}
    fresh = models.family_of(sd1_folder, "controlnet").denoiser.state_dict()
    assert len(rest) > 50 and all(torch.equal(t, fresh[name]) for name, t in rest.items())
    for step in (1, 2, 3):  # before it is unlocked, as it is, and after
        state = checkpoint.at(whole.output / "checkpoints" / f"step-{step:07d}")
        assert state is not None
        again = start(f"again-{step}", 4, state, ema=ema)
        assert same(decoder(again), moved)
        tensors = whole.task.tensors()
        assert all(torch.equal(t, tensors[name]) for name, t in again.task.tensors().items())
    with whole.methods[0].off(whole.family):
        assert same(decoder(whole), base)
    assert same(decoder(whole), moved)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_its_unet_is_exported_and_proved(
    start: Start, name: str, precision: str, tmp_path: Path, folders: dict[str, Path], models: ModuleType
) -> None:
    run = start("run", 3, name=name, precision=precision, at=0)
    written = run.task.export(tmp_path / "export", run.card)
    places = [path.relative_to(tmp_path / "export").as_posix() for path in written]
    version = run.family.version
    file = "diffusion_pytorch_model.safetensors"
    assert places == [f"diffusers/{file}", f"control_{version}_run.safetensors", f"unet/{file}"]
    lines = verify.check(run.family, run.methods, written, run.card)
    assert len(lines) == 3 and "of the unlocked decoder" in lines[2] and "training's effect" in lines[0]
    tensors, metadata = files.load(written[2])
    base = models.family_of(folders[name], "controlnet").denoiser.state_dict()
    assert tensors.keys() == base.keys()
    assert "controlnet" not in metadata["modelspec.architecture"]
    assert "controlnet" in files.load(written[1])[1]["modelspec.architecture"]
    for key, tensor in base.items():  # the rest is the file's, whatever precision it is held in
        if not key.startswith(DECODER):
            assert torch.equal(tensors[key], tensor.half()), key
    tensors["up_blocks.0.resnets.0.conv1.weight"] *= 2
    files.save(written[2], tensors, {})
    with pytest.raises(
        verify.VerifyError, match="up_blocks.0.resnets.0.conv1.weight is not what was trained"
    ):
        verify.check(run.family, run.methods, written, run.card)

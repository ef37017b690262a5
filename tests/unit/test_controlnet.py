"""ControlNet's options: channels, another start, ablations; and what each of them writes."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pydantic
import pytest
import torch
from accelerate import Accelerator
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor

from tuner import verify
from tuner.errors import UserError
from tuner.export import files
from tuner.methods.controlnet import Config, ControlNet, _lite
from tuner.objective import Objective
from tuner.sample import Sampler
from tuner.task import Task
from tuner.verify.scene import Scene, exact

Make = Callable[..., ControlNet]
FOLDER = "diffusers/diffusion_pytorch_model.safetensors"


@pytest.fixture
def make(make_method: Callable[..., Any]) -> Make:
    """The method on a fresh tiny base, which it keeps as `family`."""
    return partial(make_method, "controlnet")


def export(method: Any, folder: Path, models: ModuleType, dtype: torch.dtype = torch.float16) -> list[Path]:
    written: list[Path] = method.export(method.family, folder, models.card_of(dtype, method))
    return written


def proved(method: Any, written: list[Path], models: ModuleType) -> list[str]:
    return verify.check(method.family, [method], written, models.card_of(torch.float16, method))


@pytest.mark.parametrize(
    "config, message",
    [
        ({"conditioning_channels": 4}, "expected 3 or 1, found 4: a condition is one picture file"),
        ({"start": "x", "init": "gaussian"}, "init: has no effect: start says it"),
        ({"start": "x", "arch": "lite"}, "arch: has no effect"),
        ({"decoder_learning_rate": 1e-5}, "decoder_learning_rate: has no effect: it is never unlocked"),
        ({"condition": "nothing"}, "expected one of"),
        ({"init": "ones"}, "init"),
    ],
)
def test_impossible_configurations(config: dict[str, Any], message: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=re.escape(message)):
        Config(**config)


@pytest.mark.parametrize("base", ["sd1", "sdxl"])
def test_a_grey_condition(base: str, make: Make, tmp_path: Path, models: ModuleType) -> None:
    method = models.move(make(base, conditioning_channels=1))
    assert method.branch.config.conditioning_channels == 1
    picture = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    grey = method.look(picture)
    assert grey.shape == (2, 1, 8, 8)
    wanted = 0.299 * picture[:, 0] + 0.587 * picture[:, 1] + 0.114 * picture[:, 2]
    torch.testing.assert_close(grey[:, 0], wanted)
    torch.testing.assert_close(method.look(picture[:, :1].expand(-1, 3, -1, -1)), picture[:, :1])
    assert make(base).look(picture) is picture
    lines = proved(method, export(method, tmp_path, models), models)
    assert "sd-webui-controlnet builds branches for 3 channels, not for 1" in lines[1]
    scheduler = method.family.scheduler_config
    task = Task(method.family, [method], Objective.from_scheduler_config(scheduler))
    looks = [(255 * part.permute(1, 2, 0)).byte().numpy() for part in torch.rand(2, 3, 32, 32)]
    sampler = Sampler(task, Accelerator(cpu=True), 32, steps=1)
    with_it, without = sampler.pictures(["a", "b"], looks), sampler.pictures(["a", "b"])
    assert all((one != other).any() for one, other in zip(with_it, without, strict=True))


def outputs(method: Any) -> list[Tensor]:
    layers = [*method.branch.controlnet_down_blocks, method.branch.controlnet_mid_block]
    return [layer.weight.detach() for layer in layers]


def test_gaussian_outputs_are_drawn_and_nothing_else_is_changed(make: Make) -> None:
    zero, one, again, other = (
        make(),
        make(init="gaussian"),
        make(init="gaussian"),
        make(seed=4, init="gaussian"),
    )
    drawn = torch.cat([weight.flatten() for weight in outputs(one)])
    assert not any(bool(weight.any()) for weight in outputs(zero))
    assert float(drawn.std()) == pytest.approx(0.02, rel=0.05) and float(drawn.mean()) < 1e-3
    same = {name: torch.equal(t, zero.trained()[name]) for name, t in one.trained().items()}
    changed = {name for name, is_same in same.items() if not is_same}
    places = ("branch.controlnet_down_blocks.", "branch.controlnet_mid_block.")
    assert len(changed) == len(outputs(one)) > 3
    assert all(name.startswith(places) and name.endswith("weight") for name in changed)
    assert all(torch.equal(a, b) for a, b in zip(outputs(one), outputs(again), strict=True))
    assert not torch.equal(outputs(one)[0], outputs(other)[0])


@pytest.mark.parametrize("base", ["sd1", "sd2", "sdxl", "sd1_inpaint"])
def test_lite_has_the_same_outputs_and_no_attention(
    base: str, make: Make, tmp_path: Path, models: ModuleType
) -> None:
    full, lite = make(base), make(base, arch="lite")
    names = {name.partition(".")[0] for name in lite.branch.state_dict()}
    assert names <= {name.partition(".")[0] for name in full.branch.state_dict()}
    assert not any("attn" in name for name in lite.branch.state_dict())
    sizes = [sum(p.numel() for p in method.branch.parameters()) for method in (full, lite)]
    assert sizes[1] < 0.8 * sizes[0]
    family: Any = lite.family  # type: ignore[attr-defined]
    with exact(family, [lite]):
        scene = Scene.of(family)
        conds = [scene.cond(scene.text(lite, prompts)) for prompts in (["a", "b"], ["c", "d"])]
        a, b = (family.control(lite.branch, scene.x_t, scene.t, cond, scene.picture) for cond in conds)
        ours = [t.shape for t in (*a.down, a.middle)]
        theirs = family.control(full.branch, scene.x_t, scene.t, conds[0], scene.picture)
        assert ours == [t.shape for t in (*theirs.down, theirs.middle)] and len(ours) >= 5
        assert not any(bool(t.any()) for t in (*a.down, a.middle))
    models.move(lite)
    if base != "sdxl":  # whose time embedding is told the pooled text too
        with exact(family, [lite]):
            a, b = (family.control(lite.branch, scene.x_t, scene.t, cond, scene.picture) for cond in conds)
        assert all(torch.equal(x, y) and bool(x.any()) for x, y in zip(a.down, b.down, strict=True))
    written = export(lite, tmp_path, models)
    assert [path.relative_to(tmp_path).as_posix() for path in written] == [FOLDER]
    (line,) = proved(lite, written, models)
    assert "for diffusers alone" in line


@pytest.mark.parametrize(("config", "full", "lite"), [("sd15", 361.28, 202.39), ("sdxl", 1251.01, 125.69)])
def test_the_size_of_lite(config: str, full: float, lite: float) -> None:
    place = Path(__file__).resolve().parents[2] / "tuner/configs" / config / "unet"
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(place))
        branch = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
        both = [branch, _lite(branch)]
    sizes = [sum(p.numel() for p in one.parameters()) / 1e6 for one in both]
    assert sizes == pytest.approx([full, lite], abs=0.01)


@pytest.mark.parametrize("base", ["sd1", "sd2", "sdxl"])
def test_a_start_gives_all_of_its_tensors(base: str, make: Make, tmp_path: Path, models: ModuleType) -> None:
    old = models.move(make(base))
    written = export(old, tmp_path, models, torch.float32)
    renamed = files.save(tmp_path / "plain.safetensors", files.load(written[0])[0], {})
    for start in (written[0].parent, written[1], renamed):
        new = make(base, seed=9, start=str(start))
        assert new.trained().keys() == old.trained().keys() and len(new.trained()) > 60
        assert all(torch.equal(t, old.trained()[name]) for name, t in new.trained().items())
        names = [path.name for path in new.depends().values()]
        inside = ["config.json", "diffusion_pytorch_model.safetensors"]
        assert names == (inside if start.is_dir() else [start.name])
    assert old.depends() == {}


def drop(tensors: dict[str, Tensor]) -> None:
    tensors.pop("controlnet_mid_block.bias")


def add(tensors: dict[str, Tensor]) -> None:
    tensors["conv_out.bias"] = torch.zeros(4)


def narrow(tensors: dict[str, Tensor]) -> None:
    tensors["conv_in.weight"] = tensors["conv_in.weight"][:, :3]


@pytest.mark.parametrize(
    "damage, message",
    [
        (drop, "controlnet_mid_block.bias is missing"),
        (add, "conv_out.bias has no place in it"),
        (narrow, "conv_in.weight is [64, 3, 3, 3], expected [64, 4, 3, 3]"),
    ],
)
def test_every_key_of_a_start_has_its_place(
    damage: Any, message: str, make: Make, tmp_path: Path, models: ModuleType
) -> None:
    written = export(make(), tmp_path, models)
    tensors, _ = files.load(written[0])
    damage(tensors)
    files.save(written[0], tensors, {})
    with pytest.raises(UserError, match=re.escape(message)):
        make(start=str(written[0].parent))
    plain = files.save(tmp_path / "plain.safetensors", tensors, {})
    with pytest.raises(UserError, match=re.escape(message)):
        make(start=str(plain))


def test_starts_that_are_none_of_this_base(make: Make, tmp_path: Path, models: ModuleType) -> None:
    folder, single = export(make(), tmp_path, models)
    with pytest.raises(UserError, match="no ControlNet of this base"):
        make("sdxl", start=str(single))
    with pytest.raises(UserError, match="config.json says .* this base's ControlNet has"):
        make("sd2", start=str(folder.parent))
    with pytest.raises(UserError, match="config.json says conditioning_channels 3, .* has 1"):
        make(start=str(folder.parent), conditioning_channels=1)
    config = folder.with_name("config.json")
    config.write_text(config.read_text().replace('"rgb"', '"bgr"'))
    with pytest.raises(UserError, match="channel_order bgr, this base's ControlNet has rgb"):
        make(start=str(folder.parent))
    for start in (tmp_path / "nowhere", tmp_path / "old.pth"):
        with pytest.raises(UserError, match="expected a diffusers folder or a .safetensors file"):
            make(start=str(start))
    single.write_bytes(b"no tensors")
    with pytest.raises(UserError, match="not a whole .safetensors file"):
        make(start=str(single))
    folder.unlink()
    with pytest.raises(UserError):
        make(start=str(folder.parent))


def test_the_decoder_has_its_own_learning_rate(make: Make) -> None:
    assert [group.get("lr") for group in make(unlock_decoder_at=5).groups(0.1)] == [None, 0.1]
    own = make(unlock_decoder_at=5, decoder_learning_rate=0.2)
    assert [group.get("lr") for group in own.groups(0.1)] == [None, 0.2]
    assert len(make().groups(0.1)) == 1

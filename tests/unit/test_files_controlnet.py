"""`tuner inspect | verify | convert` on ControlNets."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from diffusers import ControlNetModel, UNet2DConditionModel

from tuner.export import cldm, contents, files
from tuner.files import bases

Run = Callable[..., tuple[int, str, str]]


def equal(one: Path, other: Path) -> bool:
    (a, _), (b, _) = files.load(one), files.load(other)
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a
    )


def control(path: Path, sd1_folder: Path, form: str) -> ControlNetModel:
    torch.manual_seed(0)
    net = ControlNetModel.from_unet(UNet2DConditionModel.from_pretrained(sd1_folder / "unet"))
    state = net.state_dict()
    files.save(path, state if form == "diffusers" else cldm.to_cldm(state, net.config), {"a": "b"})
    return net


def test_controlnet_there_and_back(run: Run, tmp_path: Path, folders: dict[str, Path]) -> None:
    for family in ("sd1", "sd2", "sdxl"):
        folder, source = folders[family], tmp_path / f"{family}.safetensors"
        net = control(source, folder, "diffusers")
        middle, last = tmp_path / f"control_{family}.safetensors", tmp_path / f"net_{family}"
        assert run("convert", source, "--to", "cldm", "--out", middle, "--base", folder)[0] == 0
        assert files.load(middle)[1]["a"] == "b"
        assert {key.partition(".")[0] for key in files.load(middle)[0]} == {"control_model"}
        assert run("convert", middle, "--to", "diffusers", "--out", last, "--base", folder)[0] == 0
        assert equal(last / "diffusion_pytorch_model.safetensors", source)
        again = ControlNetModel.from_pretrained(last)
        ignored = {"sample_size", "_name_or_path", "_use_default_values", "global_pool_conditions"}
        for key, value in net.config.items():
            assert key in ignored or again.config[key] == value or list(again.config[key]) == list(value), key


def test_verify_of_a_controlnet(run: Run, tmp_path: Path, folders: dict[str, Path]) -> None:
    path = tmp_path / "control_sd15_x.safetensors"

    def loads(folder: Path, name: str = path.name) -> dict[str, str]:
        path.rename(tmp_path / name)
        told = json.loads(run("inspect", tmp_path / name, "--base", folder, "--json")[1])["tools"]
        (tmp_path / name).rename(path)
        return {tool: found["loads"] for tool, found in told.items()}

    control(path, folders["sd1"], "cldm")
    # Tiny: only ComfyUI and Forge build any size, with heads 64 wide where the tiny base's are 32.
    assert loads(folders["sd1"]) == {
        "diffusers": "all",
        "ComfyUI": "part",
        "Forge": "part",
        "sd-webui-controlnet": "nothing",
    }
    control(path, folders["sd2"], "cldm")
    right = {"diffusers": "all", "ComfyUI": "all", "Forge": "all", "sd-webui-controlnet": "nothing"}
    assert loads(folders["sd2"]) == right
    assert loads(folders["sd2"], "x_shuffle.safetensors")["ComfyUI"] == "part"
    control(path, folders["sd2"], "diffusers")
    assert loads(folders["sd2"]) == dict.fromkeys(right, "nothing") | {"diffusers": "all"}
    control(path, folders["sdxl"], "cldm")
    assert loads(folders["sdxl"]) == right | {"diffusers": "nothing"}
    tensors, _ = files.load(path)
    key = next(key for key in tensors if "zero_convs.1" in key)
    safetensors.torch.save_file({k: v for k, v in tensors.items() if k != key}, path)
    code, _, err = run("verify", path, "--base", folders["sdxl"])
    assert code == 2 and f"missing: {key}" in err
    assert loads(folders["sdxl"])["ComfyUI"] == "part"
    safetensors.torch.save_file(tensors | {"control_model.x": torch.ones(1)}, path)
    assert "control_model.x" in run("verify", path, "--base", folders["sdxl"])[2]


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_published_sizes_load_everywhere(name: str, tmp_path: Path) -> None:
    from tuner.export import rules_controlnet
    from tuner.export.places import controlnet_tensors

    base = bases.named(name)
    shapes = controlnet_tensors(base.unet)
    for form in ("diffusers", "cldm"):
        if form == "cldm":
            with torch.device("meta"):
                state = {key: torch.empty(shape) for key, shape in shapes.items()}
            hint = {"conditioning_embedding_out_channels": (16, 32, 96, 256)}
            named = cldm.to_cldm(state, {**base.unet, **hint})
        else:
            named = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        what = contents.of(named, {}, f"control_{name}_x.safetensors")
        found = {t: rules_controlnet.judge(t, what, base).loads for t in rules_controlnet.CONTROLNETS}
        told = {"diffusers": "nothing"} if (name, form) == ("sdxl", "cldm") else {}
        assert found == dict.fromkeys(found, "all") | told and len(found) == 4
        cautions = rules_controlnet.judge("sd-webui-controlnet", what, base).cautions
        assert len(cautions) == {"sd15": 0, "sd21": 1, "sdxl": 0}[name]

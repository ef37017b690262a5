"""`tuner inspect | verify` on files of a low-rank ControlNet, and the tools' rules for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tuner.adapters import factors
from tuner.adapters.factors import Factored
from tuner.export import contents, control_lora, rules_controlnet
from tuner.export.identify import identify
from tuner.export.places import base as base_of
from tuner.export.places import controlnet_tensors
from tuner.files import bases

Run = Callable[..., tuple[int, str, str]]


def written(folder: Path, out: Path, models: ModuleType) -> Path:
    """The file of factors of rank 4 that a base in a folder gives."""
    family = models.family_of(folder, "controlnet")
    method = models.method_of("controlnet", family, rank=4)
    file: Path = method.export(family, out, models.card_of(torch.float32, method))[2]
    return file


def test_inspect_and_verify(run: Run, tmp_path: Path, models: ModuleType, folders: dict[str, Path]) -> None:
    small, base = written(folders["sdxl"], tmp_path, models), folders["sdxl"]
    code, out, _ = run("inspect", small, "--base", base, "--json")
    told = json.loads(out)
    assert code == 0 and (told["kind"], told["family"]) == ("Control-LoRA", "sdxl")
    assert told["ranks"].keys() == {"4"} and told["ranks"]["4"] > 30
    loads = {tool: found["loads"] for tool, found in told["tools"].items()}
    assert loads == {"diffusers": "part", "ComfyUI": "all", "Forge": "all", "sd-webui-controlnet": "nothing"}
    assert "places layers" in told["tools"]["diffusers"]["reasons"][0]
    assert run("verify", small, "--base", base, "--tool", "comfyui")[0] == 0
    deep = models.tiny_sd1(tmp_path / "deep", layers=2)
    small = written(deep, tmp_path / "other", models)
    assert run("verify", small, "--base", deep)[0] == 0
    code, _, err = run("convert", small, "--to", "cldm", "--out", tmp_path / "x", "--base", deep)
    assert code == 2 and "Control-LoRA is not converted here" in err


def published(name: str, rank: int = 128) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """A full-size base, and the shapes of a file of factors on it."""
    made = bases.named(name)
    unet, shapes = made.tensors["unet"], controlnet_tensors(made.unet)
    state: dict[str, Tensor] = {}
    with torch.device("meta"):
        for key, shape in shapes.items():
            if key in unet and len(shape) > 1:
                layer = (
                    nn.Linear(shape[1], shape[0])
                    if len(shape) == 2
                    else nn.Conv2d(shape[1], shape[0], shape[2])
                )
                factored = Factored(layer, None, min(rank, factors.full_rank(layer)))
                state |= {key.replace("weight", end): getattr(factored, end) for end in ("up", "down")}
            else:
                state[key] = torch.empty(shape)
        config = {**made.unet, "conditioning_embedding_out_channels": (16, 32, 96, 256)}
        return made, {key: tuple(t.shape) for key, t in control_lora.to_file(state, config).items()}


@pytest.mark.parametrize(("name", "millions"), [("sd15", 67.85), ("sd21", 68.31), ("sdxl", 197.79)])
def test_published_sizes(name: str, millions: float) -> None:
    """About as large as the published files: Stability's SDXL ones of rank 128 are told to have 377 MB."""
    base, shapes = published(name)
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert total / 1e6 == pytest.approx(millions, abs=0.01)
    what = contents.Contents(
        f"control_lora_{name}_x.safetensors", shapes, dict.fromkeys(shapes, "F16"), {}, {}
    )
    found = {tool: rules_controlnet.judge(tool, what, base) for tool in rules_controlnet.CONTROL_LORAS}
    loads = {tool: verdict.loads for tool, verdict in found.items()}
    other = {"sd-webui-controlnet": "nothing"} if name == "sd21" else {}
    assert loads == dict.fromkeys(loads, "all") | other and len(loads) == 4
    assert found["diffusers"].cautions == ["it leaves the biases beside factors at the base's"]
    assert identify(what).family == {"sd15": "sd1", "sd21": "sd2", "sdxl": "sdxl"}[name]
    identity = identify(what)
    assert bases.choose(None, what, identity).name == name
    assert (
        identity.kind == "Control-LoRA" and max(identity.ranks) == 128 and sum(identity.ranks.values()) > 100
    )


def test_rules_tell_what_is_lost() -> None:
    base, shapes = published("sd15", 4)

    def judged(tool: str, **new: tuple[int, ...] | None) -> Any:
        changed = {k: v for k, v in {**shapes, **new}.items() if v is not None}
        what = contents.Contents("x_sd15.safetensors", changed, {}, {}, {})
        return rules_controlnet.judge(tool, what, base)

    query = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    norm = "input_blocks.1.0.in_layers.0.weight"
    assert judged("ComfyUI", x=(1,)).loads == "nothing"
    assert judged("diffusers", x=(1,)).dropped.keys() == {"x"}
    assert "lacks its other factor" in judged("ComfyUI", **{f"{query}.up": None}).refused
    assert "beside [4, 320]" in judged("ComfyUI", **{f"{query}.up": (320, 3)}).refused
    assert (
        judged("ComfyUI", **{f"{query}.up": None, f"{query}.down": None}).loads == "all"
    )  # the base's weight
    assert judged("ComfyUI", **{norm: None}).loads == "all"
    assert judged("sd-webui-controlnet", **{norm: None}).missing == [norm]
    assert judged("Forge", **{"zero_convs.0.0.bias": None}).missing == ["zero_convs.0.0.bias"]
    assert judged("Forge", **{norm: (2,)}).refused.startswith(f"{norm} is [2], the base's is [320]")
    first = {
        "input_blocks.0.0.weight": (320, 4, 3, 3),
        "input_blocks.0.0.up": None,
        "input_blocks.0.0.down": None,
    }
    configs = {**base.configs, "unet": {**base.unet, "in_channels": 9}}
    filling = base_of("filling", configs)
    what = contents.Contents("x", {k: v for k, v in {**shapes, **first}.items() if v is not None}, {}, {}, {})
    assert rules_controlnet.judge("ComfyUI", what, filling).loads == "all"

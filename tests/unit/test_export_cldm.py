from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint, convert_ldm_unet_checkpoint

import tuner
from tuner.export import cldm, files

CONFIGS = Path(tuner.__file__).parent / "configs"
SD15: dict[str, Any] = {"cross_attention_dim": 768}
SMALL: dict[str, Any] = {
    "block_out_channels": (32, 64, 64, 64),
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "layers_per_block": 1,
}
TWO_LEVELS: dict[str, Any] = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "block_out_channels": (32, 64),
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "layers_per_block": 3,
    "use_linear_projection": True,
}


def controlnet(options: dict[str, Any], device: str = "cpu") -> ControlNetModel:
    with torch.device(device):
        return ControlNetModel(**options)


def unequal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> list[str]:
    """The keys that one side lacks, or whose tensors differ in shape or value."""
    return sorted(left.keys() ^ right.keys()) + [
        key
        for key in sorted(left.keys() & right.keys())
        if left[key].shape != right[key].shape
        or not (left[key] is right[key] or (not left[key].is_meta and torch.equal(left[key], right[key])))
    ]


@pytest.mark.parametrize(
    ("options", "device", "keys"),
    [(SD15, "meta", 340), (SMALL, "cpu", None), (TWO_LEVELS, "cpu", None)],
    ids=["sd15", "small", "two levels"],
)
def test_controlnet_names_are_those_that_diffusers_converts(
    options: dict[str, Any], device: str, keys: int | None
) -> None:
    model = controlnet(options, device)
    state = model.state_dict()
    named = cldm.to_cldm(state, model.config)
    assert len(named) == len(state) == (keys or len(state)) > 100
    assert all(key.startswith("control_model.") for key in named)
    # The values are not touched: the same tensor objects come back under the old names.
    assert unequal(convert_controlnet_checkpoint(dict(named), model.config), state) == []
    assert unequal(cldm.from_cldm(named, model.config), state) == []
    bare = {key.removeprefix(cldm.PREFIX): value for key, value in named.items()}
    assert unequal(cldm.from_cldm(bare, model.config), state) == []


def test_order_of_the_layers_in_sd15() -> None:
    model = controlnet(SD15, "meta")
    state = model.state_dict()
    named = cldm.to_cldm(state, model.config)
    at = {key.removeprefix(cldm.PREFIX): value for key, value in named.items()}
    assert at["input_blocks.0.0.weight"] is state["conv_in.weight"]
    assert at["time_embed.0.weight"] is state["time_embedding.linear_1.weight"]
    assert at["input_blocks.3.0.op.weight"] is state["down_blocks.0.downsamplers.0.conv.weight"]
    assert (
        at["input_blocks.4.0.skip_connection.weight"] is state["down_blocks.1.resnets.0.conv_shortcut.weight"]
    )
    assert at["input_blocks.5.1.proj_in.weight"] is state["down_blocks.1.attentions.1.proj_in.weight"]
    assert at["input_blocks.11.0.in_layers.2.weight"] is state["down_blocks.3.resnets.1.conv1.weight"]
    assert at["middle_block.2.emb_layers.1.weight"] is state["mid_block.resnets.1.time_emb_proj.weight"]
    zero = [key for key in at if key.startswith("zero_convs.") and key.endswith(".weight")]
    assert sorted(zero) == sorted(f"zero_convs.{index}.0.weight" for index in range(12))
    widths = [at[f"zero_convs.{index}.0.weight"].shape[0] for index in range(12)]
    assert widths == [320] * 4 + [640] * 3 + [1280] * 5
    assert at["middle_block_out.0.weight"] is state["controlnet_mid_block.weight"]
    hints = [key for key in at if key.startswith("input_hint_block.") and key.endswith(".weight")]
    assert sorted(hints) == sorted(f"input_hint_block.{index}.weight" for index in range(0, 15, 2))
    shapes = [tuple(at[f"input_hint_block.{index}.weight"].shape[:2]) for index in range(0, 15, 2)]
    # cldm's own encoder: 3 -> 16, then pairs (same width, next width), then the UNet's width.
    assert shapes == [(16, 3), (16, 16), (32, 16), (32, 32), (96, 32), (96, 96), (256, 96), (320, 256)]


def test_diffusers_loads_the_single_file(tmp_path: Path) -> None:
    model = controlnet(SMALL)
    model.save_config(tmp_path / "diffusers")
    named = cldm.to_cldm(model.state_dict(), model.config)
    path = files.save(tmp_path / "control_sd15_x.safetensors", named, {"format": "pt"})
    loaded = ControlNetModel.from_single_file(
        str(path), config=str(tmp_path / "diffusers"), local_files_only=True
    )
    assert unequal(loaded.state_dict(), model.state_dict()) == []


def test_faults_are_named() -> None:
    model = controlnet(TWO_LEVELS)
    state = model.state_dict()
    with pytest.raises(cldm.LayoutError, match="class_embedding.weight: no place"):
        cldm.to_cldm(state | {"class_embedding.weight": torch.zeros(1)}, model.config)
    with pytest.raises(cldm.LayoutError, match=r"zero_convs\.7\.0 is missing"):
        cldm.to_cldm({k: v for k, v in state.items() if "controlnet_down_blocks.7" not in k}, model.config)
    with pytest.raises(cldm.LayoutError, match="has 2 entries"):
        cldm.to_cldm(state, dict(model.config, conditioning_embedding_out_channels=(16, 32)))
    with pytest.raises(cldm.LayoutError, match="layers_per_block"):
        cldm.to_cldm(state, dict(model.config, layers_per_block=(1, 2)))
    named = cldm.to_cldm(state, model.config)
    twice = named | {"time_embed.0.weight": torch.zeros(1)}
    with pytest.raises(cldm.LayoutError, match="with and without"):
        cldm.from_cldm(twice, model.config)


@pytest.mark.parametrize(("layers", "keys"), [(2, 686), (1, None)])
def test_unet_names_are_those_that_diffusers_converts(layers: int, keys: int | None) -> None:
    with torch.device("meta"):
        model = UNet2DConditionModel(cross_attention_dim=768, layers_per_block=layers)
    state = model.state_dict()
    named = cldm.rename(state, cldm.unet_names(model.config))
    assert len(named) == len(state) == (keys or len(state)) > 300
    checkpoint = {f"model.diffusion_model.{key}": value for key, value in named.items()}
    assert unequal(convert_ldm_unet_checkpoint(checkpoint, dict(model.config)), state) == []
    assert unequal(cldm.rename(named, cldm.inverse(cldm.unet_names(model.config))), state) == []


@pytest.mark.parametrize(
    ("shipped", "millions", "keys"),
    [
        ("sd15", (859.52, 361.28), (686, 340)),
        ("sd15-inpainting", (859.54, 361.29), (686, 340)),
        ("sd21", (865.91, 364.23), (686, 340)),
        ("sd21-base", (865.91, 364.23), (686, 340)),
        ("sdxl", (2567.46, 1251.01), (1680, 844)),
        ("sdxl-inpainting", (2567.48, 1251.03), (1680, 844)),
    ],
)
def test_every_family_at_full_size(
    shipped: str, millions: tuple[float, float], keys: tuple[int, int]
) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(CONFIGS / shipped / "unet"))
        branch = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
    sizes = [sum(p.numel() for p in model.parameters()) / 1e6 for model in (unet, branch)]
    assert [round(size, 2) for size in sizes] == list(millions)

    state = unet.state_dict()
    named = cldm.rename(state, cldm.unet_names(unet.config))
    checkpoint = {f"model.diffusion_model.{key}": value for key, value in named.items()}
    assert unequal(convert_ldm_unet_checkpoint(checkpoint, dict(unet.config)), state) == []
    assert unequal(cldm.rename(named, cldm.inverse(cldm.unet_names(unet.config))), state) == []
    clone = branch.state_dict()
    control = cldm.to_cldm(clone, branch.config)
    assert (len(named), len(control)) == keys
    assert unequal(cldm.from_cldm(control, branch.config), clone) == []
    # The branch is the UNet's own beginning: what they share has the same names in both layouts.
    bare = {key.removeprefix(cldm.PREFIX): value for key, value in control.items()}
    shared = {key: value for key, value in bare.items() if key in named}
    added = ("zero_convs.", "input_hint_block.", "middle_block_out.")
    assert sorted(set(bare) - set(shared)) == sorted(key for key in bare if key.startswith(added))
    assert len(shared) > 250
    assert all(value.shape == named[key].shape for key, value in shared.items())


def test_names_of_sdxl() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(CONFIGS / "sdxl" / "unet"))
        branch = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
    whole, clone = unet.state_dict(), branch.state_dict()
    for state, named in (
        (whole, cldm.rename(whole, cldm.unet_names(unet.config))),
        (clone, cldm.to_cldm(clone, branch.config)),
    ):
        at = {key.removeprefix(cldm.PREFIX): value for key, value in named.items()}
        assert at["label_emb.0.0.weight"] is state["add_embedding.linear_1.weight"]
        assert at["label_emb.0.2.bias"] is state["add_embedding.linear_2.bias"]
        assert tuple(at["label_emb.0.0.weight"].shape) == (1280, 2816)
        # Two levels with attention, of 2 and 10 transformer blocks, as has the middle; none at the first.
        pattern = re.compile(r"(input_blocks\.\d+|middle_block)\.1\.transformer_blocks\.(\d+)\.")
        blocks = {found.groups() for found in map(pattern.match, at) if found}
        depths = {"4": 2, "5": 2, "7": 10, "8": 10}
        wanted = {f"input_blocks.{n}": depth for n, depth in depths.items()} | {"middle_block": 10}
        assert Counter(place for place, _ in blocks) == wanted
        assert at["input_blocks.6.0.op.weight"] is state["down_blocks.1.downsamplers.0.conv.weight"]
    zero = {key for key in at if key.startswith("zero_convs.") and key.endswith(".weight")}
    assert [at[f"zero_convs.{n}.0.weight"].shape[0] for n in range(len(zero))] == [320] * 4 + [640] * 3 + [
        1280
    ] * 2


@pytest.mark.parametrize(("family", "linear"), [("sd1", False), ("sd2", True), ("sdxl", True)])
def test_controlnet_of_every_family(folders: dict[str, Path], family: str, linear: bool) -> None:
    unet = UNet2DConditionModel.from_pretrained(folders[family] / "unet")
    branch = ControlNetModel.from_unet(unet, conditioning_channels=2)
    state = branch.state_dict()
    named = cldm.to_cldm(state, branch.config)
    assert len(named) == len(state) > 100
    projections = [value for key, value in named.items() if key.endswith(".proj_in.weight")]
    assert len(projections) == (2 if family == "sdxl" else 3)
    assert {value.ndim for value in projections} == {2 if linear else 4}
    # diffusers converts all but SDXL's label_emb.
    known = {key: value for key, value in state.items() if not key.startswith("add_embedding.")}
    assert len(state) - len(known) == (4 if family == "sdxl" else 0)
    assert unequal(convert_controlnet_checkpoint(dict(named), branch.config), known) == []
    assert unequal(cldm.from_cldm(named, branch.config), state) == []
    if family == "sdxl":
        with pytest.raises(cldm.LayoutError, match=r"label_emb\.0\.0 is missing"):
            cldm.to_cldm(known, branch.config)
        other = dict(branch.config, addition_embed_type="text")
        with pytest.raises(cldm.LayoutError, match="addition_embed_type is text; .* text_time"):
            cldm.to_cldm(state, other)

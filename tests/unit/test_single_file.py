"""What a checkpoint's one file is taken for, and what is said of other files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tuner import single_file
from tuner.errors import UserError
from tuner.export import files, original

KINDS = {"sd1": "sd1", "sd2": "sd2", "sdxl": "sdxl", "sd1_inpaint": "sd1", "sdxl_inpaint": "sdxl"}
UNET = "model.diffusion_model."
FIRST = f"{UNET}input_blocks.0.0.weight"
BIAS = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
TEXT = {"sd1": "cond_stage_model.transformer.", "sd2": "cond_stage_model.model."}
PICKLE = "a pickle"


def save(folder: Path, state: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    return files.save(folder / "model.safetensors", state, metadata or {})


@pytest.mark.parametrize(
    ("name", "config", "prediction"),
    [
        ("sd1", "sd15", "epsilon"),
        ("sd2", "sd21", "v_prediction"),
        ("sdxl", "sdxl", "epsilon"),
        ("sd1_inpaint", "sd15-inpainting", "epsilon"),
        ("sdxl_inpaint", "sdxl-inpainting", "epsilon"),
    ],
)
def test_what_a_checkpoint_is(
    states: dict[str, dict[str, Tensor]], tmp_path: Path, name: str, config: str, prediction: str
) -> None:
    about = single_file.describe(save(tmp_path, states[name]))
    assert about[:3] == (KINDS[name], config, prediction)
    assert about.components == tuple(original.PLACES[KINDS[name]])
    assert about.ignored == {}
    assert not about.zero_snr
    assert about.known_by == ("assumed, as the 768-pixel models have it" if name == "sd2" else "as published")
    assert (single_file.CONFIGS / config / "model_index.json").is_file()
    told = f"{KINDS[name]} ({config}), {prediction} ({about.known_by}): unet, vae, text_encoder"
    assert about.told().startswith(told)


@pytest.mark.parametrize(
    ("name", "metadata", "prediction", "known_by"),
    [
        ("sd2", {"modelspec.prediction_type": "epsilon"}, "epsilon", "prediction_type"),
        ("sd2", {"modelspec.prediction_type": "v"}, "v_prediction", "prediction_type"),
        ("sd2", {"modelspec.architecture": "stable-diffusion-v2-512"}, "epsilon", "architecture"),
        ("sd2", {"modelspec.architecture": "stable-diffusion-v2-768-v"}, "v_prediction", "architecture"),
        ("sdxl", {"modelspec.prediction_type": "v"}, "v_prediction", "prediction_type"),
        ("sd1", {"modelspec.prediction_type": "v"}, "v_prediction", "prediction_type"),
        ("sd1", {"modelspec.architecture": "stable-diffusion-v1"}, "epsilon", "as published"),
    ],
)
def test_prediction_by_metadata(
    states: dict[str, dict[str, Tensor]],
    tmp_path: Path,
    name: str,
    metadata: dict[str, str],
    prediction: str,
    known_by: str,
) -> None:
    path = save(tmp_path, states[name], metadata)
    about = single_file.describe(path)
    assert (about.prediction, known_by in about.known_by) == (prediction, True)
    if name == "sd2":
        assert about.config == {"epsilon": "sd21-base", "v_prediction": "sd21"}[prediction]
    for given in ("epsilon", "v_prediction"):
        assert single_file.describe(path, given)[2:4] == (given, "as given")
    with pytest.raises(UserError, match="prediction v: expected epsilon or v_prediction"):
        single_file.describe(path, "v")


def test_prediction_by_tensors(states: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    empty = torch.zeros(0)
    about = single_file.describe(save(tmp_path, states["sdxl"] | {"v_pred": empty}))
    assert about[2:5] == ("v_prediction", "its key v_pred", False)
    about = single_file.describe(save(tmp_path, states["sdxl"] | {"v_pred": empty, "ztsnr": empty}))
    assert about[2:5] == ("v_prediction", "its key v_pred", True)
    assert about.ignored == {}
    # ComfyUI's border for SD2 is a standard deviation of 0.09 over the numbers of this bias.
    wave = torch.tensor([1.0, -1.0]).repeat(160)
    for spread, prediction in ((0.1, "v_prediction"), (0.08, "epsilon"), (0.0, "v_prediction")):
        about = single_file.describe(save(tmp_path, states["sd2"] | {BIAS: spread * wave}))
        assert about.prediction == prediction
        assert about.known_by.startswith("a guess by the spread" if spread else "assumed")
    for key in ("edm_mean", "edm_vpred.sigma_max"):
        with pytest.raises(UserError, match=f"EDM formulation .{key}.; expected"):
            single_file.describe(save(tmp_path, states["sdxl"] | {key: torch.zeros(4)}))
    with pytest.raises(UserError, match="modelspec.prediction_type is flow; known are epsilon, v, v_pred"):
        single_file.describe(save(tmp_path, states["sdxl"], {"modelspec.prediction_type": "flow"}))


def test_what_lies_beside_the_weights_is_counted(
    states: dict[str, dict[str, Tensor]], tmp_path: Path, folders: dict[str, Path]
) -> None:
    one = torch.zeros(1)
    more = {"betas": one, "model_ema.decay": one, "model_ema.num_updates": one}
    more |= {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}
    about = single_file.describe(save(tmp_path, states["sd1"] | more))
    assert about.ignored == {"betas": 1, "model_ema": 2}
    assert about.told().endswith("text_encoder; without use here, tensors of betas (1), model_ema (2)")
    folder = single_file.as_folder(tmp_path / "model.safetensors", tmp_path / "cache", None, folders["sd1"])
    assert len(files.load(folder / "text_encoder" / "model.safetensors")[0]) == 36


@pytest.mark.parametrize(
    ("keys", "phrase"),
    [
        (["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight", "x.alpha"], "a LoRA"),
        (["unet.down_blocks.0.attentions.0.proj_in.lora_A.weight"], "a LoRA"),
        (["lora_unet_x.hada_w1_a", "lora_unet_x.hada_w1_b", "lora_unet_x.alpha"], "a LoRA"),
        (["control_model.input_blocks.0.0.weight"], "a ControlNet"),
        (["input_blocks.0.0.weight", "zero_convs.0.0.weight"], "a ControlNet"),
        (["down_blocks.0.resnets.0.conv1.bias", "controlnet_mid_block.bias"], "a ControlNet"),
        (["emb_params"], "a textual-inversion embedding"),
        (["clip_l", "clip_g"], "a textual-inversion embedding"),
        (["my-cat"], "a textual-inversion embedding"),
        (["down_blocks.0.resnets.0.conv1.bias", "conv_in.weight", "x"], "the UNet of a diffusers folder"),
        (["encoder.down_blocks.0.resnets.0.conv1.bias", "a", "b"], "the autoencoder of a diffusers folder"),
        (["text_model.encoder.layers.0.mlp.fc1.bias", "a", "b"], "a text encoder of a diffusers folder"),
        (["embeddings.token_embedding.weight", "a", "b"], "a text encoder of a diffusers folder"),
        (["input_blocks.0.0.weight", "out.0.bias", "a"], "a UNet alone, in the original layout"),
        (["first_stage_model.encoder.down.0.block.0.conv1.bias", "a", "b"], "an autoencoder alone"),
        (["model.diffusion_model.joint_blocks.0.x", "a", "b"], "a model of another family"),
        (["model.diffusion_model.double_blocks.0.x", "a", "b"], "a model of another family"),
        (["c", "b", "a", "d"], r"an unknown file of 4 tensors \(a, b, c\)"),
    ],
)
def test_other_files_are_named(tmp_path: Path, keys: list[str], phrase: str) -> None:
    path = save(tmp_path, {key: torch.zeros(2, 2) for key in keys})
    with pytest.raises(UserError, match=f"model.safetensors is {phrase}.*; expected a Stable Diffusion"):
        single_file.describe(path)


@pytest.mark.parametrize(
    ("content", "phrase"),
    [
        (b"PK\x03\x04rest", PICKLE),
        (b"\x80\x02}q\x00", PICKLE),
        (b"GGUF\x03", "a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer"),
        (b"<!DOCTYPE html>", "a web page"),
        (b"\x10\0\0\0\0\0\0\0{}", "not a whole .safetensors file"),
        (b"", "not a whole .safetensors file"),
    ],
)
def test_files_that_are_no_safetensors(tmp_path: Path, content: bytes, phrase: str) -> None:
    path = tmp_path / "model.ckpt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"model.ckpt.*{phrase}"):
        single_file.describe(path)


def test_a_header_may_begin_like_a_pickle(states: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    # The header's length comes first, whose lowest byte can be 0x80.
    seen = 0
    for extra in range(40):
        path = save(tmp_path, {"x": torch.zeros(1), "y": torch.zeros(1)}, {"a": "b" * 8 * extra})
        seen += path.read_bytes()[0] == 0x80
        with pytest.raises(UserError, match="is a textual-inversion embedding"):
            single_file.describe(path)
    assert seen == 1
    whole = save(tmp_path, states["sd1"])
    whole.write_bytes(whole.read_bytes()[:-1])
    with pytest.raises(UserError, match="not a whole .safetensors file"):
        single_file.describe(whole)
    with pytest.raises(UserError, match="not a whole .safetensors file: .*No such file"):
        single_file.describe(tmp_path / "nothing.safetensors")


def test_models_of_other_kinds_are_named(states: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    one, xl = torch.zeros(1), states["sdxl"]
    no_cross = {key: value for key, value in states["sd1"].items() if ".proj_in." not in key}
    swapped = {key.replace(TEXT["sd1"], TEXT["sd2"]): value for key, value in states["sd1"].items()}
    refiner = {key.replace("embedders.1.model", "embedders.0.model"): value for key, value in xl.items()}
    for state, words in (
        (xl | {f"{UNET}input_blocks.1.1.norm.weight": one}, "an image's embedding"),
        (refiner, "the refiner of SDXL"),
        (no_cross, "no cross-attention"),
        (swapped, "the UNet is of sd1, but its text encoder is not .cond_stage_model.model."),
        (states["sd1"] | {FIRST: torch.zeros(64, 8, 3, 3)}, r"sd1 .* 8 channels; expected 4, or 9"),
        (states["sd2"] | {FIRST: torch.zeros(64, 9, 3, 3)}, r"sd2 .* 9 channels; expected 4$"),
    ):
        with pytest.raises(UserError, match=words):
            single_file.describe(save(tmp_path, state))

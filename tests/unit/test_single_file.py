from __future__ import annotations

import importlib
import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tuner import components, single_file
from tuner.errors import UserError
from tuner.export import files, original

KINDS = {"sd1": "sd1", "sd2": "sd2", "sdxl": "sdxl", "sd1_inpaint": "sd1", "sdxl_inpaint": "sdxl"}
UNET = "model.diffusion_model."
FIRST = f"{UNET}input_blocks.0.0.weight"
BIAS = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
TEXT = {"sd1": "cond_stage_model.transformer.", "sd2": "cond_stage_model.model."}
PICKLE = "a pickle"
SIZES = {
    ("unet", "sd15"): 859_520_964,
    ("unet", "sd15-inpainting"): 859_535_364,
    ("unet", "sd21"): 865_910_724,
    ("unet", "sdxl"): 2_567_463_684,
    ("unet", "sdxl-inpainting"): 2_567_478_084,
    **{("vae", name): 83_653_863 for name in ("sd15", "sd15-inpainting", "sd21", "sdxl", "sdxl-inpainting")},
    **{("text_encoder", n): 123_060_480 for n in ("sd15", "sd15-inpainting", "sdxl", "sdxl-inpainting")},
    ("text_encoder", "sd21"): 340_387_840,
    **{("text_encoder_2", n): 694_659_840 for n in ("sdxl", "sdxl-inpainting")},
}


@pytest.fixture(scope="module")
def states(folders: dict[str, Path]) -> dict[str, dict[str, Tensor]]:
    """Every tiny base as one checkpoint; the tensors are shared, so only to be read."""
    made = {}
    for name, family in KINDS.items():
        parts, configs = {}, {}
        for part in original.PLACES[family]:
            network: Any = components.load(part, folders[name] / part)
            parts[part] = network.state_dict()
            config = network.config
            configs[part] = config.to_dict() if part.startswith("text") else dict(config)
        made[name] = original.to_original(parts, configs, family)
    return made


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


@pytest.mark.parametrize("name", KINDS)
def test_as_a_folder(
    states: dict[str, dict[str, Tensor]], folders: dict[str, Path], name: str, tmp_path: Path
) -> None:
    state = {key: value.half() if key.startswith(UNET) else value for key, value in states[name].items()}
    path = save(tmp_path, state)
    folder = single_file.as_folder(path, tmp_path / "cache", configs=folders[name])
    found = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    second = ["tokenizer_2/", "text_encoder_2/"] if KINDS[name] == "sdxl" else []
    for part in ("unet/", "vae/", "text_encoder/", "tokenizer/", *second):
        assert any(file.startswith(part) for file in found), part
    assert {file.split("/")[0] for file in found} == {
        *original.PLACES[KINDS[name]],
        *(n for n in json.loads((folder / "model_index.json").read_text()) if n.startswith("tokenizer")),
        "scheduler",
        "model_index.json",
    }
    family = importlib.import_module(f"tuner.families.{KINDS[name]}").FAMILY
    needs = ["unet", "vae", "text_encoder"]
    ours, theirs = (family.load(place, needs) for place in (folder, folders[name]))
    assert ours.scheduler_config["prediction_type"] == theirs.scheduler_config["prediction_type"]
    assert sorted(ours.modules()) == sorted(theirs.modules()) == sorted(original.PLACES[KINDS[name]])
    seen = 0
    for part, module in theirs.modules().items():
        loaded = ours.modules()[part].state_dict()
        assert sorted(loaded) == sorted(module.state_dict())
        for key, value in module.state_dict().items():
            assert torch.equal(loaded[key], value.half().float() if part == "unet" else value), key
            seen += 1
    assert seen > 250
    stored = files.load(folder / "unet" / "diffusion_pytorch_model.safetensors")[0]
    assert {value.dtype for value in stored.values()} == {torch.float16}
    ids, wanted = ours.tokenize(["a red toy"]).ids, theirs.tokenize(["a red toy"]).ids
    assert torch.equal(ids, wanted)


def test_it_is_made_once_for_all_that_it_depends_on(
    states: dict[str, dict[str, Tensor]], folders: dict[str, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    made: list[str] = []
    write = single_file._write_component
    monkeypatch.setattr(
        single_file, "_write_component", lambda *given: (made.append(given[2]), write(*given))[1]
    )
    configs = shutil.copytree(folders["sd1"], tmp_path / "configs")
    cache = tmp_path / "cache"
    path = save(tmp_path / "one", states["sd1"])
    folder = single_file.as_folder(path, cache, configs=configs)
    assert made == ["unet", "vae", "text_encoder"]
    moved = shutil.copy(path, tmp_path / "other name.safetensors")
    assert single_file.as_folder(Path(moved), cache, configs=configs) == folder
    assert len(made) == 3
    others = {folder, single_file.as_folder(path, cache, "v_prediction", configs)}
    scheduler = json.loads((configs / "scheduler" / "scheduler_config.json").read_text())
    (configs / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler | {"steps_offset": 0}))
    others.add(single_file.as_folder(path, cache, configs=configs))
    changed = {key: value + 1 if key == FIRST else value for key, value in states["sd1"].items()}
    others.add(single_file.as_folder(save(tmp_path / "one", changed), cache, configs=configs))
    monkeypatch.setattr(single_file, "VERSION", single_file.VERSION + 1)
    others.add(single_file.as_folder(path, cache, configs=configs))
    assert (len(others), len(made)) == (5, 15)
    assert sorted(p for p in folder.parent.iterdir() if p.is_dir()) == sorted(others)
    config = [json.loads((p / "scheduler" / "scheduler_config.json").read_text()) for p in others]
    assert sorted(c["prediction_type"] for c in config) == ["epsilon"] * 4 + ["v_prediction"]


def test_nothing_is_left_of_a_conversion_that_fails(
    states: dict[str, dict[str, Tensor]], folders: dict[str, Path], tmp_path: Path
) -> None:
    state, cache = states["sd1"], tmp_path / "cache"
    text = f"{TEXT['sd1']}text_model.final_layer_norm.bias"
    lost = {key: value for key, value in state.items() if key != text}
    for damaged, words in (
        (lost, r"its text_encoder is not that of .*: final_layer_norm\.bias is missing \(1 of 36"),
        (state | {text: torch.zeros(3)}, r"final_layer_norm\.bias is \[3\], not \[32\] \(1 of 36"),
        (state | {f"{UNET}extra.weight": torch.zeros(3)}, r"its unet .*extra\.weight: no place"),
        (state | {f"{UNET}out.0.extra": torch.zeros(3)}, r"its unet .*conv_norm_out\.extra has no place"),
    ):
        with pytest.raises(UserError, match=words):
            single_file.as_folder(save(tmp_path, damaged), cache, configs=folders["sd1"])
    assert [p for p in (cache / "checkpoints").iterdir() if p.suffix != ".lock"] == []
    with pytest.raises(UserError, match=r"its unet is not that of sd15: .* \(94 of 137 places"):
        single_file.as_folder(save(tmp_path, state), cache)
    with pytest.raises(UserError, match="holds text_encoder_2, but .* has no text_encoder_2/config.json"):
        single_file.as_folder(save(tmp_path, states["sdxl"]), cache, configs=folders["sd1"])
    with pytest.raises(UserError, match="there is no model_index.json"):
        single_file.as_folder(save(tmp_path, state), cache, configs=tmp_path)


def test_what_the_file_lacks_is_not_in_the_folder(
    states: dict[str, dict[str, Tensor]], folders: dict[str, Path], tmp_path: Path
) -> None:
    state = {key: value for key, value in states["sdxl"].items() if not key.startswith("first_stage_model.")}
    state |= {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    folder = single_file.as_folder(save(tmp_path, state), tmp_path / "cache", configs=folders["sdxl"])
    assert not (folder / "vae").exists()
    index = json.loads((folder / "model_index.json").read_text())
    assert index["vae"] == [None, None]
    assert index["unet"] == ["diffusers", "UNet2DConditionModel"]
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["prediction_type"], scheduler["rescale_betas_zero_snr"]) == ("v_prediction", True)


def test_others_wait_for_the_first(
    states: dict[str, dict[str, Tensor]], folders: dict[str, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    made: list[str] = []
    write = single_file._write_component

    def slow(*given: Any) -> None:
        made.append(given[2])
        time.sleep(0.2)
        write(*given)

    monkeypatch.setattr(single_file, "_write_component", slow)
    path, cache, start = save(tmp_path, states["sd1"]), tmp_path / "cache", threading.Barrier(3)

    def convert(_: int) -> Path:
        start.wait()
        return single_file.as_folder(path, cache, configs=folders["sd1"])

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(convert, range(3)))
    assert len(found) == 3
    assert set(found) == {p for p in (cache / "checkpoints").iterdir() if p.is_dir()}
    assert made == ["unet", "vae", "text_encoder"]


def test_an_autoencoder_alone(
    states: dict[str, dict[str, Tensor]], folders: dict[str, Path], tmp_path: Path
) -> None:
    prefix, cache = "first_stage_model.", tmp_path / "cache"
    inside = save(tmp_path / "whole", states["sd2"])
    bare = {k.removeprefix(prefix): v for k, v in states["sd2"].items() if k.startswith(prefix)}
    alone = save(tmp_path / "alone", bare | {"loss.discriminator.main.0.bias": torch.zeros(3)})
    wanted = components.load("vae", folders["sd2"] / "vae").state_dict()
    for path in (inside, alone):
        folder = single_file.autoencoder_folder(path, cache, folders["sd2"])
        assert [p.name for p in folder.iterdir()] == ["vae"]
        found = components.load("vae", folder / "vae")
        assert found.config["scaling_factor"] == 0.5
        assert sorted(found.state_dict()) == sorted(wanted)
        assert all(torch.equal(value, wanted[key]) for key, value in found.state_dict().items())
    assert len(wanted) > 80
    with pytest.raises(UserError, match="is a LoRA .*; expected an autoencoder"):
        single_file.autoencoder_folder(
            save(tmp_path, {"x.lora_down.weight": torch.zeros(1)}), cache, folders["sd2"]
        )
    with pytest.raises(UserError, match="there is no config.json"):
        single_file.autoencoder_folder(alone, cache, tmp_path)


@pytest.mark.parametrize("place", ["sd15/tokenizer", "sd21/tokenizer", "sdxl/tokenizer", "sdxl/tokenizer_2"])
def test_the_vocabulary_that_ships(tmp_path: Path, place: str) -> None:
    from transformers import CLIPTokenizer

    single_file.write_tokenizer(single_file.CONFIGS / place, tmp_path / "made")
    assert len(json.loads((tmp_path / "made" / "vocab.json").read_text(encoding="utf-8"))) == 49408
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "made")
    assert len(tokenizer) == 49408
    pad = 49407 if place in ("sd15/tokenizer", "sdxl/tokenizer") else 0
    ids = tokenizer("a photo of a cat", padding="max_length")["input_ids"]
    assert ids == [49406, 320, 1125, 539, 320, 2368, 49407] + [pad] * 70
    known = {"A Photo of  a CAT": [320, 1125, 539, 320, 2368], "naïve café": [1097, 35689, 563, 15304]}
    for words, numbers in known.items():
        assert tokenizer(words, add_special_tokens=False)["input_ids"] == numbers


def test_every_shipped_configuration_is_whole() -> None:
    from diffusers import DDPMScheduler

    shipped = sorted(p.name for p in single_file.CONFIGS.iterdir() if (p / "model_index.json").is_file())
    assert shipped == ["sd15", "sd15-inpainting", "sd21", "sd21-base", "sdxl", "sdxl-inpainting"]
    for name in shipped:
        folder = single_file.CONFIGS / name
        index = json.loads((folder / "model_index.json").read_text())
        parts = [part for part, entry in index.items() if isinstance(entry, list) and entry[0]]
        assert len(parts) == (7 if "xl" in name else 5)
        assert sorted(p.name for p in folder.iterdir() if p.is_dir()) == sorted(parts)
        family = "sd1" if "15" in name else "sd2" if "21" in name else "sdxl"
        assert set(original.PLACES[family]) <= set(parts)
        assert importlib.import_module(f"tuner.families.{family}").fits(folder)
        scheduler = DDPMScheduler.from_pretrained(folder / "scheduler").config
        assert scheduler.prediction_type == ("v_prediction" if name == "sd21" else "epsilon")
        assert (scheduler.beta_start, scheduler.beta_end) == (0.00085, 0.012)
        for part in original.PLACES[family]:
            with torch.device("meta"):
                network: Any = components.fresh(part, folder / part, 0)
            count = sum(p.numel() for p in network.parameters())
            assert count == SIZES[part, name.removesuffix("-base")], (name, part)

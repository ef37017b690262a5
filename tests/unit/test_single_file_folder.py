"""A checkpoint's one file as a folder of components, and the configurations that ship for it."""

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


TEXT = {"sd1": "cond_stage_model.transformer.", "sd2": "cond_stage_model.model."}


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


def save(folder: Path, state: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    return files.save(folder / "model.safetensors", state, metadata or {})


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
        (state | {text: torch.zeros(3)}, r"final_layer_norm\.bias is \[3\], expected \[32\] \(1 of 36"),
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

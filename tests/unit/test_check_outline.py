"""A base without its weights: what is trained on it, and what is wrong with its files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from tuner import build, device
from tuner.check.findings import Findings
from tuner.check.outline import look
from tuner.recipe import Recipe, load

METHODS: dict[str, dict[str, Any]] = {
    "controlnet": {"controlnet": "canny"},
    "grey controlnet": {"controlnet": {"condition": "canny", "conditioning_channels": 1, "arch": "lite"}},
    "low-rank controlnet": {"controlnet": {"rank": 4}},
    "unlocked controlnet": {"controlnet": {"unlock_decoder_at": 1}},
    "lora": {"lora": {"rank": 4, "targets": "attention+feed-forward", "text_encoder": True}},
    "dora": {"lora": {"rank": 4, "kind": "dora"}},
    "lokr": {"lora": {"rank": 4, "kind": "lokr"}},
    "orthogonal lora": {"lora": {"rank": 4, "init": "orthogonal"}},
    "words": {"textual_inversion": {"token": "<toy>", "init": "toy", "vectors": 3}},
    "random words": {"textual_inversion": {"token": "<toy>", "init": "random", "norm": "kept"}},
    "pivotal": {"lora": {"rank": 2}, "textual_inversion": {"token": "<toy>", "init": "red"}},
    "full": {"full": {}},
    "full with text": {"full": {"text_encoder": True}},
    "autoencoder": {"autoencoder": {}},
    "contrastive": {"contrastive": {}},
}


@pytest.fixture(autouse=True)
def fresh() -> None:
    AcceleratorState._reset_state(True)


def recipe_of(folder: Path, base: Path, method: dict[str, Any], **more: Any) -> Recipe:
    side = 32 if "contrastive" in method else 64
    tree = {
        "base": {"path": str(base), **more},
        "method": method,
        "data": {"source": "nowhere", "resolution": side, "cache": str(folder / "cache")},
        "train": {"steps": 1, "batch_size": 1, "learning_rate": 1e-3, "precision": "fp32", "threads": 1},
        "output": str(folder / "out"),
    }
    (folder / "recipe.yaml").write_text(json.dumps(tree))
    return load(folder / "recipe.yaml")


@pytest.mark.parametrize("base", ["sd1", "sdxl", "sd1_inpaint"])
@pytest.mark.parametrize("method", METHODS)
def test_it_trains_what_the_run_trains(
    folders: dict[str, Path], tmp_path: Path, base: str, method: str
) -> None:
    """Names, shapes, digests, the words' first vectors: as of the base that is loaded."""
    recipe = recipe_of(tmp_path, folders[base], METHODS[method])
    accelerator, hashes = device.start("fp32", 1), build.remembered(recipe)
    found = Findings()
    outline = look(recipe, accelerator, hashes, found)
    try:
        whole = build.adapted(recipe, accelerator, hashes)
    except ValueError as error:  # a method that this base does not take: the check says the same
        assert outline is None or found.problems
        assert str(error) in [one.text for one in found.problems]
        return
    assert outline is not None and found.problems == []
    wanted = [(name, tensor.shape) for name, tensor in whole.named_trained()]
    assert [(name, tensor.shape) for name, tensor in outline.named_trained()] == wanted
    assert found.facts["method"]["trained"] == sum(shape.numel() for _, shape in wanted) > 0
    assert outline.family.digests == whole.family.digests
    captions = ["a red <toy> & toys", ""]
    if whole.family.text_encoders:
        ours, theirs = (task.family.tokenize(captions) for task in (outline, whole))
        assert all(torch.equal(a.ids, b.ids) for a, b in zip(ours.each(), theirs.each(), strict=True))
    held = [
        key
        for network in outline.family.modules().values()
        for key, tensor in network.named_parameters()
        if not tensor.is_meta and "token_embedding" not in key
    ]
    assert bool(held) == (method == "unlocked controlnet"), "weights were loaded"


def damaged(base: Path, copy: Path, name: str) -> Path:
    shutil.copytree(base, copy)
    files = sorted((copy / name).glob("*.safetensors"))
    assert len(files) == 1
    return files[0]


def problems(tmp_path: Path, base: Path) -> list[str]:
    recipe = recipe_of(tmp_path, base, {"lora": {"rank": 2}})
    found = Findings()
    look(recipe, device.start("fp32", 1), build.remembered(recipe), found)
    assert all(one.about == "base" for one in found.problems), found.problems
    return [one.text for one in found.problems]


def test_a_file_that_is_cut_off(sd1_folder: Path, tmp_path: Path) -> None:
    file = damaged(sd1_folder, tmp_path / "base", "unet")
    file.write_bytes(file.read_bytes()[:-8])
    (text,) = problems(tmp_path, tmp_path / "base")
    assert text.startswith(f"{file}: not a whole .safetensors file")


def test_tensors_that_do_not_fit_the_configuration(sd1_folder: Path, tmp_path: Path) -> None:
    for name in ("text_encoder", "vae"):
        file = damaged(sd1_folder, tmp_path / f"{name}-base", name)
        tensors = load_file(file)
        first, second = sorted(name for name in tensors if name.endswith("weight"))[:2]
        tensors[first] = tensors[first][:1]
        del tensors[second]
        tensors["of another time"] = torch.zeros(2)  # more than is wanted does not matter
        save_file(tensors, file, metadata={"format": "pt"})
        (text,) = problems(tmp_path, tmp_path / f"{name}-base")
        assert "its files do not fit its config.json" in text and "(2 of " in text


def test_pickles_are_told_as_such(sd1_folder: Path, tmp_path: Path) -> None:
    file = damaged(sd1_folder, tmp_path / "base", "vae")
    file.rename(file.with_suffix(".bin"))
    (text,) = problems(tmp_path, tmp_path / "base")
    assert "expected diffusion_pytorch_model.safetensors" in text and "pickles are not loaded" in text


def test_all_of_a_base_that_is_wrong(sd1_folder: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(sd1_folder, base)
    shutil.rmtree(base / "scheduler")
    shutil.rmtree(base / "tokenizer")
    shutil.rmtree(base / "vae")
    found = problems(tmp_path, base)
    assert len(found) == 3
    for text in ("the component vae is missing", "the component tokenizer is missing", "scheduler"):
        assert any(text in one for one in found), (text, found)


def test_a_text_encoder_of_another_width(sd1_folder: Path, sdxl_folder: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(sd1_folder, base)
    shutil.rmtree(base / "text_encoder")
    shutil.copytree(sdxl_folder / "text_encoder_2", base / "text_encoder")
    config = json.loads((base / "text_encoder" / "config.json").read_text())
    (base / "text_encoder" / "config.json").write_text(json.dumps({**config, "architectures": []}))
    (text,) = problems(tmp_path, base)
    assert "cross_attention_dim 32 is not the text encoders' width 64" in text


def test_the_names_of_older_files_are_known(sd1_folder: Path, tmp_path: Path) -> None:
    """Text encoders with and without `text_model.`, and with positions; what is in them is the same."""
    file = damaged(sd1_folder, tmp_path / "base", "text_encoder")
    tensors = {f"text_model.{name.removeprefix('text_model.')}": t for name, t in load_file(file).items()}
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(tensors, file, metadata={"format": "pt"})
    assert problems(tmp_path, tmp_path / "base") == []

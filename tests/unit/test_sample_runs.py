"""`tuner sample` from a run or a recipe: what it trained is drawn with, and what it said is kept to."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tuner import cli, recipe, samplers
from tuner.export import files
from tuner.generate import draw

pytestmark = pytest.mark.usefixtures("surroundings")
FAST = ["--steps", "2", "--guidance", "3", "--sampler", "ddim", "--precision", "fp32"]
RunOf = Callable[..., Path]


@pytest.fixture
def finished(folders: dict[str, Path], models: ModuleType, tmp_path: Path) -> RunOf:
    """The folder of a run that has finished: its recipe and what it exported."""

    def of(name: str, base: str, options: dict[str, Any] | None = None, **more: Any) -> Path:
        family = models.family_of(folders[base], name)
        method = models.move(models.method_of(name, family, **(options or {})), by=1.0)
        asked = {
            "base": str(folders[base]),
            "method": {name: models.CONFIGS[name] | (options or {})},
            "data": {"source": "pictures", "resolution": 64},
            "train": {"steps": 1, "batch_size": 1, "learning_rate": 1.0},
            "preview": {"steps": 3, "guidance": 2.5, "negative": "sea"},
            "export": {"name": "case"},
            "output": "elsewhere",
        }
        written = tmp_path / f"{name}.yaml"
        written.write_text(json.dumps(asked | more))
        output = tmp_path / f"run-{name}-{base}"
        output.mkdir()
        (output / "recipe.yaml").write_text(recipe.load(written).resolved_yaml())
        (output / "export").mkdir()
        card = dataclasses.replace(models.card_of(torch.float16, method), name="case")
        assert method.export(family, output / "export", card)
        return output

    return of


def sample(*arguments: Any, fast: bool = True) -> int:
    return cli.main(["sample", *map(str, arguments), *(FAST if fast else [])])


def drawn(out: Path) -> np.ndarray:
    return np.asarray(Image.open(out / "prompt01-seed0.png").convert("RGB"))


def told(path: Path) -> dict[str, Any]:
    return dict(json.loads(Image.open(path).text["tuner"]))  # type: ignore[attr-defined]


@pytest.mark.parametrize("base", ["sd1", "sdxl"])
def test_a_run_of_a_lora(base: str, finished: RunOf, folders: dict[str, Path], tmp_path: Path) -> None:
    run, ddim = finished("lora", base), ["--sampler", "ddim", "--precision", "fp32"]
    assert sample("--run", run, "--prompt", "toy", *ddim, "--out", tmp_path / "a", fast=False) == 0
    about = told(tmp_path / "a" / "prompt01-seed0.png")
    assert (about["steps"], about["guidance"], about["negative"], about["size"]) == (3, 2.5, "sea", [64, 64])
    assert about["adapters"] == [{"kind": "lora", "name": "case", "weight": 1.0}]
    same = [
        "--steps",
        "3",
        "--guidance",
        "2.5",
        "--negative",
        "sea",
        "--base",
        folders[base],
        "--prompt",
        "toy",
    ]
    file = run / "export" / "case.safetensors"
    for out, more in (("b", ["--lora", file]), ("c", [])):
        assert sample(*same, *ddim, *more, "--out", tmp_path / out, fast=False) == 0
    whole, explicit, bare = (drawn(tmp_path / out) for out in "abc")
    assert np.array_equal(whole, explicit)
    assert np.abs(whole.astype(int) - bare).max() > 3
    assert sample(*same, *ddim, "--lora", f"{file}:0", "--out", tmp_path / "d", fast=False) == 2


@pytest.mark.parametrize("base", ["sd1", "sdxl"])
@pytest.mark.parametrize("kind", ["dora", "loha", "lokr"])
def test_a_run_of_other_kinds(
    kind: str, base: str, finished: RunOf, folders: dict[str, Path], tmp_path: Path
) -> None:
    run = finished("lora", base, {"kind": kind, "text_encoder": False, "rank": 2, "alpha": 2.0})
    apart = kind != "dora"
    file = run / "export" / ("lycoris/case.safetensors" if apart else "case.safetensors")
    assert file.is_file() and (run / "export" / "lycoris").is_dir() == apart
    same = ["--prompt", "a toy", "--negative", "b", "--size", "64x64"]
    plain = ["--base", folders[base]]
    for out, more in (("a", ["--run", run]), ("b", [*plain, "--lora", file]), ("c", plain)):
        assert sample(*more, *same, "--out", tmp_path / out) == 0
    assert told(tmp_path / "a" / "prompt01-seed0.png")["adapters"] == [
        {"kind": "lora", "name": "case", "weight": 1.0}
    ]
    assert np.array_equal(drawn(tmp_path / "a"), drawn(tmp_path / "b"))
    assert np.abs(drawn(tmp_path / "a").astype(int) - drawn(tmp_path / "c")).max() > 3


def test_a_run_of_a_word(finished: RunOf, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = finished("textual_inversion", "sd1")
    assert sample("--run", run, "--prompt", "a <toy>", "--out", tmp_path / "a") == 0
    assert "toy.safetensors: the word <toy>, 3 vectors" in capfd.readouterr().out
    assert told(tmp_path / "a" / "prompt01-seed0.png")["adapters"] == [{"kind": "embedding", "name": "<toy>"}]
    assert sample("--run", run, "--prompt", "a toy", "--out", tmp_path / "b") == 2
    assert "no prompt has the word <toy>" in capfd.readouterr().err
    assert sample("--run", run, "--prompt", "a toy", "--negative", "<toy>", "--out", tmp_path / "b") == 0


def test_a_run_of_a_control_net(
    finished: RunOf, folders: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run, look = finished("controlnet", "sd1"), tmp_path / "look.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(look)
    base = ["--prompt", "a", "--negative", "", "--size", "64x64"]
    assert sample("--run", run, *base, "--out", tmp_path / "x") == 2
    assert "trained a ControlNet; give its condition: --controlnet run:PICTURE" in capfd.readouterr().err
    single = run / "export" / "control_sd15_case.safetensors"
    made = {}
    for number, more in enumerate(
        (
            ["--run", run, "--controlnet", f"run:{look}"],
            ["--base", folders["sd1"], "--controlnet", f"{run / 'export' / 'diffusers'}:{look}"],
            [
                "--base",
                folders["sd1"],
                "--controlnet",
                f"{single}:0.5:{look}",
                "--controlnet",
                f"{single}:0.5:{look}",
            ],
            ["--run", run, "--controlnet", f"run:0:{look}"],
            ["--base", folders["sd1"]],
            ["--run", run, "--controlnet", f"run:{look}", "--control-guidance", "64/h"],
            ["--run", run, "--base", folders["sd1"], "--controlnet", f"run:{look}"],
        )
    ):
        assert sample(*more, *base, "--out", tmp_path / f"{number}") == 0
        made[number] = drawn(tmp_path / f"{number}").astype(int)
    assert np.array_equal(made[0], made[1]) and np.array_equal(made[0], made[6])
    assert np.abs(made[0] - made[2]).max() <= 1, "half and half of the same is one"
    assert np.array_equal(made[3], made[4]), "scale 0 is the base"
    assert np.abs(made[0] - made[4]).max() > 3 and np.abs(made[0] - made[5]).max() > 3
    about = told(tmp_path / "5" / "prompt01-seed0.png")
    assert about["adapters"] == [{"kind": "controlnet", "name": "case", "weight": 1.0}]
    assert about["control_guidance"]["name"] == "64/h" and "64 / h_i" in about["control_guidance"]["formula"]
    assert (
        "control guidance 64/h: control in the conditional branch only, w_i = H / h_i"
        in capfd.readouterr().out
    )


@pytest.mark.parametrize("pipeline", [True, False])
@pytest.mark.parametrize("base", ["sd1", "sdxl"])
def test_a_run_that_trained_the_base_itself(
    base: str,
    pipeline: bool,
    finished: RunOf,
    folders: dict[str, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    options = {"text_encoder": True, "pipeline": pipeline, "checkpoint_file": False}
    run, copied = finished("full", base, options), tmp_path / "copied"
    shutil.copytree(folders[base], copied)
    parts = ["unet", "text_encoder", *["text_encoder_2"] * (base == "sdxl")]
    for part in parts:
        shutil.copytree(run / "export" / "diffusers" / part, copied / part, dirs_exist_ok=True)
    same = ["--prompt", "a", "--negative", "b", "--size", "64x64"]
    for out, more in (("a", ["--run", run]), ("b", ["--base", copied]), ("c", ["--base", folders[base]])):
        assert sample(*more, *same, "--out", tmp_path / out) == 0
    of_run, of_copy, of_base = (drawn(tmp_path / out).astype(int) for out in "abc")
    # Weights that are put into a loaded network lie elsewhere in memory, where products round otherwise.
    assert np.array_equal(of_run, of_copy) if pipeline else np.abs(of_run - of_copy).max() <= 1
    assert np.abs(of_run - of_base).max() > 3
    about = told(tmp_path / "a" / "prompt01-seed0.png")
    assert about["adapters"] == [{"kind": part, "name": "case"} for part in parts]
    assert about["base"] == folders[base].name
    assert sample("--run", run, "--base", copied, *same, "--out", tmp_path / "d") == 2
    assert "trained the base itself" in capfd.readouterr().err


def test_a_run_of_an_autoencoder(finished: RunOf, tmp_path: Path) -> None:
    run = finished("autoencoder", "sd1", preview={})
    assert sample("--run", run, "--prompt", "a", "--out", tmp_path / "a") == 0


def test_a_runs_own_noise_schedule_is_used(
    finished: RunOf, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished("lora", "sd2", objective={"zero_terminal_snr": True})
    seen: list[Any] = []
    real = samplers.make

    def noted(name: str, config: Any) -> Any:
        seen.append((config.get("rescale_betas_zero_snr", False), config.get("timestep_spacing")))
        return real(name, config)

    monkeypatch.setattr(draw.samplers, "make", noted)
    assert sample("--run", run, "--prompt", "a", "--out", tmp_path / "a") == 0
    assert sample("--run", run, "--base", folders["sd2"], "--prompt", "a", "--out", tmp_path / "b") == 0
    assert seen == [(True, "trailing"), (False, "leading")]


def test_a_recipe_says_the_base(sd1_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    told_recipe = {
        "base": {"path": str(sd1_folder), "clip_skip": 2},
        "method": "lora",
        "data": {"source": "pictures", "resolution": 32},
        "train": {"steps": 1, "batch_size": 1, "learning_rate": 1.0},
        "output": "x",
    }
    file = tmp_path / "r.yaml"
    file.write_text(json.dumps(told_recipe))
    assert sample(file, "--prompt", "a red toy", "--out", tmp_path / "a") == 0
    base = ["--base", sd1_folder, "--prompt", "a red toy", "--size", "32x32"]
    assert sample(*base, "--clip-skip", "2", "--out", tmp_path / "b") == 0
    assert sample(*base, "--out", tmp_path / "c") == 0
    assert np.array_equal(drawn(tmp_path / "a"), drawn(tmp_path / "b"))
    assert not np.array_equal(drawn(tmp_path / "a"), drawn(tmp_path / "c"))
    assert sample(file, *base, "--out", tmp_path / "d") == 2
    assert "has no effect beside --base" in capfd.readouterr().err


def test_an_unfinished_run(finished: RunOf, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = finished("lora", "sd1")
    tensors, _ = files.load(run / "export" / "case.safetensors")
    assert len(tensors) > 10
    (run / "export" / "case.safetensors").unlink()
    assert sample("--run", run, "--prompt", "a", "--out", tmp_path / "a") == 2
    assert "case.safetensors: there is no such file; is the run finished?" in capfd.readouterr().err
    shutil.rmtree(run / "export")
    assert sample("--run", run, "--prompt", "a", "--out", tmp_path / "a") == 2
    assert "there is no folder export in it" in capfd.readouterr().err

"""`tuner sample`, from its options to the files: names, what they say of themselves, runs, mistakes."""

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

from tuner import cli, device, recipe, samplers
from tuner.export import files
from tuner.generate import draw, make
from tuner.generate.asked import Asked

ROOT = Path(__file__).resolve().parents[2]
FAST = ["--steps", "2", "--guidance", "3", "--sampler", "ddim", "--precision", "fp32"]


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache of its own, one thread, a current folder without anything."""
    torch.set_num_threads(1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def sample(*arguments: Any, fast: bool = True) -> int:
    return cli.main(["sample", *map(str, arguments), *(FAST if fast else [])])


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def told(path: Path) -> dict[str, Any]:
    return dict(json.loads(Image.open(path).text["tuner"]))  # type: ignore[attr-defined]


def picture_file(path: Path, size: tuple[int, int] = (64, 64), seed: int = 0) -> Path:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    Image.fromarray(values).save(path)
    return path


def test_every_option_is_a_field(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["sample", "--help"]) == 0
    text = capfd.readouterr().out
    names = [field.name.replace("_", "-") for field in dataclasses.fields(Asked)]
    assert len(names) == 26 and all(f"--{name} " in text for name in names if name != "recipe")
    assert "[RECIPE]" in text


def test_options_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Asked] = []
    monkeypatch.setattr(make, "make", seen.append)
    plain = ["--out", "x"]
    many = [
        "--lora",
        "a",
        "--lora",
        "b:0.5",
        "--prompt",
        "p",
        "--prompt",
        "",
        "--clip-skip",
        "2",
        "--size",
        "8x8",
    ]
    assert sample("r.yaml", *plain, *many, fast=False) == sample(*plain, fast=False) == 0
    given = {
        "lora": ["a", "b:0.5"],
        "prompt": ["p", ""],
        "clip_skip": 2,
        "size": "8x8",
        "recipe": Path("r.yaml"),
    }
    assert seen == [Asked(Path("x"), **given), Asked(Path("x"))]  # type: ignore[arg-type]


def test_files_and_what_they_say(sd1_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out, grid = tmp_path / "out", tmp_path / "grids" / "all.png"
    prompts = ["--prompt", "a red toy, 'big'", "--prompt", "the sea\n∿"]
    base = ["--base", sd1_folder, "--negative", "a: b", "--size", "64x32", "--count", "2", "--seed", "7"]
    assert sample(*base, *prompts, "--out", out, "--grid", grid) == 0
    names = [f"prompt{n:02d}-seed{s}.png" for n in (1, 2) for s in (7, 8)]
    assert sorted(path.name for path in out.iterdir()) == names
    texts = [Image.open(out / name).text for name in names]  # type: ignore[attr-defined]
    assert texts[0]["parameters"] == (
        "a red toy, 'big'\nNegative prompt: a: b\nSteps: 2, Sampler: DDIM, CFG scale: 3, Seed: 7, "
        f"Size: 64x32, Model: tiny-sd1, Version: tuner {told(out / names[0])['version']}"
    )
    found = [told(out / name) for name in names]
    assert [(one["prompt"], one["seed"]) for one in found] == [
        (prompt, seed) for prompt in prompts[1::2] for seed in (7, 8)
    ]
    wanted = {"negative": "a: b", "sampler": "ddim", "steps": 2, "guidance": 3.0, "size": [64, 32]}
    wanted |= {"base": "tiny-sd1", "family": "sd1", "adapters": [], "precision": "fp32"}
    assert all({key: one[key] for key in wanted} == wanted for one in found)
    assert not any(str(tmp_path) in json.dumps(text) or "/tmp" in json.dumps(text) for text in texts)
    made = [pixels(out / name) for name in names]
    assert all(one.shape == (32, 64, 3) for one in made)
    assert len({one.tobytes() for one in made}) == 4
    sheet = pixels(grid)
    assert sheet.shape == (22 + 2 * (32 + 18 + 6), 6 + 2 * (64 + 6), 3)
    for row in range(2):
        for column in range(2):
            top, left = 22 + row * 56 + 18, 6 + column * 70
            assert np.array_equal(sheet[top : top + 32, left : left + 64], made[2 * row + column])
    lines = capfd.readouterr().out.splitlines()
    assert lines[0].startswith(
        "4 pictures of 64x32 from tiny-sd1 (sd1, epsilon): ddim, 2 steps, guidance 3, fp32"
    )
    assert lines[-1] == f"4 pictures in {out}"
    # The last of them alone is the same picture, and none is drawn over another.
    alone = [
        "--base",
        sd1_folder,
        "--negative",
        "a: b",
        "--size",
        "64x32",
        "--seed",
        "8",
        "--prompt",
        prompts[3],
    ]
    assert sample(*alone, "--out", tmp_path / "alone") == 0
    assert np.array_equal(pixels(tmp_path / "alone" / "prompt01-seed8.png"), made[3])
    assert sample(*base, *prompts, "--out", out) == 2
    assert "prompt01-seed7.png and 3 more: is there already" in capfd.readouterr().err


def test_values_that_a_web_ui_would_read_wrongly_are_quoted() -> None:
    from tuner.generate.keep import parameters

    about = {"prompt": "p", "negative": "", "steps": 1, "sampler": "euler-a", "guidance": 1.5, "seed": 0}
    about |= {"size": [8, 8], "base": "a, b: c", "version": "1", "strength": 0.25}
    about["adapters"] = [{"kind": "lora", "name": "x", "weight": 0.5}, {"kind": "embedding", "name": "<y>"}]
    about["control_guidance"] = {"name": "64/h"}
    assert parameters(about) == (
        'p\nSteps: 1, Sampler: Euler a, CFG scale: 1.5, Seed: 0, Size: 8x8, Model: "a, b: c", '
        'Denoising strength: 0.25, Adapters: "lora x 0.5, embedding <y>", Control guidance: 64/h, '
        "Version: tuner 1"
    )


def test_pictures_of_another_size_are_resized_with_a_word(
    sd1_folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    image, mask = picture_file(tmp_path / "i.png", (70, 61)), picture_file(tmp_path / "m.png", (128, 112))
    base = ["--base", sd1_folder, "--prompt", "a", "--image", image]
    assert sample(*base, "--mask", mask, "--out", tmp_path / "a") == 0
    out = capfd.readouterr().out
    assert "m.png: 128x112 pixels, resized to 64x56\n" in out
    assert "i.png: 70x61 pixels, resized to 64x56, which changes its proportions\n" in out
    path = tmp_path / "a" / "prompt01-seed0.png"
    assert pixels(path).shape == (56, 64, 3)
    assert (told(path)["started_from"], told(path)["strength"]) == ("mask", 1.0)
    assert sample(*base, "--out", tmp_path / "b") == 0
    path = tmp_path / "b" / "prompt01-seed0.png"
    assert (told(path)["started_from"], told(path)["strength"]) == ("image", 0.6)
    assert "Denoising strength: 0.6" in Image.open(path).text["parameters"]  # type: ignore[attr-defined]
    mask_of = np.zeros((56, 64, 3), np.uint8)
    Image.fromarray(mask_of).save(mask)
    assert sample(*base, "--mask", mask, "--out", tmp_path / "c") == 2
    assert "--mask m.png: it is all black, so nothing would be drawn" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["sd2", "sdxl", "sd1_inpaint", "sdxl_inpaint"])
def test_every_base_from_a_picture(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    image, mask = picture_file(tmp_path / "i.png"), picture_file(tmp_path / "m.png", seed=1)
    made = []
    for number, more in enumerate(([], ["--image", image], ["--image", image, "--mask", mask])):
        out = tmp_path / f"{number}"
        assert (
            sample("--base", folders[name], "--prompt", "a", "--sampler", "euler", *more, "--out", out) == 0
        )
        made.append(pixels(out / "prompt01-seed0.png").tobytes())
    assert len(set(made)) == 3


def test_bf16_is_nearly_the_same(sdxl_folder: Path, tmp_path: Path) -> None:
    pictures = []
    for precision in ("fp32", "bf16"):
        out = tmp_path / precision
        more = ["--precision", precision, "--steps", "2", "--sampler", "euler", "--out", out]
        assert sample("--base", sdxl_folder, "--prompt", "a", *more, fast=False) == 0
        assert told(out / "prompt01-seed0.png")["precision"] == precision
        pictures.append(pixels(out / "prompt01-seed0.png").astype(int))
    assert 0 < np.abs(pictures[0] - pictures[1]).mean() < 5


RunOf = Callable[..., Path]


@pytest.fixture
def finished(folders: dict[str, Path], models: ModuleType, tmp_path: Path) -> RunOf:
    """The folder of a run that has finished: its recipe and what it exported."""

    def of(name: str, base: str, **more: Any) -> Path:
        family = models.family_of(folders[base], name)
        method = models.move(models.method_of(name, family), by=1.0)
        asked = {
            "base": str(folders[base]),
            "method": {name: models.CONFIGS[name]},
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


def drawn(out: Path) -> np.ndarray:
    return pixels(out / "prompt01-seed0.png")


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
    for out, more in (("b", ["--lora", file]), ("c", ["--lora", f"{file}:0"]), ("d", [])):
        assert sample(*same, *ddim, *more, "--out", tmp_path / out, fast=False) == 0
    whole, explicit, zero, bare = (drawn(tmp_path / out) for out in "abcd")
    assert np.array_equal(whole, explicit) and np.array_equal(zero, bare)
    assert np.abs(whole.astype(int) - bare).max() > 3


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
    run, look = finished("controlnet", "sd1"), picture_file(tmp_path / "look.png")
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


def test_a_run_that_trained_the_base_itself(
    finished: RunOf, folders: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = finished("full", "sd1")
    copied = tmp_path / "copied"
    shutil.copytree(folders["sd1"], copied)
    shutil.copytree(run / "export" / "diffusers" / "unet", copied / "unet", dirs_exist_ok=True)
    same = ["--prompt", "a", "--negative", "b", "--size", "64x64"]
    for out, more in (("a", ["--run", run]), ("b", ["--base", copied]), ("c", ["--base", folders["sd1"]])):
        assert sample(*more, *same, "--out", tmp_path / out) == 0
    assert np.array_equal(drawn(tmp_path / "a"), drawn(tmp_path / "b"))
    assert not np.array_equal(drawn(tmp_path / "a"), drawn(tmp_path / "c"))
    assert told(tmp_path / "a" / "prompt01-seed0.png")["adapters"] == [{"kind": "unet", "name": "case"}]
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


@pytest.mark.parametrize(
    "more, error",
    [
        (["--sampler", "eular"], "--sampler eular: unknown; did you mean euler? Known: "),
        (["--precision", "fp8"], "--precision fp8: unknown; expected one of auto, fp32, bf16, fp16"),
        (["--control-guidance", "both"], "--control-guidance has no effect without --controlnet"),
        (
            ["--controlnet", "n:p", "--control-guidance", "64"],
            "--control-guidance 64: unknown; did you mean 64/h?",
        ),
        (["--count", "0"], "--count 0: expected at least 1"),
        (["--clip-skip", "0"], "--clip-skip 0: expected at least 1"),
        (["--seed", "-1"], "--seed -1: expected 0 or more"),
        (["--mask", "m.png"], "--mask has no effect without --image"),
        (["--strength", "0"], "--strength has no effect without --image"),
        (["--image", "i.png", "--strength", "1.5"], "--strength 1.5: expected above 0, and at most 1"),
        (["--grid", "x.txt"], "--grid x.txt: expected a name that ends in .png, .jpg"),
        (["--guidance", "0.5"], "--guidance 0.5: expected 1, which is none, or more"),
        (["--guidance", "1", "--negative", "a"], "--negative has no effect with --guidance 1"),
        (
            ["--guidance", "1", "--controlnet", "n:p", "--control-guidance", "conditional"],
            "--control-guidance conditional has no effect with --guidance 1",
        ),
        (["--controlnet", "n"], "--controlnet n: expected NET:PICTURE"),
        (["--controlnet", "n:p.png"], "n: there is no such file"),
        (["--lora", "x:y"], "'y' is no number"),
        (["--lora", "x.safetensors"], "x.safetensors: there is no such file"),
        (["--embedding", "x.safetensors"], "x.safetensors: no such file"),
        (["--image", "i.png"], "i.png: this picture cannot be read"),
        (["--size", "64"], "--size 64: expected WIDTHxHEIGHT"),
        (["--size", "64x60"], "--size 64x60: expected multiples of 8; the nearest is 64x64"),
        (["--steps", "0"], "--steps 0: expected 1 to 1000"),
        (["--revision", "main"], "base.revision: main has no effect"),
        (["--out", "file"], "--out file: is a file; expected a folder"),
    ],
)
def test_mistakes(more: list[str], error: str, sd1_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Path("file").touch()
    given = ["--base", sd1_folder, "--prompt", "a", "--out", "out"]
    assert cli.main(["sample", *map(str, given), *more]) == 2
    err = capfd.readouterr().err
    assert error in err and "Traceback" not in err
    assert sorted(path.name for path in Path().iterdir()) == ["file"], "nothing is written"


@pytest.mark.parametrize(
    "given, error",
    [
        (["--base", "embedded"], "there is nothing to draw: give --prompt"),
        (["--prompt", "a"], "there is no base: give --base, a recipe, or --run"),
        (
            ["--prompt", "a", "--run", "."],
            "there is no recipe.yaml in it; expected the folder of a finished run",
        ),
        (["--prompt", "a", "--base", "nowhere/at/all"], "base.path: nowhere/at/all: no such folder or file"),
        (["r.yaml", "--run", ".", "--prompt", "a"], "RECIPE r.yaml has no effect beside --run"),
        (["r.yaml", "--prompt", "a"], "r.yaml"),
        (["--base", "embedded", "--prompt", "a", "--controlnet", "run:x.png"], "here is none"),
    ],
)
def test_mistakes_in_what_is_drawn_from(
    given: list[str], error: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["sample", *given, "--out", "out"]) == 2
    assert error in capfd.readouterr().err and not Path("out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_fp16_needs_a_gpu(sd1_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    given = ["--base", sd1_folder, "--prompt", "a", "--out", "out", "--precision", "fp16"]
    assert cli.main(["sample", *map(str, given)]) == 2
    assert "--precision fp16 needs a GPU" in capfd.readouterr().err
    assert set(device.DTYPES) == {"fp32", "bf16", "fp16"}


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

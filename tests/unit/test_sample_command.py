"""`tuner sample`, from its options to the files: names, what they say of themselves, mistakes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tuner import cli, device
from tuner.generate import make
from tuner.generate.asked import Asked

pytestmark = pytest.mark.usefixtures("surroundings")
FAST = ["--steps", "2", "--guidance", "3", "--sampler", "ddim", "--precision", "fp32"]


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
    assert len(names) == 27 and all(f"--{name} " in text for name in names if name != "recipe")
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
    there = f"{out / 'prompt01-seed7.png'} and 3 more: is there already"
    assert there in capfd.readouterr().err


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

"""`tuner check`: everything is told before the first step, all at once, and nothing is changed."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet

CONTROLNET, LORA = "controlnet_canny.yaml", "lora.yaml"
INVERSION = "textual_inversion.yaml"
AUTOENCODER, CLIP, FULL = "embedded/1_autoencoder.yaml", "embedded/2_clip.yaml", "embedded/4_unet_128.yaml"

Digests = Callable[[Path], dict[str, str]]


def check(tiny: Any, recipe: str, output: Path, *more: str, **changes: Any) -> int:
    from tuner.cli import main

    overrides = tiny.overrides(recipe, output, **changes)
    return main(["check", str(tiny.root / "recipes" / recipe), *overrides, *more])


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("recipe", [CONTROLNET, LORA, INVERSION, AUTOENCODER, CLIP, FULL])
def test_a_recipe_that_would_start(
    tiny: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    digests: Digests,
    recipe: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = digests(tiny.shapes) | digests(tiny.base)
    assert check(tiny, recipe, tmp_path / "out", "--json") == 0
    found = told(capsys)
    assert found["ok"] and found["problems"] == [] and found["not_checked"] == []
    sections = ("recipe", "base", "method", "data", "captions", "sizes", "buckets", "plan", "disk", "memory")
    assert [name for name in sections if name not in found] == []
    source, samples = found["data"]["sources"][0], {LORA: 8, INVERSION: 5}.get(recipe, 8)
    assert (source["samples"], source["repeats"]) == (samples, [1])
    assert source["captions_by"] == "metadata.jsonl"
    plan = found["plan"]
    assert (plan["steps"], plan["batch_size"], plan["steps_per_epoch"]) == (2, 4, -(-samples // 4))
    # Two full steps; of five samples the second step has the one that is left.
    assert plan["images"] == {8: 8, 5: 5}[samples] and plan["epochs"] == 2 / plan["steps_per_epoch"]
    assert sum(row["entries"] for row in found["buckets"]) == samples
    assert found["memory"]["peak"] == found["memory"]["needs"]["peak"] > 0
    # Nothing but the cache is written.
    assert {path.name for path in tmp_path.iterdir()} <= {"out-cache"}
    assert digests(tiny.shapes) | digests(tiny.base) == before


def test_numbers_are_those_of_the_run(tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The trained numbers, the checkpoint's size, and whether an output holds this very run."""
    output = tmp_path / "out"
    assert tiny.start(LORA, output) == 0
    capsys.readouterr()
    assert check(tiny, LORA, output, "--json") == 0
    found = told(capsys)
    assert found["disk"]["output"]["holds"] == "this run, finished: it would not start again"
    checkpoint = sorted((output / "checkpoints").glob("step-*"))[-1]
    from safetensors.torch import load_file

    trained = load_file(checkpoint / "trained.safetensors")
    assert found["method"]["trained"] == sum(tensor.numel() for tensor in trained.values())
    weights = sum(tensor.nbytes for tensor in trained.values())
    assert found["disk"]["output"]["checkpoint"] == 3 * weights  # and Adam's two moments
    # Another run in the same folder is refused, as a run would be.
    assert check(tiny, LORA, output, "--json", train__learning_rate=0.5) == 2
    (problem,) = told(capsys)["problems"]
    assert problem["about"] == "output" and "belongs to another run" in problem["text"]
    assert "train.learning_rate" in problem["text"]


def test_every_problem_at_once(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], digests: Digests
) -> None:
    base, data, output = tmp_path / "base", tmp_path / "data", tmp_path / "taken"
    shutil.copytree(tiny.base, base)
    (base / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    whole = base / "unet" / "diffusion_pytorch_model.safetensors"
    whole.write_bytes(whole.read_bytes()[:-100])
    shutil.copytree(tiny.shapes / "style", data)
    (data / "000002.png").write_bytes(b"no picture")
    (data / "000004.png").write_bytes(b"")
    output.write_text("mine")
    before = digests(tmp_path)
    changes: dict[str, Any] = {"base": base, "data.source": data, "train.batch_size": 3}
    changes |= {"train.accumulate": 2, "data.cache": tmp_path / "cache"}
    assert check(tiny, LORA, output, "--json", **changes) == 2
    found = told(capsys)
    texts = [(one["about"], one["text"]) for one in found["problems"]]
    expected = [
        ("base", "vae: expected diffusion_pytorch_model.safetensors, found no weights"),
        ("base", f"{whole}: not a whole .safetensors file"),
        ("data", "000002.png"),
        ("data", "the file is empty (0 bytes)"),
        ("data", "2 of 8 samples cannot be used"),
        ("output", "taken is a file"),
        ("recipe", "train.batch_size: found 3, which 1 process x 2"),
    ]
    for about, text in expected:
        assert any(one == about and text in line for one, line in texts), (about, text, texts)
    assert len(texts) == len(expected), texts
    assert found["data"]["samples"] == 6 and found["sizes"]["pictures"] == 6
    assert any("methods fit the base" in line for line in found["not_checked"])
    after = {name: value for name, value in digests(tmp_path).items() if not name.startswith("cache/")}
    assert after == before
    assert output.read_text() == "mine"


def test_samples_that_may_be_left_out_are_no_problem(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As for a run, whether the picture or what belongs to it is wrong."""
    data = drawn(tmp_path / "data", SIZES)
    (data / "1.txt").unlink()
    (data / "4.png").write_bytes(b"")
    changes: dict[str, Any] = {"data.source": data, "preview.every": 0, "evaluate.samples": 0}
    for allowed, code in ((2, 0), (1, 2)):
        assert check(tiny, LORA, tmp_path / "out", "--json", **changes, data__unreadable=allowed) == code
        found = told(capsys)
        assert len(found["problems"]) == (0 if allowed == 2 else 3), found["problems"]
        assert found["data"]["samples"] == 4 and len(found["data"]["left_out"]) == 2


def test_the_recipe_s_own_mistakes_come_together(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(tiny, LORA, tmp_path / "out", "--json", train__stepz=3, data__flip=1) == 2
    found = told(capsys)
    (problem,) = found["problems"]
    assert problem["about"] == "recipe"
    assert "train.stepz" in problem["text"] and "data.flip" in problem["text"]
    assert found["not_checked"] == ["everything else: the recipe cannot be read"]


def test_the_table(tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(tiny, CONTROLNET, tmp_path / "out") == 0
    lines = capsys.readouterr().out.splitlines()
    titles = ["Recipe", "Base", "Method", "Data", "Captions", "Sizes", "Buckets", "Plan", "Disk", "Memory"]
    assert [line for line in lines if line in titles] == titles
    assert lines[-1] == "No problems: a run would start."
    assert "  batch          4 = 1 process x 1 accumulated x 4" in lines


def test_memory_that_is_too_small(tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--json", "--device", "cuda", "--memory")
    assert check(tiny, CONTROLNET, tmp_path / "out", *more, "1MiB") == 2
    found = told(capsys)
    (problem,) = found["problems"]
    assert problem["about"] == "memory" and "more than --memory 1MiB" in problem["text"]
    assert found["memory"]["device"] == "cuda" and found["memory"]["limit"] == 2**20
    assert check(tiny, CONTROLNET, tmp_path / "out", *more, "1000GiB") == 0
    assert told(capsys)["memory"]["suggestions"] == []


def test_time_is_measured_without_a_trace(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(tiny, LORA, tmp_path / "out", "--json", "--time", train__steps=20) == 0
    found = told(capsys)["time"]
    assert found["measured_steps"] == 4 and found["steps"] == 20
    assert found["seconds"] == pytest.approx(20 * found["seconds_per_step"])
    assert found["images_per_second"] == pytest.approx(4 / found["seconds_per_step"])
    assert not (tmp_path / "out").exists()


def pictures(page: str) -> list[tuple[str, np.ndarray[Any, Any]]]:
    """Labels and pixels of a page's pictures."""
    found = re.findall(r'src="data:image/png;base64,([^"]+)"[^>]* alt="([^"]*)"', page)
    made = [(label, Image.open(io.BytesIO(base64.b64decode(data)))) for data, label in found]
    return [(label, np.asarray(image)) for label, image in made]


@pytest.mark.parametrize("recipe", [CONTROLNET, LORA, INVERSION, AUTOENCODER, CLIP, FULL])
def test_the_page_shows_what_the_model_gets(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], recipe: str
) -> None:
    page = tmp_path / "page.html"
    more = ("--contact-sheet", "--out", str(page), "--samples", "3")
    assert check(tiny, recipe, tmp_path / "out", *more) == 0
    text = page.read_text(encoding="utf-8")
    assert text.count("<article") == 3 and "<script" not in text
    expected = {
        CONTROLNET: ["file and crop", "latent, decoded", "condition"],
        CLIP: ["file and crop", "pixels"],
    }.get(recipe, ["file and crop", "latent, decoded"])
    assert [label for label, _ in pictures(text)] == expected * 3
    assert {path.name for path in tmp_path.iterdir()} == {"page.html", "out-cache"}


def test_the_decoded_latents_are_the_run_s(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bitwise those of the batches that a run's own feed makes, decoded by its autoencoder."""
    from tuner import build, device, recipe

    page = tmp_path / "page.html"
    more = ("--contact-sheet", "--out", str(page), "--samples", "6")
    changes: dict[str, Any] = {"data.flip": True, "preview.every": 0, "validate.every": 0}
    assert check(tiny, CONTROLNET, tmp_path / "out", *more, **changes) == 0
    shown = pictures(page.read_text(encoding="utf-8"))
    overrides = tiny.overrides(CONTROLNET, tmp_path / "out", **changes)
    loaded = recipe.load(tiny.root / "recipes" / CONTROLNET, overrides)
    run = build.build(loaded, device.start("fp32", 1))
    seen = 0
    for step in range(2):
        slots = run.plan.step(step)[: 6 - seen]
        batch = run.data.batch(slots, 4.0)
        with torch.no_grad():
            decoded = run.family.decode_latents(run.task.latents(batch))
        for place in range(len(slots)):
            own = ((decoded[place] + 1) / 2 * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
            assert shown[3 * seen + 1][0] == "latent, decoded"
            assert np.array_equal(shown[3 * seen + 1][1], own)
            assert batch.condition is not None
            edges = (batch.condition[place] * 255).round().byte().permute(1, 2, 0).numpy()
            assert np.array_equal(shown[3 * seen + 2][1], edges)
            seen += 1
    assert seen == 6


def test_text_of_the_data_is_escaped_and_cut_tokens_are_marked(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name, size in (("a<b>&", (64, 64)), ("wide", (192, 96)), ("c", (80, 64)), ("d", (64, 64))):
        Image.new("RGB", size, (200, 30, 30)).save(data / f"{name}.png")
        Image.new("L", size, 255).save(data / f"{name}_mask.png")
        words = "<script>alert('x')</script> & {{ 7 * 7 }} " + "toy " * 100
        (data / f"{name}.txt").write_text(words)
    page = tmp_path / "page.html"
    changes: dict[str, Any] = {
        "data.source": json.dumps({"path": str(data), "mask_from": "_mask"}),
        "data.captions.drop": 0,
        "evaluate.samples": 0,
    }
    assert check(tiny, LORA, tmp_path / "out", "--contact-sheet", "--out", str(page), **changes) == 0
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text and "&lt;script&gt;" in text and "{{ 7 * 7 }}" in text
    assert "a&lt;b&gt;&amp;.png" in text
    assert text.count("<article") == 4 and text.count("cut from here</b>") == 4
    # Of 64 x 64 out of 192 x 96 a half is lost; the crop is the middle half of the width.
    assert "<dd>50.0%</dd>" in text
    assert 'style="left: 25.0%; top: 0.0%; width: 50.0%; height: 100.0%"' in text
    assert [label for label, _ in pictures(text)].count("mask, 1 to 1") == 4
    out = capsys.readouterr().out
    assert re.search(r"^  masks +4$", out, re.MULTILINE) and re.search(r"^  cut +4$", out, re.MULTILINE)
    assert ".txt 4" in out


def test_sizes_that_sdxl_is_told_are_shown(
    tiny: Any, sdxl_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    more = ("--contact-sheet", "--out", str(page), "--samples", "1")
    changes = {"base": sdxl_folder, "preview.every": 0, "evaluate.samples": 0}
    assert check(tiny, LORA, tmp_path / "out", *more, **changes) == 0
    assert "<dt>told sizes</dt><dd>128 128 0 0 64 64</dd>" in page.read_text(encoding="utf-8")


def drawn(folder: Path, sizes: list[tuple[int, int]], mode: str = "RGB") -> Path:
    """A folder of pictures with captions, half of each picture red (and, with alpha, that half opaque)."""
    folder.mkdir(parents=True)
    for number, (width, height) in enumerate(sizes):
        picture = Image.new(mode, (width, height))
        picture.paste((200, 30, 30, 255)[: len(mode)], (0, 0, width // 2, height))
        picture.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a red toy {number}")
    return folder


SIZES = [(64, 64), (128, 64), (128, 66), (64, 128), (32, 32), (640, 640)]

VARIANTS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "alpha is the mask": (LORA, {"data.alpha": "mask"}, ["latent, decoded", "mask, 0 to 2"]),
    "not cached": (LORA, {"data.crop": "random", "data.jitter": "{brightness: 0.1}"}, ["latent, decoded"]),
    "nothing is cached": (LORA, {"data.cache": "off"}, ["latent, decoded"]),
    "buckets": (LORA, {"data.buckets": "{step: 16}", "train.batch_size": 2}, ["latent, decoded"]),
    "stages": (
        LORA,
        {
            "data.resolution": None,
            "data.stages": "[{resolution: 32, steps: 3}, {resolution: 64, batch_size: 2}]",
            "train.steps": 5,
        },
        ["latent, decoded"],
    ),
    "class pictures": (FULL, {"method.full.prior": "{prompt: a toy, count: 4}"}, ["latent, decoded"]),
    "a ControlNet of few numbers": (
        CONTROLNET,
        {"method.controlnet": "{condition: inpaint, rank: 2}"},
        ["latent, decoded", "condition", "its hole"],
    ),
    "two sources": (INVERSION, {}, ["latent, decoded"]),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    recipe, changes, labels = VARIANTS[name]
    data = drawn(tmp_path / "data", SIZES, "RGBA" if name.startswith("alpha") else "RGB")
    source: Any = data
    if name == "two sources":
        other = drawn(tmp_path / "other", [(64, 64)] * 2)
        captions = {"drop": 0.0, "prefix": "toy "}
        source = [{"path": str(data), "share": 1}, {"path": str(other), "share": 3, "captions": captions}]
        changes = {"method.textual_inversion.replace": "toy"}
    page = tmp_path / "page.html"
    more = {"data.source": source if isinstance(source, Path) else json.dumps(source), **changes}
    more |= {"preview.every": 0, "evaluate.samples": 0, "validate.every": 0}
    options = ("--contact-sheet", "--out", str(page), "--json", "--samples", "2")
    assert check(tiny, recipe, tmp_path / "out", *options, **more) == 0, capsys.readouterr()
    found = told(capsys)
    assert found["not_checked"] == []
    shown = [label for label, _ in pictures(page.read_text(encoding="utf-8"))]
    assert shown == ["file and crop", *labels] * 2
    plan, assigned = found["plan"], found["buckets"]
    if name == "stages":
        assert [stage["steps"] for stage in plan["stages"]] == [3, 2]
        # Six pictures in batches of four, two and four again; then two batches of two.
        assert plan["images"] == 4 + 2 + 4 + 2 * 2
        assert [(row["stage"], row["width"], row["entries"]) for row in assigned] == [(1, 32, 6), (2, 64, 6)]
    if name == "buckets":
        shapes = {(row["width"], row["height"]): row["entries"] for row in assigned}
        assert sum(shapes.values()) == 6 and len(shapes) > 1
        assert found["sizes"]["enlarged"] == 1  # that of 32 x 32
    if name == "class pictures":
        assert found["data"]["class_pictures"] == {"wanted": 4, "there": 0}
        assert plan["images"] == 2 * 4 and plan["entries_per_epoch"] == 6
    if name == "two sources":
        # A share of 1 to 3 where there are 6 and 2 samples: the second's come nine times.
        assert plan["entries_per_epoch"] == 6 + 9 * 2
        assert set(found["captions"]["operators"]) == {"all", "1"}
        assert found["captions"]["first_words"][0] == ["<crescent>", 18]
    if name == "nothing is cached":
        assert not list(tmp_path.glob("*cache*")) and found["disk"]["cache"] == {}
    if name == "not cached":
        assert list(found["disk"]["cache"]["uncached"]) == ["pictures"]


def test_what_is_read_in_passing_is_looked_at_from_its_beginning(
    tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All that depends on the whole set is told as not checked; what a run refuses is a problem."""
    data = drawn(tmp_path / "data", SIZES)
    rows = [
        {"image": {"bytes": (data / f"{n}.png").read_bytes(), "path": None}, "text": f"a toy {n}"}
        for n in range(len(SIZES))
    ]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "set.parquet")
    page = tmp_path / "page.html"
    source = {"path": str(tmp_path / "set.parquet"), "streaming": True}
    changes: dict[str, Any] = {"data.source": json.dumps(source), "preview.every": 0, "evaluate.samples": 0}
    more = ("--json", "--contact-sheet", "--out", str(page), "--samples", "2", "--time")
    assert check(tiny, LORA, tmp_path / "out", *more, **changes) == 0
    found = told(capsys)
    assert found["plan"]["samples"] is None and found["plan"]["images"] == 2 * 4
    assert found["data"]["samples"] == 6 and found["sizes"]["pictures"] == 6
    assert any("its first 6 samples stand for all here" in line for line in found["notes"])
    assert len(found["not_checked"]) == 2 and all("in passing" in line for line in found["not_checked"])
    assert page.read_text(encoding="utf-8").count("<article") == 2
    changes |= {"train.steps": None, "train.epochs": 1}
    assert check(tiny, LORA, tmp_path / "out", "--json", **changes) == 2
    assert ["train.epochs" in one["text"] for one in told(capsys)["problems"]] == [True]


def test_an_inpainting_base_shows_its_holes(
    tiny: Any, sd1_inpaint_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    changes = {"base": sd1_inpaint_folder, "preview.every": 0, "evaluate.samples": 0}
    more = ("--contact-sheet", "--out", str(page), "--samples", "2")
    assert check(tiny, LORA, tmp_path / "out", *more, **changes) == 0
    found = pictures(page.read_text(encoding="utf-8"))
    assert [label for label, _ in found] == ["file and crop", "latent, decoded", "hole to be filled"] * 2
    assert all(set(np.unique(image)) == {0, 255} for label, image in found if label.startswith("hole"))

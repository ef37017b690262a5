"""`tuner inspect | verify | convert` on files with the vectors of words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tuner.export import embedding, files

Run = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("tensors", "bad"),
    [
        ({"<toy>": (3, 32)}, {}),
        (
            {"<toy>": (1, 32), "<toy>_1": (1, 32)},
            {
                "ComfyUI": "part",
                "diffusers": "nothing",
                "A1111": "nothing",
                "Forge": "nothing",
                "kohya": "part",
            },
        ),
        ({"<toy>": (3, 31)}, dict.fromkeys(("ComfyUI", "diffusers", "A1111", "Forge", "kohya"), "nothing")),
        ({"<toy>": (32,)}, {"kohya": "part"}),
    ],
)
def test_verify_of_vectors(
    run: Run, tmp_path: Path, sd1_folder: Path, tensors: dict[str, tuple[int, ...]], bad: dict[str, str]
) -> None:
    path = files.save(tmp_path / "toy.safetensors", {k: torch.ones(s) for k, s in tensors.items()}, {})
    told = json.loads(run("inspect", path, "--base", sd1_folder, "--json")[1])["tools"]
    expected = dict.fromkeys(("diffusers", "ComfyUI", "A1111", "Forge", "kohya"), "all") | bad
    assert {tool: found["loads"] for tool, found in told.items()} == expected
    assert run("verify", path, "--base", sd1_folder)[0] == (2 if bad else 0)


def test_vectors_of_two_text_encoders(run: Run, tmp_path: Path, sdxl_folder: Path) -> None:
    pair = {"clip_l": torch.ones(2, 32), "clip_g": torch.ones(2, 64)}
    path = files.save(tmp_path / "toy.safetensors", pair, {})
    assert run("verify", path, "--base", sdxl_folder)[0] == 0
    for fault in (
        {"clip_l": pair["clip_l"]},
        {"toy": torch.ones(2, 32)},
        pair | {"clip_g": torch.ones(2, 63)},
        pair | {"x": torch.ones(1, 32)},
    ):
        path = files.save(tmp_path / "toy.safetensors", fault, {})
        assert run("verify", path, "--base", sdxl_folder)[0] == 2, sorted(fault)


def test_the_word_is_the_files_name(run: Run, tmp_path: Path, sd1_folder: Path) -> None:
    path = files.save(tmp_path / "other.safetensors", embedding.to_file("<toy>", torch.ones(1, 32)), {})
    code, out, _ = run("verify", path, "--base", sd1_folder)
    assert code == 0 and "prompts call it other, after the file; diffusers calls it <toy>" in out
    path = path.rename(tmp_path / "toy.safetensors")
    assert "prompts call it" not in run("verify", path, "--base", sd1_folder)[1]


def test_several_keys_become_one(run: Run, tmp_path: Path, sd1_folder: Path) -> None:
    rows = torch.randn(12, 32)
    keys = ["<toy>", *(f"<toy>_{index}" for index in range(1, 12))]
    path = files.save(tmp_path / "rows.safetensors", dict(zip(keys, rows, strict=True)), {"a": "b"})
    out = tmp_path / "toy.safetensors"
    assert run("convert", path, "--to", "comfy", "--out", out)[0] == 0
    tensors, told = files.load(out)
    assert list(tensors) == ["<toy>"] and torch.equal(tensors["<toy>"], rows) and told["a"] == "b"
    assert run("verify", out, "--base", sd1_folder)[0] == 0
    files.save(path, {"emb_params": rows}, {})
    (tmp_path / "other").mkdir()
    again = tmp_path / "other" / "toy.safetensors"
    assert run("convert", path, "--to", "diffusers", "--out", again)[0] == 0
    assert torch.equal(files.load(again)[0]["<toy>"], rows)
    out = tmp_path / "third.safetensors"
    for fault in ({"a": rows[:1], "b": rows[:1]}, {"a": rows[:1], "a_2": rows[:1]}):
        files.save(path, fault, {})
        code, _, err = run("convert", path, "--to", "comfy", "--out", out)
        assert code == 2 and ("several words" in err or "expected the keys a, a_1" in err)

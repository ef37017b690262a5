"""`tuner inspect` and `verify` on files, as a user calls them: adapters, checkpoints, unknown files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import safetensors.torch
import torch

from tuner.export import contents, files, identify, kohya, metadata, original, rules_checkpoint
from tuner.files import account, bases

Run = Callable[..., tuple[int, str, str]]


def test_inspect(run: Run, lora: Path, folder: Path) -> None:
    code, out, err = run("inspect", lora, "--base", folder)
    assert code == 0 and err == ""
    family = bases.named(str(folder)).family
    lines = {line.partition("  ")[0]: line.partition("  ")[2].strip() for line in out.splitlines()}
    assert lines["family"] == family and lines["is"].startswith("LoRA (kohya")
    assert lines["ranks"].startswith("4 (") and lines["alphas"].startswith("8.0 (")
    assert [lines[t] for t in ("diffusers", "ComfyUI", "A1111", "Forge", "kohya")] == [
        f"loads all on {folder.name}"
    ] * 5
    code, out, _ = run("inspect", lora, "--base", folder, "--json")
    told = json.loads(out)
    assert code == 0 and told["ranks"].keys() == {"4"} and told["metadata"]["modelspec.title"] == "mine"
    assert {found["loads"] for found in told["tools"].values()} == {"all"} and len(told["tools"]) == 5


def test_verify(run: Run, lora: Path, folder: Path) -> None:
    code, out, err = run("verify", lora, "--base", folder)
    keys = len(files.load(lora)[0])
    *rules, loaded = out.splitlines()
    assert code == 0 and err == "" and len(rules) == 5
    assert all(f" loads all {keys} keys on {folder.name}" in line for line in rules)
    assert f"all {keys} keys loaded by diffusers into" in loaded and "as tuner reads them" in loaded
    tensors, told = files.load(lora)
    key = next(key for key in tensors if key.endswith("to_q.lora_up.weight"))
    tensors[key.replace("to_q", "to_qq")] = tensors.pop(key)
    safetensors.torch.save_file(tensors, lora, metadata=told)
    code, out, err = run("verify", lora, "--base", folder)
    assert code == 2 and out == ""
    assert key.replace("to_q", "to_qq") in err and "ComfyUI would load part of it" in err
    assert "Traceback" not in err


def test_verify_by_one_tool(run: Run, lora: Path, folder: Path, tmp_path: Path) -> None:
    assert (
        run("convert", lora, "--to", "peft", "--out", tmp_path / "peft.safetensors", "--base", folder)[0] == 0
    )
    code, _, err = run("verify", tmp_path / "peft.safetensors", "--base", folder)
    assert code == 2 and "ComfyUI would load part" in err
    code, out, _ = run("verify", tmp_path / "peft.safetensors", "--base", folder, "--tool", "Diffusers")
    assert code == 0 and len(out.splitlines()) == 1
    code, _, err = run("verify", tmp_path / "peft.safetensors", "--base", folder, "--tool", "kohya")
    assert code == 2 and "kohya would load nothing" in err
    code, _, err = run("verify", lora, "--base", folder, "--tool", "comfy")
    assert code == 2 and "expected one of diffusers, ComfyUI, A1111, Forge, kohya" in err


def test_the_base_is_found_by_names_and_sizes(run: Run, tmp_path: Path, adapters: ModuleType) -> None:
    for name, family in (("sd15", "sd1"), ("sd21", "sd2"), ("sdxl", "sdxl"), ("embedded", "sd1")):
        base = bases.named(name)
        some = [p for p in base.adaptable() if p.endswith(("attn2.to_k", "layers.0.mlp.fc1"))]
        modules = adapters.loras(base, only=some.__contains__)
        tensors = kohya.to_kohya(modules, kohya.naming(base.family, base.unet))
        path = files.save(tmp_path / f"{name}.safetensors", tensors, {})
        code, out, err = run("verify", path)
        assert (code, err) == (0, "") and out.count(f"keys on {name}") == 5 and base.family == family


def test_a_base_of_another_size_is_told(run: Run, lora: Path, folder: Path) -> None:
    code, out, _ = run("inspect", lora)
    assert code == 0 and "it fits none of sd15, sd21, sdxl, embedded; say what it was made for" in out
    code, _, err = run("verify", lora)
    assert code == 2 and "--base FOLDER" in err
    code, _, err = run("verify", lora, "--base", "sd9")
    assert code == 2 and err.startswith(
        "base sd9: expected sd15, sd21, sdxl, embedded, or a diffusers folder"
    )


def test_verify_reads_the_hash_of_our_own_files(
    run: Run, tmp_path: Path, sd1_folder: Path, adapters: ModuleType
) -> None:
    base, path = bases.named(str(sd1_folder)), tmp_path / "x.safetensors"
    tensors = kohya.to_kohya(adapters.loras(base, only=lambda place: place.endswith("to_q")))
    files.save(path, tensors, metadata.with_hash({"tuner.versions": "{}"}, tensors))
    assert run("verify", path, "--base", sd1_folder)[0] == 0
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    code, _, err = run("verify", path, "--base", sd1_folder)
    assert code == 2 and "modelspec.hash_sha256" in err


def test_unknown_files_are_told(run: Run, tmp_path: Path) -> None:
    path = files.save(tmp_path / "x.safetensors", {"x": torch.ones(2, 2, 2)}, {})
    code, out, _ = run("inspect", path)
    assert code == 0 and "unknown" in out
    code, _, err = run("verify", path)
    assert code == 2 and "no rules for this kind of file (unknown)" in err
    for command in ("inspect", "verify"):
        code, _, err = run(command, tmp_path / "y.safetensors")
        assert code == 2 and err.endswith("there is no such file\n")


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_checkpoints_of_published_sizes(name: str) -> None:
    base = bases.named(name)
    shapes = rules_checkpoint.expected(base) | {"first_stage_model.x": (1,), "alphas_cumprod": (1000,)}
    whole = contents.Contents("x.safetensors", shapes, dict.fromkeys(shapes, "F16"), {}, {})
    identity = identify.identify(whole)
    assert identity.kind == "checkpoint" and bases.choose(None, whole, identity).name == name
    judged = {tool: account.judge(tool, whole, identity, base).loads for tool in account.tools_for(identity)}
    assert judged == dict.fromkeys(("diffusers", "ComfyUI", "A1111", "Forge", "kohya"), "all")
    key = "model.diffusion_model.out.2.weight"
    for fault in ({k: s for k, s in shapes.items() if k != key}, shapes | {f"{key}x": (1,)}):
        judged = {t: account.judge(t, whole._replace(shapes=fault), identity, base).loads for t in judged}
        assert set(judged.values()) == {"part"}


def test_checkpoint_of_the_tiny_bases(run: Run, folders: dict[str, Path], tmp_path: Path) -> None:
    """Only diffusers knows a base of any size; the keys are those that the single-file export writes."""
    for family in ("sd1", "sd2", "sdxl"):
        folder = folders[family]
        places_ = original.PLACES[family]
        states = {name: bases.weights(folder / name) for name in places_}
        configs = {name: bases.config(folder / name) for name in places_}
        path = tmp_path / f"{family}.safetensors"
        files.save(path, original.to_original(states, configs, family), {})
        code, out, err = run("verify", path, "--base", folder)
        assert (code, err) == (0, ""), err
        *rules, loaded = out.replace(";", "").splitlines()
        assert "loaded by diffusers' from_single_file" in loaded
        loads = {line.split()[1]: line.split()[3] for line in rules}
        assert loads == dict.fromkeys(("diffusers", "ComfyUI", "A1111", "Forge", "kohya"), "nothing") | {
            "diffusers": "all"
        }
        tensors, _ = files.load(path)
        key = next(key for key in tensors if key.endswith("out.2.weight"))
        files.save(path, {k: v for k, v in tensors.items() if k != key}, {})
        code, _, err = run("verify", path, "--base", folder)
        assert code == 2 and f"missing: {key}" in err

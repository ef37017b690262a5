"""`tuner verify FILE` on a base with weights, and beside the checkpoint of the run that made the file."""

from __future__ import annotations

import hashlib
import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tuner import recipe
from tuner.export import files, kohya, peft_format
from tuner.files import bases
from tuner.method import Card
from tuner.verify import VerifyError, loaded, lora, readers

Run = Callable[..., tuple[int, str, str]]


def test_a_lora_is_loaded_and_compared(run: Run, lora: Path, folder: Path) -> None:
    code, out, err = run("verify", lora, "--base", folder)
    assert code == 0 and err == ""
    layers = len(files.load(lora)[0]) // 3
    last = out.splitlines()[-1]
    assert f"keys loaded by diffusers into {layers} layers on {folder.name}, with the effect" in last
    rules = run("verify", lora, "--base", folder, "--tool", "diffusers")[1].splitlines()
    assert len(rules) == 1 and "loads all" in rules[0]


def test_what_cannot_be_loaded_is_said(run: Run, tmp_path: Path, adapters: ModuleType) -> None:
    base = bases.named("sd15")
    modules = adapters.loras(base, only=lambda place: place.endswith("0.attn2.to_k"))
    path = files.save(tmp_path / "x.safetensors", *peft_format.to_peft(modules))
    code, out, _ = run("verify", path, "--base", "sd15", "--tool", "diffusers")
    assert code == 0 and len(out.splitlines()) == 1
    files.save(path, kohya.to_kohya(modules), {})
    last = run("verify", path)[1].splitlines()[-1]
    assert "proved by the tools' rules of naming alone; --base FOLDER or FILE with weights, or --run" in last
    last = run("verify", path, "--base", "sd15")[1].splitlines()[-1]
    assert last == "x.safetensors: proved by the tools' rules of naming alone: there are no weights in sd15"


def test_another_effect_or_a_lost_layer_is_an_error(
    folders: dict[str, Path], tmp_path: Path, write_lora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, path = folders["sd1"], tmp_path / "x.safetensors"
    write_lora(path, bases.named(str(folder)), scale=0.1)
    real, found = lora.add, lora.loaded_layers
    assert "off by" in loaded.verify(path, str(folder), (), None)[-1]

    def stronger(pipe: Any, made: Any) -> None:
        modules = {p: m._replace(scale=1.01 * m.scale) for p, m in made.modules.items()}
        real(pipe, made._replace(modules=modules))

    monkeypatch.setattr(lora, "add", stronger)
    with pytest.raises(VerifyError, match="loaded by diffusers, is off by 0.0"):
        loaded.verify(path, str(folder), (), None)
    monkeypatch.setattr(lora, "add", real)
    monkeypatch.setattr(lora, "loaded_layers", lambda pipe: dict(list(found(pipe).items())[1:]))
    with pytest.raises(VerifyError, match="loaded by diffusers,: of .* keys 1 missing"):
        loaded.verify(path, str(folder), (), None)


RECIPE = """\
base: {base}
method: {method}
data: {{source: pictures, resolution: 32}}
train: {{steps: 3, batch_size: 2, learning_rate: 1e-3{more}}}
export: {{name: case}}
output: {output}
"""
METHODS = {  # what is trained, the file of it, and what its line says
    "lora": ("lora: {rank: 2, text_encoder: true}", "case.safetensors", "keys loaded by diffusers"),
    "lokr": ("lora: {rank: 2, kind: lokr}", "lycoris/case.safetensors", "(diffusers reads no such LoKr)"),
    "textual_inversion": (
        "textual_inversion: {token: <toy>, init: red, vectors: 2}",
        "toy.safetensors",
        "all 2 of its vectors",
    ),
    "controlnet": ("controlnet: {}", "control_sd15_case.safetensors", "tensors loaded by diffusers"),
    "full": ("full: {text_encoder: true}", "case.safetensors", "its unet and text_encoder loaded"),
}


def trained(name: str, folder: Path, place: Path, models: ModuleType, ema: bool) -> Path:
    """A run's folder: its recipe, an export, and the checkpoint; with `ema` the averages were exported."""
    text, output = METHODS[name][0], place / "run"
    output.mkdir()
    more = ", ema: 0.9" if ema else ""
    given = place / "given.yaml"
    given.write_text(RECIPE.format(base=folder, method=f"{{{text}}}", output=output, more=more))
    made = recipe.load(given)
    (output / "recipe.yaml").write_text(made.resolved_yaml())
    kind = next(iter(made.method))
    family = models.family_of(folder, kind)
    make = importlib.import_module(f"tuner.methods.{kind}").METHOD
    method = models.move(make(made.method[kind], family, 0))
    about = {method.kind: {"format": "pt", "tuner.recipe": "{}"}}
    method.export(family, output / "export", Card("case", torch.float16, about))
    state = output / "checkpoints" / "step-0000003"
    state.mkdir(parents=True)
    tensors = {f"0.{key}": tensor.detach().clone() for key, tensor in method.tensors().items()}
    rows = {f"0.{key}": tensor.detach().clone() for key, tensor in method.trained().items()}
    if ema:
        tensors = {key: 2 * tensor for key, tensor in tensors.items()}
    save_file(tensors, state / "trained.safetensors")
    torch.save({"ema": rows if ema else None, "optimiser": {}}, state / "state.pt")
    write_manifest(state)
    return output


def write_manifest(state: Path) -> None:
    digests = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in state.iterdir()
        if file.suffix in (".pt", ".safetensors")
    }
    (state / "manifest.json").write_text(json.dumps({"step": 3, "fingerprint": {}, "files": digests}))


@pytest.mark.usefixtures("surroundings")
@pytest.mark.parametrize("name", METHODS)
def test_a_file_has_the_effect_of_its_runs_checkpoint(
    name: str, sd1_folder: Path, models: ModuleType, tmp_path: Path
) -> None:
    output = trained(name, sd1_folder, tmp_path, models, ema=False)
    path = output / "export" / METHODS[name][1]
    line = loaded.verify(path, None, (), output)[-1]
    assert METHODS[name][2] in line
    assert "the checkpoint of run at step 3 has the same effect within float16" in line
    state = output / "checkpoints" / "step-0000003"
    tensors = {k: 1.5 * t for k, t in files.load(state / "trained.safetensors")[0].items()}
    save_file(tensors, state / "trained.safetensors")
    write_manifest(state)
    with pytest.raises(VerifyError, match="is off by"):
        loaded.verify(path, None, (), output)


@pytest.mark.usefixtures("surroundings")
def test_averages_are_compared_where_a_run_keeps_some(
    sd1_folder: Path, models: ModuleType, tmp_path: Path, run: Run
) -> None:
    output = trained("lora", sd1_folder, tmp_path, models, ema=True)
    path = output / "export" / "case.safetensors"
    assert "has the same effect" in loaded.verify(path, None, (), output)[-1]
    assert "--base has no effect" in run("verify", path, "--run", output, "--base", sd1_folder)[2]
    assert "--tool has no effect" in run("verify", path, "--run", output, "--tool", "kohya")[2]
    other = trained_word(tmp_path)
    assert "the run trained lora" in run("verify", other, "--run", output)[2]
    shutil.rmtree(output / "checkpoints")
    assert "there is no whole checkpoint" in run("verify", path, "--run", output)[2]
    (output / "recipe.yaml").unlink()
    assert "there is no recipe.yaml" in run("verify", path, "--run", output)[2]


def trained_word(place: Path) -> Path:
    return files.save(place / "toy.safetensors", {"<toy>": torch.ones(2, 32)}, {})


def test_every_kind_with_a_reader_is_one_that_rules_know() -> None:
    assert len(loaded.KINDS) == 11 and {kind.method for kind in loaded.KINDS.values()} == {
        "lora",
        "textual_inversion",
        "controlnet",
        "full",
    }
    assert all(kind.read in vars(readers).values() for kind in loaded.KINDS.values())

"""Every shipped recipe loads and runs, and leaves what the README says in its output."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tuner.log import read

ROOT = Path(__file__).resolve().parents[2]
EXPORTS = {  # recipe: every file of its export
    "controlnet_canny.yaml": [
        "control_sd15_controlnet_canny.safetensors",
        "diffusers/config.json",
        "diffusers/diffusion_pytorch_model.safetensors",
    ],
    "lora.yaml": ["lora.safetensors"],
    "textual_inversion.yaml": ["crescent.safetensors"],
    "embedded/1_autoencoder.yaml": [
        "diffusers/vae/config.json",
        "diffusers/vae/diffusion_pytorch_model.safetensors",
    ],
    "embedded/2_clip.yaml": [
        "diffusers/image_encoder/config.json",
        "diffusers/image_encoder/model.safetensors",
        "diffusers/text_encoder/config.json",
        "diffusers/text_encoder/model.safetensors",
    ],
    "embedded/3_unet_64.yaml": [
        "diffusers/unet/config.json",
        "diffusers/unet/diffusion_pytorch_model.safetensors",
    ],
    "embedded/4_unet_128.yaml": [
        "diffusers/unet/config.json",
        "diffusers/unet/diffusion_pytorch_model.safetensors",
    ],
}
MEASURES = {
    "controlnet_canny.yaml": {"edges followed", "prompt obeyed"},
    "lora.yaml": {"style"},
    "textual_inversion.yaml": {"concept", "new words"},
}
PICTURELESS = {"embedded/1_autoencoder.yaml", "embedded/2_clip.yaml"}


def test_every_shipped_recipe_is_run_here() -> None:
    shipped = {str(p.relative_to(ROOT / "recipes")) for p in (ROOT / "recipes").rglob("*.yaml")}
    shipped = {
        name for name in shipped if not name.startswith(("sd15/", "sd21/", "sdxl/"))
    }  # test_real_bases.py
    assert len(shipped) == 7
    assert shipped == EXPORTS.keys()


@pytest.mark.plans_memory
@pytest.mark.parametrize("recipe", EXPORTS)
def test_a_shipped_recipe_runs(
    tiny: Any, tmp_path: Path, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert tiny.start(recipe, output) == 0
    assert "memory: about " in capsys.readouterr().out

    export = output / "export"
    assert sorted(str(p.relative_to(export)) for p in export.rglob("*") if p.is_file()) == EXPORTS[recipe]
    folders = {"checkpoints", "export"}
    folders |= {"previews"} if recipe not in PICTURELESS else set()
    folders |= {"evaluation"} if recipe in MEASURES else set()
    assert {p.name for p in output.iterdir() if p.is_dir()} == folders
    files = {"recipe.yaml", "metrics.jsonl", "report.html", "versions.json", "finished.json"}
    assert {p.name for p in output.iterdir() if p.is_file()} == files
    assert sorted(p.name for p in (output / "checkpoints").iterdir()) == ["step-0000002"]
    if recipe not in PICTURELESS:
        names = [f"step-{step:06d}.{kind}" for step in (1, 2) for kind in ("json", "png")]
        assert sorted(p.name for p in (output / "previews").iterdir()) == names

    records = read(output / "metrics.jsonl")
    assert [step for step, _ in records.scalars["loss"]] == [1, 2]
    assert records.finished
    assert set(records.measures) == MEASURES.get(recipe, set())
    verified = [text for _, text in records.events if text.startswith("verified: ")]
    assert len(verified) == sum(name.endswith(".safetensors") for name in EXPORTS[recipe])

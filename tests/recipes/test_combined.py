"""Whole runs of what no shipped recipe asks for: methods together, class pictures, an unlocked decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tuner.log import read

COPIED = "vae/diffusion_pytorch_model.safetensors"  # as the base has it, beside what was trained
CASES: dict[str, tuple[str, dict[str, Any], list[str], set[str]]] = {
    "pivotal tuning": (
        "textual_inversion.yaml",
        {"method.lora": "{rank: 2, text_encoder: true}", "train.ema": 0.5},
        [
            "bundle/textual_inversion.safetensors",
            "crescent.safetensors",
            "textual_inversion.safetensors",
        ],
        {"style", "concept", "new words"},
    ),
    "two words": (
        "textual_inversion.yaml",
        {
            "method.textual_inversion": "{norm: kept, templates: object, tokens: [{token: <one>, init: toy, "
            "vectors: 2, replace: thing}, {token: <two>, init: random, replace: a}]}",
            "method.textual_inversion.init": ...,
            "train.ema": 0.5,
        },
        ["one.safetensors", "two.safetensors"],
        {"concept", "new words"},
    ),
    "DreamBooth": (
        "embedded/4_unet_128.yaml",
        {
            "method.full": "{text_encoder: true, prior: {prompt: a toy, count: 3, steps: 1}}",
        },
        [
            "4_unet_128.safetensors",
            "diffusers/model_index.json",
            "diffusers/scheduler/scheduler_config.json",
            "diffusers/text_encoder/config.json",
            "diffusers/text_encoder/model.safetensors",
            "diffusers/tokenizer/tokenizer.json",
            "diffusers/tokenizer/tokenizer_config.json",
            "diffusers/unet/config.json",
            "diffusers/unet/diffusion_pytorch_model.safetensors",
            "diffusers/vae/config.json",
            f"diffusers/{COPIED}",
        ],
        set(),
    ),
    "ControlNet with its decoder": (
        "controlnet_canny.yaml",
        {"method.controlnet": "{unlock_decoder_at: 1, conditioning_channels: 1, init: gaussian}"},
        [
            "control_sd15_controlnet_canny.safetensors",
            "diffusers/config.json",
            "diffusers/diffusion_pytorch_model.safetensors",
            "unet/config.json",
            "unet/diffusion_pytorch_model.safetensors",
        ],
        {"edges followed", "prompt obeyed"},
    ),
    "ControlNet-lite": (
        "controlnet_canny.yaml",
        {"method.controlnet": "{arch: lite}"},
        ["diffusers/config.json", "diffusers/diffusion_pytorch_model.safetensors"],
        {"edges followed", "prompt obeyed"},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_run(tiny: Any, tmp_path: Path, name: str) -> None:
    recipe, changes, files, measures = CASES[name]
    output = tmp_path / "out"
    assert tiny.start(recipe, output, **changes) == 0
    export = output / "export"
    assert sorted(str(p.relative_to(export)) for p in export.rglob("*") if p.is_file()) == files
    records = read(output / "metrics.jsonl")
    assert records.finished and [step for step, _ in records.scalars["loss"]] == [1, 2]
    assert set(records.measures) == measures
    verified = [text for _, text in records.events if text.startswith("verified: ")]
    assert len(verified) == sum(file.endswith(".safetensors") and COPIED not in file for file in files)
    assert (output / "report.html").stat().st_size > 10_000

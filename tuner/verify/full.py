"""Full fine-tuning: the denoiser's folder predicts as the trained denoiser does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tuner.method import Card, Method
from tuner.methods.full import Full
from tuner.verify.compare import one, same_output, short
from tuner.verify.component import folder_name, read_back
from tuner.verify.scene import Scene


def check(scene: Scene, method: Method, files: Sequence[Path], card: Card) -> dict[Path, str]:
    """Prove `diffusers/unet/`.

    Raises:
        VerifyError: its tensors, configuration or prediction are not the trained denoiser's.
    """
    assert isinstance(method, Full)
    path = one(files, "diffusers/unet/diffusion_pytorch_model.safetensors")
    loaded, count = read_back(path, method.denoiser, card)
    text = scene.text(method)
    found, own = scene.with_denoiser(loaded, text), scene.own(method, text)
    difference = same_output(f"{folder_name(path)}: the prediction", found, own, card.dtype)
    return {
        path: f"{folder_name(path)}: all {count} tensors loaded by diffusers; "
        f"a prediction differs by {difference:.1e} of its size ({short(card.dtype)})"
    }

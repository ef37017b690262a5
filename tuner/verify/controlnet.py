"""ControlNet: the folder steers as the trained branch does, and the single file holds the same tensors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from tuner.export import cldm
from tuner.family import Control
from tuner.method import Card, Method, public_config
from tuner.methods.controlnet import ControlNet
from tuner.text import Text
from tuner.verify.compare import (
    LOADING,
    VerifyError,
    load,
    one,
    same_effect,
    same_keys,
    same_reading,
    same_tensors,
    short,
)
from tuner.verify.component import read_back
from tuner.verify.scene import Scene, rounded


def check(scene: Scene, method: Method, files: Sequence[Path], card: Card) -> dict[Path, str]:
    """Prove `diffusers/` and the file in the original layout.

    Raises:
        VerifyError: keys, tensors, configuration, residuals or the steered prediction are not the trainer's.
    """
    assert isinstance(method, ControlNet)
    whole = one(files, "diffusers/diffusion_pytorch_model.safetensors")
    single = one(files, f"control_{scene.family.version}_{card.name}.safetensors")
    loaded, count = read_back(whole, method.branch, card)
    text = scene.text(method)
    control = _steer(scene, loaded, text)
    denoiser, cond = scene.family.denoiser, scene.cond(text)
    with rounded([*method.branch.parameters(), *method.branch.buffers()], card.dtype):
        residuals = _same_residuals(control, _steer(scene, method.branch, text), card.dtype)
    own, base = scene.own(method, text), scene.with_denoiser(denoiser, text)
    found = scene.family.predict(denoiser, scene.x_t, scene.t, cond, control)
    error = same_effect("diffusers/: the prediction", found, own, base, card.dtype)
    del loaded
    readers = _single(whole, single, method.branch)
    return {
        whole: f"diffusers/: all {count} tensors loaded by diffusers; {residuals} residuals right, "
        f"a prediction differs by {error:.1e} of the branch's effect ({short(card.dtype)})",
        single: f"{single.name}: all {count} tensors in the original layout, equal to the folder's; "
        f"{readers}",
    }


def _steer(scene: Scene, branch: nn.Module, text: Text) -> Control:
    return scene.family.control(branch, scene.x_t, scene.t, scene.cond(text), scene.picture)


def _same_residuals(found: Control, wanted: Control, dtype: torch.dtype) -> int:
    """Compare each residual with its own size; returns how many."""
    pairs = list(zip([*found.down, found.middle], [*wanted.down, wanted.middle], strict=True))
    for number, (has, wants) in enumerate(pairs):
        same_reading(f"diffusers/: residual {number}", has, wants, torch.zeros_like(wants), dtype)
    return len(pairs)


def _single(whole: Path, single: Path, branch: nn.Module) -> str:
    """The single file has the original layout's keys and the folder's tensors, also as diffusers reads it.

    diffusers' converter leaves SDXL's `label_emb` out (0.42), so such a file is proved by the names' exact
    inverse alone. Returns who reads it, in words.
    """
    from diffusers import ControlNetModel

    config, folder, tensors = public_config(branch), load(whole), load(single)
    same_keys(single.name, tensors, cldm.to_cldm(folder, config))
    kind = next(iter(folder.values())).dtype
    same_tensors(f"{single.name}, converted back,", cldm.from_cldm(tensors, config), folder, kind)
    if config.get("addition_embed_type") is not None:
        return "diffusers reads this base's ControlNets from the folder only"
    try:
        read = ControlNetModel.from_single_file(
            str(single), config=str(whole.parent), torch_dtype=torch.float32, local_files_only=True
        )
    except LOADING as error:
        raise VerifyError(f"{single.name} does not load in diffusers: {error}") from error
    floats = {name: tensor.float() for name, tensor in folder.items()}
    same_tensors(f"{single.name}, read by diffusers,", read.state_dict(), floats, torch.float32)
    return "read by diffusers' own converter too"

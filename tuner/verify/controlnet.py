"""ControlNet: the folder steers as the trained branch does, and the single file holds the same tensors."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from tuner.export import cldm
from tuner.family import Control
from tuner.method import Card, Method, public_config
from tuner.methods.controlnet import DECODER, ControlNet
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
    """Prove `diffusers/`, the file in the original layout, and the UNet of an unlocked decoder.

    Raises:
        VerifyError: keys, tensors, configuration, residuals or the steered prediction are not the trainer's.
    """
    assert isinstance(method, ControlNet)
    whole = one(files, "diffusers/diffusion_pytorch_model.safetensors")
    loaded, count = read_back(whole, method.branch, card)
    text = scene.text(method)
    control = _steer(scene, method, loaded, text)
    with rounded([*method.branch.parameters(), *method.branch.buffers()], card.dtype):
        residuals = _same_residuals(control, _steer(scene, method, method.branch, text), card.dtype)
    del loaded
    lines = {}
    denoiser = scene.family.denoiser
    if method.decoder:
        path = one(files, "unet/diffusion_pytorch_model.safetensors")
        denoiser, lines[path] = _unlocked(scene, method, path, card)
    own = scene.own(method, text)
    found = scene.family.predict(denoiser, scene.x_t, scene.t, scene.cond(text), control)
    with method.off(scene.family):
        base = scene.with_denoiser(scene.family.denoiser, text)
    error = same_effect("diffusers/: the prediction", found, own, base, card.dtype)
    readers = _single(whole, method, files, scene.family.version, card, lines)
    lines[whole] = (
        f"diffusers/: all {count} tensors loaded by diffusers; {residuals} residuals right, a prediction "
        f"differs by {error:.1e} of the {'training' if method.decoder else 'branch'}'s effect "
        f"({short(card.dtype)}){readers}"
    )
    return lines


def _steer(scene: Scene, method: ControlNet, branch: nn.Module, text: Text) -> Control:
    cond, picture = scene.cond(text), method.look(scene.picture)
    return scene.family.control(branch, scene.x_t, scene.t, cond, picture)


def _unlocked(scene: Scene, method: ControlNet, path: Path, card: Card) -> tuple[nn.Module, str]:
    """The UNet's folder loads and holds the trained decoder; a copy of the trainer's UNet with that decoder.

    Only the decoder is compared by its effect: the rest the trainer may hold in half precision.
    """
    family = scene.family
    whole = copy.deepcopy(family.denoiser)
    whole.load_state_dict(method.base(family))
    loaded, count = read_back(path, whole, card)
    decoder = {name: t for name, t in loaded.state_dict().items() if name.partition(".")[0] in DECODER}
    del loaded, whole
    made = copy.deepcopy(family.denoiser)
    assert not made.load_state_dict(decoder, strict=False).unexpected_keys and decoder
    line = f"unet/: all {count} tensors loaded by diffusers, {len(decoder)} of them of the unlocked decoder"
    return made, line


def _same_residuals(found: Control, wanted: Control, dtype: torch.dtype) -> int:
    """Compare each residual with its own size; returns how many."""
    pairs = list(zip([*found.down, found.middle], [*wanted.down, wanted.middle], strict=True))
    for number, (has, wants) in enumerate(pairs):
        same_reading(f"diffusers/: residual {number}", has, wants, torch.zeros_like(wants), dtype)
    return len(pairs)


def _single(
    whole: Path, method: ControlNet, files: Sequence[Path], version: str, card: Card, lines: dict[Path, str]
) -> str:
    """Prove the file in the original layout; its line is added. What the folder's line says besides."""
    name = f"control_{version}_{card.name}.safetensors"
    if public_config(method.branch)["mid_block_type"] != "UNetMidBlock2DCrossAttn":
        if any(path.name == name for path in files):
            raise VerifyError(f"{name}: the original layout has no place for a branch without attention")
        return "; without attention it is for diffusers alone: no other tool builds such a branch"
    single = one(files, name)
    count, readers = _same_single(whole, single, method.branch)
    channels = method.config.conditioning_channels
    if channels != 3:
        readers += f"; sd-webui-controlnet builds branches for 3 channels, not for {channels}"
    lines[single] = f"{name}: all {count} tensors in the original layout, equal to the folder's; {readers}"
    return ""


def _same_single(whole: Path, single: Path, branch: nn.Module) -> tuple[int, str]:
    """The single file has the original layout's keys and the folder's tensors, also as diffusers reads it.

    diffusers' converter leaves SDXL's `label_emb` out (0.42), so such a file is proved by the names' exact
    inverse alone. Returns how many tensors there are, and who reads them.
    """
    from diffusers import ControlNetModel

    config, folder, tensors = public_config(branch), load(whole), load(single)
    count = same_keys(single.name, tensors, cldm.to_cldm(folder, config))
    kind = next(iter(folder.values())).dtype
    same_tensors(f"{single.name}, converted back,", cldm.from_cldm(tensors, config), folder, kind)
    if config.get("addition_embed_type") is not None:
        return count, "diffusers reads this base's ControlNets from the folder only"
    try:
        read = ControlNetModel.from_single_file(
            str(single), config=str(whole.parent), torch_dtype=torch.float32, local_files_only=True
        )
    except LOADING as error:
        raise VerifyError(f"{single.name} does not load in diffusers: {error}") from error
    floats = {name: tensor.float() for name, tensor in folder.items()}
    same_tensors(f"{single.name}, read by diffusers,", read.state_dict(), floats, torch.float32)
    return count, "read by diffusers' own converter too"

"""ControlNet: the folder steers as the trained branch does, and the single file holds the same tensors.

A low-rank branch's folder has the factors added to the base's weights; the file of factors gives the same on
the base, also as diffusers reads it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tuner.adapters import factors
from tuner.export import cldm, control_lora
from tuner.family import Control
from tuner.method import Card, Method, public_config
from tuner.methods.controlnet import DECODER, ControlNet
from tuner.text import Text
from tuner.verify.compare import (
    LOADING,
    VerifyError,
    distance,
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

_SAME = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
"""How far a tensor may be off, relative to its size: the order of sums, and the rounding of frozen biases."""


def check(scene: Scene, method: Method, files: Sequence[Path], card: Card) -> dict[Path, str]:
    """Prove `diffusers/`, the file in the original layout, that of factors, and an unlocked decoder's UNet.

    Raises:
        VerifyError: keys, tensors, configuration, residuals or the steered prediction are not the trainer's.
    """
    assert isinstance(method, ControlNet)
    whole = one(files, "diffusers/diffusion_pytorch_model.safetensors")
    trained = _complete(method, scene)
    loaded, count = read_back(whole, trained, card)
    text = scene.text(method)
    control = _steer(scene, method, loaded.to(scene.family.device), text)
    del loaded
    trained.to(scene.family.device)
    with rounded([*trained.parameters(), *trained.buffers()], card.dtype):
        residuals = _same_residuals(control, _steer(scene, method, trained, text), card.dtype)
    del trained
    lines = {}
    denoiser = scene.family.denoiser
    if method.decoder:
        path = one(files, "unet/diffusion_pytorch_model.safetensors")
        denoiser, lines[path] = _unlocked(scene, method, path, card)
    own = scene.own(method, text)
    found = scene.family.predict(denoiser, scene.x_t, scene.t, scene.cond(text), control)
    with method.off(scene.family):
        base = scene.with_denoiser(scene.family.denoiser, text)
    kept = _as_held(method, scene, card.dtype)
    error = same_effect("diffusers/: the prediction", found, own, base, kept)
    if method.config.rank is not None:
        _small(scene, method, files, card, lines)
    readers = _single(whole, method, files, scene.family.version, card, lines)
    lines[whole] = (
        f"diffusers/: all {count} tensors loaded by diffusers; {residuals} residuals right, a prediction "
        f"differs by {error:.1e} of the {'training' if method.decoder else 'branch'}'s effect "
        f"({short(card.dtype)}){readers}"
    )
    return lines


def _complete(method: ControlNet, scene: Scene) -> nn.Module:
    """The trained branch as other tools build it; of a low-rank one a new network, on the CPU."""
    if method.config.rank is None:
        return method.branch
    kind: Any = type(method.branch)
    made: nn.Module = kind.from_config(method.branch.config).eval().requires_grad_(False)
    made.load_state_dict(method.whole(scene.family))
    return made


def _as_held(method: ControlNet, scene: Scene, dtype: torch.dtype) -> torch.dtype:
    """The type that bounds the effect: bfloat16 where the trainer holds the base in less than its file does.

    Exports are made of the weights as the file has them.
    """
    if method.config.rank is None:
        return dtype
    files = method.frozen(scene.family)
    for path, layer in factors.factored(method.branch):
        held = layer.frozen()[0]
        if not torch.equal(held, files[f"{path}.weight"].to(held)):
            return torch.bfloat16
    return dtype


def _small(
    scene: Scene, method: ControlNet, files: Sequence[Path], card: Card, lines: dict[Path, str]
) -> None:
    """Prove the file of factors: what it makes of the base's weights, and how diffusers reads it."""
    family, config = scene.family, public_config(method.branch)
    name = f"{control_lora.FOLDER}/{control_lora.file_name(family.version, card.name)}"
    path = one(files, name)
    tensors = load(path)
    wanted = control_lora.to_file(method.low_rank(family), config)
    count = same_tensors(name, tensors, wanted, card.dtype)
    made = control_lora.whole(control_lora.from_file(tensors, config), method.frozen(family))
    with rounded(method.branch.parameters(), card.dtype):
        trained = method.whole(family)
    same_keys(f"{name}, on the base,", made, trained)
    for key, tensor in trained.items():
        error = distance(made[key].to(tensor.device), tensor)
        if not error <= _SAME[card.dtype if key.endswith(".bias") else torch.float32]:
            raise VerifyError(f"{name}, on the base: {key} is off by {error:.2g} of its size")
    told = f"{name}: all {count} tensors (rank {method.config.rank}), with which the base is the folder's"
    lines[path] = f"{told}{_diffusers(scene, method, path, card)}"


def _diffusers(scene: Scene, method: ControlNet, path: Path, card: Card) -> str:
    """Compare what diffusers makes of the file on a clone of the base; says who reads it."""
    family = scene.family
    if public_config(method.branch)["layers_per_block"] != 2 or family.inpainting:
        return "; diffusers reads it on bases of two layers a level that do not fill holes, not on this one"
    clone: Any = family.control_branch(method.config.conditioning_channels)
    try:
        with warnings.catch_warnings(action="ignore"):
            clone.load_lora_adapter(
                str(path.parent), weight_name=path.name, prefix=None, local_files_only=True
            )
    except LOADING as error:
        raise VerifyError(f"{path.name} does not load in diffusers: {error}") from error
    clone.to(family.device).eval()
    text, dtype = scene.text(method), _as_held(method, scene, card.dtype)
    found, own = (_steer(scene, method, branch, text) for branch in (clone, method.branch))
    pairs = list(zip([*found.down, found.middle], [*own.down, own.middle], strict=True))
    for number, (has, wants) in enumerate(pairs):
        same_effect(
            f"{path.name} in diffusers: residual {number}", has, wants, torch.zeros_like(wants), dtype
        )
    return f"; read by diffusers, whose {len(pairs)} residuals are right"


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

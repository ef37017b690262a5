"""LoRA: the file, loaded by diffusers into a bare base, changes it as the trained adapters do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tuner.export.kohya import LoraError, LoraModule, from_kohya, kohya_name
from tuner.method import Card, Method
from tuner.methods.lora import Lora
from tuner.text import Text
from tuner.verify.compare import (
    LOADING,
    NOISE,
    VerifyError,
    load,
    norm,
    one,
    same_effect,
    same_keys,
    same_reading,
    short,
)
from tuner.verify.scene import PROMPTS, Scene, rounded

PARTS = ("lora_down.weight", "lora_up.weight", "alpha")
ADAPTER = "export"


def check(scene: Scene, method: Method, files: Sequence[Path], card: Card) -> dict[Path, str]:
    """Prove `NAME.safetensors` through `load_lora_weights` and `unload_lora_weights`.

    Raises:
        VerifyError: keys are missing or unexpected, a layer's change or the prediction is not the trainer's,
            or unloading does not give the base back bitwise.
    """
    assert isinstance(method, Lora)
    path = one(files, f"{card.name}.safetensors")
    tensors, trained = load(path), method.modules_by_path()
    wanted = [f"{kohya_name(place)}.{part}" for place in trained for part in PARTS]
    count = same_keys(path.name, tensors, wanted)
    _types(path, tensors, card.dtype)
    # diffusers gives every layer the commonest alpha, other tools each its own: both must be the trained one.
    _same_layers(path.name, _own_layers(path, tensors, trained), trained, card.dtype)
    own_text, own = _own(scene, method)
    with rounded(method.trained().values(), card.dtype):
        stored_text, stored = _own(scene, method)
    pipe = scene.bare_pipeline()
    base_text, base = _outputs(scene, pipe)
    with method.off(scene.family):
        _same_base(path, _own(scene, method)[1], base)
    try:
        pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=ADAPTER)
    except LOADING as error:
        raise VerifyError(f"{path.name} does not load in diffusers: {error}") from error
    _same_layers(f"{path.name}, loaded by diffusers,", _loaded_layers(pipe), trained, card.dtype)
    text, prediction = _outputs(scene, pipe)
    for what, outputs in (
        ("the encoded prompt", [each.hidden for each in (text, stored_text, own_text, base_text)]),
        ("the prediction", [prediction, stored, own, base]),
    ):
        loaded, rounded_own, exact_own, without = outputs
        same_reading(f"{path.name}: {what}", loaded, rounded_own, without, card.dtype)
        difference = same_effect(f"{path.name}: {what}", loaded, exact_own, without, card.dtype)
    pipe.unload_lora_weights()
    after_text, after = _outputs(scene, pipe)
    if not (torch.equal(after, base) and torch.equal(after_text.hidden, base_text.hidden)):
        raise VerifyError(f"{path.name}: unloading it does not give the base back")
    return {
        path: f"{path.name}: all {count} keys loaded by diffusers into {len(trained)} layers; a "
        f"prediction differs by {difference:.1e} of the adapters' effect "
        f"({short(card.dtype)}); unloading gives the base back bitwise"
    }


def _own(scene: Scene, method: Method) -> tuple[Text, Tensor]:
    """The trainer's own encoding and prediction."""
    text = scene.text(method)
    return text, scene.own(method, text)


def _outputs(scene: Scene, pipe: Any) -> tuple[Text, Tensor]:
    """The prompts as the pipeline's networks encode them [2, 77 W, D], and their prediction [2, C, h, w]."""
    family = scene.family.around(pipe)
    text = family.encode_prompts(family.tokenize(PROMPTS).to(family.device))
    return text, scene.with_denoiser(family.denoiser, text)


def _types(path: Path, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype != dtype:
            raise VerifyError(f"{path.name}: {name} is {short(tensor.dtype)}, expected {short(dtype)}")


def _same_base(path: Path, off: Tensor, base: Tensor) -> None:
    """The copied base is the trainer's with its adapters off, else the comparison would mean nothing."""
    if norm(off - base) > NOISE * norm(base):
        raise VerifyError(f"{path.name}: the base that was trained on is not the base that the check copied")


def _same_layers(
    where: str, found: Mapping[str, LoraModule], trained: Mapping[str, LoraModule], dtype: torch.dtype
) -> None:
    """Each layer's change, scale * up @ down, is the trained one within the rounding of its factors."""
    same_keys(where, found, trained)
    for place, module in trained.items():
        has, wants = _change(found[place]), _change(module)
        if has.shape != wants.shape:
            shapes = f"{list(has.shape)} numbers, expected {list(wants.shape)}"
            raise VerifyError(f"{where}: {kohya_name(place)} changes {shapes}")
        error, bound = norm(has.to(wants.device) - wants), _rounding(module, dtype)
        if not error <= bound:
            raise VerifyError(
                f"{where}: {kohya_name(place)} changes its layer otherwise than training did: off by "
                f"{error:.2g}, {short(dtype)} allows {bound:.2g}, the change is {norm(wants):.2g}"
            )


def _own_layers(
    path: Path, tensors: Mapping[str, Tensor], trained: Mapping[str, LoraModule]
) -> dict[str, LoraModule]:
    """The layers that the file says, by the format's own rule."""
    try:
        return from_kohya(tensors, trained)
    except LoraError as error:
        raise VerifyError(f"{path.name}: {error}") from error


def _loaded_layers(pipe: Any) -> dict[str, LoraModule]:
    """The layers that hold the loaded adapter, by component and module path."""
    from peft.tuners.lora import LoraLayer

    layers: dict[str, LoraModule] = {}
    for component, network in pipe.components.items():
        if not isinstance(network, torch.nn.Module):
            continue
        for name, layer in network.named_modules():
            if isinstance(layer, LoraLayer) and ADAPTER in layer.lora_A:
                down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
                layers[f"{component}.{name}"] = LoraModule(down, up, float(layer.scaling[ADAPTER]))
    return layers


def _change(module: LoraModule) -> Tensor:
    """scale * up @ down [out, in * kh * kw] in float64."""
    return module.scale * module.up.double().flatten(1) @ module.down.double().flatten(1)


def _rounding(module: LoraModule, dtype: torch.dtype) -> float:
    """Four times what rounding `down`, `up` and alpha to `dtype` may change scale * up @ down, as a norm.

    |up' down' - up down| <= |up' - up| |down| + |up'| |down' - down|, and alpha is off by eps at most.
    """
    up, down = module.up.float(), module.down.float()
    off = norm(up.to(dtype).float() - up) * norm(down) + norm(up) * norm(down.to(dtype).float() - down)
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    return 4 * abs(module.scale) * (off + eps * norm(up) * norm(down))

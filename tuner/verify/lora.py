"""LoRA and kin: each file, put on a bare base, changes it as the trained adapters do.

What diffusers loads goes through its own loader. The other files are read by this project's reader of their
format and added to the base's weights; what the tools that they are for make of their names is said by
those tools' rules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tuner.adapters import exports
from tuner.adapters.exports import Form
from tuner.adapters.layers import ADAPTER as TRAINED
from tuner.export import adapter, contents, files, kohya, lycoris
from tuner.export.adapter import Adapter
from tuner.export.kohya import LoraError, LoraModule, Naming, from_kohya, kohya_name
from tuner.method import Card, Method, stored_type
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
    same_tensors,
    short,
)
from tuner.verify.scene import PROMPTS, Scene, rounded

ADAPTER = "export"


class Outputs(NamedTuple):
    """What a base, adapted or not, makes of the scene."""

    text: Text
    prediction: Tensor  # [2, C, h, w]


class Own(NamedTuple):
    """The trainer's own outputs: as trained, with the numbers that a file holds, and without the adapters."""

    exact: Outputs
    stored: Outputs
    off: Outputs


def check(scene: Scene, method: Method, files: Sequence[Path], card: Card) -> dict[Path, str]:
    """Prove every file of the export; a line for each.

    Raises:
        VerifyError: keys are missing or unexpected, a layer's change or the prediction is not the trainer's,
            unloading does not give the base back bitwise, or a tool that the file is for would not load all.
    """
    assert isinstance(method, Lora)
    exact = _own(scene, method)
    with _as_stored(method, card.dtype):
        stored = _own(scene, method)
    with method.off(scene.family):
        own = Own(exact, stored, _own(scene, method))
    lines = {}
    for form in method.forms(card.name):
        path = one(files, form.place)
        through = _diffusers if "diffusers" in form.tools else _added
        line = through(scene, method, path, form, own, card.dtype)
        if found := exports.problems(form, contents.read(path), method.base):
            raise VerifyError(
                "\n  ".join([f"{path.name}: not every tool that it is for would load it:", *found])
            )
        others = [tool for tool in form.tools if tool != "diffusers"]
        rules = f"; {exports.told(others)} load all of it by their rules of naming" if others else ""
        lines[path] = line + rules + _elsewhere(method)
    assert lines
    return lines


def _elsewhere(method: Lora) -> str:
    """What to do for the tools that have no reader of such an adapter."""
    if method.how.kind not in ("loha", "lokr"):
        return ""
    name = {"loha": "LoHa", "lokr": "LoKr"}[method.how.kind]
    return f"; diffusers and kohya read no {name}: `tuner resize --rank N` makes a LoRA of it that they read"


def _diffusers(scene: Scene, method: Lora, path: Path, form: Form, own: Own, dtype: torch.dtype) -> str:
    """A file that diffusers loads by `load_lora_weights` and takes out by `unload_lora_weights`."""
    tensors, trained, names = load(path), _loras(method), _naming(method)
    count = same_keys(path.name, tensors, form.tensors)
    _types(path, tensors, dtype)
    if method.how.kind == "dora":
        same_tensors(path.name, tensors, form.tensors, dtype)
    else:
        # diffusers gives every layer the commonest alpha, other tools each its own: both must be the trained.
        _same_layers(path.name, _own_layers(path, tensors, trained, names), trained, dtype, names)
    pipe = scene.bare_pipeline()
    base = outputs(scene, pipe)
    _same_base(path, own.off.prediction, base.prediction)
    try:
        pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=ADAPTER)
    except LOADING as error:
        raise VerifyError(f"{path.name} does not load in diffusers: {error}") from error
    _same_layers(f"{path.name}, loaded by diffusers,", loaded_layers(pipe), trained, dtype, names)
    difference = _same_outputs(path, outputs(scene, pipe), own, base, dtype, reading=True)
    pipe.unload_lora_weights()
    after = outputs(scene, pipe)
    if not (
        torch.equal(after.prediction, base.prediction) and torch.equal(after.text.hidden, base.text.hidden)
    ):
        raise VerifyError(f"{path.name}: unloading it does not give the base back")
    return (
        f"{path.name}: all {count} keys loaded by diffusers into {len(trained)} layers; a "
        f"prediction differs by {difference:.1e} of the adapters' effect "
        f"({short(dtype)}); unloading gives the base back bitwise"
    )


def _added(scene: Scene, method: Lora, path: Path, form: Form, own: Own, dtype: torch.dtype) -> str:
    """A file whose changes are added to a bare base's weights."""
    tensors = load(path)
    count = same_tensors(path.name, tensors, form.tensors, dtype)
    try:
        found = adapter.read(tensors, files.load(path)[1], method.base)
    except LoraError as error:
        raise VerifyError(f"{path.name}: {error}") from error
    same_keys(path.name, found.modules, method.bases)
    pipe = scene.bare_pipeline()
    base = outputs(scene, pipe)
    _same_base(path, own.off.prediction, base.prediction)
    add(pipe, found)
    difference = _same_outputs(path, outputs(scene, pipe), own, base, dtype, reading=False)
    return (
        f"{path.name}: all {count} keys added to {len(found.modules)} layers of the base; a "
        f"prediction differs by {difference:.1e} of the adapters' effect ({short(dtype)})"
    )


def add(pipe: Any, made: Adapter) -> None:
    """Add an adapter's whole change to the weights of a pipeline's networks."""
    for place, module in made.modules.items():
        component, _, name = place.partition(".")
        layer = getattr(pipe, component).get_submodule(name)
        weight = layer.weight
        if place in made.magnitudes:
            assert isinstance(module, LoraModule)
            module = lycoris.from_dora(weight, module, made.magnitudes[place])
        change = lycoris.change(module, tuple(weight.shape)).to(weight.device)
        weight.copy_(weight.double() + change)
        if isinstance(module, lycoris.Difference) and module.bias is not None:
            layer.bias.copy_(layer.bias.double() + module.bias.to(weight.device).double())


def _same_outputs(
    path: Path, loaded: Outputs, own: Own, base: Outputs, dtype: torch.dtype, reading: bool
) -> float:
    """The loaded file has the trainer's effect on prompts and predictions; how far it is off the latter."""
    difference = 0.0
    for what, index in (("the encoded prompt", 0), ("the prediction", 1)):
        parts = [each.text.hidden if index == 0 else each.prediction for each in (loaded, *own[:2], base)]
        has, exact, stored, without = parts
        if reading:
            same_reading(f"{path.name}: {what}", has, stored, without, dtype)
        difference = same_effect(f"{path.name}: {what}", has, exact, without, dtype)
    return difference


def _loras(method: Lora) -> dict[str, LoraModule]:
    """The trained factors, of a DoRA without its magnitudes."""
    return method.adapter()._replace(magnitudes={}).loras("this check")


def _naming(method: Lora) -> Naming:
    return kohya.naming(method.base.family, method.base.unet)


@contextmanager
def _as_stored(method: Lora, dtype: torch.dtype) -> Iterator[None]:
    """Within it the adapters' tensors have the values that a file of `dtype` gives them.

    Where the modules' ranks or scales differ, a LoRA's file holds scale * up in place of up.
    """
    ups: dict[str, Tensor] = {}
    if method.how.kind == "lora" and not exports.is_uniform(_loras(method)):
        for place, layer in method.layers.items():
            scale = layer.scaling[TRAINED]
            ups[place] = (layer.lora_B[TRAINED].weight.data * scale).to(dtype).float() / scale
    with rounded(method.trained().values(), dtype):
        for place, value in ups.items():
            method.layers[place].lora_B[TRAINED].weight.data = value
        yield


def _own(scene: Scene, method: Method) -> Outputs:
    """The trainer's own encoding and prediction."""
    text = scene.text(method)
    return Outputs(text, scene.own(method, text))


def outputs(scene: Scene, pipe: Any) -> Outputs:
    """The prompts as the pipeline's networks encode them [2, 77 W, D], and their prediction."""
    family = scene.family.around(pipe)
    text = family.encode_prompts(family.tokenize(PROMPTS).to(family.device))
    return Outputs(text, scene.with_denoiser(family.denoiser, text))


def _types(path: Path, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype != (wanted := stored_type(name, tensor, dtype)):
            raise VerifyError(f"{path.name}: {name} is {short(tensor.dtype)}, expected {short(wanted)}")


def _same_base(path: Path, off: Tensor, base: Tensor) -> None:
    """The copied base is the trainer's with its adapters off, else the comparison would mean nothing."""
    if norm(off - base) > NOISE * norm(base):
        raise VerifyError(f"{path.name}: the base that was trained on is not the base that the check copied")


def _same_layers(
    where: str,
    found: Mapping[str, LoraModule],
    trained: Mapping[str, LoraModule],
    dtype: torch.dtype,
    names: Naming,
) -> None:
    """Each layer's change, scale * up @ down, is the trained one within the rounding of its factors."""
    same_keys(where, found, trained)
    for place, module in trained.items():
        has, wants = _change(found[place]), _change(module)
        if has.shape != wants.shape:
            shapes = f"{list(has.shape)} numbers, expected {list(wants.shape)}"
            raise VerifyError(f"{where}: {kohya_name(place, names)} changes {shapes}")
        error, bound = norm(has.to(wants.device) - wants), _rounding(module, dtype)
        if not error <= bound:
            raise VerifyError(
                f"{where}: {kohya_name(place, names)} changes its layer otherwise than training did: off by "
                f"{error:.2g}, {short(dtype)} allows {bound:.2g}, the change is {norm(wants):.2g}"
            )


def _own_layers(
    path: Path, tensors: Mapping[str, Tensor], trained: Mapping[str, LoraModule], names: Naming
) -> dict[str, LoraModule]:
    """The layers that the file says, by the format's own rule."""
    try:
        return from_kohya(tensors, trained, names)
    except LoraError as error:
        raise VerifyError(f"{path.name}: {error}") from error


def loaded_layers(pipe: Any) -> dict[str, LoraModule]:
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
    """Four times what rounding `down` and `up` to `dtype` may change scale * up @ down, as a norm.

    |up' down' - up down| <= |up' - up| |down| + |up'| |down' - down|; alpha is off by float32's eps at most.
    """
    up, down = module.up.float(), module.down.float()
    off = norm(up.to(dtype).float() - up) * norm(down) + norm(up) * norm(down.to(dtype).float() - down)
    return 4 * abs(module.scale) * (off + torch.finfo(torch.float32).eps * norm(up) * norm(down))

"""LoRA in the names of kohya's sd-scripts, which diffusers, ComfyUI, A1111, Forge and kohya all read.

A module `unet.down_blocks.0...to_q` becomes `lora_unet_down_blocks_0_..._to_q` with three tensors:
`.lora_down.weight`, `.lora_up.weight` and a float `.alpha`; a reader adds (alpha / rank) * up @ down. For
SDXL the UNet's modules have the names of the original code (`lora_unet_input_blocks_4_1_...`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tuner.errors import UserError
from tuner.export import cldm

PARTS = ("lora_down.weight", "lora_up.weight", "alpha")
_PEFT_KEY = re.compile(r"(?P<path>.+)\.lora_(?P<half>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")


class LoraError(UserError):
    """Tensors that are no LoRA that this format can hold."""


class LoraModule(NamedTuple):
    """One layer's low-rank change, `scale * up @ down`."""

    down: Tensor  # [r, in] or [r, in, kh, kw]
    up: Tensor  # [out, r] or [out, r, 1, 1]
    scale: float  # alpha / r, or alpha / sqrt(r) for rsLoRA


class Naming(NamedTuple):
    """How one family's modules are called.

    Attributes:
        prefixes: the component (first part of a module's path) -> how its names begin.
        original: the UNet's module prefixes -> where they stand in the original code; None: as in diffusers.
    """

    prefixes: Mapping[str, str]
    original: Mapping[str, str] | None = None


# For SD1 and SD2 kohya itself reads only `lora_te`, and A1111 reads nothing else for SD2.
SD1 = Naming({"unet": "lora_unet", "text_encoder": "lora_te"})
_SDXL = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}


def naming(family: str, unet: Mapping[str, Any]) -> Naming:
    """The names that every tool reads for a family (`sd1`, `sd2`, `sdxl`) with this UNet configuration."""
    return Naming(_SDXL, cldm.unet_names(unet)) if family == "sdxl" else SD1


def kohya_name(path: str, names: Naming = SD1) -> str:
    """The kohya name of a module path such as `unet.conv_in` or `text_encoder.encoder.layers.0.mlp.fc1`.

    transformers >= 5.6 has no `text_model.` in a CLIPTextModel's paths; the other tools know only names with
    it, so that it is put back.

    Raises:
        LoraError: the path begins with none of the prefixes, or the original layout has no place for it.
    """
    network, _, rest = path.partition(".")
    if network not in names.prefixes or not rest:
        raise LoraError(f"{path}: expected a path below {' or '.join(sorted(names.prefixes))}")
    if network.startswith("text_encoder") and not rest.startswith(("text_model.", "text_projection")):
        rest = f"text_model.{rest}"
    if network == "unet" and names.original is not None:
        rest = original_path(rest, names.original)
    return f"{names.prefixes[network]}_{rest.replace('.', '_')}"


def original_path(rest: str, original: Mapping[str, str]) -> str:
    """A UNet's module path in the original code: its longest prefix that the table holds is replaced.

    Raises:
        LoraError: no prefix of it is in the table.
    """
    prefix = rest
    while prefix not in original:
        prefix, dot, _ = prefix.rpartition(".")
        if not dot:
            raise LoraError(f"unet.{rest}: the original layout has no place for it")
    return original[prefix] + rest[len(prefix) :]


def to_kohya(modules: Mapping[str, LoraModule], names: Naming = SD1) -> dict[str, Tensor]:
    """LoRA modules by path -> kohya tensors by name.

    Where all modules share one rank and one scale, the factors stay as they are and alpha = scale * rank.
    Otherwise each scale is multiplied into its `up`, and the factors are padded with zeros to the largest
    rank, which is alpha everywhere: diffusers 0.42 misreads differing alphas, without a warning.

    Raises:
        LoraError: no modules, shapes that do not fit each other, or two paths with one name.
    """
    if not modules:
        raise LoraError("there is no LoRA module to export")
    for path, module in modules.items():
        check(path, module)
    rank = max(module.down.shape[0] for module in modules.values())
    uniform = len({(module.down.shape[0], module.scale) for module in modules.values()}) == 1
    tensors: dict[str, Tensor] = {}
    for path in sorted(modules):
        module, name = modules[path], kohya_name(path, names)
        if f"{name}.alpha" in tensors:
            raise LoraError(f"{path}: another module has the same name, {name}")
        if not uniform:
            module = pad(module, rank)
        values = (module.down, module.up, torch.tensor(module.scale * rank, dtype=torch.float32))
        tensors |= {f"{name}.{part}": value for part, value in zip(PARTS, values, strict=True)}
    assert len(tensors) == 3 * len(modules)
    return tensors


def from_kohya(
    tensors: Mapping[str, Tensor], paths: Iterable[str], names: Naming = SD1
) -> dict[str, LoraModule]:
    """Kohya tensors -> LoRA modules by path; the exact inverse of `to_kohya` for one rank and one scale.

    `paths` are module paths of the model (with their network first); those that the file lacks are passed
    over. A module without alpha has scale 1, as diffusers and ComfyUI read it.

    Raises:
        LoraError: a tensor belongs to none of the paths, half of a module is missing, or two have one name.
    """
    places: dict[str, str] = {}
    for path in paths:
        name = kohya_name(path, names)
        if places.setdefault(name, path) != path:
            raise LoraError(f"{path} and {places[name]} have the same name, {name}")
    known = {f"{name}.{part}" for name in places for part in PARTS}
    if unknown := sorted(set(tensors) - known):
        raise LoraError(f"{len(unknown)} of {len(tensors)} tensors fit no module: {', '.join(unknown[:5])}")
    modules: dict[str, LoraModule] = {}
    for name in sorted({key.partition(".")[0] for key in tensors}):
        down, up, alpha = (tensors.get(f"{name}.{part}") for part in PARTS)
        if down is None or up is None:
            raise LoraError(f"{name}: {'lora_down' if down is None else 'lora_up'} is missing")
        scale = 1.0 if alpha is None else float(alpha) / down.shape[0]
        modules[places[name]] = LoraModule(down, up, scale)
        check(name, modules[places[name]])
    return modules


def from_peft(state: Mapping[str, Tensor], scales: Mapping[str, float]) -> dict[str, LoraModule]:
    """peft tensors (`<path>.lora_A.weight`, `<path>.lora_B.default.weight` ...) -> LoRA modules by path.

    `scales` gives each path the factor that peft multiplies up @ down with (`layer.scaling[adapter]`).

    Raises:
        LoraError: a key of another kind (DoRA's magnitudes, biases), several adapters at once, half a module,
            or scales that do not name exactly the modules found.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    adapters: set[str | None] = set()
    for key, tensor in state.items():
        found = _PEFT_KEY.fullmatch(key)
        if found is None:
            raise LoraError(f"{key}: not a plain LoRA factor (lora_A or lora_B)")
        adapters.add(found["adapter"])
        halves.setdefault(found["path"].removeprefix("base_model.model."), {})[found["half"]] = tensor
    if len(adapters) > 1:
        raise LoraError(f"several adapters in one state: {', '.join(sorted(str(name) for name in adapters))}")
    if broken := sorted(path for path, pair in halves.items() if len(pair) != 2):
        raise LoraError(f"{broken[0]}: only lora_{next(iter(halves[broken[0]]))} is there")
    if wrong := sorted(set(halves) ^ set(scales)):
        found_one = "tensors but no scale" if wrong[0] in halves else "a scale but no tensors"
        raise LoraError(f"{wrong[0]}: has {found_one}")
    return {path: LoraModule(pair["A"], pair["B"], float(scales[path])) for path, pair in halves.items()}


def check(path: str, module: LoraModule) -> None:
    """Raises LoraError where the factors' shapes do not fit each other."""
    down, up = module.down, module.up
    fits = down.ndim == up.ndim and down.ndim in (2, 4) and down.shape[0] == up.shape[1]
    if not fits or (up.ndim == 4 and tuple(up.shape[2:]) != (1, 1)):
        raise LoraError(f"{path}: down {list(down.shape)} and up {list(up.shape)} do not fit each other")


def pad(module: LoraModule, rank: int) -> LoraModule:
    """The same product at scale 1 and a larger rank: the new rows of down and columns of up are zero."""
    missing = rank - module.down.shape[0]
    # The product in float32 at least, so that factors of half precision are rounded once.
    wide = torch.promote_types(module.up.dtype, torch.float32)
    up = (module.up.to(wide) * module.scale).to(module.up.dtype)
    down = torch.cat([module.down, module.down.new_zeros(missing, *module.down.shape[1:])])
    up = torch.cat([up, up.new_zeros(up.shape[0], missing, *up.shape[2:])], dim=1)
    return LoraModule(down, up, 1.0)

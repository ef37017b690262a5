"""An adapter file of any tool's spelling, read into changes by module path, and written again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from tuner.export import kohya, lycoris, peft_format
from tuner.export.kohya import LoraError, LoraModule
from tuner.export.lycoris import Change, Difference
from tuner.export.places import Base
from tuner.export.rules import SHOWN, bundled, everything
from tuner.export.spelling import LORA, missing, split


class Adapter(NamedTuple):
    """What a file changes.

    Attributes:
        modules: the change of each module, by its path with the component first.
        magnitudes: for a DoRA, those of each module.
    """

    modules: dict[str, Change]
    magnitudes: dict[str, Tensor]

    def loras(self, purpose: str) -> dict[str, LoraModule]:
        """The modules where all are plain low-rank products.

        Raises:
            LoraError: one is another kind of change; the message says what it is not good for.
        """
        if self.magnitudes:
            raise LoraError(f"{purpose} is not possible for a DoRA: its effect depends on the base's weights")
        for path, module in self.modules.items():
            if not isinstance(module, LoraModule):
                kind = type(module).__name__.removesuffix("Module")
                raise LoraError(f"{purpose} is not possible for {kind} ({path}); `tuner resize` makes a LoRA")
        return {path: module for path, module in self.modules.items() if isinstance(module, LoraModule)}

    def differences(self, weights: Mapping[str, Tensor]) -> dict[str, Difference]:
        """The whole change of every module, from the base's weights [out, in, ...] by path."""
        whole = {}
        for path, module in self.modules.items():
            if path in self.magnitudes:
                assert isinstance(module, LoraModule)
                whole[path] = lycoris.from_dora(weights[path], module, self.magnitudes[path])
            elif isinstance(module, Difference):
                whole[path] = module
            else:
                made = lycoris.change(module, tuple(weights[path].shape))
                whole[path] = Difference(made.float())
        return whole


def read(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    base: Base,
    hint: str = "was it made for another base?",
) -> Adapter:
    """The adapter that a file's tensors are, in any spelling that some tool knows.

    A LoRA without alpha has scale 1, in peft's names what the metadata says.

    Args:
        hint: how the message ends where keys are of no module of the base: what the user can do there.

    Raises:
        LoraError: a key belongs to no module of the base, a module lacks a factor, or sizes do not fit.
    """
    if words := bundled(tensors):
        raise LoraError(
            f"words lie in this LoRA's file ({', '.join(words)}); give the file of the LoRA alone, and theirs"
        )
    names, layers = everything(base), base.layers()
    parts: dict[str, dict[str, dict[str, Tensor]]] = {}
    strange = []
    for key, tensor in tensors.items():
        found = split(key)
        if found is None or found.name not in names:
            strange.append(key)
            continue
        own = parts.setdefault(names[found.name], {}).setdefault(found.dialect, {})
        if found.role in own:
            raise LoraError(f"{key}: the module is there twice, in two spellings")
        own[found.role] = tensor
    if strange:
        more = f" and {len(strange) - SHOWN} more" if len(strange) > SHOWN else ""
        raise LoraError(
            f"{len(strange)} of {len(tensors)} keys name no module of {base.name}: "
            f"{', '.join(strange[:SHOWN])}{more}; {hint}"
        )
    ranks = {
        path: own[dialect]["down"].shape[0]
        for path, own in parts.items()
        for dialect in own.keys() & set(LORA[1:])
        if "down" in own[dialect]
    }
    scales = peft_format.scales(metadata, ranks)
    modules = {path: _module(path, own, scales.get(path, 1.0)) for path, own in parts.items()}
    magnitudes = {path: _magnitude(path, own) for path, own in parts.items() if _has_magnitude(own)}
    for path, module in modules.items():
        if isinstance(module, LoraModule):
            modules[path] = _shaped(path, module, layers[path], base.name, hint)
    return Adapter(dict(sorted(modules.items())), magnitudes)


def to_kohya(adapter: Adapter, base: Base) -> dict[str, Tensor]:
    """The file that ComfyUI, A1111 and Forge read, and of a plain LoRA diffusers and kohya too.

    Raises:
        LoraError: a DoRA (its differences are made first), or LoRA and others in one file.
    """
    names = kohya.naming(base.family, base.unet)
    kinds = {type(module) for module in adapter.modules.values()}
    if adapter.magnitudes:
        raise LoraError("a DoRA is read right in peft's names only; --base FOLDER makes whole differences")
    if LoraModule not in kinds:
        return lycoris.to_lycoris(adapter.modules, names)
    if len(kinds) > 1:
        raise LoraError(f"LoRA and {', '.join(sorted(k.__name__ for k in kinds - {LoraModule}))} in one file")
    return kohya.to_kohya(adapter.loras("this"), names)


def to_peft(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors in peft's names, and the metadata that belongs to them.

    Raises:
        LoraError: neither LoRA nor DoRA.
    """
    modules = adapter._replace(magnitudes={}).loras("a file in peft's names")
    return peft_format.to_peft(modules, adapter.magnitudes or None)


def _module(path: str, parts: Mapping[str, Mapping[str, Tensor]], scale: float) -> Change:
    """One module's change of its tensors by dialect and role."""
    dialects = [dialect for dialect in parts if dialect != "any"]
    if len(dialects) != 1:
        raise LoraError(f"{path}: {'factors of several kinds' if dialects else 'there is an alpha alone'}")
    dialect, own, alpha = dialects[0], parts[dialects[0]], parts.get("any", {}).get("alpha")
    if lacking := missing(dialect, own):
        raise LoraError(f"{path} lacks {' and '.join(lacking)}")
    if dialect in ("diff", "norm"):
        return Difference(own["weight"], own.get("bias"))
    if dialect in LORA:
        if "mid" in own:
            raise LoraError(f"{path}: a LoRA of three factors (lora_mid) is not read here")
        if alpha is not None:
            scale = float(alpha) / own["down"].shape[0]
        down, up = own["down"], own["up"]
        module = LoraModule(down, up, scale)
        kohya.check(path, module)
        return module
    made = lycoris.module(path, {"loha": "hada", "lokr": "lokr"}[dialect], own, 1.0)
    rank = made.w1_b.shape[0] if isinstance(made, lycoris.LohaModule) else made.rank
    if alpha is None or rank is None:  # without factored part alpha is not read
        return made
    return made._replace(scale=float(alpha) / rank)


def _has_magnitude(parts: Mapping[str, Mapping[str, Tensor]]) -> bool:
    return "magnitude" in parts.get("peft", {}) or "dora" in parts.get("any", {})


def _magnitude(path: str, parts: Mapping[str, Mapping[str, Tensor]]) -> Tensor:
    """peft's magnitudes; those of LyCORIS' `dora_scale` where they are one for each output."""
    if (own := parts.get("peft", {}).get("magnitude")) is not None:
        return own
    scale = parts["any"]["dora"]
    if scale.ndim > 1 and scale.shape[0] == 1:
        raise LoraError(f"{path}: dora_scale for each input {list(scale.shape)} is not read here")
    return scale.flatten()


def _shaped(path: str, module: LoraModule, layer: tuple[int, ...], base: str, hint: str) -> LoraModule:
    """The factors in the layer's form: some tools write those of 1x1 convolutions as matrices."""
    size = [module.up.shape[0], module.down[0].numel()]
    if size != [layer[0], torch.Size(layer[1:]).numel()]:
        raise LoraError(f"{path}: the factors make {size}, the layer of {base} is {list(layer)}; {hint}")
    rank, ones = module.down.shape[0], [1] * (len(layer) - 2)
    return LoraModule(
        module.down.reshape(rank, *layer[1:]), module.up.reshape(layer[0], rank, *ones), module.scale
    )

"""`tuner merge`: several LoRAs into one, or adapters into a base."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tuner.errors import UserError
from tuner.export import adapter, files, lycoris
from tuner.export import contents as reading
from tuner.export.adapter import Adapter
from tuner.export.identify import ADAPTERS, identify
from tuner.export.kohya import LoraModule
from tuner.export.places import Base
from tuner.files import bases, write


class Part(NamedTuple):
    """An adapter file and how much of it is wanted."""

    path: Path
    weight: float


def parse(text: str) -> Part:
    """`FILE` or `FILE:WEIGHT`.

    Raises:
        UserError: the weight is no number.
    """
    path, colon, weight = text.rpartition(":")
    if not colon or (len(path) == 1 and weight.startswith(("\\", "/"))):  # a drive is no file
        return Part(Path(text), 1.0)
    try:
        return Part(Path(path), float(weight))
    except ValueError as error:
        if Path(text).exists():
            return Part(Path(text), 1.0)
        raise UserError(f"--lora {text}: expected FILE or FILE:WEIGHT, {weight!r} is no number") from error


def together(parts: Sequence[Part], out: Path, base: str | None) -> list[str]:
    """Several LoRAs in one file, exact: the ranks of each module stand side by side.

    Raises:
        UserError: fewer than two LoRAs, one that is none, or files of different bases.
    """
    if len(parts) < 2:
        raise UserError("expected at least two --lora, or --into FOLDER to add one to a base")
    adapters, metadata, made = _read(parts, base)
    joined: dict[str, list[LoraModule]] = {}
    for part, one in zip(parts, adapters, strict=True):
        for path, module in one.loras(f"merging {part.path.name} with others").items():
            joined.setdefault(path, []).append(module._replace(scale=module.scale * part.weight))
    modules = {path: _beside(loras) for path, loras in joined.items()}
    told = {"modelspec.merged_from": ", ".join(part.path.stem for part in parts)}
    write.kohya(out, Adapter(dict(modules), {}), made, _common(metadata), told)
    ranks = max(module.down.shape[0] for module in modules.values())
    weights = " + ".join(f"{part.weight:g} x {part.path.name}" for part in parts)
    return [f"{weights} -> {out.name}: {len(modules)} modules of rank {ranks}"]


def into(parts: Sequence[Part], base: Path, out: Path) -> list[str]:
    """Adapters of any kind added to a base's weights: a whole diffusers folder, or one component's folder.

    Sums are computed in float64 and rounded once to the weights' own type.

    Raises:
        UserError: the folder is no base, a file does not fit it or changes components that are not in it, or
            `out` is there already.
    """
    if out.exists():
        raise UserError(f"--out {out}: is there already")
    made, component = bases.folder_of(base)
    adapters = [_one(part, made) for part in parts]
    touched = {path.partition(".")[0] for one in adapters for path in one.modules}
    if component is not None and (others := sorted(touched - {component})):
        raise UserError(
            f"{base} holds {component} alone; {', '.join(others)} are changed too: give the whole base"
        )
    with files.folder_whole(out) as beside:
        shutil.copytree(base, beside, dirs_exist_ok=True)
        for name in sorted(touched):
            place = beside if component is not None else beside / name
            _add(place, name, parts, adapters)
    changed = {path for one in adapters for path in one.modules}
    names = " + ".join(f"{part.weight:g} x {part.path.name}" for part in parts)
    return [f"{names} into {made.name} -> {out.name}: {len(changed)} weights of {', '.join(sorted(touched))}"]


def _add(place: Path, component: str, parts: Sequence[Part], adapters: Sequence[Adapter]) -> None:
    """Add the adapters' changes to one component's weights, in place of its files."""
    old = bases.weights_files(place)
    prefixed = {key for file in old for key in reading.read(file).shapes if key.startswith("text_model.")}
    state = bases.weights(place)
    kept = dict(state)
    for part, one in zip(parts, adapters, strict=True):
        for path, module in one.modules.items():
            network, _, rest = path.partition(".")
            if network == component:
                _change(kept, state, rest, module, one.magnitudes.get(path), part.weight)
    tensors = {name: kept[name].to(state[name].dtype) for name in state}
    if prefixed:  # older transformers' names stay as they were
        tensors = {f"text_model.{n}" if f"text_model.{n}" in prefixed else n: t for n, t in tensors.items()}
    told = files.load(old[0])[1]
    for file in (*old, *place.glob("*.safetensors.index*.json")):
        file.unlink()
    stem = next(stem for stem in bases.WEIGHTS if old[0].name.startswith(stem))
    files.save(place / f"{stem}.safetensors", tensors, {"format": "pt", **told})


def _change(
    kept: dict[str, Tensor],
    state: Mapping[str, Tensor],
    rest: str,
    module: lycoris.Change,
    magnitude: Tensor | None,
    weight: float,
) -> None:
    """Add one module's change, in float64."""
    name, old = f"{rest}.weight", state[f"{rest}.weight"]
    if magnitude is not None:
        assert isinstance(module, LoraModule)
        module = lycoris.from_dora(old, module, magnitude)
    kept[name] = kept[name].double() + weight * lycoris.change(module, tuple(old.shape))
    if isinstance(module, lycoris.Difference) and module.bias is not None:
        kept[f"{rest}.bias"] = kept[f"{rest}.bias"].double() + weight * module.bias.double()


def _read(parts: Sequence[Part], base: str | None) -> tuple[list[Adapter], list[dict[str, str]], Base]:
    """The adapters, their metadata, and the base of the first of them, which the others must fit."""
    contents = reading.read(parts[0].path)
    made = bases.choose(base, contents, identify(contents))
    return [_one(part, made) for part in parts], [files.load(part.path)[1] for part in parts], made


def _one(part: Part, base: Base) -> Adapter:
    contents = reading.read(part.path)
    if (kind := identify(contents).kind) not in ADAPTERS:
        raise UserError(f"{part.path.name}: expected a LoRA or kin, found {kind}")
    tensors, told = files.load(part.path)
    return adapter.read(tensors, told, base)


def _beside(loras: Sequence[LoraModule]) -> LoraModule:
    """The sum of low-rank products as one, of the sum of their ranks; exact but for the scales' rounding."""
    if len(loras) == 1:
        return loras[0]
    dtype = loras[0].up.dtype
    for lora in loras[1:]:
        dtype = torch.promote_types(dtype, lora.up.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    ups = [(lora.up.to(wide) * lora.scale).to(dtype) for lora in loras]
    return LoraModule(torch.cat([lora.down.to(dtype) for lora in loras]), torch.cat(ups, dim=1), 1.0)


def _common(metadata: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """What all the files say alike, but not what one of them was made of."""
    shared = set.intersection(*(set(told.items()) for told in metadata))
    return {key: value for key, value in shared if key.startswith(("ss_", "modelspec.")) or key == "format"}

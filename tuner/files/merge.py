"""`tuner merge`: several LoRAs into one, or adapters into a base."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tuner import single_file
from tuner.errors import UserError
from tuner.export import adapter, files, lycoris, metadata, original
from tuner.export import contents as reading
from tuner.export.adapter import Adapter
from tuner.export.identify import ADAPTERS, identify
from tuner.export.kohya import LoraModule
from tuner.export.places import Base
from tuner.files import account, bases, write


class Part(NamedTuple):
    """An adapter file and how much of it is wanted."""

    path: Path
    weight: float


def parse(text: str) -> Part:
    """`FILE` or `FILE:WEIGHT`.

    Raises:
        UserError: the weight is no number, or 0, with which the file has no effect.
    """
    path, colon, weight = text.rpartition(":")
    if not colon or (len(path) == 1 and weight.startswith(("\\", "/"))):  # a drive is no file
        return Part(Path(text), 1.0)
    try:
        value = float(weight)
    except ValueError as error:
        if Path(text).exists():
            return Part(Path(text), 1.0)
        raise UserError(f"--lora {text}: expected FILE or FILE:WEIGHT, {weight!r} is no number") from error
    if value == 0 or not math.isfinite(value):
        why = "it has no effect; leave it out" if value == 0 else "expected a finite number"
        raise UserError(f"--lora {text}: weight {weight}: {why}")
    return Part(Path(path), value)


def together(parts: Sequence[Part], out: Path, base: str | None) -> list[str]:
    """Several LoRAs in one file, exact: the ranks of each module stand side by side.

    Raises:
        UserError: fewer than two LoRAs, one that is none, or files of different bases.
    """
    if len(parts) < 2:
        raise UserError("expected at least two --lora, or --into FOLDER to add one to a base")
    write.check_free(out, *(part.path for part in parts))
    adapters, headers, made = _read(parts, base)
    joined: dict[str, list[LoraModule]] = {}
    for part, one in zip(parts, adapters, strict=True):
        for path, module in one.loras(f"merging {part.path.name} with others").items():
            joined.setdefault(path, []).append(module._replace(scale=module.scale * part.weight))
    modules = {path: _beside(loras) for path, loras in joined.items()}
    told = {
        "modelspec.merged_from": ", ".join(part.path.stem for part in parts),
        write.DERIVED: f"merge of {_sum(parts, [part.path.stem for part in parts])}",
    }
    write.kohya(out, Adapter(dict(modules), {}), made, _common(headers), told)
    ranks = max(module.down.shape[0] for module in modules.values())
    line = f"{_sum(parts)} -> {out.name}: {len(modules)} modules of rank {ranks}"
    return [line, account.summary(out, made)]


def into(parts: Sequence[Part], base: Path, out: Path) -> list[str]:
    """Adapters of any kind added to a base's weights: a whole diffusers folder, one component's, or a file.

    Sums are computed in float64 and rounded once to the weights' own type. A checkpoint in one file becomes
    one again where `out` ends in .safetensors, else a diffusers folder.

    Raises:
        UserError: it is no base, a file does not fit it or changes components that are not in it, or `out` is
            there already.
    """
    write.check_free(out, base, *(part.path for part in parts))
    name, one_file = bases.title(base), out.suffix == ".safetensors"
    if one_file and not base.is_file():
        raise UserError(f"--out {out}: expected a folder's name: --into {base} is no checkpoint in one file")
    folder = bases.unpacked(base)
    made, component = bases.folder_of(folder)
    made = made._replace(name=name)
    adapters = [_one(part, made) for part in parts]
    touched = sorted({path.partition(".")[0] for one in adapters for path in one.modules})
    if component is not None and (others := sorted(set(touched) - {component})):
        raise UserError(
            f"{base} holds {component} alone; {', '.join(others)} are changed too: give the whole base"
        )
    what = f"merge of {_sum(parts, [part.path.stem for part in parts])} into {name}"
    if one_file:
        _into_file(base, folder, {n: _summed(folder / n, n, parts, adapters) for n in touched}, out, what)
    else:
        with files.folder_whole(out) as beside:
            shutil.copytree(folder, beside, dirs_exist_ok=True)
            for part in touched:
                place = beside if component is not None else beside / part
                _replace(place, _summed(place, part, parts, adapters), what)
    changed = {path for one in adapters for path in one.modules}
    line = f"{_sum(parts)} into {name} -> {out.name}: {len(changed)} weights of {', '.join(touched)}"
    if one_file:
        return [line, account.summary(out, made)]
    unets = [out if component else out / part for part in touched if part == "unet"]
    return [line, *(account.summary(bases.weights_files(place)[0], made) for place in unets)]


def _sum(parts: Sequence[Part], names: Sequence[str] = ()) -> str:
    """`0.5 x a + 1 x b`; called by their files' names where no others are given."""
    called = names or [part.path.name for part in parts]
    return " + ".join(f"{part.weight:g} x {name}" for part, name in zip(parts, called, strict=True))


def _summed(
    place: Path, component: str, parts: Sequence[Part], adapters: Sequence[Adapter]
) -> dict[str, Tensor]:
    """One component's weights with the adapters' changes, in the weights' own types."""
    state = bases.weights(place)
    kept = dict(state)
    for part, one in zip(parts, adapters, strict=True):
        for path, module in one.modules.items():
            network, _, rest = path.partition(".")
            if network == component:
                _change(kept, state, rest, module, one.magnitudes.get(path), part.weight)
    return {name: kept[name].to(state[name].dtype) for name in state}


def _replace(place: Path, tensors: dict[str, Tensor], what: str) -> None:
    """Write a component's weights in place of its files."""
    old = bases.weights_files(place)
    prefixed = {key for file in old for key in reading.read(file).shapes if key.startswith("text_model.")}
    if prefixed:  # older transformers' names stay as they were
        tensors = {f"text_model.{n}" if f"text_model.{n}" in prefixed else n: t for n, t in tensors.items()}
    told = dict(reading.read(old[0]).metadata)
    for file in (*old, *place.glob("*.safetensors.index*.json")):
        file.unlink()
    stem = next(stem for stem in bases.WEIGHTS if old[0].name.startswith(stem))
    changes = {write.DERIVED: write.derived(what, told)}
    files.save(place / f"{stem}.safetensors", tensors, metadata.derived(told, tensors, changes))


def _into_file(
    source: Path, folder: Path, changed: Mapping[str, Mapping[str, Tensor]], out: Path, what: str
) -> None:
    """Write a checkpoint with other weights in some components; all else of it stays, bit by bit."""
    tensors, told = files.load(source)
    family = single_file.describe(source).family
    for component, state in changed.items():
        config, prefix = bases.config(folder / component), original.PLACES[family][component]
        before = original.component_to_original(component, bases.weights(folder / component), config, family)
        after = original.component_to_original(component, state, config, family)
        for name, tensor in after.items():
            if not torch.equal(tensor, before[name]):
                place = f"{prefix}{name}"
                tensors[place] = tensor.reshape(tensors[place].shape)
    changes = write.renamed(out, told, write.derived(what, told))
    files.save(out, tensors, metadata.derived(told, tensors, changes))


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
    read = [_one(part, made, write.ASK_BASE) for part in parts]
    return read, [files.load(part.path)[1] for part in parts], made


def _one(part: Part, base: Base, *hint: str) -> Adapter:
    contents = reading.read(part.path)
    if (kind := identify(contents).kind) not in ADAPTERS:
        raise UserError(f"{part.path.name}: expected a LoRA or kin, found {kind}")
    tensors, told = files.load(part.path)
    return adapter.read(tensors, told, base, *hint)


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


def _common(headers: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """What all the files say alike, but not what one of them was made of."""
    shared = set.intersection(*(set(told.items()) for told in headers))
    return {key: value for key, value in shared if key.startswith(("ss_", "modelspec.")) or key == "format"}

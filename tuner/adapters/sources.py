"""Adapter files that a run begins with: to train further, or to add to the frozen base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tuner.adapters.layers import Kind
from tuner.adapters.targets import Slot, is_unread
from tuner.errors import UserError
from tuner.export import adapter, contents, files, lycoris, places
from tuner.export.adapter import Adapter
from tuner.export.kohya import LoraModule
from tuner.export.lycoris import Change, Difference, LohaModule
from tuner.export.places import COMPONENTS, Base
from tuner.family import Family
from tuner.method import public_config


class Start(NamedTuple):
    """A file to be trained further.

    Attributes:
        slots: by path, of the layers whose adapters are trained.
        trained: what the file has there.
        kept: what it has where nothing reads a layer's output: left as it is.
    """

    kind: Kind
    slots: dict[str, Slot]
    trained: Adapter
    kept: Adapter


class Part(NamedTuple):
    """An adapter to be added to the base."""

    place: Path
    weight: float
    key: str  # in the recipe


def base_of(family: Family) -> Base:
    """The family's networks as file formats know them."""
    found = {name: network for name, network in family.modules().items() if name in COMPONENTS}
    made = places.base(family.name, {name: public_config(network) for name, network in found.items()})
    return made._replace(family=family.name)


def read(place: Path, key: str, base: Base) -> Adapter:
    """An adapter file of any tool's.

    Raises:
        UserError: it is missing or no adapter of this base; the message begins with the recipe's key.
    """
    try:
        contents.read(place)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    try:
        return adapter.read(*files.load(place), base)
    except UserError as error:
        raise UserError(f"{key}: {place.name}: {error}") from error


def start(place: Path, key: str, base: Base, family: Family) -> Start:
    """Read a file to be trained further.

    Raises:
        UserError: it cannot be read, or holds what is not trained here.
    """
    found = read(place, key, base)
    try:
        kind = _kind(found)
        for path, module in found.modules.items():
            if not isinstance(module, LoraModule):
                lycoris.change(module, base.layers()[path])  # says whether the factors fit
    except UserError as error:
        raise UserError(f"{key}: {place.name}: {error}") from error
    unread = {path for path in found.modules if is_unread(family, path)}
    if len(unread) == len(found.modules):
        raise UserError(f"{key}: {place.name}: nothing reads the layers that it changes")
    trained, kept = _part(found, found.modules.keys() - unread), _part(found, unread)
    slots = {path: _slot(module) for path, module in trained.modules.items()}
    return Start(kind, slots, trained, kept)


def merge(family: Family, parts: Sequence[Part], base: Base) -> None:
    """Add adapters to the frozen base, in place: sums in float64, rounded once to the weights' own type.

    The digests of the components that change are those of the base and what was added, since cached
    encodings depend on them.

    Raises:
        UserError: a file cannot be read or does not fit.
    """
    found = [read(part.place, part.key, base) for part in parts]
    networks = family.modules()
    for path in sorted({path for one in found for path in one.modules}):
        component, _, name = path.partition(".")
        layer = networks[component].get_submodule(name)
        own = [(part, one) for part, one in zip(parts, found, strict=True) if path in one.modules]
        try:
            _add(layer, path, own)
        except UserError as error:
            raise UserError(f"{', '.join(part.key for part, _ in own)}: {path}: {error}") from error
    for part, one in zip(parts, found, strict=True):
        digest = files.tensors_digest(files.load(part.place)[0])
        for component in sorted({path.partition(".")[0] for path in one.modules}):
            family.digests[component] += f" + {part.weight:g} x {digest}"


def _add(layer: nn.Module, path: str, own: Sequence[tuple[Part, Adapter]]) -> None:
    """Add the changes of one layer."""
    weight, bias = layer.weight, layer.bias
    assert isinstance(weight, Tensor)
    old = weight.detach().cpu().double()
    total, offset = old.clone(), None
    for part, one in own:
        module: Change = one.modules[path]
        if path in one.magnitudes:
            assert isinstance(module, LoraModule)
            module = lycoris.from_dora(old, module, one.magnitudes[path])
        total += part.weight * lycoris.change(module, tuple(old.shape))
        if isinstance(module, Difference) and module.bias is not None:
            offset = (0.0 if offset is None else offset) + part.weight * module.bias.double()
    with torch.no_grad():
        weight.copy_(total)
        if offset is not None:
            if not isinstance(bias, Tensor):
                raise UserError("it changes a bias, which the layer has not")
            bias.copy_(bias.cpu().double() + offset)


def _kind(found: Adapter) -> Kind:
    """What a file holds, where it is one thing that can be trained."""
    kinds = {_name(module) for module in found.modules.values()}
    if found.magnitudes:
        if found.magnitudes.keys() != found.modules.keys():
            raise UserError("some of its modules are DoRA and some are not, which is not trained here")
        return "dora"
    if len(kinds) > 1:
        raise UserError(f"it holds {' and '.join(sorted(kinds))} together, which is not trained here")
    kind = kinds.pop()
    if kind == "full differences":
        raise UserError("it holds full differences, which cannot be trained further as an adapter")
    return _KINDS[kind]


def _name(module: Change) -> str:
    if isinstance(module, LoraModule):
        return "LoRA"
    if isinstance(module, Difference):
        return "full differences"
    return "LoHa" if isinstance(module, LohaModule) else "LoKr"


_KINDS: Mapping[str, Kind] = {"LoRA": "lora", "LoHa": "loha", "LoKr": "lokr"}


def _part(found: Adapter, paths: set[str]) -> Adapter:
    return Adapter(
        {path: module for path, module in found.modules.items() if path in paths},
        {path: magnitude for path, magnitude in found.magnitudes.items() if path in paths},
    )


def _slot(module: Change) -> Slot:
    """The rank and alpha of one adapter; alpha in float32, as files hold it."""
    if isinstance(module, LoraModule):
        rank = int(module.down.shape[0])
    else:
        assert not isinstance(module, Difference)
        rank = int(module.w1_b.shape[0]) if isinstance(module, LohaModule) else module.rank or 1
    return Slot(rank, torch.tensor(module.scale * rank, dtype=torch.float32).item())

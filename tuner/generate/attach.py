"""Adapter files put on a base: LoRA and its kin, and ControlNets. A file is read whole or is an error."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import torch
from torch import Tensor, nn

from tuner.components import config_of
from tuner.errors import UserError
from tuner.export import adapter, cldm, files, lycoris, places, rules_controlnet
from tuner.export import contents as reading
from tuner.export.adapter import Adapter
from tuner.export.identify import ADAPTERS, identify
from tuner.export.kohya import LoraModule
from tuner.export.places import Base
from tuner.family import Family
from tuner.files.merge import Part
from tuner.method import public_config
from tuner.progress import say

SHOWN = 5  # keys that a message names
FOLDER_FILE = "pytorch_lora_weights.safetensors"
_LOADING = (OSError, ValueError, RuntimeError, KeyError, TypeError, safetensors.SafetensorError)
_SAME = (
    "block_out_channels",
    "layers_per_block",
    "down_block_types",
    "cross_attention_dim",
    "addition_embed_type",
)
"""What a ControlNet's configuration must have of the UNet's, for its residuals to fit."""


def base_of(family: Family) -> Base:
    """What the rules of adapter files need to know of a base; before any adapter is on it."""
    networks = {"unet": family.denoiser, **family.text_encoders}
    return places.base(family.title, {name: public_config(network) for name, network in networks.items()})


def add_loras(family: Family, parts: Sequence[Part]) -> None:
    """Put LoRAs beside the base's layers, each with its weight, through diffusers.

    What diffusers' loader does not read (LoHa, LoKr, full differences) is added to the weights themselves.

    Raises:
        UserError: a file is no adapter of this base, or one of its keys has no place.
    """
    if not parts:
        return
    base = base_of(family)
    read = [_read(part, base) for part in parts]  # all of them before the base is changed
    beside = [_is_lora(one) for one in read]
    for part, one, lora in zip(parts, read, beside, strict=True):
        if not lora:
            _add_to_weights(family, one, part.weight)
    pipe = family.pipeline()
    names, weights = [], []
    for number, (part, one, lora) in enumerate(zip(parts, read, beside, strict=True)):
        if lora:
            names.append(f"lora{number}")  # peft allows no dots
            weights.append(part.weight)
            _load(pipe, names[-1], part, one)
        how = "beside" if lora else "added to"
        say(f"{part.path.name}: {len(one.modules)} modules, {how} the base's layers, weight {part.weight:g}")
    if names:
        pipe.set_adapters(names, weights)


def _read(part: Part, base: Base) -> Adapter:
    if (kind := identify(reading.read(part.path)).kind) not in ADAPTERS:
        raise UserError(f"--lora {part.path.name}: expected a LoRA or kin, found {kind}")
    tensors, told = files.load(part.path)
    try:
        return adapter.read(tensors, told, base)
    except UserError as error:
        raise UserError(f"--lora {part.path.name}: {error}") from error


def _is_lora(one: Adapter) -> bool:
    """Whether diffusers' loader holds all of it: low-rank products, or a DoRA of nothing else.

    It knows what a text encoder's adapter is by its attention, and refuses one of other layers alone.
    """
    plain = all(isinstance(module, LoraModule) for module in one.modules.values())
    encoders = {path.partition(".")[0] for path in one.modules if path.startswith("text_encoder")}
    known = {path.partition(".")[0] for path in one.modules if ".self_attn." in path}
    return plain and encoders <= known and one.magnitudes.keys() in (set(), one.modules.keys())


def _load(pipe: Any, name: str, part: Part, one: Adapter) -> None:
    """Load it in peft's names, in which diffusers reads every rank and scale as it is."""
    tensors, metadata = adapter.to_peft(one)
    with tempfile.TemporaryDirectory() as folder:
        files.save(Path(folder) / FOLDER_FILE, tensors, {"format": "pt", **metadata})
        try:
            with warnings.catch_warnings(action="ignore"):  # of peft, that there are several adapters
                pipe.load_lora_weights(folder, weight_name=FOLDER_FILE, adapter_name=name)
        except _LOADING as error:
            raise UserError(f"--lora {part.path.name}: diffusers does not load it: {error}") from error
    found = set(_holding(pipe, name))
    if missing := sorted(one.modules.keys() - found):
        raise UserError(f"--lora {part.path.name}: diffusers loads it only in part; {_shown(missing)}")


def _holding(pipe: Any, name: str) -> Iterable[str]:
    """The paths of the modules that hold an adapter, component first."""
    from peft.tuners.lora import LoraLayer

    for component in places.COMPONENTS:
        network = getattr(pipe, component, None)
        if network is not None:
            for path, layer in network.named_modules():
                if isinstance(layer, LoraLayer) and name in layer.lora_A:
                    yield f"{component}.{path}"


@torch.no_grad()
def _add_to_weights(family: Family, one: Adapter, weight: float) -> None:
    """Add an adapter's whole change to the base's weights; computed in float64, rounded once."""
    networks: Mapping[str, nn.Module] = {"unet": family.denoiser, **family.text_encoders}
    layers: dict[str, nn.Module] = {}
    for path in one.modules:
        component, _, rest = path.partition(".")
        layers[path] = networks[component].get_submodule(rest)
    old: dict[str, Tensor] = {path: _tensor(layer, "weight") for path, layer in layers.items()}
    for path, change in one.differences(old).items():
        old[path].copy_(old[path].double() + weight * lycoris.change(change, tuple(old[path].shape)))
        if change.bias is not None:
            bias = _tensor(layers[path], "bias")
            bias.copy_(bias.double() + weight * change.bias.double())


def _tensor(layer: nn.Module, name: str) -> Tensor:
    tensor: Tensor = layer.get_parameter(name)
    return tensor


class Net(NamedTuple):
    """A ControlNet that is asked for.

    Attributes:
        path: a diffusers folder or a file.
        scale: what its residuals are multiplied by.
        picture: the condition.
        name: as it is told; the path's, or the run's.
    """

    path: Path
    scale: float
    picture: Path
    name: str


def parse_net(text: str, own: Path | None, own_name: str) -> Net:
    """`NET:PICTURE` or `NET:SCALE:PICTURE`; NET is a folder, a file, or `run`.

    Args:
        own: the ControlNet of the run, if there is one, and its name.

    Raises:
        UserError: it is none of these.
    """
    rest, _, picture = text.rpartition(":")
    place, colon, number = rest.rpartition(":")
    scale = 1.0
    if colon and not Path(rest).exists():
        try:
            scale, rest = float(number), place
        except ValueError as error:
            raise UserError(f"--controlnet {text}: the scale {number!r} is no number") from error
    if not rest or not picture:
        raise UserError(f"--controlnet {text}: expected NET:PICTURE or NET:SCALE:PICTURE")
    if rest != "run":
        return Net(Path(rest), scale, Path(picture), _name(Path(rest)))
    if own is None:
        raise UserError(f"--controlnet {text}: `run` is the ControlNet that a --run trained; here is none")
    return Net(own, scale, Path(picture), own_name)


def _name(path: Path) -> str:
    return path.stem if path.is_file() else path.resolve().name


def load_net(family: Family, path: Path) -> nn.Module:
    """A ControlNet for the base, in float32, from its diffusers folder or from one file of either layout.

    Before any LoRA is on the base.

    Raises:
        UserError: there is none, it is not whole, or it was made for another kind of base.
    """
    branch = _from_folder(family, path) if path.is_dir() else _from_file(family, path)
    if public_config(branch).get("global_pool_conditions"):
        raise UserError(f"--controlnet {path.name}: ControlNets that pool their residuals are not known here")
    return branch.requires_grad_(False).eval()


def _from_folder(family: Family, path: Path) -> nn.Module:
    from diffusers import ControlNetModel

    found = config_of(path.parent, path.name)
    if found.get("_class_name") != "ControlNetModel":
        kind = found.get("_class_name", "no config.json")
        raise UserError(f"--controlnet {path}: expected the folder of a ControlNetModel, found {kind}")
    try:
        branch, told = ControlNetModel.from_pretrained(
            path,
            torch_dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except _LOADING as error:
        raise UserError(f"--controlnet {path}: does not load: {error}") from error
    wrong = [*told["missing_keys"], *told["unexpected_keys"], *(key[0] for key in told["mismatched_keys"])]
    if wrong:
        raise UserError(f"--controlnet {path}: loads only in part; {_shown(sorted(wrong))}")
    mine, own = public_config(branch), public_config(family.denoiser)
    for key in _SAME:
        if mine.get(key) != own.get(key):
            raise UserError(
                f"--controlnet {path.name}: {key} is {mine.get(key)}, the UNet's of {family.title} "
                f"{own.get(key)}; it was made for another base"
            )
    loaded: nn.Module = branch
    return loaded


def _from_file(family: Family, path: Path) -> nn.Module:
    contents = reading.read(path)
    layout = rules_controlnet.layout(contents)
    if layout is None:
        raise UserError(f"--controlnet {path.name}: expected a ControlNet, found {identify(contents).kind}")
    # An inpainting base's ControlNet sees the noisy latent alone.
    unet = {**public_config(family.denoiser), "in_channels": family.latent_channels}
    base = places.base(family.title, {"unet": unet})
    wanted, found = rules_controlnet.expected(contents, base), contents.shapes
    for what, keys in (
        ("has no place", found.keys() - wanted.keys()),
        ("is missing", wanted.keys() - found.keys()),
        ("has another size", {k for k in wanted.keys() & found.keys() if wanted[k] != found[k]}),
    ):
        if keys:
            raise UserError(
                f"--controlnet {path.name}: {_shown(sorted(keys))}, of {len(found)} keys, {what} in a "
                f"ControlNet of {family.title}"
            )
    tensors, _ = files.load(path)
    hint = rules_controlnet.HINT[layout]
    channels = next(shape[1] for key, shape in found.items() if key.removeprefix(cldm.PREFIX) == hint)
    branch = family.control_branch(channels)
    if layout == "cldm":
        tensors = cldm.from_cldm(tensors, public_config(branch))
    else:
        tensors = {key.removeprefix(cldm.PREFIX): tensor for key, tensor in tensors.items()}
    branch.load_state_dict(tensors)
    return branch.float()


def _shown(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return f"{', '.join(keys[:SHOWN])}{more}"

"""One network of a base from its diffusers folder: loaded, initialised afresh, or stored quantised."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tuner import quantised
from tuner.errors import UserError
from tuner.quantised import Scheme

WEIGHTS = "diffusion_pytorch_model"  # how diffusers calls a component's file, without its ending
GROUP = 2**28
"""Bytes that are read of a file at a time, in float32, where its tensors are converted."""

_PICKLE = "a pickle (.ckpt, .pt), which can run any code when it is read; convert it to .safetensors"
_MAGIC = {  # what else a file can be that should hold tensors, by its first bytes
    b"PK\x03\x04": _PICKLE,
    b"\x80": _PICKLE,
    b"GGUF": "a GGUF file, quantised for inference",
    b"version https://git-lfs": "a Git LFS pointer; the file itself was not downloaded: git lfs pull",
    b"<": "a web page, not the download",
}

KINDS = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    "image_encoder": ("transformers", "CLIPVisionModelWithProjection"),
}


def load(name: str, place: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The network `name` from its folder, on the CPU, its tensors in `dtype`.

    Raises:
        UserError: there is none, or it does not load.
    """
    if dtype != torch.float32 and KINDS[name][0] == "diffusers":
        narrowed = _narrowed(name, place, dtype)
        if narrowed is not None:
            return narrowed
    return _loaded(name, place, {"torch_dtype": dtype})


def _narrowed(name: str, place: Path, dtype: torch.dtype) -> nn.Module | None:
    """A network of diffusers whose file has other types, without the whole file in memory meanwhile.

    from_pretrained keeps all of the file mapped until the last tensor is converted: with a float32 file the
    process then holds three times what the network needs. None where it is to be asked all the same: the
    file has this type, or not just the network's names and shapes.
    """
    files = weight_files(place)
    _kind(name, place)  # says what is missing
    state: dict[str, Tensor] = {}
    try:
        for path in files:
            for names in _groups(path, dtype):
                with safe_open(path, framework="pt") as file:  # opened anew: what was read is let go of
                    state |= {key: file.get_tensor(key).to(dtype, copy=True) for key in names}
    except (SafetensorError, OSError):
        return None
    if not state:
        return None
    with torch.device("meta"):
        network = fresh(name, place, seed=0)
    if misfit(state, network.state_dict()) is not None:
        return None
    network.load_state_dict(state, assign=True)
    if any(tensor.is_meta for tensor in (*network.parameters(), *network.buffers())):
        return None
    return network.eval()


def _groups(path: Path, dtype: torch.dtype | None = None) -> list[list[str]]:
    """The tensors of a file, about GROUP bytes each time; none where all of them have this type."""
    names = {torch.float16: "F16", torch.bfloat16: "BF16"}
    groups: list[list[str]] = [[]]
    size, other = 0, False
    with safe_open(path, framework="pt") as file:
        for key in file.offset_keys():
            about = file.get_slice(key)
            other |= dtype is None or about.get_dtype() != names.get(dtype)
            if size > GROUP:
                groups, size = [*groups, []], 0
            groups[-1].append(key)
            size += 4 * math.prod(about.get_shape())
    return groups if other else []


def weight_files(place: Path, stem: str = WEIGHTS) -> list[Path]:
    """The safetensors files of a component, whole or in shards; a whole one only if it is there.

    Raises:
        UserError: a part that the index names is missing, or leaves the folder.
    """
    index = place / f"{stem}.safetensors.index.json"
    whole = place / f"{stem}.safetensors"
    if not index.is_file():
        return [whole] if whole.is_file() else []
    parts = read_json(index).get("weight_map")
    if not isinstance(parts, dict):
        raise UserError(f"{index}: expected a weight_map; download it again")
    for part in sorted(set(map(str, parts.values()))):
        if Path(part).name != part:
            raise UserError(f"{index}: names {part}, which leaves the folder; expected plain file names")
        if not (place / part).is_file():
            raise UserError(f"{index}: its part {part} is missing; download it again")
    return [place / part for part in sorted(set(parts.values()))]


def other_kind(path: Path) -> str | None:
    """What a file is that should hold tensors and does not, by how it begins; None where nothing is known."""
    with path.open("rb") as file:
        start = file.read(32)
    if start[8:9] == b"{":  # behind the header's length, whose bytes can look like anything
        return None
    return next((phrase for magic, phrase in _MAGIC.items() if start.startswith(magic)), None)


def check_whole(path: Path) -> None:
    """Raises UserError where a file is no whole safetensors file, as its header and its length tell."""
    if (other := other_kind(path)) is not None:
        raise UserError(f"{path} is {other}; expected a .safetensors file")
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        if isinstance(error, PermissionError):
            raise
        raise UserError(
            f"{path}: not a whole .safetensors file: {error}; download it again, or copy it whole"
        ) from error


def read_json(place: Path) -> dict[str, Any]:
    """A configuration.

    Raises:
        UserError: it is no JSON, or no object.
    """
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{place}: is no JSON ({error}); download it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{place}: expected an object of keys; download it again")
    return found


def tensors(place: Path, names: Collection[str]) -> dict[str, Tensor]:
    """Some tensors of a component of diffusers' by name, in float32; of the others nothing is read.

    Raises:
        UserError: there are no safetensors files, or a name is in none of them.
    """
    found: dict[str, Tensor] = {}
    for path in weight_files(place):
        try:
            with safe_open(path, framework="pt") as file:
                own = [name for name in file.keys() if name in names]  # noqa: SIM118
                found |= {name: file.get_tensor(name).float() for name in own}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from error
    if lacking := sorted(set(names) - found.keys()):
        raise UserError(f"{place}: {lacking[0]} is missing ({len(lacking)} of {len(names)} tensors)")
    return found


def load_quantised(name: str, place: Path, scheme: Scheme, compute: torch.dtype) -> nn.Module:
    """The network with its linear layers stored as `nf4` or `int8` by bitsandbytes.

    nf4: four bits a weight in blocks, the blocks' scales quantised too (QLoRA, arXiv 2305.14314); int8: eight
    bits, outlying inputs in full precision (arXiv 2208.07339). What is not such a layer has `compute`. Where
    there is a GPU it is quantised, and left, there. One tensor is read at a time.

    Raises:
        UserError: there is no such network, or its files do not hold it.
    """
    what, files = _checked(name, place)
    with init_empty_weights(include_buffers=False):  # a text encoder's positions are in no file
        network = fresh(name, place, seed=0)
    paths = set(quantised.replace(network, scheme, compute))
    wanted = {key for key, _ in network.named_parameters()}
    wanted |= {key for key in network.state_dict() if key not in wanted}  # and what is no parameter
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts = [(file, names) for file in files for names in _groups(file)]
    for path, names in parts:
        with safe_open(path, framework="pt") as opened:  # opened anew: what was read is let go of
            for stored in names:
                key = next((one for one in _spellings(stored) if one in wanted), None)
                if key is not None:
                    place_of, _, last = key.rpartition(".")
                    stores = place_of in paths and last == "weight"
                    _put(network, key, opened.get_tensor(stored), (compute, device), stores, what)
                    wanted.discard(key)
    if wanted:
        raise UserError(_missing(what, wanted))
    return network.requires_grad_(False).eval()


def _spellings(stored: str) -> tuple[str, ...]:
    """How a tensor of a file may be called in a network: text encoders' begin with text_model or not."""
    return stored, stored.removeprefix("text_model."), f"text_model.{stored}"


def _put(
    network: nn.Module,
    key: str,
    tensor: Tensor,
    how: tuple[torch.dtype, torch.device],
    stores: bool,
    what: str,
) -> None:
    """Put a tensor of a file into its place, in this type, on this device; where it `stores`, quantised."""
    path, _, name = key.rpartition(".")
    layer: Any = network.get_submodule(path)
    held = getattr(layer, name)
    shape = [layer.out_features, layer.in_features] if stores else list(held.shape)
    if list(tensor.shape) != shape:
        found = f"{key} is {list(tensor.shape)}, expected {shape}"
        raise UserError(f"{what} does not load: {found}; is its config.json its own?")
    made = tensor.to(how[0], copy=True) if tensor.is_floating_point() else tensor.clone()
    if stores:
        quantised.fill(layer, made, how[1])
    elif isinstance(held, nn.Parameter):
        setattr(layer, name, nn.Parameter(made.to(how[1]), requires_grad=False))
    else:
        setattr(layer, name, made.to(how[1]))


def fresh(name: str, place: Path, seed: int) -> nn.Module:
    """The network with the configuration in its folder and weights drawn from `seed`, in float32.

    Raises:
        UserError: there is no configuration.
    """
    kind = _kind(name, place)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if KINDS[name][0] == "diffusers":
            made: nn.Module = kind.from_config(kind.load_config(place))
        else:
            made = kind(kind.config_class.from_pretrained(place))
    return made.float()


def config_of(folder: Path, name: str) -> dict[str, Any]:
    """The config.json of a component of a diffusers folder; empty where there is none."""
    place = folder / name / "config.json"
    return read_json(place) if place.is_file() else {}


def without_weights(kind: Any, place: Path, wanted: str) -> Any:
    """A part of a base that has no weights, by its library.

    Raises:
        UserError: it is missing, or does not load.
    """
    what = f"base {place.parent}: the component {place.name}"
    if not any((place / name).is_file() for name in wanted.split(" or ")):
        raise UserError(f"{what} is missing (no {place.name}/{wanted}); download it again")
    for name in wanted.split(" or "):
        if (place / name).is_file():
            read_json(place / name)
    try:
        return kind.from_pretrained(place, local_files_only=True)
    except (OSError, ValueError, NotImplementedError, TypeError, KeyError) as error:
        raise UserError(f"{what} does not load: {error}; expected the files of one base") from error


def _kind(name: str, place: Path) -> Any:
    import diffusers
    import transformers

    if not (place / "config.json").is_file():
        raise UserError(f"base {place.parent}: the component {name} is missing (no {place.name}/config.json)")
    read_json(place / "config.json")  # says what is wrong with it
    library, class_name = KINDS[name]
    return getattr({"diffusers": diffusers, "transformers": transformers}[library], class_name)


def _checked(name: str, place: Path) -> tuple[str, list[Path]]:
    """What a network is called in errors, and its files, whole safetensors ones.

    Raises:
        UserError: there are none, or they are something else.
    """
    _kind(name, place)  # says what is missing
    stem = WEIGHTS if KINDS[name][0] == "diffusers" else "model"
    what = f"base {place.parent}: the component {name}"
    files = weight_files(place, stem)
    if not files and (pickles := sorted(file.name for file in place.glob(f"{stem.split('_model')[0]}*.bin"))):
        raise UserError(f"{what} is there as {pickles[0]} only, {_PICKLE}")
    if not files:
        raise UserError(f"{what} does not load: {place} has no {stem}.safetensors; download it again")
    for file in files:
        check_whole(file)
    return what, files


def _loaded(name: str, place: Path, how: dict[str, Any]) -> nn.Module:
    """The network by its library; nothing but whole safetensors files are read, and none is drawn anew."""
    kind, (what, _) = _kind(name, place), _checked(name, place)
    try:
        loaded, told = kind.from_pretrained(
            place, use_safetensors=True, local_files_only=True, output_loading_info=True, **how
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{what} does not load: {_first(error)}; is its config.json its own?") from error
    if missing := sorted(told["missing_keys"]):
        raise UserError(_missing(what, missing))
    network: nn.Module = loaded
    return network


def _missing(what: str, names: Collection[str]) -> str:
    return (
        f"{what}: {min(names)} is missing in its weights ({len(names)} tensors); is its config.json its own?"
    )


def _first(error: Exception) -> str:
    """The first sentence of a library's error, without its advice."""
    return str(error).strip().split("\n")[0].split(" If you want to instead")[0].rstrip(".")


def misfit(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str | None:
    """The first name or shape that differs from a network's, and how many do; None where none does."""
    wrong = dict.fromkeys(tensors.keys() - wanted.keys(), "has no place in it")
    wrong |= dict.fromkeys(wanted.keys() - tensors.keys(), "is missing")
    for name in wanted.keys() & tensors.keys():
        if tensors[name].shape != wanted[name].shape:
            wrong[name] = f"is {list(tensors[name].shape)}, expected {list(wanted[name].shape)}"
    if not wrong:
        return None
    name = min(wrong)
    return f"{name} {wrong[name]} ({len(wrong)} of {len(wanted)} tensors differ)"

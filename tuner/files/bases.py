"""Which base a file is read against: its configurations, and where asked for its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from tuner import single_file
from tuner.data.cache import default_folder
from tuner.errors import UserError
from tuner.export import files, rules_checkpoint, rules_controlnet
from tuner.export.contents import Contents
from tuner.export.identify import Identity
from tuner.export.places import COMPONENTS, Base, base
from tuner.export.rules import everything
from tuner.export.spelling import split

HERE = Path(__file__).resolve().parents[1]
SHIPPED: Mapping[str, Path] = {
    "sd15": HERE / "configs" / "sd15",
    "sd21": HERE / "configs" / "sd21",
    "sdxl": HERE / "configs" / "sdxl",
    "embedded": HERE / "embedded",
}
_OF_FAMILY = {"sd1": "sd15", "sd2": "sd21", "sdxl": "sdxl"}
WEIGHTS = ("diffusion_pytorch_model", "model")  # how a component's files are called, without their endings


def named(name: str) -> Base:
    """A base by its name (sd15, sd21, sdxl, embedded), its diffusers folder or its checkpoint in one file.

    Raises:
        UserError: there is no such base.
    """
    folder = folder_named(name)
    if folder is None:
        raise UserError(
            f"base {name}: expected {', '.join(SHIPPED)}, or a diffusers folder, or a checkpoint's file"
        )
    configs = {part: config(folder / part) for part in COMPONENTS if (folder / part).is_dir()}
    return base(name if name in SHIPPED else title(Path(name)), configs)


def folder_named(name: str) -> Path | None:
    """The diffusers folder of a base that is named so; None where there is none."""
    folder = SHIPPED.get(name) or unpacked(Path(name))
    return folder if folder.is_dir() else None


def title(place: Path) -> str:
    """The name of a base: of its folder, or of its file without the ending."""
    return place.resolve().stem if place.is_file() else place.resolve().name


def unpacked(place: Path) -> Path:
    """The diffusers folder of a checkpoint in one file, in the user's cache; another path as it is.

    Raises:
        UserError: the file is no checkpoint.
    """
    if not place.is_file():
        return place
    return single_file.as_folder(place, default_folder())


def config(place: Path) -> dict[str, Any]:
    """A component's config.json.

    Raises:
        UserError: there is none, or it is not JSON.
    """
    file = place / "config.json"
    if not file.is_file():
        raise UserError(f"{place}: there is no config.json")
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise UserError(f"{file}: is no JSON ({error})") from error


def choose(name: str | None, contents: Contents, identity: Identity) -> Base:
    """The base that is asked for, or the shipped one that the file's names and sizes fit best.

    Raises:
        UserError: there is no such base, or the file fits none of the shipped ones.
    """
    if name is not None:
        return named(name)
    told = _told(contents.metadata)
    first = [told] if told in SHIPPED else [_OF_FAMILY[identity.family]] if identity.family else []
    order = [*first, *(shipped for shipped in SHIPPED if shipped not in first)]
    scores: dict[str, int] = {}
    for shipped in order:
        scores[shipped] = _score(contents, identity, named(shipped))
        if scores[shipped] == len(contents.shapes) - len(contents.alphas):
            return named(shipped)
    best = max(order, key=scores.__getitem__)
    if 2 * scores[best] <= len(contents.shapes) - len(contents.alphas):  # chance hits of common sizes
        raise UserError(
            f"{contents.name}: it fits none of {', '.join(SHIPPED)}; say what it was made for: --base FOLDER"
        )
    return named(best)


def _told(metadata: Mapping[str, str]) -> str | None:
    """The name of the base in the metadata that our exports write."""
    try:
        return str(json.loads(metadata.get("tuner.base", "{}")).get("name"))
    except (ValueError, AttributeError):
        return None


def _score(contents: Contents, identity: Identity, made: Base) -> int:
    """How many of a file's tensors fit a base by name and size."""
    if rules_controlnet.is_low_rank(contents):
        return len(contents.shapes) - len(rules_controlnet.problems(contents, made))
    if rules_controlnet.layout(contents) is not None:
        wanted = rules_controlnet.expected(contents, made)
        return sum(wanted.get(key) == shape for key, shape in contents.shapes.items())
    if identity.kind == "checkpoint":
        wanted = rules_checkpoint.expected(made)
        # The autoencoder's tensors are not counted, so that half of the file need not be them.
        return 2 * sum(wanted.get(key) == shape for key, shape in contents.shapes.items())
    if unet := made.tensors["unet"].keys() & contents.shapes.keys():
        return sum(made.tensors["unet"][key] == contents.shapes[key] for key in unet)
    names, layers = everything(made), made.layers()
    count = 0
    for key, shape in contents.shapes.items():
        found = split(key)
        if found is None:  # vectors of a word
            widths = {t[1] for n in layers if n.endswith("token_embedding") for t in [layers[n]]}
            count += shape[-1:] != () and shape[-1] in widths
        elif found.name in names:
            layer = layers[names[found.name]]
            fits = {"down": shape[1:2] == layer[1:2], "up": shape[:1] == layer[:1], "weight": shape == layer}
            count += fits.get(found.role, found.role != "alpha")
    return count


def folder_of(place: Path) -> tuple[Base, str | None]:
    """A diffusers folder's base; of a component's folder also which component it is.

    Raises:
        UserError: it is neither.
    """
    if (place / "unet" / "config.json").is_file():
        return named(str(place)), None
    own = config(place) if place.is_dir() else {}
    if not own:
        raise UserError(f"{place}: expected a diffusers folder, or one of its components' folders")
    if place.name in COMPONENTS and (place.parent / "unet" / "config.json").is_file():
        return named(str(place.parent)), place.name
    if own.get("_class_name") == "UNet2DConditionModel":
        return base(place.resolve().name, {"unet": own}), "unet"
    raise UserError(f"{place}: a component whose base is not around it; give the base's folder")


def weights_files(place: Path) -> list[Path]:
    """The safetensors files that hold a component's weights.

    Raises:
        UserError: there are none.
    """
    for stem in WEIGHTS:
        for variant in ("", ".fp16", ".bf16"):
            index = place / f"{stem}.safetensors.index{variant}.json"
            if index.is_file():
                parts = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
                return [place / part for part in sorted(parts)]
            if (whole := place / f"{stem}{variant}.safetensors").is_file():
                return [whole]
    raise UserError(f"{place}: expected {' or '.join(f'{stem}.safetensors' for stem in WEIGHTS)} there")


def weights(place: Path) -> dict[str, Tensor]:
    """A component's tensors by name, a CLIPTextModel's without `text_model.` (as transformers >= 5.6).

    Raises:
        UserError: there are none, or they cannot be read.
    """
    tensors: dict[str, Tensor] = {}
    for file in weights_files(place):
        try:
            tensors |= files.load(file)[0]
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"{file}: cannot be read: {error}") from error
    if "CLIPTextModel" in config(place).get("architectures", []):
        tensors = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    return tensors

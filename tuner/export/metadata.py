"""What an exported file says about itself: for the tools that list models, and for making it again.

Everything is a function of tensors, recipe, versions and digests. No time, host, user, output folder or
absolute path goes in, so that two runs write equal files. `modelspec.date`, which the specification
recommends, is left out for that reason.

modelspec keys: https://github.com/Stability-AI/ModelSpec ; ss_ keys: kohya's sd-scripts.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from tuner.errors import UserError
from tuner.export import files

Kind = Literal["lora", "textual_inversion", "controlnet", "full"]

_SUFFIXES: Mapping[Kind, str] = {
    "lora": "/lora",
    "textual_inversion": "/textual-inversion",
    "controlnet": "/controlnet",
    "full": "",
}
_EXPLICIT = re.compile(r"/|[A-Za-z]:/|\.{1,2}(/|$)|~[^/]*(/|$)")
_EXTRA = (
    "condition",
    "family",
    "resolution",
    "prediction_type",
    "trigger_phrase",
    "licence",
    "clip_skip",
    "rank",
    "alpha",
    "algorithm",
    "tag_frequency",
    "start",
    "inpainting",
    "zero_terminal_snr",
)
# Keys of a recipe that only a place is given for, whether it is still there or not.
_PLACES = (
    *("data.source.path", "data.heldout.path", "train.resume"),
    *(f"method.{name}.prior.source" for name in ("full", "lora")),
)
_LORA_ONLY = ("rank", "alpha", "algorithm", "tag_frequency")
ALGORITHMS = ("lora", "dora", "loha", "lokr")


class Labels(NamedTuple):
    """How the tools name one family of base models."""

    architecture: str  # modelspec.architecture
    base_version: str  # ss_base_model_version
    v2: str  # ss_v2


# With what the base predicts, where the names depend on it. sd-scripts: library/sai_model_spec.py.
FAMILIES: Mapping[str, Labels] = {
    "sd1": Labels("stable-diffusion-v1", "sd_v1", "False"),
    "sd1 v": Labels("stable-diffusion-v1", "sd_v1_v", "False"),
    "sd2": Labels("stable-diffusion-v2-512", "sd_v2", "True"),
    "sd2 v": Labels("stable-diffusion-v2-768-v", "sd_v2_v", "True"),
    "sdxl": Labels("stable-diffusion-xl-v1-base", "sdxl_base_v1-0", "False"),
}


class MetadataError(UserError):
    """Something that the metadata has no place for."""


def build(
    kind: Kind,
    *,
    name: str,
    recipe_text: str,
    versions: Mapping[str, str],
    base_name: str,
    base_digest: str,
    data_digests: Mapping[str, str],
    extra: Mapping[str, Any],
) -> dict[str, str]:
    """The header's metadata of one exported file; strings by key, sorted.

    `recipe_text` comes from `recipe_text` below, so that it is scrubbed. `extra` may hold `family` ("sd1",
    "sd2", "sdxl"), `resolution` (pixels, one number or (width, height)), `prediction_type` ("epsilon",
    "v_prediction"), `trigger_phrase` and `licence` (texts), `clip_skip` (which layer of the text encoder is
    read, 1 the last), `start` (the recipe's keys of the files that training began from -> their digests),
    `condition` (a ControlNet's, with its parameters),
    `inpainting` (whether the base is shown a hole), `zero_terminal_snr` (whether the last timestep has no
    signal; modelspec has no key for it), and for a LoRA `rank` and `alpha`, as the file's tensors have them,
    `algorithm` (lora, dora, loha, lokr) and `tag_frequency` (captions' tags -> how often; tells of the data).

    Raises:
        MetadataError: an unknown key in extra, an unknown family, or a LoRA without rank and alpha.
    """
    if unknown := sorted(set(extra) - set(_EXTRA)):
        raise MetadataError(f"unknown metadata {', '.join(unknown)}; known are {', '.join(_EXTRA)}")
    if kind != "lora" and (useless := sorted(set(extra) & set(_LORA_ONLY))):
        raise MetadataError(f"{', '.join(useless)}: the metadata of a {kind} has no place for it")
    labels = labels_of(extra.get("family", "sd1"), extra.get("prediction_type"))
    base: dict[str, Any] = {"name": local_name(base_name), "digest": base_digest}
    holes = bool(extra.get("inpainting"))
    keys = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": _architecture(labels, kind, holes),
        "modelspec.implementation": "diffusers",
        "modelspec.title": name,
        "tuner.recipe": recipe_text,
        "tuner.versions": _json(versions),
        "tuner.base": _json({**base, "inpainting": True} if holes else base),
        "tuner.data": _json({_place_name(source): digest for source, digest in data_digests.items()}),
    }
    if extra.get("start"):
        keys["tuner.start"] = _json(extra["start"])
    if extra.get("condition"):
        keys["tuner.condition"] = _json(extra["condition"])
    keys |= _modelspec(extra)
    if kind == "lora":
        keys |= _kohya(name, labels, extra)
    return dict(sorted(keys.items()))


def labels_of(family: str, prediction: str | None) -> Labels:
    """How the tools name a family whose base predicts `prediction`.

    Raises:
        MetadataError: an unknown family.
    """
    known = sorted(name for name in FAMILIES if " " not in name)
    if family not in known:
        raise MetadataError(f"unknown family {family!r}; known are {', '.join(known)}")
    own = f"{family} v" if str(prediction).startswith("v") else family
    return FAMILIES.get(own, FAMILIES[family])


def _architecture(labels: Labels, kind: Kind, holes: bool) -> str:
    """modelspec.architecture; tools know one name of a base that is shown a hole, none of its adapters."""
    if kind == "full" and holes and labels.architecture == "stable-diffusion-v1":
        return "stable-diffusion-v1-inpainting"
    return labels.architecture + _SUFFIXES[kind]


def derived(
    metadata: Mapping[str, str], tensors: Mapping[str, Tensor], changes: Mapping[str, str | None]
) -> dict[str, str]:
    """The metadata of a file made of another: the other's, what is new (None: left out), and its own hash."""
    kept = {"format": "pt", **metadata, **changes}
    return with_hash({key: value for key, value in kept.items() if value is not None}, tensors)


def with_hash(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The metadata with `modelspec.hash_sha256`: of the file's bytes after the header."""
    return dict(sorted({**metadata, "modelspec.hash_sha256": f"0x{files.data_digest(tensors)}"}.items()))


def scrub(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe without what differs between two machines or two runs of it.

    Dropped: `output`, `log`, `data.cache`, `train.threads`. A path on this machine, of base, data or anything
    else, becomes its last part (the digests say what it was); names on the Hub ("owner/name") stay.
    """
    kept: dict[str, Any] = {}
    for key, value in recipe.items():
        if key in ("output", "log"):
            continue
        if isinstance(value, Mapping):
            dropped = {"data": "cache", "train": "threads"}.get(key)
            value = {inner: item for inner, item in value.items() if inner != dropped}
        kept[key] = _shorten(value, key)
    return kept


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """The scrubbed recipe as JSON with sorted keys (JSON is YAML too)."""
    return _json(scrub(recipe))


def local_name(text: str) -> str:
    """The last part of a path on this machine; any other text as it is.

    A text is such a path when it is absolute, begins with a folder `.`, `..` or `~`, or has a `/` and
    something lies there; so "owner/name" stays a name on the Hub.
    """
    path = text.removeprefix("file://")
    plain = path.replace("\\", "/")
    explicit = path != text or _EXPLICIT.match(plain) is not None
    # os.path.exists, not Path.exists: the latter raises where a long caption could be no path at all.
    if not explicit and not ("/" in plain and os.path.exists(path)):
        return text
    last = plain.rstrip("/").rpartition("/")[2]
    # "~", ".." and a drive have no name of their own, and what they stand for differs between machines.
    return "local" if not last.strip(".") or last.startswith("~") or last.endswith(":") else last


def _place_name(text: str) -> str:
    """The last part of a path, which may be gone; a set on the Hub and an address as they are."""
    if "://" in text and not text.startswith("file://"):
        return _public_address(text)
    return local_name(text if text.startswith(("hub:", "file://")) else os.path.join(".", text))


def _public_address(address: str) -> str:
    """Without what a name, a password or a token may stand in: user information, query, fragment."""
    scheme, _, rest = address.partition("://")
    place, slash, path = rest.partition("/")
    return f"{scheme}://{place.rpartition('@')[2]}{slash}{path.partition('?')[0].partition('#')[0]}"


def _shorten(value: Any, at: str) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _shorten(item, f"{at}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_shorten(item, at) for item in value]
    if isinstance(value, (str, Path)):
        return _place_name(str(value)) if at in _PLACES else local_name(str(value))
    return value


def _modelspec(extra: Mapping[str, Any]) -> dict[str, str]:
    keys: dict[str, str] = {}
    if "resolution" in extra:
        size = extra["resolution"]
        width, height = (size, size) if isinstance(size, int) else size
        keys["modelspec.resolution"] = f"{width}x{height}"
    if "prediction_type" in extra:
        # The specification writes "v" where diffusers writes "v_prediction".
        keys["modelspec.prediction_type"] = str(extra["prediction_type"]).removesuffix("_prediction")
    for key, name in (
        ("trigger_phrase", "trigger_phrase"),
        ("licence", "license"),
        ("clip_skip", "encoder_layer"),
    ):
        if key in extra:
            keys[f"modelspec.{name}"] = str(extra[key])
    return keys


def _kohya(name: str, labels: Labels, extra: Mapping[str, Any]) -> dict[str, str]:
    """The keys by which A1111, Forge and kohya recognise a LoRA and its base (weights load without)."""
    if "rank" not in extra or "alpha" not in extra:
        raise MetadataError("a LoRA's metadata needs its rank and alpha")
    algorithm = extra.get("algorithm", "lora")
    if algorithm not in ALGORITHMS:
        raise MetadataError(f"unknown algorithm {algorithm!r}; known are {', '.join(ALGORITHMS)}")
    plain = algorithm in ("lora", "dora")
    keys = {
        "ss_base_model_version": labels.base_version,
        "ss_v2": labels.v2,
        "ss_network_module": "networks.lora" if plain else "lycoris.kohya",
        "ss_network_dim": str(int(extra["rank"])),
        "ss_network_alpha": str(float(extra["alpha"])),
        "ss_output_name": name,
    }
    if not plain:
        keys["ss_network_args"] = _json({"algo": algorithm})
    if extra.get("zero_terminal_snr"):
        keys["ss_zero_terminal_snr"] = "True"
    if "clip_skip" in extra:
        keys["ss_clip_skip"] = str(int(extra["clip_skip"]))
    if "tag_frequency" in extra:
        # By data set, as the web UIs read it; theirs have a folder's name there.
        keys["ss_tag_frequency"] = _json({name: dict(extra["tag_frequency"])})
    return keys


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)

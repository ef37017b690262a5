"""The parts of a diffusers pipeline's folder that a training leaves as they are.

Weights are copied byte by byte, in the precision of the base's own files. Configurations say the same as the
base's, without what tells of a machine, and text encoders' that they are loaded in float32, as diffusers
loads the rest: transformers would take the files' own precision, and the pipeline dies on mixed types.
"""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tuner.errors import UserError
from tuner.export.component import PRIVATE
from tuner.export.files import write_whole
from tuner.files import bases

NOBODY = (*PRIVATE, "name_or_path", "tokenizer_file", "special_tokens_map_file")
"""Keys of configurations that hold a path of the machine on which they were made."""


def copy_component(source: Path, place: Path) -> None:
    """Copy a network: its configuration, and the bytes of its safetensors files.

    Raises:
        UserError: there is no configuration, or there are no such files.
    """
    config = _without_places(bases.config(source))
    if "architectures" in config:
        config = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": "float32"}
    _write_json(place / "config.json", config)
    for file in (*bases.weights_files(source), *sorted(source.glob("*.safetensors.index.json"))):
        _copy(file, place / file.name)


def copy_tokenizer(source: Path, place: Path) -> None:
    """Copy a tokeniser's files."""
    for file in sorted(source.iterdir()):
        if file.suffix == ".json" and file.name.endswith("config.json"):
            _write_json(place / file.name, _without_places(json.loads(file.read_text(encoding="utf-8"))))
        elif file.suffix in (".json", ".txt", ".model"):
            _copy(file, place / file.name)


def write_scheduler(source: Path, place: Path, wanted: Mapping[str, Any]) -> None:
    """Write the base's scheduler, with the settings that pictures of the trained model are drawn by.

    Where the base's class does not know one of them (PNDM has no zero-terminal schedule), it is DDIM.

    Args:
        source: the base's folder `scheduler`.
        wanted: Objective.sampling of the configuration that DDPM reads there.
    """
    import diffusers

    told = json.loads((source / "scheduler_config.json").read_text(encoding="utf-8"))
    read = dict(diffusers.DDPMScheduler.from_pretrained(source).config)
    changed = {k: v for k, v in wanted.items() if not k.startswith("_") and (k not in read or read[k] != v)}
    config = {**_without_places(told), **changed}
    kind = getattr(diffusers, str(told.get("_class_name")), None)
    if changed and (kind is None or changed.keys() - inspect.signature(kind.__init__).parameters.keys()):
        known = inspect.signature(diffusers.DDIMScheduler.__init__).parameters
        kept = {key: value for key, value in config.items() if key in known}
        # Latents are not clipped, which DDIM does where nothing is said.
        config = {"_class_name": "DDIMScheduler", "clip_sample": False, **kept}
    _write_json(place / "scheduler_config.json", config)


def write_index(source: Path, place: Path, pipeline: str, networks: Mapping[str, tuple[str, str]]) -> None:
    """Write model_index.json: which class of which library each folder holds.

    Args:
        source: the base's folder; settings in its index that are no components stay.
        pipeline: the class of the pipeline.
        networks: component -> library and class.
    """
    import diffusers

    file = source / "model_index.json"
    told = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    settings = {k: v for k, v in told.items() if not k.startswith("_") and not isinstance(v, list)}
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": diffusers.__version__, **settings}
    if not pipeline.startswith("StableDiffusionXL"):
        index |= {"safety_checker": [None, None], "requires_safety_checker": False}
    index |= {"feature_extractor": [None, None], "image_encoder": [None, None]}
    for name, entry in networks.items():
        index[name] = list(entry)
        if name.startswith("text_encoder"):
            index[name.replace("text_encoder", "tokenizer")] = ["transformers", "CLIPTokenizer"]
    scheduler = json.loads((place / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    index["scheduler"] = ["diffusers", scheduler["_class_name"]]
    _write_json(place / "model_index.json", index)


def _without_places(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in NOBODY}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(content, indent=2, sort_keys=True) + "\n")


def _copy(file: Path, place: Path) -> None:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)  # follows links, as the Hub's cache is made of them
    except OSError as error:
        raise UserError(f"{file}: cannot be copied: {error}") from error

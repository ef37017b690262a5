"""A transformers model from a folder or the Hub: its files, what names them, its network."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from tuner import hub
from tuner.base import EMBEDDED, component_digest
from tuner.data.cache import Hashes
from tuner.errors import UserError

WANTED = (
    *("*.json", "*.txt", "*.model", "*.jinja"),
    *("model.safetensors", "model-?????-of-?????.safetensors"),
)
"""What is taken of a repository: configuration, tokeniser, and weights in the one format without code."""

PAIR = ("image_encoder", "text_encoder", "tokenizer")
"""The folders of a base whose text encoder was trained with an image encoder (method contrastive)."""

LOADING = (
    *(OSError, ValueError, KeyError, IndexError, RuntimeError, ImportError, AttributeError, TypeError),
    SafetensorError,
)
"""What transformers raises where a folder is not what it says it is."""


@dataclass(frozen=True)
class Model:
    """Where a model lies.

    Attributes:
        option: what the user gave it as: `--model` or `--filter`.
        title: its name for messages.
        digest: a hash of its files.
        config: its config.json; empty for a base's pair.
    """

    option: str
    title: str
    folder: Path
    digest: str
    config: dict[str, Any]

    @property
    def kind(self) -> str:
        """Its model_type; `pair` for a base's folder."""
        return str(self.config.get("model_type", "pair"))

    def fault(self, text: str) -> UserError:
        """An error about this model."""
        return UserError(f"{self.option} {self.title}: {text}")


def locate(name: str, revision: str | None, option: str, hashes: Hashes) -> Model:
    """The model of a folder, of a Hub id (its safetensors only), or `embedded`.

    Raises:
        UserError: there is none, it has no safetensors, or the Hub says no.
    """
    revised = {"--model": "--revision", "--filter": "--filter-revision"}[option]
    local = EMBEDDED if name == "embedded" else Path(name)
    if local.is_dir():
        if revision is not None:
            raise UserError(f"{revised} {revision}: has no effect: {name} is here, and not a Hub id")
        if all((local / part).is_dir() for part in PAIR):
            digest = " ".join(component_digest(local / part, hashes) for part in PAIR)
            return Model(option, name, local, digest, {})
        for file in ("config.json", "*.safetensors"):
            if not list(local.glob(file)):
                there = ", ".join(sorted(one.name for one in local.iterdir())[:8]) or "nothing"
                raise UserError(f"{option} {name}: expected {file} in the folder, found {there}")
        folder = local
    else:
        if name.count("/") != 1 or name.startswith((".", "/", "~")):
            raise UserError(f"{option} {name}: no such folder (expected a model's folder, or a Hub id)")
        folder = hub.fetch(name, revision, WANTED, (option, revised))
        hub.check_model(name, folder, option)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{option} {name}: config.json is no JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UserError(f"{option} {name}: expected a model_type in config.json, found none")
    return Model(option, name, folder, component_digest(folder, hashes), config)


def network(model: Model, kind: Any, dtype: torch.dtype, device: torch.device, purpose: str) -> Any:
    """The model's network by a class of transformers, frozen.

    Args:
        purpose: what it is to do, for messages.

    Raises:
        UserError: it does not load, or its file lacks tensors.
    """
    try:
        made, told = kind.from_pretrained(
            model.folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except LOADING as error:
        raise model.fault(f"does not load to {purpose}: {one_line(error)}") from error
    # Poolers are often left out of a file, and read by nothing that is done here.
    if missing := sorted(name for name in told["missing_keys"] if ".pooler." not in name):
        raise model.fault(
            f"{len(missing)} tensors are missing in its file ({missing[0]} ...); "
            f"expected a model trained to {purpose}"
        )
    try:
        return made.eval().requires_grad_(False).to(device)
    except torch.OutOfMemoryError as error:
        raise model.fault(f"does not fit on {device}") from error


def part(model: Model, kind: Any, **how: Any) -> Any:
    """A model's tokeniser, image processor, or both in one.

    Raises:
        UserError: it does not load.
    """
    try:
        return kind.from_pretrained(model.folder, local_files_only=True, trust_remote_code=False, **how)
    except LOADING as error:
        raise model.fault(f"does not load: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """The first line of an error's text, which of transformers' errors says what it is."""
    text = str(error).strip() or type(error).__name__
    return " ".join(text.splitlines()[0].split())

"""Adapter files written by the tools of this package, with metadata that says what became of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from tuner.errors import UserError
from tuner.export import adapter, files, metadata, peft_format
from tuner.export.adapter import Adapter
from tuner.export.places import Base

_RANKS = ("ss_network_dim", "ss_network_alpha")


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        UserError: it is missing or no safetensors file.
    """
    from tuner.export.contents import read

    read(path)
    return files.load(path)


def kohya(path: Path, made: Adapter, base: Base, told: Mapping[str, str], changes: Mapping[str, str]) -> Path:
    """Write an adapter in the names that every tool reads.

    Args:
        told: the metadata of what it was made from.
        changes: what is new in it.
    """
    tensors = adapter.to_kohya(made, base)
    labels = metadata.labels_of(base.family, told.get("modelspec.prediction_type"))
    basic = {  # by which A1111 and Forge see the version
        "ss_base_model_version": labels.base_version,
        "ss_v2": labels.v2,
        "modelspec.architecture": f"{labels.architecture}/lora",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "diffusers",
        "modelspec.title": path.stem,
    }
    new = {**_ranks(tensors), **changes, "ss_output_name": path.stem, peft_format.METADATA: None}
    return files.save(out_file(path), tensors, metadata.derived({**basic, **told}, tensors, new))


def peft(path: Path, made: Adapter, told: Mapping[str, str]) -> Path:
    """Write an adapter as diffusers' pipelines save it."""
    tensors, own = adapter.to_peft(made)
    return files.save(out_file(path), tensors, metadata.derived(told, tensors, own))


def out_file(path: Path) -> Path:
    """The path, which must end in .safetensors.

    Raises:
        UserError: it does not.
    """
    if path.suffix != ".safetensors":
        raise UserError(f"--out {path}: expected a name that ends in .safetensors")
    return path


def _ranks(tensors: Mapping[str, Tensor]) -> dict[str, str | None]:
    """The rank and alpha that all modules share; nothing where they do not."""
    ranks = {t.shape[0] for key, t in tensors.items() if key.endswith((".lora_down.weight", ".hada_w1_b"))}
    alphas = {float(t) for key, t in tensors.items() if key.endswith(".alpha")}
    if len(ranks) != 1 or len(alphas) != 1:
        return dict.fromkeys(_RANKS)
    return dict(zip(_RANKS, (str(ranks.pop()), str(alphas.pop())), strict=True))

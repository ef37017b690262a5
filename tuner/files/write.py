"""Adapter files written by the tools of this package, with metadata that says what became of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from tuner.errors import UserError
from tuner.export import adapter, files, metadata, peft_format
from tuner.export.adapter import Adapter
from tuner.export.kohya import LoraModule
from tuner.export.lycoris import Difference, LohaModule, LokrModule
from tuner.export.places import Base

ASK_BASE = "if it was made for another base, say so: --base FOLDER"
"""How messages on keys without a place end where the command has that option."""

DERIVED = "tuner.derived"
"""The key of the metadata that says what a file was made of, and how."""

_RANKS = ("ss_network_dim", "ss_network_alpha")
_ALGORITHMS = {LoraModule: "lora", LohaModule: "loha", LokrModule: "lokr", Difference: "full"}


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        UserError: it is missing or no safetensors file.
    """
    from tuner.export.contents import read

    read(path)
    return files.load(path)


def check_free(out: Path, *read: Path) -> None:
    """Nothing that is there is ever replaced.

    Args:
        out: what is to be written, a file or a folder.
        read: what it is made of.

    Raises:
        UserError: there is something already, maybe what is read, or it would lie within that.
    """
    for source in read:
        if source.exists() and out.exists() and out.samefile(source):
            raise UserError(f"--out {out}: is what is read; take another name")
        if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
            raise UserError(f"--out {out}: lies within {source}, which is read; take another place")
    if out.exists() or out.is_symlink():
        raise UserError(f"--out {out}: is there already; take another name, or remove it first")


def derived(what: str, told: Mapping[str, str]) -> str:
    """`what`, and how that had been made which it was made of, if its metadata says it."""
    return f"{what} ({told[DERIVED]})" if DERIVED in told else what


def kohya(
    path: Path, made: Adapter, base: Base, told: Mapping[str, str], changes: Mapping[str, str | None]
) -> Path:
    """Write an adapter in the names that every tool reads.

    Args:
        told: the metadata of what it was made from.
        changes: what is new in it; None: left out.
    """
    tensors = adapter.to_kohya(made, base)
    labels = metadata.labels_of(base.family, told.get("modelspec.prediction_type"))
    basic = {  # by which A1111 and Forge see the version
        "ss_base_model_version": labels.base_version,
        "ss_v2": labels.v2,
        "modelspec.architecture": f"{labels.architecture}/lora",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": "diffusers",
    }
    names = {"modelspec.title": path.stem, "ss_output_name": path.stem, peft_format.METADATA: None}
    new = {**_ranks(tensors), **_network(made, told), **changes, **names}
    return files.save(out_file(path), tensors, metadata.derived({**basic, **told}, tensors, new))


def peft(path: Path, made: Adapter, told: Mapping[str, str], what: str) -> Path:
    """Write an adapter as diffusers' pipelines save it.

    Args:
        what: how it was derived.
    """
    tensors, own = adapter.to_peft(made)
    return files.save(
        out_file(path), tensors, metadata.derived(told, tensors, {**own, **renamed(path, told, what)})
    )


def renamed(path: Path, told: Mapping[str, str], what: str) -> dict[str, str]:
    """What the metadata of a file made of another says otherwise: its name, and how it was derived."""
    names = {key: path.stem for key in ("modelspec.title", "ss_output_name") if key in told}
    return {**names, DERIVED: what}


def out_file(path: Path) -> Path:
    """The path, which must end in .safetensors.

    Raises:
        UserError: it does not.
    """
    if path.suffix != ".safetensors":
        raise UserError(f"--out {path}: expected a name that ends in .safetensors")
    return path


def _network(made: Adapter, told: Mapping[str, str]) -> dict[str, str | None]:
    """The module and algorithm by which tools list it, where what it was made of does not say them."""
    module, algorithm = told.get("ss_network_module"), _told_algorithm(told)
    kinds = {_ALGORITHMS[type(one)] for one in made.modules.values()}
    if kinds == {"lora"}:
        if module == "lycoris.kohya" and algorithm in ("lora", "locon"):
            return {}
        arguments = {} if module == "networks.lora" else {"ss_network_args": None}
        return {"ss_network_module": "networks.lora", **arguments}
    if module == "lycoris.kohya" and kinds == {algorithm}:
        return {}
    own = json.dumps({"algo": kinds.pop()}) if len(kinds) == 1 else None
    return {"ss_network_module": "lycoris.kohya", "ss_network_args": own}


def _told_algorithm(told: Mapping[str, str]) -> str:
    try:
        return str(dict(json.loads(told.get("ss_network_args", "{}"))).get("algo", "lora")).lower()
    except (ValueError, TypeError):
        return "lora"


def _ranks(tensors: Mapping[str, Tensor]) -> dict[str, str | None]:
    """The rank and alpha that all modules share; nothing where they do not."""
    ranks = {t.shape[0] for key, t in tensors.items() if key.endswith((".lora_down.weight", ".hada_w1_b"))}
    alphas = {float(t) for key, t in tensors.items() if key.endswith(".alpha")}
    if len(ranks) != 1 or len(alphas) != 1:
        return dict.fromkeys(_RANKS)
    return dict(zip(_RANKS, (str(ranks.pop()), str(alphas.pop())), strict=True))

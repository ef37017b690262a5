"""How a ControlNet's branch begins: with the tensors of another one, or with factors beside the base's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import safetensors
import torch
from torch import Tensor, nn

from tuner import components
from tuner.adapters import factors
from tuner.errors import UserError
from tuner.export import cldm, control_lora
from tuner.export.files import load
from tuner.family import Family
from tuner.files import bases
from tuner.method import public_config

_OWN_CONFIG = ("upcast_attention",)  # a matter of precision, which differs between published files


def fill(branch: Any, start: Path) -> None:
    """Put the tensors of another ControlNet into a branch; each has to have its place.

    Raises:
        UserError: there is no such ControlNet, or it is not one of this base.
    """
    where = f"method.controlnet.start: {start}"
    if start.is_dir():
        try:
            told, tensors = bases.config(start), bases.weights(start)
        except UserError as error:
            raise UserError(f"method.controlnet.start: {error}") from error
        _check_config(where, told, dict(branch.config))
    else:
        tensors = _from_file(where, start, branch)
    _put(where, branch, tensors)


def factor(branch: Any, family: Family, rank: int, start: Path | None) -> None:
    """Put factors beside the weights that the base has too; those of `start` where one is given.

    The weights of a quantised base are copied, as the branch is a clone of what they were.

    Raises:
        UserError: `start` is no Control-LoRA of this base and rank.
    """
    layers = factors.counterparts(branch, family.denoiser)
    ranks = {path: min(rank, factors.full_rank(branch.get_submodule(path))) for path in layers}
    state: dict[str, Tensor] = {}
    where = f"method.controlnet.start: {start}"
    if start is not None:
        state = _low_rank(where, start, public_config(branch))
        found = control_lora.ranks(state)
        if max(found.values()) != rank:
            raise UserError(f"{where}: found rank {max(found.values())}, expected the recipe's, {rank}")
        ranks |= {path: own for path, own in found.items() if path in ranks}
    biases = {name: tensor for name, tensor in branch.state_dict().items() if name.endswith(".bias")}
    quantised = family.options.quantise is not None
    factors.put_in(branch, layers, ranks, family.options.compute if quantised else None)
    if start is None:
        return
    for name in factors.frozen_names(branch):
        bias = state.pop(name, None) if name.endswith(".bias") else None
        if bias is not None and not torch.allclose(bias.float(), biases[name], 1e-2, 1e-5):
            raise UserError(
                f"{where}: {name} is not the base's; biases beside factors are not trained here, as "
                "diffusers does not read them: expected rank: null, which trains all of it further"
            )
    _put(where, branch, state)


def _low_rank(where: str, start: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a Control-LoRA file in diffusers' names."""
    tensors = {} if start.is_dir() else _read(where, start)
    if control_lora.MARKER not in tensors:
        raise UserError(
            f"{where}: found a complete ControlNet, expected a Control-LoRA file beside "
            "method.controlnet.rank; a complete one is trained further with rank: null"
        )
    try:
        state = control_lora.from_file(tensors, config)
    except cldm.LayoutError as error:
        raise UserError(f"{where}: no Control-LoRA of this base: {error}") from error
    if not control_lora.ranks(state):
        raise UserError(f"{where}: no Control-LoRA: there are no factors in it")
    return state


def _put(where: str, branch: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load tensors; raises UserError where names or shapes are not the branch's."""
    if differs := components.misfit(tensors, branch.state_dict()):
        raise UserError(f"{where}: no ControlNet of this base and of these conditioning_channels: {differs}")
    branch.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})


def _from_file(where: str, path: Path, branch: nn.Module) -> dict[str, Tensor]:
    """A single file's tensors in diffusers' names; it has those or the original layout's, or factors."""
    tensors, config = _read(where, path), public_config(branch)
    if any(name.startswith("controlnet_") for name in tensors):
        return tensors
    try:
        if control_lora.MARKER in tensors:  # the branch is still the base's clone
            cloned = {n: t for n, t in branch.state_dict().items() if not n.startswith("controlnet_")}
            return control_lora.whole(control_lora.from_file(tensors, config), cloned)
        return cldm.from_cldm(tensors, config)
    except cldm.LayoutError as error:
        raise UserError(f"{where}: no ControlNet of this base: {error}") from error


def _read(where: str, path: Path) -> dict[str, Tensor]:
    if path.suffix != ".safetensors" or not path.is_file():
        raise UserError(f"{where}: expected a diffusers folder or a .safetensors file that is there")
    try:
        return load(path)[0]
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{where}: not a whole .safetensors file: {error}") from error


def _check_config(where: str, told: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises UserError where a folder's configuration is not that of this base's ControlNets."""
    for key in sorted(told.keys() & wanted.keys() - set(_OWN_CONFIG)):
        has, wants = _plain(told[key]), _plain(wanted[key])
        if not key.startswith("_") and has != wants:
            raise UserError(f"{where}: config.json says {key} {has}, this base's ControlNet has {wants}")


def _plain(value: Any) -> Any:
    return list(cast(Any, value)) if isinstance(value, (list, tuple)) else value

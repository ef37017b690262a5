"""The files that adapters are exported as, and what each tool makes of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tuner.adapters.layers import Kind
from tuner.export import adapter, kohya, lycoris, rules
from tuner.export.adapter import Adapter
from tuner.export.contents import Contents
from tuner.export.kohya import LoraModule
from tuner.export.lycoris import Change, Difference
from tuner.export.places import Base
from tuner.export.tools import ADAPTERS

EVERY = tuple(ADAPTERS)
WITHOUT_PIPELINES = ("ComfyUI", "A1111", "Forge")  # these read LyCORIS' names
PEFT = "peft/pytorch_lora_weights.safetensors"  # what diffusers looks for in a folder


class Form(NamedTuple):
    """One exported file.

    Attributes:
        place: below the export's folder.
        tools: those that it is for.
        tensors: in the precision in which they were trained.
        metadata: what its header says otherwise than a LoRA's in kohya's names; None: not at all.
    """

    place: str
    tools: tuple[str, ...]
    tensors: dict[str, Tensor]
    metadata: dict[str, str | None]


def forms(kind: Kind, made: Adapter, base: Base, weights: Mapping[str, Tensor], name: str) -> list[Form]:
    """The files of an adapter.

    A LoRA is one file for every tool. A DoRA is one for diffusers, as other tools read its magnitudes
    wrongly, and one of whole differences for those; LoHa and LoKr are one file, which diffusers and kohya
    refuse.

    Args:
        weights: the base's, by path, for a DoRA.
        name: the export's, without ending.
    """
    names = kohya.naming(base.family, base.unet)
    if kind == "lora":
        return [Form(f"{name}.safetensors", EVERY, kohya.to_kohya(made.loras("this"), names), {})]
    if kind in ("loha", "lokr"):
        tensors = lycoris.to_lycoris(made.modules, names)
        return [Form(f"lycoris/{name}.safetensors", WITHOUT_PIPELINES, tensors, {})]
    tensors, own = adapter.to_peft(made)
    # One after another on the CPU: together they are as large as the base.
    whole: dict[str, Change] = {}
    for path, module in made.modules.items():
        assert isinstance(module, LoraModule)
        weight = weights[path].to(module.down.device)
        found = lycoris.from_dora(weight, module, made.magnitudes[path])
        whole[path] = found if weight.is_meta else Difference(found.weight.cpu())
    told: dict[str, str | None] = {
        "ss_network_module": "lycoris.kohya",
        "ss_network_args": json.dumps({"algo": "full"}),
        "ss_network_dim": None,
        "ss_network_alpha": None,
    }
    return [
        Form(PEFT, ("diffusers",), tensors, dict(own)),
        Form(f"{name}.safetensors", WITHOUT_PIPELINES, lycoris.to_lycoris(whole, names), told),
    ]


def outline(made: Adapter) -> Adapter:
    """The same without values, for `forms` to say names and shapes alone."""

    def empty(value: Any) -> Any:
        return value.to("meta") if isinstance(value, Tensor) else value

    modules: dict[str, Change] = {
        path: type(module)(*(empty(value) for value in module)) for path, module in made.modules.items()
    }
    return Adapter(modules, {path: empty(tensor) for path, tensor in made.magnitudes.items()})


def problems(form: Form, found: Contents, base: Base) -> list[str]:
    """Why one of the tools that a file is for would not load all of it, by its rules; none where all do."""
    lines = []
    for tool in form.tools:
        verdict = rules.judge(tool, found, base)
        if verdict.loads != "all":
            lines.append(f"{tool} would load {verdict.loads} of it: {'; '.join(verdict.reasons())}")
    return lines


def shared(modules: Mapping[str, Change]) -> tuple[int, float]:
    """The rank and alpha that the files' metadata tell: the largest rank, and the alpha that goes with it.

    A LoRA's file has one rank and one alpha; where its modules do not, the scales are multiplied into the
    factors, and alpha is the largest rank.
    """
    pairs = {_rank_and_alpha(module) for module in modules.values()}
    rank, alpha = max(pairs)
    if len(pairs) > 1 and any(isinstance(module, LoraModule) for module in modules.values()):
        return rank, float(rank)
    return rank, alpha


def is_uniform(modules: Mapping[str, LoraModule]) -> bool:
    """Whether the factors stand in a kohya file as they are, without scales multiplied into them."""
    return len({(module.down.shape[0], module.scale) for module in modules.values()}) == 1


def _rank_and_alpha(module: Change) -> tuple[int, float]:
    assert not isinstance(module, Difference)
    rank: int | None
    if isinstance(module, LoraModule):
        rank = int(module.down.shape[0])
    else:
        rank = int(module.w1_b.shape[0]) if isinstance(module, lycoris.LohaModule) else module.rank
    if rank is None:  # both factors of a LoKr are whole: the scale is multiplied into one
        return 1, 1.0
    return rank, torch.tensor(module.scale * rank, dtype=torch.float32).item()


def told(tools: Sequence[str]) -> str:
    """`ComfyUI, A1111 and Forge`."""
    return f"{', '.join(tools[:-1])} and {tools[-1]}" if len(tools) > 1 else tools[0]

"""FSDP2: large networks are shared out among the processes, block by block (arXiv 2304.11277).

Of a shared network each process holds an equal part of every parameter, of its gradient and of what the
optimiser keeps for it; a block is put together while it works, and its gradients are averaged and parted
behind it (torch.distributed.fsdp.fully_shard). Adapters and new words are small: they stay whole on every
process, and their gradients are averaged here as DDP does it. Which processes there are, and whether they
share, is said outside of recipes (tuner.device.sharding).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tuner.adapters.factors import Factored
from tuner.adapters.layers import path_of
from tuner.errors import UserError
from tuner.family import Family
from tuner.method import Method
from tuner.processes import own_part
from tuner.training import Train

BLOCK = re.compile(
    r"(down_blocks|up_blocks)\.\d+|mid_block|.+\.transformer_blocks\.\d+|(text_model\.)?encoder\.layers\.\d+"
)
"""Paths of the parts of a network that are put together one at a time; what is left over is the last one."""
OPTIMISERS = ("adam", "adamw", "lion", "sgd")
"""Those that treat each number by itself, and are tested on parted tensors."""
_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class ShardingError(UserError):
    """A run that cannot be shared out in this way."""


def check(family: Family, methods: Sequence[Method], about: Train, precision: str) -> None:
    """See, before anything is written, that a run can be shared out.

    Args:
        precision: as accelerate calls it.

    Raises:
        ShardingError: it cannot; says what can be changed.
    """
    without = "start it without FSDP2 (DDP: launch/README.md)"
    # As recipes call them.
    names = " + ".join(type(method).__module__.rpartition(".")[2] for method in methods)
    if any(method.WHOLE_STEP for method in methods):
        raise ShardingError(f"FSDP2: method {names} trains small networks whole; {without}")
    if family.options.quantise is not None:
        raise ShardingError(
            f"FSDP2: base.quantise: found {family.options.quantise}, whose numbers cannot be parted; "
            f"set null, or {without}"
        )
    if precision == "fp16":
        raise ShardingError("FSDP2: train.precision: found fp16, expected bf16 or fp32")
    if any(isinstance(module, Factored) for method in methods for module in method.modules()):
        raise ShardingError(
            "FSDP2: method.controlnet.rank: its branch reads the base's own weights, which are parted; "
            f"set null, or {without}"
        )
    parted = any(method.kind in ("full", "controlnet") for method in methods)
    optimiser, held = about.optimiser.name, about.trained_precision
    if parted and held != "fp32":
        raise ShardingError(f"FSDP2: train.trained_precision: found {held}, expected fp32, or {without}")
    if parted and optimiser.lower() not in OPTIMISERS:
        raise ShardingError(
            f"FSDP2: train.optimiser: {optimiser} cannot be used on parted tensors, as method {names} has "
            f"them; take {', '.join(OPTIMISERS[:-1])} or {OPTIMISERS[-1]}, or {without}"
        )


def networks(family: Family, methods: Sequence[Method]) -> dict[str, nn.Module]:
    """What is shared out: the denoiser, text encoders in which something is trained, and a branch."""
    found = {"unet": family.denoiser}
    for name, encoder in family.text_encoders.items():
        if any(parameter.requires_grad for parameter in encoder.parameters()):
            found[name] = encoder
    branches = [branch for method in methods if (branch := method.control_branch()) is not None]
    return found | {f"branch {number}": branch for number, branch in enumerate(branches)}


@dataclass(frozen=True)
class _Plain:
    """What a module was before its network was shared out."""

    kind: type[nn.Module]
    hooks: Mapping[str, frozenset[int]]  # by number
    own: frozenset[str]  # names of its attributes

    @classmethod
    def of(cls, module: nn.Module) -> _Plain:
        hooks = {name: frozenset(getattr(module, name)) for name in _HOOKS}
        return cls(type(module), hooks, frozenset(vars(module)))


class Shards:
    """Networks that are shared out.

    Attributes:
        networks: by name, each parted from now on.
        mesh: the processes.
    """

    def __init__(self, found: Mapping[str, nn.Module], accelerator: Accelerator, reshard: bool) -> None:
        """Part the networks, in place; every process must have the same ones.

        Args:
            reshard: a block's parts are let go of behind its forward, and gathered again for its backward.
        """
        self.networks = dict(found)
        self.mesh: DeviceMesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        self._plain: dict[nn.Module, _Plain] = {}
        self._is_whole = False
        for network in self.networks.values():
            self._plain |= {module: _Plain.of(module) for module in network.modules()}
            kept = {p for name, p in network.named_parameters() if path_of(name) is not None}
            for parameter in network.parameters():
                parameter.data = parameter.data.contiguous()  # others cannot be parted
            paths = [path for path, _ in network.named_modules() if BLOCK.fullmatch(path)]
            assert paths, f"{type(network).__name__} has no blocks that are known"
            for path in reversed(paths):  # inner ones first
                fully_shard(
                    network.get_submodule(path),
                    mesh=self.mesh,
                    reshard_after_forward=reshard,
                    ignored_params=kept,
                )
            # The rest is used at the beginning and at the end: it stays whole until the backward is over.
            fully_shard(network, mesh=self.mesh, reshard_after_forward=False, ignored_params=kept)
        self._added = {
            module: {name: value for name, value in vars(module).items() if name not in plain.own}
            for module, plain in self._plain.items()
        }

    def last(self, is_last: bool) -> None:
        """Whether the next backward is a step's last: gradients are averaged and parted behind it alone."""
        for network in self.networks.values():
            assert isinstance(network, FSDPModule)
            network.set_requires_gradient_sync(is_last)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within it the networks are what they were before: plain modules, whole on every process.

        Every process has to enter and to leave it; what they do within it is their own matter. What is
        written into the parameters meanwhile is lost.
        """
        if self._is_whole:
            yield
            return
        places = [place for network in self.networks.values() for place in _parted(network)]
        aside = {module: self._put_aside(module) for module in self._plain}
        with torch.no_grad():
            gathered = {parameter: parameter.full_tensor() for _, _, parameter in places}
        plain = {p: nn.Parameter(t.detach().contiguous(), p.requires_grad) for p, t in gathered.items()}
        del gathered
        for module, name, parameter in places:
            module._parameters[name] = plain[parameter]
        self._is_whole = True
        try:
            yield
        finally:
            self._is_whole = False
            for module, name, parameter in places:
                module._parameters[name] = parameter
            for module, hooks in aside.items():
                self._put_back(module, hooks)

    def _put_aside(self, module: nn.Module) -> tuple[type[nn.Module], dict[str, dict[int, Any]]]:
        """Take away what makes a module a shared one, so that it is called, copied and named as before."""
        plain, kind = self._plain[module], type(module)
        hooks = {name: dict(getattr(module, name)) for name in _HOOKS}
        for name in _HOOKS:
            for number in hooks[name].keys() - plain.hooks[name]:
                del getattr(module, name)[number]
        for name in self._added[module]:
            delattr(module, name)
        module.__class__ = plain.kind
        return kind, hooks

    def _put_back(self, module: nn.Module, aside: tuple[type[nn.Module], dict[str, dict[int, Any]]]) -> None:
        kind, hooks = aside
        module.__class__ = kind
        vars(module).update(self._added[module])
        for name in _HOOKS:
            here = getattr(module, name)
            here.clear()  # in place: handles know this very dictionary
            here.update(hooks[name])

    @staticmethod
    @torch.no_grad()
    def average(parameters: Sequence[nn.Parameter]) -> None:
        """Put the processes' mean into the gradients of parameters that are not parted, as DDP does.

        What has none counts as zero.
        """
        whole = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
        if not whole:
            return
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in whole]
        flat = torch.cat([part.flatten() for part in parts]) / dist.get_world_size()
        dist.all_reduce(flat)
        means = torch.split(flat, [p.numel() for p in whole])
        for parameter, mean in zip(whole, means, strict=True):
            parameter.grad = mean.view_as(parameter).to(parameter.dtype)

    @staticmethod
    @torch.no_grad()
    def clip(parameters: Sequence[nn.Parameter], most: float) -> Tensor:
        """Scale gradients, parted and whole ones, to a norm of at most `most`; the norm before, a number."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not any(isinstance(gradient, DTensor) for gradient in gradients):
            return torch.nn.utils.clip_grad_norm_(parameters, most)
        parted = [own_part(gradient) for gradient in gradients if isinstance(gradient, DTensor)]
        whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
        squares = torch.stack(torch._foreach_norm(parted)).square().sum()
        dist.all_reduce(squares)
        if whole:
            squares += torch.stack(torch._foreach_norm(whole)).square().sum()
        norm = squares.sqrt()
        torch._foreach_mul_([*parted, *whole], (most / (norm + 1e-6)).clamp(max=1.0))  # as torch scales them
        return norm

    @staticmethod
    def anywhere(flags: Tensor) -> Tensor:
        """Flags [n] (bool) that are set on any process."""
        count = flags.to(torch.int32)
        dist.all_reduce(count, dist.ReduceOp.MAX)
        return count.bool()


def _parted(network: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """Every place of a parted parameter: the module, its name there, itself."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    every: list[tuple[nn.Module, str, Any]] = [
        (module, name, p) for module in network.modules() for name, p in module._parameters.items()
    ]
    return [(module, name, p) for module, name, p in every if isinstance(p, DTensor)]


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """A whole tensor parted as another of its shape is; as it is where that one is whole."""
    if not isinstance(other, DTensor) or isinstance(tensor, DTensor) or tensor.shape != other.shape:
        return tensor
    own = tensor.to(other.device)  # every process has all of it: nothing is sent
    return distribute_tensor(own, other.device_mesh, other.placements, src_data_rank=None)

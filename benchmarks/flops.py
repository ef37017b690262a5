"""The FLOPs of a training step: counted as it runs, and the least that its layers need.

One multiplication and addition are two FLOPs; only matrix products, convolutions and attention count.

Counted: torch's FlopCounterMode over everything that a step does. It does not know attention's fused kernel
on the CPU, which `counter` adds; and that fused kernels compute the scores once more in their backward passes
is not counted here: it is their way to save memory, no work of the step.

The least: from the layers alone. While a forward pass runs, hooks write down for each linear layer, each
convolution and each attention the shapes, whether its inputs depend on something that is trained, and whether
its weight is trained. With y the output, and only where the loss depends on y:

    layer                       forward               gradient of its input     gradient of its weight
    linear [m, k] -> [m, n]     2 m k n               the same, if the input    the same, if it is trained
    convolution c -> d, K taps  2 B h w c d K         depends on what is        the same, if it is trained
    attention, S x T, width C   2 B S T C, twice      trained

h and w are of the output. Of attention's four backward products (each 2 B S T C) those of the scores are
needed if queries or keys depend on what is trained, and one for each of queries, keys and values that does.
A fused kernel computes all four in any case: what was not needed is told apart, as `idle`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

HEADS = (("to_q", "to_k", "to_v"), ("q_proj", "k_proj", "v_proj"))
"""How diffusers and transformers call the projections of an attention."""


def counter() -> FlopCounterMode:
    """What counts within its context; `get_total_flops()` tells."""
    aten = torch.ops.aten
    backward = (
        aten._scaled_dot_product_flash_attention_for_cpu_backward,
        aten._scaled_dot_product_flash_attention_backward,
        aten._scaled_dot_product_efficient_attention_backward,
        aten._scaled_dot_product_cudnn_attention_backward,
    )
    known: dict[Any, Any] = {aten._scaled_dot_product_flash_attention_for_cpu: _attention}
    return FlopCounterMode(display=False, custom_mapping=known | dict.fromkeys(backward, _attention_backward))


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """Two products, of [B, H, S, D], [B, H, T, D] and [B, H, T, E]."""
    return 2 * prod(query[:3]) * key[2] * (query[3] + value[3])


def _attention_backward(_: Any, query: Any, key: Any, value: Any, *__: Any, **___: Any) -> int:
    """The four that give the gradients of weights, values, queries and keys."""
    return 2 * prod(query[:3]) * key[2] * 2 * (query[3] + value[3])


@dataclass(frozen=True)
class Call:
    """One call of a layer, in FLOPs.

    Attributes:
        backward: what the gradients need that depend on something trained.
        idle: what a fused kernel computes besides.
        node: of autograd's graph; None where the output depends on nothing trained.
    """

    network: str
    kind: str
    forward: int
    backward: int
    idle: int
    node: Any


@dataclass
class Work:
    """The FLOPs of a step.

    Attributes:
        forward, backward: the least.
        unused: forward passes of layers whose output the loss does not depend on.
        idle: what fused kernels compute without need.
        networks: of each network what it needs forward and backward.
        kinds: the same by the kind of layer.
        calls: of layers, by their kind.
    """

    forward: int = 0
    backward: int = 0
    unused: int = 0
    idle: int = 0
    networks: dict[str, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))
    kinds: dict[str, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))
    calls: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    @property
    def least(self) -> int:
        """What the step needs."""
        return self.forward + self.backward

    @property
    def expected(self) -> int:
        """What a count of it has to find."""
        return self.least + self.unused + self.idle


class Needed:
    """Within it the layers' calls are written down; `settle` tells what a loss needs of them.

    Attributes:
        work: of all losses that were settled.
    """

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        """
        Args:
            networks: all that a step calls, by name.
        """
        self.work = Work()
        self._networks = dict(networks)
        self._calls: list[Call] = []
        self._handles: list[Any] = []
        self._projected: dict[nn.Module, Tensor] = {}
        self._kernels = _Kernels()

    def __enter__(self) -> Self:
        for name, network in self._networks.items():
            for module in network.modules():
                self._watch(name, module)
        self._kernels.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._kernels.__exit__(*error)
        for handle in self._handles:
            handle.remove()
        self._projected.clear()

    def settle(self, loss: Tensor) -> None:
        """Add what the calls since the last time are for this loss; before its backward pass."""
        reached, work = _reached(loss), self.work
        for call in self._calls:
            if call.node is not None and call.node not in reached:
                work.unused += call.forward
                continue
            work.forward += call.forward
            work.calls[call.kind] += 1
            backward = 0 if call.node is None else call.backward
            work.backward += backward
            work.idle += 0 if call.node is None else call.idle
            for table, key in ((work.networks, call.network), (work.kinds, call.kind)):
                table[key][0] += call.forward
                table[key][1] += backward
        self._calls.clear()

    def _watch(self, network: str, module: nn.Module) -> None:
        def layer(one: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self._calls.append(_layer(network, one, args[0], output))

        if isinstance(module, (nn.Linear, nn.Conv2d)):
            self._handles.append(module.register_forward_hook(layer))
        if isinstance(getattr(module, "base_layer", None), nn.Linear) and hasattr(module, "lora_A"):
            self._watch_adapted(network, module)
        for names in HEADS:
            if all(hasattr(module, name) for name in names):
                self._watch_attention(network, module, names)

    def _watch_adapted(self, network: str, module: Any) -> None:
        """A linear layer with a LoRA: where it calls none of its parts, it computes their products itself."""
        before: list[int] = []

        def ends(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if len(self._calls) == before.pop():
                self._calls += _adapted(network, module, args[0], output)

        self._handles.append(module.register_forward_pre_hook(lambda *_: before.append(len(self._calls))))
        self._handles.append(module.register_forward_hook(ends))

    def _watch_attention(self, network: str, module: nn.Module, names: tuple[str, str, str]) -> None:
        parts = [module.get_submodule(name) for name in names]

        def projected(one: nn.Module, _: Any, output: Tensor) -> None:
            self._projected[one] = output

        def begins(*_: Any) -> None:
            self._kernels.seen = 0

        def ends(_: nn.Module, __: Any, output: Any) -> None:
            q, k, v = (self._projected.pop(part) for part in parts)
            seen = output[0] if isinstance(output, tuple) else output
            self._calls.append(_attended(network, q, k, v, seen.grad_fn, self._kernels.seen > 0))

        self._handles += [part.register_forward_hook(projected) for part in parts]
        self._handles += [module.register_forward_pre_hook(begins), module.register_forward_hook(ends)]


class _Kernels(TorchFunctionMode):
    """Counts calls of fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += func is F.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


def _layer(network: str, layer: Any, given: Tensor, output: Tensor) -> Call:
    """A linear layer's or a convolution's call."""
    if isinstance(layer, nn.Linear):
        kind, product = "linear", 2 * output.numel() * layer.in_features
    else:
        assert layer.groups == 1
        kind, product = "convolution", 2 * output.numel() * layer.in_channels * prod(layer.kernel_size)
    gradients = int(given.requires_grad) + int(layer.weight.requires_grad)
    return Call(network, kind, product, product * gradients, 0, output.grad_fn)


def _adapted(network: str, layer: Any, given: Tensor, output: Tensor) -> list[Call]:
    """The calls of a layer [m, k] -> [m, n] and of its adapter's parts [m, k] -> [m, r] -> [m, n]."""
    (name,) = layer.active_adapters
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    rows, sees = 2 * (given.numel() // given.shape[-1]), int(given.requires_grad)
    within = int(bool(sees) or down.requires_grad)
    parts = (
        (layer.base_layer.weight, sees + int(layer.base_layer.weight.requires_grad)),
        (down, sees + int(down.requires_grad)),
        (up, within + int(up.requires_grad)),
    )
    node = output.grad_fn
    return [Call(network, "linear", rows * w.numel(), rows * w.numel() * n, 0, node) for w, n in parts]


def _attended(network: str, q: Tensor, k: Tensor, v: Tensor, node: Any, fused: bool) -> Call:
    """An attention's call; queries [B, S, C], keys [B, T, C] and values [B, T, E], all heads together."""
    rows = 2 * q.shape[0] * q.shape[1] * k.shape[1]
    scores, values = rows * q.shape[2], rows * v.shape[2]
    both = int(q.requires_grad) + int(k.requires_grad)
    needed = values * (int(both > 0) + int(v.requires_grad)) + scores * both
    every = 2 * (scores + values)
    idle = every - needed if fused and needed else 0
    return Call(network, "attention", scores + values, needed, idle, node)


def _reached(loss: Tensor) -> set[Any]:
    """The nodes of autograd's graph that the loss depends on."""
    found, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in found:
            continue
        found.add(node)
        waiting += [before for before, _ in node.next_functions]
    return found


def of_model(model: Any, batch: Any) -> tuple[int, Work]:
    """The counted FLOPs of a forward and a backward pass on the meta device, and what its layers need.

    Args:
        model: a tuner.memory.model.Model, with the attention that its device has.
        batch: as tuner.memory.step makes it.
    """
    from tuner.memory import step

    networks = dict(model.family.modules())
    if hasattr(model.methods[0], "branch"):
        networks["branch"] = model.methods[0].branch
    with counter() as found:
        # The rules replace attention's kernel, so they have to stand outside: what is inside is called first.
        with model.rules, Needed(networks) as needed:
            loss = step._loss(model, batch)
        needed.settle(loss)
        loss.backward()
    for parameter in model.trained():
        parameter.grad = None
    return found.get_total_flops(), needed.work

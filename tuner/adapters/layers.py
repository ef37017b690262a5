"""Adapters inside a network's layers, made by peft: put in, read out, and filled from a file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tuner.adapters.targets import Slot
from tuner.errors import UserError
from tuner.export import lycoris
from tuner.export.kohya import LoraModule
from tuner.export.lycoris import Change, LohaModule, LokrModule

ADAPTER = "tuner"
Kind = Literal["lora", "dora", "loha", "lokr"]
KINDS = get_args(Kind)
_PREFIX = {"loha": "hada", "lokr": "lokr"}
_PART = re.compile(rf"(?P<path>.+)\.(lora|hada|lokr)_\w+\.{ADAPTER}(\.weight)?")


@dataclass(frozen=True)
class Making:
    """How adapters are made.

    Attributes:
        kind: LoRA (arXiv 2106.09685), DoRA (2402.09353), LoHa (2108.06098) or LoKr (2309.14859).
        rslora: the factor is alpha / sqrt(rank) instead of alpha / rank (2312.03732).
        dropout: of LoRA's and DoRA's inputs, of the rows of a LoHa's or LoKr's change; in [0, 1).
        init: default; gaussian or orthogonal for LoRA and DoRA; lycoris (w2 is zero, not w1) for LoKr.
        factor: of LoKr, the first factor's size; None: near the square root of the layer's.
        decompose_both: of LoKr, the first factor is low-rank too.
        tucker: LoHa and LoKr of convolutions with a core tensor (2108.06098, proposition 3).
    """

    kind: Kind = "lora"
    rslora: bool = False
    dropout: float = 0.0
    init: str = "default"
    factor: int | None = None
    decompose_both: bool = False
    tucker: bool = False

    @property
    def plain(self) -> bool:
        """Whether an adapter is a low-rank product, with or without magnitudes."""
        return self.kind in ("lora", "dora")


def check(how: Making, wanted: Mapping[str, tuple[Slot, nn.Module]]) -> None:
    """Raises UserError where adapters cannot be made so on these layers, or an option has no effect."""
    kernels = {path: layer for path, (_, layer) in wanted.items() if isinstance(layer, nn.Conv2d)}
    if how.init == "orthogonal":
        if kernels:
            raise UserError(
                f"method.lora.init: orthogonal is for linear layers only, found {next(iter(kernels))}"
            )
        if odd := [path for path, (slot, _) in wanted.items() if slot.rank % 2]:
            raise UserError(
                f"method.lora.init: orthogonal needs even ranks, found {wanted[odd[0]][0].rank} ({odd[0]})"
            )
    if how.tucker and all(layer.kernel_size == (1, 1) for layer in kernels.values()):
        raise UserError("method.lora.tucker: has no effect: no convolution larger than 1x1 has an adapter")


def inject(host: nn.Module, slots: Mapping[str, Slot], how: Making, seed: int) -> None:
    """Put adapters into a network's layers, in place, drawn from `seed` alone.

    Args:
        slots: by the layers' paths within the network.
    """
    from peft import inject_adapter_in_model

    from tuner.adapters import fused

    with torch.random.fork_rng(), _taken_for_float32([host.get_submodule(path) for path in slots]):
        torch.manual_seed(seed)
        inject_adapter_in_model(_settings(slots, how), host, adapter_name=ADAPTER)
    found = dict(adapted(host))
    assert found.keys() == slots.keys(), sorted(found.keys() ^ slots.keys())[:5]
    for path, layer in found.items():
        slot = slots[path]
        divisor = slot.rank**0.5 if how.rslora else slot.rank
        assert (layer.r[ADAPTER], layer.scaling[ADAPTER]) == (slot.rank, slot.alpha / divisor), path
        layer.eval()
        fused.fuse(layer)


@contextmanager
def _taken_for_float32(hosts: Iterable[nn.Module]) -> Iterator[None]:
    """Within it layers that are held in half precision look like float32 ones, without any numbers.

    peft gives adapters the type of their layer's weights, or what a layer of 4 bits computes in, which would
    round what they begin with.
    """
    every: list[Any] = list(hosts)
    computes = [(host, host.compute_dtype) for host in every if hasattr(host, "compute_dtype")]
    weights = [host.weight for host in every if isinstance(host.weight, Tensor)]
    kept = [(w, w.data) for w in weights if w.dtype in (torch.float16, torch.bfloat16)]
    try:
        for weight, data in kept:
            weight.data = torch.empty((), device=data.device).expand(data.shape)
        for host, _ in computes:
            host.compute_dtype = torch.float32
        yield
    finally:
        for host, compute in computes:
            host.compute_dtype = compute
        for weight, data in kept:
            weight.data = data


def adapted(host: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers of a network that have an adapter of ours, by path within it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, layer in host.named_modules():
        if isinstance(layer, BaseTunerLayer):
            yield path, layer


def path_of(name: str) -> str | None:
    """The path of the layer whose adapter a parameter belongs to; None for a parameter of the base."""
    found = _PART.fullmatch(name)
    return None if found is None else found["path"]


def change_of(path: str, layer: Any) -> Change:
    """A layer's adapter as its factors and its scale; the tensors are the parameters' own memory."""
    scale = float(layer.scaling[ADAPTER])
    if hasattr(layer, "lora_A"):
        down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        return LoraModule(down.detach(), up.detach(), scale)
    prefix = "hada" if hasattr(layer, "hada_w1_a") else "lokr"
    parts = {
        name.removeprefix(f"{prefix}_"): getattr(layer, name)[ADAPTER].detach()
        for name in layer.adapter_layer_names
        if ADAPTER in getattr(layer, name)
    }
    return lycoris.module(path, prefix, parts, scale)


def magnitude_of(layer: Any) -> Tensor | None:
    """A DoRA's magnitudes, [out], or [1, out, 1, 1] of a convolution."""
    held = getattr(layer, "lora_magnitude_vector", {})
    return held[ADAPTER].weight.detach() if ADAPTER in held else None


def fill(layer: Any, change: Change, magnitude: Tensor | None) -> None:
    """Give an adapter the values and the scale of another of its kind, in float32.

    A LoHa or LoKr takes over which factors there are, and their shapes.
    """
    device = layer.get_base_layer().weight.device
    if isinstance(change, LoraModule):
        pairs = [(layer.lora_A, change.down), (layer.lora_B, change.up)]
        if magnitude is not None:
            pairs.append((layer.lora_magnitude_vector, magnitude))
        with torch.no_grad():
            for held, value in pairs:
                held[ADAPTER].weight.copy_(value.reshape(held[ADAPTER].weight.shape))
    else:
        assert isinstance(change, (LohaModule, LokrModule)) and magnitude is None
        prefix = "hada" if isinstance(change, LohaModule) else "lokr"
        for role, value in change._asdict().items():
            if role == "scale":
                continue
            held = getattr(layer, f"{prefix}_{role}")
            if value is not None:
                held[ADAPTER] = nn.Parameter(value.detach().to(device, torch.float32, copy=True))
            elif ADAPTER in held:
                del held[ADAPTER]
    layer.scaling[ADAPTER] = change.scale


def train_mode(layer: Any, on: bool) -> None:
    """Dropout of the adapter alone; the layer that it sits on stays as it is.

    A LoHa or LoKr in training draws whether its module is dropped, in each step, and branches on it, which
    would also cut a compiled graph in two; where nothing is dropped it is left in evaluation, to the same
    effect.
    """
    layer.training = on and getattr(layer, "rank_dropout", {}).get(ADAPTER, 1.0) > 0
    if hasattr(layer, "lora_dropout"):
        layer.lora_dropout.train(on)


def _settings(slots: Mapping[str, Slot], how: Making) -> Any:
    """peft's configuration for exactly these layers."""
    from peft import LoHaConfig, LoKrConfig, LoraConfig

    usual = Counter(slots.values()).most_common(1)[0][0]
    shared: dict[str, Any] = {
        "r": usual.rank,
        "target_modules": _either(slots),
        "rank_pattern": _patterns({path: slot.rank for path, slot in slots.items()}, usual.rank),
        "alpha_pattern": _patterns({path: slot.alpha for path, slot in slots.items()}, usual.alpha),
    }
    if how.plain:
        return LoraConfig(
            **shared,
            lora_alpha=usual.alpha,
            lora_dropout=how.dropout,
            use_rslora=how.rslora,
            use_dora=how.kind == "dora",
            init_lora_weights=True if how.init == "default" else how.init,
        )
    shared |= {
        "alpha": usual.alpha,
        "rank_dropout": how.dropout,
        # It is skipped where a draw from [0, 1) is not above this: with 0 once in 2^24 draws, and its
        # parameters without a gradient stop several processes.
        "module_dropout": -1.0,
        "use_effective_conv2d": how.tucker,
    }
    if how.kind == "loha":
        return LoHaConfig(**shared)
    return LoKrConfig(
        **shared,
        rank_dropout_scale=True,  # what is left is scaled up, as in every other kind
        decompose_factor=-1 if how.factor is None else how.factor,
        decompose_both=how.decompose_both,
        init_weights="lycoris" if how.init == "lycoris" else True,
    )


def _either(paths: Iterable[str]) -> str:
    """A regular expression for exactly these paths."""
    return "|".join(re.escape(path) for path in paths)


def _patterns(values: Mapping[str, float], usual: float) -> dict[str, Any]:
    """The values that are not the usual one, by regular expressions as peft matches them: behind any dot."""
    grouped: dict[float, list[str]] = {}
    for path, value in values.items():
        if value != usual:
            grouped.setdefault(value, []).append(path)
    return {f"^({_either(paths)})": value for value, paths in grouped.items()}

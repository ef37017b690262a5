"""torch.compile: whether a run can be compiled, what of it, and whether it pays.

Compiled is what gradients go through: the denoiser and a control branch, each whole, and the layers of a text
encoder that is read anew in each step. Around them stays what changes from step to step: the hooks that put
new words' rows in, the objective, the loss, the optimiser. What then happens: tuner/compiled.py.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from tuner import device
from tuner.data.flow import Flow
from tuner.data.loader import Division
from tuner.data.plan import Plan, Stages
from tuner.errors import UserError
from tuner.family import Family
from tuner.method import Method
from tuner.text import layers
from tuner.training import Train

MOST = 24
"""Shapes that `auto` compiles for, at most."""
SECONDS, SECONDS_A_LAYER = 20.0, 0.1
"""Time that compiling one shape takes: a constant, and for each smallest layer. An expectation: the embedded
UNet with LoRA took about a minute on one CPU core."""
LAUNCHES = 0.1
"""A GPU that is done within this share of a step after the last launch has waited for launches."""
SAVED_LAUNCHING, SAVED_COMPUTING = 0.4, 0.1
"""Share of a step that compiling saves, where launches take the time and where the GPU does. Expectations, on
the careful side of what is published (1.06 to 1.3 times as fast where the GPU computes)."""
MARGIN = 1.5
"""What is saved has to be this many times what compiling takes."""


class CompileError(UserError):
    """What `train.compile: on` asks for cannot be done."""


def passed(family: Family, methods: Sequence[Method]) -> dict[str, Any]:
    """The networks that gradients go through, by name."""
    networks = family.modules()
    if any(method.WHOLE_STEP for method in methods):
        return {name: net for name, net in networks.items() if any(p.requires_grad for p in net.parameters())}
    found = {"unet": networks["unet"]}
    if any(not method.CACHES_TEXT for method in methods):
        found |= family.text_encoders
    for method in methods:
        if (branch := method.control_branch()) is not None:
            found["branch"] = branch
    return found


def units(family: Family, methods: Sequence[Method]) -> dict[str, nn.Module]:
    """What is compiled, each by itself, by name: unet, branch, text_encoder.encoder.layers.0 ..."""
    found: dict[str, nn.Module] = {}
    for name, network in passed(family, methods).items():
        if name in family.text_encoders:
            place, count = layers(network)
            found |= {f"{name}.{place}.{n}": network.get_submodule(f"{place}.{n}") for n in range(count)}
        else:
            found[name] = network
    return found


def missing(kind: str) -> str | None:
    """What a type of device lacks for compiling, in words; None: nothing."""
    if kind not in ("cpu", "cuda"):
        return f"devices of type {kind} are not compiled for"
    compilers = [os.environ.get("CXX") or "g++", "clang++"]
    if not any(shutil.which(name) for name in compilers):
        return f"no C++ compiler is here ({' or '.join(compilers)})"
    if kind == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if torch.cuda.get_device_capability() < (7, 0):
            return "the GPU is too old for triton, which needs compute capability 7.0"
    return None


def obstacle(family: Family, methods: Sequence[Method], accelerator: Accelerator) -> str | None:
    """Why this run cannot be compiled, in words; None: it can."""
    own = [method.kind for method in methods if method.WHOLE_STEP]
    if own:
        return f"method {own[0]} has a step of its own, which is not compiled"
    if family.options.quantise is not None:
        return f"layers that are stored in {family.options.quantise} (base.quantise) are not compiled"
    if device.sharding() is not None and accelerator.num_processes > 1:
        return "networks that are shared out among processes (FSDP2) are not compiled"
    return missing(accelerator.device.type)


def check(asked: str, family: Family, methods: Sequence[Method], accelerator: Accelerator) -> None:
    """Raises CompileError where compiling is asked for and cannot be done."""
    if asked == "on" and (why := obstacle(family, methods, accelerator)) is not None:
        raise CompileError(f"train.compile: found on, but {why}; expected auto or off")


def stated(recipe: Train, kind: str) -> str:
    """What is known of a run before its first step: on, off, or auto, which is decided while it runs."""
    undecided = recipe.compile == "auto" and kind != "cpu" and not recipe.deterministic
    return "auto" if undecided else recipe.compile.replace("auto", "off")


@dataclass(frozen=True)
class Shapes:
    """The shapes of a run's batches on one process.

    Attributes:
        count: how many there are, at most.
        sizes: pictures in a whole micro-batch; of stages each.
        pixels: of the largest micro-batch.
    """

    count: int
    sizes: frozenset[int]
    pixels: int

    @classmethod
    def of(cls, plan: Plan | Stages | Flow, division: Division, side: int) -> Shapes:
        """Those of a plan; `side`: pixels of the largest square."""
        parts = division.accumulate * division.processes
        if isinstance(plan, Flow):
            every: set[tuple[int, object]] = {
                (plan.batch_size // parts, shape) for one in plan.buckets for shape in one.shapes
            }
        else:
            plans = plan.plans if isinstance(plan, Stages) else (plan,)
            every = {
                (one.batch_size // parts, (shape, number if shape is None else 0))
                for number, one in enumerate(plans)
                for shape in one.shapes
            }
        sizes = frozenset(size for size, _ in every)
        return cls(len(every), sizes, max(sizes) * side**2)


@dataclass(frozen=True)
class Times:
    """A step as it was measured: seconds, and the share of them that launching did not take."""

    step: float
    tail: float


def verdict(left: int, times: Times, count: int, shapes: int) -> tuple[bool, str]:
    """Whether compiling pays, and why, in words.

    Args:
        left: steps to come.
        times: of an uncompiled step.
        count: smallest layers of what is compiled.
        shapes: graphs that are compiled, of each.
    """
    launching = times.tail < LAUNCHES
    share = SAVED_LAUNCHING if launching else SAVED_COMPUTING
    saved, cost = left * times.step * share, shapes * (SECONDS + SECONDS_A_LAYER * count)
    pays = saved > MARGIN * cost
    many = f"{shapes} shapes" if shapes > 1 else "one shape"
    why = (
        f"{left} steps of {times.step:.3g} s are left, of which {'launches' if launching else 'the GPU'} "
        f"take{'' if launching else 's'} the time: about {saved:.0f} s would be saved, "
        f"and compiling {many} takes about {cost:.0f} s"
    )
    return pays, why


def layout(family: Family, methods: Sequence[Method], kind: str) -> list[str]:
    """Lay convolutions' weights out with the channels last, as a GPU's kernels want them; not on a CPU.

    On a CPU nothing is gained by it. A convolution with such weights gives outputs laid out so, whatever its
    input. Numbers, names and the parameters themselves stay; files are written as always.

    Args:
        kind: the device's type.

    Returns:
        The paths of the layers that were changed.
    """
    if kind != "cuda":
        return []
    modules = family.modules()
    networks: dict[str, nn.Module] = {name: net for name, net in modules.items() if name in ("unet", "vae")}
    for method in methods:
        if (branch := method.control_branch()) is not None:
            networks["branch"] = branch
    changed = []
    for name, network in networks.items():
        for path, layer in network.named_modules():
            if isinstance(layer, nn.Conv2d):
                layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
                changed.append(f"{name}.{path}")
    return changed


def align(optimiser: torch.optim.Optimizer) -> None:
    """Lay an optimiser's state out as its parameters are: one kernel goes through both, number by number.

    A checkpoint may come from a device where they were laid out otherwise.
    """
    for parameter, state in optimiser.state.items():
        for name, value in state.items():
            same = isinstance(value, torch.Tensor) and value.shape == parameter.shape
            if same and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)

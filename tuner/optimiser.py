"""Optimisers and learning-rate schedules by name."""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from tuner.errors import UserError
from tuner.muon import Muon

Schedule = Literal["constant", "linear", "cosine"]

EIGHT_BIT = {"adamw8bit": "AdamW8bit", "lion8bit": "Lion8bit"}  # their classes in bitsandbytes.optim
# What AdamW uses. An optimiser that has no such option may be given just this value.
COMMON = {"weight_decay": 0.01, "betas": (0.9, 0.999), "eps": 1e-8}
# LBFGS needs a closure that it may call several times a step, SparseAdam sparse gradients.
UNFIT = {"Optimizer", "LBFGS", "SparseAdam"}


class OptimiserError(UserError):
    """An optimiser or schedule that does not exist, cannot be used here, or does not take an option."""


def build(
    groups: Sequence[Mapping[str, Any]],
    name: str,
    learning_rate: float,
    weight_decay: float | None = None,
    betas: tuple[float, float] | None = None,
    eps: float | None = None,
) -> Optimizer:
    """The optimiser `name` over `groups`, each {"params": tensors, and, if it has its own, "lr": rate}.

    `name` is muon (tuner/muon.py; torch's own takes matrices alone), adamw8bit or lion8bit (bitsandbytes) or
    another class of torch.optim, in any case. An option that is None has its own default (which is
    not the same for all: SGD decays no weights, AdamW does).

    Raises:
        OptimiserError: for an unknown name, for one that cannot be used here, for an option the optimiser
            does not take (unless its value is AdamW's default) or does not accept.
    """
    kind = _find(name)
    taken = inspect.signature(kind).parameters
    options: dict[str, Any] = {"lr": learning_rate}
    for option, value in (("weight_decay", weight_decay), ("betas", betas), ("eps", eps)):
        if value is None:
            continue
        if option in taken:
            options[option] = value
        elif value != COMMON[option]:
            raise OptimiserError(f"{kind.__name__} does not take {option} (found {value})")
    if kind is torch.optim.AdamW:
        options["fused"] = True  # one kernel for all: a third of the time on the CPU
    for group in groups:
        assert {"params"} <= set(group) <= {"params", "lr"}, sorted(group)
    copies = [{**group, "params": list(group["params"])} for group in groups]
    assert copies and all(group["params"] for group in copies), "an optimiser needs parameters in each group"
    try:
        return kind(copies, **options)
    except (TypeError, ValueError) as error:
        raise OptimiserError(f"{kind.__name__} cannot be made with {options}: {error}") from error


def schedule(optimiser: Optimizer, name: str, warmup: int, steps: int) -> LambdaLR:
    """Learning rates over `steps` optimiser steps; step the result once after each optimiser step.

    Over the first `warmup` steps the rate is step / warmup of the full one: the very first is 0. After them
    it stays ("constant"), or falls to 0 at `steps` as a straight line ("linear") or half a cosine
    (arXiv 1608.03983, eq. 5) ("cosine"). A `warmup` longer than `steps` is a ramp that is not finished.

    Raises:
        OptimiserError: for an unknown name, a negative `warmup`, or `steps` below 1.
    """
    if name not in get_args(Schedule):
        raise OptimiserError(_unknown("schedule", name, get_args(Schedule)))
    if warmup < 0 or steps < 1:
        raise OptimiserError(f"a schedule needs warmup >= 0 and steps >= 1, found {warmup} and {steps}")

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        if name == "constant":
            return 1.0
        # Kept at 1 beyond the end, where the cosine would rise again.
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return 1.0 - progress if name == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))

    return LambdaLR(optimiser, factor)


def _find(name: str) -> Callable[..., Optimizer]:
    wanted = name.lower()
    if wanted in EIGHT_BIT:
        return _eight_bit(EIGHT_BIT[wanted])
    known: dict[str, Callable[..., Optimizer]] = {
        label.lower(): kind
        for label, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, Optimizer) and label not in UNFIT
    }
    known["muon"] = Muon
    if wanted not in known:
        raise OptimiserError(_unknown("optimiser", name, [*known, *EIGHT_BIT]))
    return known[wanted]


def _eight_bit(label: str) -> Callable[..., Optimizer]:
    try:
        library = importlib.import_module("bitsandbytes.optim")
    # A build for another CUDA fails to load its binary in one of these ways.
    except (ImportError, OSError, RuntimeError) as error:
        raise OptimiserError(
            f"{label} needs the package bitsandbytes, which cannot be used here ({error}); "
            "install it (pip install 'tuner[gpu]') or take adamw"
        ) from error
    kind: Callable[..., Optimizer] = getattr(library, label)
    return kind


def _unknown(what: str, found: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(found.lower(), names, n=3) or sorted(names)
    return f"unknown {what} {found!r}; did you mean {' or '.join(near)}?"

"""Optimisers and learning-rate schedules by name."""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast, get_args

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from tuner.errors import UserError
from tuner.lion import Lion
from tuner.muon import Muon
from tuner.training import Schedule


class Packaged(NamedTuple):
    """An optimiser of another package."""

    module: str
    label: str  # its class
    extra: str  # what to install of this project to have it


PACKAGED = {
    "adamw8bit": Packaged("bitsandbytes.optim", "AdamW8bit", "gpu"),
    "pagedadamw8bit": Packaged("bitsandbytes.optim", "PagedAdamW8bit", "gpu"),
    "pagedadamw32bit": Packaged("bitsandbytes.optim", "PagedAdamW32bit", "gpu"),
    "lion8bit": Packaged("bitsandbytes.optim", "Lion8bit", "gpu"),
    "pagedlion8bit": Packaged("bitsandbytes.optim", "PagedLion8bit", "gpu"),
    "prodigy": Packaged("prodigyopt", "Prodigy", "optimisers"),
    "adamwschedulefree": Packaged("schedulefree", "AdamWScheduleFree", "optimisers"),
    "radamschedulefree": Packaged("schedulefree", "RAdamScheduleFree", "optimisers"),
    "sgdschedulefree": Packaged("schedulefree", "SGDScheduleFree", "optimisers"),
}
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
    options: Mapping[str, Any] | None = None,
) -> Optimizer:
    """The optimiser `name` over `groups`, each {"params": tensors, and, if it has its own, "lr": rate}.

    `name` is muon (tuner/muon.py; torch's own takes matrices alone), lion (tuner/lion.py), a key of PACKAGED
    or another class of torch.optim, in any case. What is None has the class's own default (which is not the
    same for all: SGD decays no weights, AdamW does). `options` are further arguments of the class; a list
    among them is given as a tuple.

    Raises:
        OptimiserError: for an unknown name, for one that cannot be used here, for an option the class does
            not take or does not accept, or for several learning rates where it needs one.
    """
    kind = _find(name)
    named = {"weight_decay": weight_decay, "betas": betas, "eps": eps}
    chosen = {key: value for key, value in named.items() if value is not None}
    further = {k: tuple(v) if isinstance(v, list) else v for k, v in (options or {}).items()}
    _check_options(kind, chosen, further)
    arguments = {"lr": learning_rate, **chosen, **further}
    if kind is torch.optim.AdamW and not further.keys() & {"fused", "foreach", "differentiable"}:
        arguments["fused"] = True  # one kernel for all: a third of the time on the CPU
    for group in groups:
        assert {"params"} <= set(group) <= {"params", "lr"}, sorted(group)
    copies = [{**group, "params": list(group["params"])} for group in groups]
    assert copies and all(group["params"] for group in copies), "an optimiser needs parameters in each group"
    rates = sorted({float(group.get("lr", learning_rate)) for group in copies})
    if name.lower() == "prodigy" and len(rates) > 1:
        raise OptimiserError(f"prodigy finds one learning rate for all; found groups with {rates}")
    try:
        return kind(copies, **arguments)
    except (TypeError, ValueError) as error:
        raise OptimiserError(f"{kind.__name__} cannot be made with {arguments}: {error}") from error


def _check_options(
    kind: Callable[..., Optimizer], chosen: Mapping[str, Any], further: Mapping[str, Any]
) -> None:
    """Raises OptimiserError for what the class does not take, or what is given twice."""
    many = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(kind).parameters.values()
    taken = [p.name for p in parameters if p.kind not in many and p.name not in ("params", "lr")]
    for option, value in chosen.items():
        if option not in taken:
            raise OptimiserError(f"{kind.__name__} does not take {option} (found {value})")
        if option in further:
            raise OptimiserError(f"{option} is given twice: as optimiser.{option} and in optimiser.options")
    for option in further:
        if option == "lr":
            raise OptimiserError("optimiser.options: lr is train.learning_rate")
        if option not in taken:
            raise OptimiserError(_unknown(f"option of {kind.__name__}", option, taken))


class Averaging:
    """The average of the weights that a schedule-free optimiser keeps (arXiv 2405.15682); else nothing.

    Such an optimiser trains at one point and answers for another, and has train() and eval() to go between
    them. Going there and back rounds, so here what was trained is kept and put back: a run is the same
    however often it is looked at, and a checkpoint, taken while it trains, continues it exactly.
    """

    def __init__(self, optimiser: Optimizer) -> None:
        """Call it before a checkpoint is restored: it tells the optimiser that training begins."""
        self.optimiser = cast(Any, optimiser)  # torch's own class has neither
        self.kept = all(callable(getattr(optimiser, name, None)) for name in ("train", "eval"))
        if self.kept:
            self.optimiser.train()

    def keep(self) -> None:
        """Put the averages into the parameters for good, at the end of training."""
        if self.kept:
            self.optimiser.eval()

    @contextmanager
    def swap(self) -> Iterator[None]:
        """Within it the parameters hold the averages; after it bitwise what they held before."""
        if not self.kept:
            yield
            return
        parameters = [p for group in self.optimiser.param_groups for p in group["params"]]
        trained = [p.detach().clone() for p in parameters]
        self.optimiser.eval()
        try:
            yield
        finally:
            self.optimiser.train()
            with torch.no_grad():
                for parameter, value in zip(parameters, trained, strict=True):
                    parameter.copy_(value)


def schedule(
    optimiser: Optimizer,
    name: str,
    warmup: int,
    steps: int,
    *,
    end: float = 0.0,
    cycles: int = 1,
    power: float = 1.0,
    pieces: Sequence[tuple[int, float]] = (),
) -> LambdaLR:
    """Learning rates over `steps` optimiser steps; step the result once after each optimiser step.

    Over the first `warmup` steps the rate is step / warmup of the full one: the very first is 0. After them,
    with p = (step - warmup) / (steps - warmup) from 0 to 1, it is the full one times

    - constant: 1; piecewise_constant: the factor of the last of `pieces` (step, factor) that began, else 1;
    - inverse_sqrt: sqrt(warmup / step) (arXiv 1706.03762, eq. 3);
    - end + (1 - end) f, with f, linear: 1 - p; cosine: half a cosine (arXiv 1608.03983, eq. 5);
      cosine_with_restarts: `cycles` of them; polynomial: (1 - p)^power; rex: (1 - p) / (1 - p / 2)
      (arXiv 2107.04197, eq. 4).

    A `warmup` longer than `steps` is a ramp that is not finished.

    Raises:
        OptimiserError: for an unknown name, or a number out of range.
    """
    if name not in get_args(Schedule):
        raise OptimiserError(_unknown("schedule", name, get_args(Schedule)))
    if warmup < (1 if name == "inverse_sqrt" else 0) or steps < 1:
        raise OptimiserError(
            f"a schedule needs warmup >= 0 (inverse_sqrt: >= 1) and steps >= 1, found {warmup} and {steps}"
        )
    if not 0 <= end < 1 or cycles < 1 or power <= 0 or any(factor < 0 for _, factor in pieces):
        raise OptimiserError(f"a schedule cannot have {end=}, {cycles=}, {power=}, {pieces=}")

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        if name == "inverse_sqrt":
            return math.sqrt(warmup / step)
        if name in ("constant", "piecewise_constant"):
            begun = [value for start, value in pieces if start <= step]
            return begun[-1] if begun else 1.0
        # Kept at the end beyond it, where the cosine would rise again.
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        return end + (1.0 - end) * _fall(name, progress, cycles, power)

    return LambdaLR(optimiser, factor)


def _fall(name: str, progress: float, cycles: int, power: float) -> float:
    """From 1 at progress 0 to 0 at 1."""
    left = 1.0 - progress
    if name == "linear":
        return left
    if name == "polynomial":
        return math.pow(left, power)
    if name == "rex":
        return left / (0.5 + 0.5 * left)
    if name == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    assert name == "cosine_with_restarts", name
    return 0.0 if progress == 1.0 else 0.5 * (1.0 + math.cos(math.pi * ((cycles * progress) % 1.0)))


def _find(name: str) -> Callable[..., Optimizer]:
    wanted = name.lower()
    if wanted in PACKAGED:
        return _packaged(PACKAGED[wanted])
    known: dict[str, Callable[..., Optimizer]] = {
        label.lower(): kind
        for label, kind in vars(torch.optim).items()
        if isinstance(kind, type) and issubclass(kind, Optimizer) and label not in UNFIT
    }
    known |= {"muon": Muon, "lion": Lion}
    if wanted not in known:
        raise OptimiserError(_unknown("optimiser", name, [*known, *PACKAGED]))
    return known[wanted]


def _packaged(about: Packaged) -> Callable[..., Optimizer]:
    package = about.module.partition(".")[0]
    try:
        library = importlib.import_module(about.module)
    # A build of bitsandbytes for another CUDA fails to load its binary in one of these ways.
    except (ImportError, OSError, RuntimeError) as error:
        raise OptimiserError(
            f"{about.label} needs the package {package}, which cannot be used here ({error}); "
            f"install it (pip install 'tuner[{about.extra}]') or take adamw"
        ) from error
    kind: Callable[..., Optimizer] | None = getattr(library, about.label, None)
    if kind is None:
        raise OptimiserError(
            f"this version of the package {package} has no {about.label}; "
            f"install a newer one (pip install -U 'tuner[{about.extra}]') or take adamw"
        )
    return kind


def _unknown(what: str, found: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(found.lower(), names, n=3) or sorted(names)
    return f"unknown {what} {found!r}; did you mean {' or '.join(near)}?"

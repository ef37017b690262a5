"""A training step asks the device for nothing: the host runs ahead of it (tuner/loop.py)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import TorchDispatchMode

from tuner import loop
from tuner.data.loader import Division
from tuner.ema import Ema
from tuner.guard import Watch
from tuner.objective import Objective

ASKS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "unique", "equal")
"""Operations whose result the host needs: their values, or the size of what they give."""
HOST = ("lift_fresh",)
"""A tensor made of numbers of the host: a copy that is waited for, where it goes to a device."""


class Seen(TorchDispatchMode):
    """Counts operations by name, those of the backward pass included."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.forbidden: Counter[str] = Counter()
        self.looks = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.names[name] += 1
        if self.looks and name in ASKS + HOST:
            self.forbidden[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def test_what_waits_is_seen() -> None:
    with Seen() as seen:
        x = torch.ones(3, requires_grad=True)
        float(x.sum())
        x.detach().nonzero()
        bool(x.sum() > 0)
        torch.tensor([1.0, 2.0])
    assert seen.forbidden == {"_local_scalar_dense": 2, "nonzero": 1, "lift_fresh": 1}
    assert seen.names["sum"] == 2


def test_a_step_waits_for_nothing(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator(cpu=True)
    recipe = SimpleNamespace(train=SimpleNamespace(seed=0, clip=1.0))
    watch = Watch(bench.task, None, True)
    ema = Ema(bench.task.named_trained(), 0.9)
    task, prepared = accelerator.prepare(bench.task, bench.optimiser())
    compiled = SimpleNamespace(on=lambda batch: nullcontext())
    run: Any = SimpleNamespace(
        recipe=recipe, accelerator=accelerator, methods=[bench.method], task=bench.task, division=Division()
    )
    made: Any = SimpleNamespace(task=task, prepared=prepared, watch=watch, compiled=compiled)
    batches = iter([bench.batch(), bench.batch()])
    loop.one_step(run, made, batches, 0)  # what is made once, such as the optimiser's state
    seen, sample = Seen(), Objective.sample_t

    def unseen(objective: Objective, u: torch.Tensor) -> torch.Tensor:
        """It checks its numbers on the CPU, where they are."""
        seen.looks = False
        found = sample(objective, u)
        seen.looks = True
        return found

    monkeypatch.setattr(Objective, "sample_t", unseen)
    with seen:
        loss, figures = loop.one_step(run, made, batches, 1)
        ema.update(1)
    assert math.isfinite(float(loss)) and figures
    assert seen.names["_fused_adamw_"] >= 1 and sum(seen.names.values()) > 300
    # The embedded base's own parts are trained on CPUs, and ask for a batch's size and captions.
    parts = {"contrastive": {"_local_scalar_dense": 2, "lift_fresh": 1}, "autoencoder": {"lift_fresh": 1}}
    own = parts.get(bench.case.method, {})
    if bench.case.config.get("kind") == "loha":  # peft writes its scale as a tensor, which stays on the host
        assert seen.forbidden.pop("lift_fresh") > 0
    assert seen.forbidden == own

"""No method makes the guard speak while it learns, on any family."""

from __future__ import annotations

from typing import Any

import pytest

from tuner import guard
from tuner.guard import Watch


def test_a_healthy_start_raises_nothing(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a warm-up, whose first step moves nothing: six steps later all tensors had a gradient."""
    monkeypatch.setattr(guard, "WITHIN", 5)
    watch, made, batch = Watch(bench.task, None, True), bench.optimiser(), bench.batch()
    schedule = [0.0, 0.5, *[1.0] * 4]
    rates = [group["lr"] for group in made.param_groups]
    for step, factor in enumerate(schedule, start=1):
        for group, rate in zip(made.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        made.zero_grad()
        loss, _ = bench.task(batch)
        loss.backward()
        watch.gradients()
        bench.method.before_update(step - 1)
        watch.kept()
        made.step()
        bench.method.after_update()
        assert watch.row(step, {"loss": float(loss)}, rates[0] * factor) is None
        judged = watch._counted >= guard.WITHIN
        fault = watch.lot(step)
        assert fault is None, fault
    assert judged and watch._seen is None, "the verdict was given"
    assert watch.weights(len(schedule)) is None

"""Compiled training: every method on every family in whole graphs, with the same gradients."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from tuner.compiled import Compiling
from tuner.compiling import Shapes, units
from tuner.data.loader import Division
from tuner.training import Train

pytestmark = pytest.mark.slow  # tracing a network takes ten seconds and more


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing that was traced, and no accelerator, of a test before; and no log of all that is traced."""
    logging.getLogger("torch.__trace").propagate = False
    AcceleratorState._reset_state(True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    AcceleratorState._reset_state(True)
    torch._dynamo.reset()


def compiling(bench: Any, backend: str = "aot_eager", **train: Any) -> Compiling:
    recipe = Train(batch_size=4, learning_rate=1e-3, steps=10, **{"compile": "on", **train})
    shapes = Shapes(1, frozenset({4}), 4 * 32**2)
    return Compiling(recipe, bench.task, shapes, Division(), Accelerator(cpu=True), 10, backend)


def gradients(bench: Any, compiled: Compiling, count: int) -> list[dict[str, torch.Tensor]]:
    """Of as many batches; each has other numbers and the same shape."""
    found = []
    for number in range(count):
        batch = bench.batch([(number + i) % 6 for i in range(4)])
        torch.manual_seed(number)  # dropout
        with compiled.on(batch):
            loss, _ = bench.task(batch)
            loss.backward()
        found.append(bench.gradients() | {"loss": loss.detach()})
        bench.task.zero_grad()
        bench.family.denoiser.zero_grad()
    return found


def test_whole_graphs_and_the_same_gradients(case: Any, build: Callable[..., Any]) -> None:
    if case.method in ("autoencoder", "contrastive"):
        pytest.skip("its own step is not compiled")
    plain, bench = build(case), build(case)
    for one in (plain, bench):
        one.wake()
    names = {name: sorted(net.state_dict()) for name, net in bench.family.modules().items()}
    expected = gradients(plain, compiling(plain, compile="off"), 2)
    compiled = compiling(bench)
    assert compiled.start(None) is None and compiled.state == "on"
    found = gradients(bench, compiled, 2)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"], dict(counters["graph_break"])
    made = units(bench.family, [bench.method])
    whole = [name for name in made if "." not in name]
    # Of one encoder all layers share a graph; another one has the first where its input has no gradient.
    encoders = {name.rsplit(".", 1)[0] for name in made if "." in name}
    least = len(whole) + len(encoders)
    assert least <= counters["stats"]["unique_graphs"] <= least + len(encoders)
    assert len(found) == 2
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-6)
    assert {name: sorted(net.state_dict()) for name, net in bench.family.modules().items()} == names
    assert made and not any("forward" in vars(module) for module in made.values())

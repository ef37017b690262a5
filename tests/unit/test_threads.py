"""When a micro-batch's parts go through a network on threads of their own, and how it is divided."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tuner import allocator, threads
from tuner.batch import Batch
from tuner.family import Moments
from tuner.text import Text, Tokens


def batch(size: int, side: int = 4) -> Batch:
    def drawn(*shape: int) -> Tensor:
        return torch.arange(size * torch.Size(shape).numel(), dtype=torch.float32).reshape(size, *shape)

    picture = drawn(4, side, side)
    ids = torch.arange(size * 77).reshape(size, 1, 77)
    second = Tokens(ids + 1, torch.arange(size)[:, None], tuple(range(size)))
    return Batch(
        names=tuple(f"n{i}" for i in range(size)),
        captions=tuple(f"c{i}" for i in range(size)),
        weight=drawn()[:, None].squeeze(1),
        total=7.0,
        u=drawn(),
        noise=picture,
        posterior=picture + 1,
        moments=Moments(picture + 2, picture + 3),
        tokens=Tokens(ids, torch.arange(size)[:, None], tuple(range(size)), second),
        text=Text(drawn(77, 8), drawn(8)),
        condition=drawn(3, 8, 8),
        sizes=drawn(6),
        mask=drawn(1, side, side),
    )


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize(("size", "count", "sizes"), [(4, 2, [2, 2]), (5, 2, [2, 3]), (2, 3, [1, 1])])
def test_parts_are_the_batch_again(size: int, count: int, sizes: list[int]) -> None:
    whole = batch(size)
    parts = whole.parts(count)
    assert [len(part.names) for part in parts] == sizes
    assert all(part.total == whole.total for part in parts)
    looked = 0
    for field in ("names", "captions"):
        assert sum((getattr(part, field) for part in parts), ()) == getattr(whole, field)
    for field in ("weight", "u", "noise", "posterior", "condition", "sizes", "mask"):
        assert torch.equal(torch.cat([getattr(part, field) for part in parts]), getattr(whole, field))
        looked += 1
    for field in ("moments", "text"):
        for i, tensor in enumerate(getattr(whole, field)):
            assert torch.equal(torch.cat([getattr(part, field)[i] for part in parts]), tensor)
            looked += 1
    assert looked == 11
    for read in (lambda one: one.tokens, lambda one: one.tokens.second):
        assert torch.equal(torch.cat([read(part).ids for part in parts]), read(whole).ids)
        assert sum((read(part).cut for part in parts), ()) == read(whole).cut


CPU = torch.device("cpu")


def test_parts_are_for_several_small_pictures() -> None:
    assert threads.Threads.fit(batch(2, 32))
    assert not threads.Threads.fit(batch(2, 33))
    assert not threads.Threads.fit(batch(1, 32))


def test_parts_are_for_one_process_with_threads_on_the_cpu_that_draws_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def asked(device: torch.device = CPU, processes: int = 1, whole: bool = False, **config: float) -> bool:
        method: Any = SimpleNamespace(WHOLE_STEP=whole, config=SimpleNamespace(**config))
        return threads.sound(family, [method], device, processes)

    network = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0))
    family: Any = SimpleNamespace(modules=lambda: {"unet": network})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert asked() and asked(dropout=0.0)
    assert not asked(torch.device("cuda")) and not asked(processes=2)
    assert not asked(whole=True) and not asked(dropout=0.1)
    network.append(nn.Dropout(0.1))
    assert not asked()
    del network[-1]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert not asked()


class Weighted(nn.Module):
    """A loss whose gradient is known: the sum of a * noise, and b is not in it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))
        self.seen: list[int] = []

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        self.seen.append(torch.get_num_threads())
        return (self.a * batch.noise).sum() / batch.total, {}


def test_gradients_are_added_and_what_has_none_keeps_none() -> None:
    task, whole = Weighted(), replace(batch(3), total=1.0)
    together = threads.Threads(task, [task.a, task.b], 2)
    expected = whole.noise.sum()
    for times in (1, 2):
        assert torch.equal(together.backward(whole), expected)
        assert task.a.grad is not None and float(task.a.grad) == times * float(expected)
    assert task.b.grad is None
    assert task.seen == [1] * 4
    together.close()


def test_a_part_that_fails_is_the_steps_failure() -> None:
    class Failing(Weighted):
        def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            raise RuntimeError("out of memory")

    task = Failing()
    together = threads.Threads(task, [task.a], 2)
    with pytest.raises(RuntimeError, match="out of memory"):
        together.backward(batch(2))
    together.close()


def test_the_allocator_is_left_alone_where_the_environment_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    class Library:
        def __init__(self, name: None) -> None:
            pass

        @staticmethod
        def mallopt(key: int, value: int) -> int:
            asked.append((key, value))
            return 1

    monkeypatch.setattr(allocator.ctypes, "CDLL", Library)
    for name in ("MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)
    assert allocator.keep_freed() and asked == list(allocator.KEPT.items())
    for name in ("MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD"):
        monkeypatch.setenv(name, "1")
        assert not allocator.keep_freed()
        monkeypatch.delenv(name)
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())  # no glibc
    assert not allocator.keep_freed()
    assert len(asked) == len(allocator.KEPT)

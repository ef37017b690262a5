"""Attention that depends on where a run is: the same numbers as diffusers' own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from tuner import attention
from tuner.families.sd1 import StableDiffusion1

EMBEDDED = Path(attention.__file__).parent / "embedded"


@pytest.mark.parametrize("shape", [(2, 20, 32), (2, 32, 4, 5)], ids=["sequence", "picture"])
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("limit", [0, 10**9], ids=["fused", "plain"])
def test_same_as_the_stock_processor(
    shape: tuple[int, ...], cross: bool, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer = Attention(query_dim=32, cross_attention_dim=24 if cross else None, heads=2, dim_head=16)
    hidden = torch.randn(shape)
    context = torch.randn(2, 7, 24) if cross else None
    layer.set_processor(AttnProcessor2_0())
    expected = layer(hidden, context)
    chosen = attention.SmallOnCpu()
    used: list[str] = []
    for name in ("plain", "fused"):
        kept = getattr(chosen, name)

        def spy(*given: object, name: str = name, kept: object = kept) -> object:
            used.append(name)
            return kept(*given)  # type: ignore[operator]

        setattr(chosen, name, spy)
    monkeypatch.setattr(attention, "SMALL", limit)
    layer.set_processor(chosen)
    torch.testing.assert_close(layer(hidden, context), expected, rtol=1e-5, atol=1e-6)
    assert used == ["fused" if limit == 0 else "plain"]


def test_the_limit_counts_queries_times_keys() -> None:
    layer = Attention(query_dim=8, heads=1, dim_head=8)
    chosen = attention.SmallOnCpu()
    calls: list[str] = []
    chosen.plain = lambda *given: calls.append("plain") or given[1]
    chosen.fused = lambda *given: calls.append("fused") or given[1]
    for queries in (1024, 1025):
        chosen(layer, torch.zeros(1, queries, 8))
    assert calls == ["plain", "fused"]


def test_base_and_clone_have_it_and_the_autoencoder_keeps_its_own() -> None:
    family = StableDiffusion1.load(EMBEDDED, ("unet", "vae"))
    branch = family.control_branch(3)
    for network, wanted in ((family.denoiser, True), (branch, True), (family.modules()["vae"], False)):
        layers = [layer for layer in network.modules() if isinstance(layer, Attention)]
        assert all(isinstance(layer.processor, attention.SmallOnCpu) == wanted for layer in layers)
        assert layers or not wanted


@pytest.fixture
def own_order() -> Iterator[list[SDPBackend]]:
    """Puts torch's own order back."""
    before = _cur_sdpa_kernel_backends(with_priority=True)
    yield before
    for context in attention._kept:
        context.__exit__(None, None, None)  # type: ignore[attr-defined]
    attention._kept.clear()
    assert _cur_sdpa_kernel_backends(with_priority=True) == before


@pytest.mark.parametrize("base", ["sd1", "sdxl"])
def test_the_shapes_are_those_that_the_network_has(
    base: str, folders: dict[str, Path], models: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    unet: Any = models.family_of(folders[base], "lora").denoiser
    found: Counter[attention.Shape] = Counter()
    fused = torch.nn.functional.scaled_dot_product_attention

    def spy(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **more: Any) -> torch.Tensor:
        found[attention.Shape(query.shape[1], query.shape[3], query.shape[2], key.shape[2])] += 1
        return fused(query, key, value, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    monkeypatch.setattr(attention, "SMALL", 0)
    told = {}
    if base == "sdxl":
        told = {"text_embeds": torch.zeros(1, 48), "time_ids": torch.zeros(1, 6)}
    hidden = torch.zeros(1, 77, unet.config.cross_attention_dim)
    unet(torch.zeros(1, 4, 8, 8), torch.zeros(1), hidden, added_cond_kwargs=told)
    assert attention.shapes(unet, 8, 77) == found and len(found) >= 2


SHAPE = attention.Shape(8, 40, 4096, 77)


def test_the_fastest_order_stays(own_order: list[SDPBackend]) -> None:
    asked: list[object] = []

    def seconds(shape: attention.Shape, order: tuple[SDPBackend, ...] | None) -> float:
        asked.append(order)
        return 0.5 if order is not None and order[0] == SDPBackend.CUDNN_ATTENTION else 1.0

    assert attention.settle({SHAPE: 3}, seconds).startswith("attention: cudnn first, in 50% of the time")
    assert len(asked) == 1 + len(attention.ORDERS)
    now = _cur_sdpa_kernel_backends(with_priority=True)
    assert now[0] == SDPBackend.CUDNN_ATTENTION
    assert {*now, SDPBackend.OVERRIDEABLE} == set(own_order)  # that one is of devices of other makers


def test_what_is_hardly_faster_or_fails_changes_nothing(own_order: list[SDPBackend]) -> None:
    def hardly(shape: attention.Shape, order: object) -> float:
        return 1.0 if order is None else 0.98

    def failing(shape: attention.Shape, order: object) -> float:
        raise RuntimeError("no kernel\nfor it")

    assert "own order" in attention.settle({SHAPE: 1}, hardly)
    told = attention.settle({SHAPE: 1}, failing)
    assert told.endswith("as trying others failed: no kernel") and not attention._kept
    assert _cur_sdpa_kernel_backends(with_priority=True) == own_order

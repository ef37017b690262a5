"""Attention that depends on where a run is: the same numbers as diffusers' own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

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

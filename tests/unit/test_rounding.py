"""bfloat16 weights whose updates are rounded stochastically."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tuner import optimiser, rounding
from tuner.errors import UserError
from tuner.rounding import Rounded, stochastic


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def neighbours(wide: Tensor) -> tuple[Tensor, Tensor]:
    """The bfloat16 numbers on both sides of float32 ones, towards zero and away from it, as float32."""
    low = (wide.view(torch.int32) & -65536).view(torch.float32)
    high = ((wide.view(torch.int32) & -65536) + 65536).view(torch.float32)
    return low, high


def test_each_rounding_is_one_of_the_two_neighbours() -> None:
    """Of all sizes and signs, subnormal ones too; what is a bfloat16 already stays."""
    wide = torch.randn(200_000, generator=draw()) * torch.exp2(
        torch.randint(-140, 120, (200_000,), generator=draw(1))
    )
    low, high = neighbours(wide)
    made = stochastic(wide, draw(2))
    assert made.dtype == torch.bfloat16
    down, up = made.float() == low, made.float() == high
    assert bool((down | up).all()) and down.sum() > 50_000 and up.sum() > 50_000
    kept = torch.randn(100_000, generator=draw(3)).bfloat16()
    assert torch.equal(stochastic(kept.float(), draw(4)), kept)


def test_what_is_no_finite_number_stays() -> None:
    """Every NaN is one afterwards: CUDA's has all bits set, and adding to it would make a zero of it."""
    bits = torch.tensor([0x7FFFFFFF, 0x7FC00000, 0x7F800001, 0x7F800000, -0x800000], dtype=torch.int32)
    for seed in range(20):
        made = stochastic(bits.view(torch.float32), draw(seed))
        assert made.isnan().tolist() == [True, True, True, False, False]
        assert made[3:].tolist() == [math.inf, -math.inf]


@pytest.mark.parametrize("value", [1.0 + 2**-9, 1.0 + 2**-12, -(3.0 + 2**-10), 1e-3, -0.7])
def test_the_mean_is_the_value(value: float) -> None:
    """Within 5 deviations: a rounding goes up with probability p, so the mean of n has sqrt(p (1 - p) / n)
    gaps."""
    count = 400_000
    wide = torch.full((count,), value)
    low, high = (side[0].double() for side in neighbours(wide))
    gap, p = high - low, (wide[0].double() - low) / (high - low)
    assert 0 < p < 1
    off = stochastic(wide, draw()).double().mean() - wide[0].double()
    assert abs(float(off)) < 5 * float(abs(gap) * (p * (1 - p) / count).sqrt())
    nearest = wide.bfloat16().double().mean() - wide[0].double()
    assert abs(float(nearest)) > 10 * abs(float(off)), "as the nearest would be off"


def trained(name: str, dtype: torch.dtype, steps: int, rate: float = 1e-3, seed: int = 0) -> Tensor:
    """Weights of 1.0 after steps of plain descent with gradients of 1.0."""
    weights = nn.Parameter(torch.ones(10_000, dtype=dtype))
    made = optimiser.build([{"params": [weights]}], name, rate)
    stepping = Rounded(made, seed) if dtype == torch.bfloat16 else made
    for _ in range(steps):
        weights.grad = torch.ones_like(weights)
        stepping.step()
    return weights.detach().double()


def test_an_update_below_half_a_last_place_moves_weights_on_average() -> None:
    """100 updates of 1e-4, where bfloat16 below 1 has steps of 2^-8 = 0.0039; rounded to the nearest:
    none."""
    plain = nn.Parameter(torch.ones(10, dtype=torch.bfloat16))
    still = optimiser.build([{"params": [plain]}], "sgd", 1e-4)
    for _ in range(100):
        plain.grad = torch.ones_like(plain)
        still.step()
    assert bool((plain == 1).all())
    moved = trained("sgd", torch.bfloat16, 100, 1e-4)
    # Each update has a variance of at most a quarter of a squared gap.
    bound = 5 * math.sqrt(100 / 4 / 10_000) * 2**-8
    assert abs(float(moved.mean()) - 0.99) < bound < 0.002
    assert bool((moved < 1).any())


@pytest.mark.parametrize("name", rounding.SINGLE)
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_every_optimiser_goes_as_in_float32_on_average(name: str) -> None:
    if "bit" in name:
        pytest.importorskip("bitsandbytes")
    made, exact = (trained(name, dtype, 30) for dtype in (torch.bfloat16, torch.float32))
    moved = 1 - float(exact.mean())
    assert moved > 0.02
    assert abs(float(made.mean()) - float(exact.mean())) < 0.02 * moved


def parameters(seed: int = 0) -> list[nn.Parameter]:
    sizes = [(70, 80), (5,), (3, 4, 5), (64, 65)]
    made = draw(seed)
    return [nn.Parameter(torch.randn(size, generator=made).bfloat16()) for size in sizes]


def stepped(own: list[nn.Parameter], made: Rounded, first: int, last: int) -> None:
    for step in range(first, last):
        for number, parameter in enumerate(own):
            gradient = torch.randn(parameter.shape, generator=draw(100 * step + number)).bfloat16()
            parameter.grad = None if (number, step) == (1, 0) else gradient
        made.step()


def built(own: list[nn.Parameter], name: str, seed: int = 0) -> Rounded:
    groups = [{"params": own[:2]}, {"params": own[2:], "lr": 3e-3}]
    return Rounded(optimiser.build(groups, name, 1e-3), seed)


@pytest.mark.parametrize("name", ["adamw", "adam", "lion", "adamw8bit"])
def test_a_resume_is_exact(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Moments keep their type: torch's own way back would make them the weights'."""
    if "bit" in name:
        pytest.importorskip("bitsandbytes")
    whole = parameters()
    stepped(whole, built(whole, name), 0, 6)
    half = parameters()
    before = built(half, name)
    stepped(half, before, 0, 3)
    torch.save(before.state_dict(), tmp_path / "state.pt")
    again = [nn.Parameter(p.detach().clone()) for p in half]
    after = built(again, name)
    after.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert after.taken == 3 and len(after.state) == 4
    kept = [t.dtype for own in after.state.values() for t in own.values() if isinstance(t, Tensor)]
    assert len(kept) >= 4 and torch.bfloat16 not in kept
    stepped(again, after, 3, 6)
    assert all(torch.equal(one, other) for one, other in zip(whole, again, strict=True))
    other = parameters()
    stepped(other, built(other, name, seed=1), 0, 6)
    assert not torch.equal(whole[0], other[0]), "another seed rounds otherwise"


def test_lots_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a parameter's random bits depend on is its number, not what it is updated together with."""
    whole, parts = parameters(), parameters()
    stepped(whole, built(whole, "adamw"), 0, 3)
    monkeypatch.setattr(rounding, "LOT", 5000)
    assert list(rounding._lots([5600, 5, 60, 4160])) == [[0], [1, 2, 3]]
    stepped(parts, built(parts, "adamw"), 0, 3)
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))
    assert rounding.scratch([5600, 5, 60, 4160]) == 8 * 5600 + 16 * 5600


def test_learning_rates_follow_the_schedule() -> None:
    own = parameters()
    made = built(own, "sgd")
    falling = optimiser.schedule(made, "linear", 0, 10)
    before = own[0].detach().clone()
    for _ in range(10):
        stepped(own, made, 0, 1)
        falling.step()
    assert [group["lr"] for group in made.param_groups] == [0.0, 0.0] and not torch.equal(own[0], before)
    then = own[0].detach().clone()
    stepped(own, made, 0, 1)
    assert torch.equal(own[0], then), "a rate of 0 moves nothing, also not by rounding"


@pytest.mark.parametrize("name", ["muon", "prodigy", "adamwschedulefree", "adafactor"])
def test_other_optimisers_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"updates each tensor by itself, found {name}; take one of adamw"):
        rounding.check(name, ["lora"], "bf16", False)


def test_other_methods_are_refused() -> None:
    rounding.check("AdamW", ["lora"], "bf16", False)
    with pytest.raises(UserError, match="method textual_inversion needs float32"):
        rounding.check("adamw", ["lora", "textual_inversion"], "bf16", False)


def test_other_runs_are_refused() -> None:
    with pytest.raises(UserError, match="needs train.precision bf16, and auto is fp32 on this machine"):
        rounding.check("adamw", ["full"], "no", False)
    with pytest.raises(UserError, match="does not go with FSDP2"):
        rounding.check("adamw", ["full"], "bf16", True)

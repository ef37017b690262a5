from __future__ import annotations

import pytest
import torch
from torch import nn

from tuner.ema import Ema, EmaError


def named(*values: float, dtype: torch.dtype = torch.float32) -> list[tuple[str, nn.Parameter]]:
    return [(f"p{i}", nn.Parameter(torch.full((2, 3), v, dtype=dtype))) for i, v in enumerate(values)]


def put(parameters: list[tuple[str, nn.Parameter]], value: float) -> None:
    with torch.no_grad():
        for _, parameter in parameters:
            parameter.fill_(value)


def test_average_closed_form_with_warm_up() -> None:
    parameters = named(1.0, -2.0)
    ema = Ema(parameters, decay=0.25)
    expected = [1.0, -2.0]
    decays = []
    for step in range(1, 6):
        put(parameters, float(step))
        ema.update(step)
        decay = min(0.25, (1 + step) / (10 + step))
        decays.append(decay)
        expected = [decay * e + (1 - decay) * step for e in expected]
    assert decays[0] == 2 / 11 and decays[1:] == [0.25] * 4  # 3 / 12 is where the warm-up ends
    state = ema.state_dict()
    assert list(state) == ["p0", "p1"]
    for name, value in zip(state, expected, strict=True):
        torch.testing.assert_close(state[name], torch.full((2, 3), value), rtol=1e-6, atol=0)


def test_decay_warms_up_and_stays() -> None:
    ema = Ema(named(0.0), decay=0.999)
    assert ema.decay_at(1) == 2 / 11 and ema.decay_at(90) == 91 / 100
    assert ema.decay_at(8990) == 8991 / 9000 == 0.999 and ema.decay_at(10**6) == 0.999


def test_decay_zero_follows_the_parameters() -> None:
    parameters = named(1.0)
    ema = Ema(parameters, decay=0.0)
    put(parameters, 0.3)
    ema.update(1)
    assert torch.equal(ema.state_dict()["p0"], parameters[0][1].detach())


def test_averages_of_half_precision_are_float32() -> None:
    # One update by 1/256 of the way is lost in bfloat16, which has 8 bits.
    parameters = named(1.0, dtype=torch.bfloat16)
    ema = Ema(parameters, decay=255 / 256)
    put(parameters, 2.0)
    ema.update(10**6)
    average = ema.state_dict()["p0"]
    assert average.dtype == torch.float32 and torch.equal(average, torch.full((2, 3), 1 + 1 / 256))
    with ema.swap():
        assert parameters[0][1].dtype == torch.bfloat16
        assert torch.equal(parameters[0][1].detach(), average.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_swap_restores_bitwise(dtype: torch.dtype) -> None:
    drawn = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    drawn[:3] = torch.tensor([float("nan"), float("inf"), -0.0], dtype=dtype)
    parameter = nn.Parameter(torch.zeros(50, dtype=dtype))
    optimiser = torch.optim.SGD([parameter], lr=0.1)
    ema = Ema([("p", parameter)], decay=0.9)
    with torch.no_grad():
        parameter.copy_(drawn)
    place = parameter.data_ptr()
    with ema.swap():
        assert torch.equal(parameter.detach(), torch.zeros(50, dtype=dtype))
        assert parameter.data_ptr() == place and optimiser.param_groups[0]["params"][0] is parameter
    assert parameter.data_ptr() == place and parameter.requires_grad
    assert parameter.detach().view(torch.uint8).equal(drawn.view(torch.uint8))


def test_swap_restores_after_an_exception_and_gradients_still_flow() -> None:
    parameters = named(1.0)
    ema = Ema(parameters, decay=0.9)
    put(parameters, 5.0)
    with pytest.raises(KeyError), ema.swap():
        raise KeyError
    parameter = parameters[0][1]
    assert torch.equal(parameter.detach(), torch.full((2, 3), 5.0))
    parameter.sum().backward()
    assert parameter.grad is not None and torch.equal(parameter.grad, torch.ones(2, 3))
    with ema.swap():
        assert torch.equal(parameter.detach(), torch.ones(2, 3))


def test_no_update_and_no_second_swap_within_a_swap() -> None:
    ema = Ema(named(1.0), decay=0.9)
    with ema.swap():
        with pytest.raises(AssertionError):
            ema.update(1)
        with pytest.raises(AssertionError), ema.swap():
            pass
    ema.update(1)


def test_state_round_trip_continues_exactly() -> None:
    parameters = named(1.0, 2.0)
    ema = Ema(parameters, decay=0.9)
    put(parameters, 0.7)
    ema.update(1)
    state = ema.state_dict()
    put(parameters, -0.3)
    ema.update(2)
    fresh = Ema(named(0.0, 0.0), decay=0.9)
    fresh.load_state_dict(state)
    for parameter in fresh.parameters.values():
        parameter.data.fill_(-0.3)
    fresh.update(2)
    compared = [torch.equal(fresh.state_dict()[name], ema.state_dict()[name]) for name in ("p0", "p1")]
    assert compared == [True, True]
    assert not torch.equal(state["p0"], ema.state_dict()["p0"])  # a copy: the later update left it alone


def test_wrong_states_are_errors_and_change_nothing() -> None:
    ema = Ema(named(1.0, 2.0), decay=0.9)
    good = ema.state_dict()
    wrong = [
        {"p0": torch.zeros(2, 3)},
        {"p0": torch.zeros(2, 3), "p1": torch.zeros(2, 3), "p2": torch.zeros(2, 3)},
        {"p0": torch.zeros(2, 3), "p1": torch.zeros(3, 2)},
        {"p0": torch.zeros(2, 3), "p1": torch.zeros(2, 3, dtype=torch.float16)},
    ]
    for state in wrong:
        with pytest.raises(EmaError):
            ema.load_state_dict(state)
    assert len(wrong) == 4
    assert all(torch.equal(ema.state_dict()[name], good[name]) for name in ("p0", "p1"))


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_decay_out_of_range_is_an_error(decay: float) -> None:
    with pytest.raises(EmaError):
        Ema(named(1.0), decay)

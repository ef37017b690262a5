"""A linear layer with its LoRA as one operation: peft's numbers and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tuner.adapters import fused, layers
from tuner.adapters.layers import ADAPTER, Making
from tuner.adapters.targets import Slot


class Host(nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 8, bias=bias).requires_grad_(False)


def made(how: Making, bias: bool = True, alpha: float = 6.0) -> Any:
    """A layer with an adapter of rank 3 that is not at its start."""
    torch.manual_seed(0)
    host = Host(bias)
    layers.inject(host, {"inner": Slot(3, alpha)}, how, 0)
    layer: Any = host.inner
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return layer


def plain(layer: Any, x: Tensor) -> Tensor:
    """peft's own way."""
    seen: Tensor = super(fused.FusedLinear, layer).forward(x)
    return seen


def gradients(layer: Any, x: Tensor, y: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    wanted = [x, layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight]
    return list(torch.autograd.grad(y, wanted, torch.randn_like(y)))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("alpha", [3.0, 6.0], ids=["scale_1", "scale_2"])
@pytest.mark.parametrize("shape", [(5, 12), (2, 7, 12), (2, 3, 4, 12)], ids=str)
def test_output_and_gradients_are_pefts(bias: bool, alpha: float, shape: tuple[int, ...]) -> None:
    layer = made(Making(), bias, alpha).double()
    assert isinstance(layer, fused.FusedLinear)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    seen, expected = layer(x), plain(layer, x)
    assert seen.grad_fn.name() == "_ProductBackward"
    torch.testing.assert_close(seen, expected, rtol=1e-12, atol=1e-12)
    pairs = list(zip(gradients(layer, x, seen), gradients(layer, x, expected), strict=True))
    assert len(pairs) == 3
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_gradients_are_those_of_differences() -> None:
    layer = made(Making()).double()
    x = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda given: layer(given), (x,))


def test_an_input_without_a_gradient_gets_none_and_is_not_computed_for() -> None:
    layer, x = made(Making()), torch.randn(4, 12)
    layer(x).sum().backward()
    assert x.grad is None and layer.lora_A[ADAPTER].weight.grad is not None


def test_under_autocast_it_is_as_near_to_the_truth_as_peft() -> None:
    layer, x = made(Making()), torch.randn(64, 12, requires_grad=True)
    truth = plain(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        seen, expected = layer(x), plain(layer, x)
    assert seen.dtype == expected.dtype == torch.bfloat16
    assert float((seen - truth).norm()) <= 1.05 * float((expected - truth).norm())
    for one, parameter in zip(gradients(layer, x, seen), (x, *layer.parameters()), strict=False):
        assert one.dtype == torch.float32 and parameter.dtype == torch.float32


def test_what_is_no_plain_lora_goes_peft_s_way() -> None:
    x = torch.randn(4, 12, requires_grad=True)
    for how in (Making(kind="dora"), Making(kind="loha"), Making(kind="lokr")):
        assert not isinstance(made(how), fused.FusedLinear)
    layer = made(Making(dropout=0.5))
    layers.train_mode(layer, False)
    assert layer(x).grad_fn.name() == "_ProductBackward"
    layers.train_mode(layer, True)
    assert layer(x).grad_fn.name() != "_ProductBackward"
    layer = made(Making())
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x))
    mixed = made(Making())
    mixed.base_layer.bfloat16()  # what is added is float32: peft knows how
    assert torch.equal(mixed(x.bfloat16()), plain(mixed, x.bfloat16()))

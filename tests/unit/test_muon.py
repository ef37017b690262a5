from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from tuner.muon import QUINTIC, ROUNDS, Muon, is_matrix, orthogonal
from tuner.optimiser import build


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def steps(optimiser: torch.optim.Optimizer, parameters: Sequence[Parameter], seeds: range) -> None:
    for seed in seeds:
        for i, parameter in enumerate(parameters):
            parameter.grad = drawn(*parameter.shape, seed=1000 * i + seed)
        optimiser.step()


@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (64, 576), (300, 40)])
def test_orthogonal_keeps_singular_vectors_and_evens_their_values(rows: int, columns: int) -> None:
    matrices = drawn(3, rows, columns)
    u, values, vh = torch.linalg.svd(matrices, full_matrices=False)
    made = u.mT @ orthogonal(matrices) @ vh.mT  # diagonal if the vectors are kept
    found = made.diagonal(dim1=1, dim2=2)
    strong = values > 0.05 * values[:, :1]
    assert found[strong].min() > 0.5 and found.max() < 1.3
    assert (made - torch.diag_embed(found)).abs().max() < 0.1


def test_orthogonal_of_zeros_is_zeros() -> None:
    assert orthogonal(torch.zeros(2, 16, 20)).abs().max() == 0


def test_the_first_step_of_a_matrix_in_closed_form() -> None:
    # The gradient 3 I has the norm 12, so each singular value starts at 1/4 and follows the quintic.
    parameter = Parameter(torch.ones(16, 16))
    optimiser = Muon([parameter], lr=0.1, weight_decay=0.5)
    parameter.grad = 3 * torch.eye(16)
    optimiser.step()
    value = 0.25
    for _ in range(ROUNDS):
        value = QUINTIC[0] * value + QUINTIC[1] * value**3 + QUINTIC[2] * value**5
    expected = 0.95 * torch.ones(16, 16) - 0.2 * 4 * 0.1 * value * torch.eye(16)
    torch.testing.assert_close(parameter.detach(), expected, atol=1e-3, rtol=0)


def test_what_is_no_matrix_takes_adamw_steps() -> None:
    ours = [Parameter(drawn(20)), Parameter(drawn(8, 300)), Parameter(drawn(4, 2, 3, 3))]
    theirs = copy.deepcopy(ours)
    assert not any(map(is_matrix, ours))
    options = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6}
    steps(Muon(ours, **options), ours, range(5))
    steps(torch.optim.AdamW(theirs, **options), theirs, range(5))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_a_convolution_is_the_matrix_of_its_flattened_weight() -> None:
    convolution, matrix = Parameter(drawn(32, 16, 3, 3)), Parameter(drawn(32, 16, 3, 3).flatten(1))
    first, second = Muon([convolution], lr=0.1), Muon([matrix], lr=0.1)
    for seed in range(3):
        convolution.grad = drawn(32, 16, 3, 3, seed=seed)
        matrix.grad = convolution.grad.flatten(1)
        first.step()
        second.step()
    assert torch.equal(convolution.flatten(1), matrix)
    assert not torch.equal(matrix, drawn(32, 16, 3, 3).flatten(1))


def test_a_saved_state_continues_exactly() -> None:
    start = [Parameter(drawn(20, 24)), Parameter(drawn(20, 24, seed=1)), Parameter(drawn(9))]
    at_once, halves = copy.deepcopy(start), copy.deepcopy(start)
    steps(Muon(at_once, lr=0.01), at_once, range(6))
    first = Muon(halves, lr=0.01)
    steps(first, halves, range(3))
    second = Muon(halves, lr=0.01)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    steps(second, halves, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(at_once, halves, strict=True))


def test_lowers_a_loss_and_leaves_what_has_no_gradient() -> None:
    target = drawn(24, 24, seed=5)
    parameter, idle = Parameter(torch.zeros(24, 24)), Parameter(torch.ones(24, 24))
    optimiser = build([{"params": [parameter, idle]}], "Muon", 0.2, weight_decay=0.0)
    assert isinstance(optimiser, Muon)
    for _ in range(60):
        optimiser.zero_grad()
        (parameter - target).square().mean().backward()
        optimiser.step()
    assert (parameter - target).square().mean() < 0.05 * target.square().mean()
    assert torch.equal(idle, torch.ones(24, 24))


def test_numbers_out_of_range_are_errors() -> None:
    with pytest.raises(ValueError, match="momentum"):
        Muon([Parameter(torch.ones(2))], momentum=1.0)

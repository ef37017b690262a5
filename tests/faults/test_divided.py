"""Another number of processes goes on: the same samples in the same order, equal within rounding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

# Plain descent: AdamW would make a whole step of a rounding.
PLAIN = {
    "method__lora__dropout": "0",
    "train__optimiser": "sgd",
    "train__learning_rate": "0.5",
    "train__clip": "null",
    "train__schedule": "constant",
}
STEPS = 12
PARTS = ((4, 1, 2), (8, 2, 1), (12, 1, 2))  # until which step, on how many processes, accumulating how often


def recorded(place: Path, processes: int, accumulate: int) -> list[tuple[str, str, float]]:
    """Name, noise and weight of each sample, in the order of the plan: step, micro-batch, process."""
    of_rank = []
    for rank in range(processes):
        lines = [json.loads(line) for line in Path(f"{place}-{rank}.jsonl").read_text().splitlines()]
        of_rank.append([list(zip(one["names"], one["each"], one["weight"], strict=True)) for one in lines])
    assert len({len(batches) for batches in of_rank}) == 1 and len(of_rank[0]) % accumulate == 0
    return [tuple(s) for batches in zip(*of_rank, strict=True) for batch in batches for s in batch]


@pytest.mark.slow
def test_one_process_then_two_then_one(new_run: Any, tmp_path: Path) -> None:
    alone, divided = new_run("lora", tmp_path / "alone"), new_run("lora", tmp_path / "divided")
    hooks = [["record", str(tmp_path / "whole")]]
    more = {**PLAIN, "train__steps": str(STEPS), "train__accumulate": "2"}
    assert alone.run(hooks, 1, **more) == 0, alone.printed
    found = []
    for until, processes, accumulate in PARTS:
        place = tmp_path / f"until-{until}"
        more = {**PLAIN, "train__steps": str(until), "train__accumulate": str(accumulate)}
        assert divided.run([["record", str(place)]], processes, **more) == 0, divided.printed
        found += recorded(place, processes, accumulate)
    wanted = recorded(tmp_path / "whole", 1, 2)
    # 10 samples in batches of 4: an epoch's last batch of 2, and no places that are only filled.
    assert found == wanted and len(wanted) == 4 * 10 and {weight for *_, weight in wanted} == {1.0}
    for said in ("1 x 2 (processes x train.accumulate) and is by 2 x 1", "2 x 1 (processes x"):
        assert f"within rounding, not bit for bit: the batch was divided by {said}" in divided.printed
    name = f"checkpoints/step-{STEPS:07d}/trained.safetensors"
    one, other = load_file(alone.output / name), load_file(divided.output / name)
    assert one.keys() == other.keys() and len(one) > 10
    for key, tensor in one.items():
        torch.testing.assert_close(other[key], tensor, rtol=1e-5, atol=1e-6)
    first = load_file(alone.output / "checkpoints/step-0000008/trained.safetensors")
    assert any(not torch.equal(first[key], one[key]) for key in one)


@pytest.mark.slow
def test_a_batch_that_cannot_be_divided_is_refused(new_run: Any, tmp_path: Path) -> None:
    run = new_run("lora", tmp_path)
    assert run.run((), 1, **PLAIN, train__steps="4") == 0
    assert run.run((), 2, **PLAIN, train__steps="8", train__accumulate="4") != 0
    assert "found 4, which 2 processes x 4 (train.accumulate) = 8 forward passes cannot share" in run.printed
    assert run.run((), 1, **PLAIN, train__steps="4") == 0 and "finished before" in run.printed

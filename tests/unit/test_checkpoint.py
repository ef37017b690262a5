"""Checkpoints: whole or not at all, exact, the newest that is whole."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tuner import checkpoint
from tuner.checkpoint import Parts
from tuner.ema import Ema
from tuner.errors import UserError

ACCELERATOR: Any = SimpleNamespace(is_main_process=True, wait_for_everyone=lambda: None)
FINGERPRINT = {"recipe": {"train.seed": 0, "objective.betas": (0.9, 0.999)}, "threads": 1}


class Small(torch.nn.Module):
    """Stands in for a task: four trained numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(4.0))

    def tensors(self) -> dict[str, torch.Tensor]:
        return {"0.weight": self.weight}

    def load_tensors(self, tensors: dict[str, torch.Tensor]) -> None:
        assert tensors.keys() == {"0.weight"}
        with torch.no_grad():
            self.weight.copy_(tensors["0.weight"])


def parts(ema: bool = True) -> Parts:
    task: Any = Small()
    optimiser = torch.optim.AdamW(task.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 / (1 + step))
    return Parts(task, optimiser, schedule, Ema([("0.weight", task.weight)], 0.5) if ema else None, None)


def step(made: Parts, number: int) -> None:
    weight: Any = made.task.weight
    made.optimiser.zero_grad()
    ((weight - number) ** 2).sum().backward()
    made.optimiser.step()
    made.schedule.step()
    if made.ema is not None:
        made.ema.update(number)


def write(output: Path, number: int, made: Parts, keep: int = 2) -> None:
    checkpoint.write(output, number, made, FINGERPRINT, keep, ACCELERATOR)


def names(output: Path) -> list[str]:
    return sorted(p.name for p in (output / "checkpoints").iterdir())


def test_a_continued_run_is_the_uninterrupted_one_bitwise(tmp_path: Path) -> None:
    whole = parts()
    for number in range(1, 7):
        step(whole, number)
        if number == 3:
            write(tmp_path, 3, whole)
    state = checkpoint.newest(tmp_path)
    assert state is not None and state.step == 3
    later = parts()
    assert checkpoint.restore(state, later) == 3
    for number in range(4, 7):
        step(later, number)
    assert torch.equal(whole.task.weight, later.task.weight)  # type: ignore[arg-type]
    assert whole.schedule.get_last_lr() == later.schedule.get_last_lr()
    assert whole.ema is not None and later.ema is not None
    whole.ema.keep()
    later.ema.keep()
    assert torch.equal(whole.task.weight, later.task.weight)  # type: ignore[arg-type]
    assert not torch.equal(whole.task.weight, torch.arange(4.0))  # type: ignore[arg-type]


def test_nothing_to_continue(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None


def test_the_newest_are_kept(tmp_path: Path) -> None:
    made = parts()
    for number in (5, 10, 15):
        write(tmp_path, number, made)
    assert names(tmp_path) == ["step-0000010", "step-0000015"]
    write(tmp_path, 20, made, keep=1)
    assert names(tmp_path) == ["step-0000020"]
    write(tmp_path, 20, made, keep=1)  # the same step again replaces it
    assert names(tmp_path) == ["step-0000020"]


def test_a_checkpoint_ahead_never_crowds_out_a_new_one(tmp_path: Path) -> None:
    made = parts()
    for number in (5, 10, 15):
        write(tmp_path, number, made, keep=3)
    checkpoint.drop_ahead(tmp_path, 5)
    write(tmp_path, 7, made, keep=2)
    assert names(tmp_path) == ["step-0000005", "step-0000007"]
    checkpoint.drop_ahead(tmp_path, 0)
    assert names(tmp_path) == []


FILES = ["manifest.json", "state.pt", "trained.safetensors"]


@pytest.mark.parametrize("file", FILES)
def test_one_wrong_byte_is_found_and_the_one_before_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    made = parts()
    write(tmp_path, 5, made)
    write(tmp_path, 10, made)
    newest = tmp_path / "checkpoints" / "step-0000010"
    assert sorted(p.name for p in newest.iterdir()) == FILES
    content = bytearray((newest / file).read_bytes())
    content[0 if file == "manifest.json" else len(content) // 2] ^= 0x01
    (newest / file).write_bytes(content)
    state = checkpoint.newest(tmp_path)
    assert state is not None and state.step == 5
    said = capsys.readouterr().out
    assert str(newest) in said and "step-0000005: this one, before it, is used" in said
    assert ("not a whole checkpoint" if file == "manifest.json" else f"damaged ({file})") in said


@pytest.mark.parametrize("file", FILES)
def test_a_torn_folder_is_passed_over(tmp_path: Path, file: str) -> None:
    made = parts()
    write(tmp_path, 5, made)
    write(tmp_path, 10, made)
    (tmp_path / "checkpoints" / "step-0000010" / file).unlink()
    (tmp_path / "checkpoints" / ".step-0000020.writing").mkdir()
    (tmp_path / "checkpoints" / "step-notes").mkdir()
    state = checkpoint.newest(tmp_path)
    assert state is not None and state.step == 5
    checkpoint.drop_ahead(tmp_path, state.step)
    write(tmp_path, 12, made)
    assert names(tmp_path) == ["step-0000005", "step-0000012", "step-notes"]


def test_all_damaged_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, 5, parts())
    (tmp_path / "checkpoints" / "step-0000005" / "state.pt").write_bytes(b"")
    assert checkpoint.newest(tmp_path) is None
    said = capsys.readouterr().out
    assert "step-0000005: damaged (state.pt)" in said and "is used" not in said


def test_differences_are_named(tmp_path: Path) -> None:
    write(tmp_path, 5, parts())
    state = checkpoint.newest(tmp_path)
    assert state is not None
    # A pair becomes a list in JSON; that is no difference.
    assert checkpoint.differences(state, FINGERPRINT) == []
    found = checkpoint.differences(state, {"recipe": FINGERPRINT["recipe"], "precision": "bf16"})
    assert found == [
        "precision: the checkpoint has None, the run 'bf16'",
        "threads: the checkpoint has 1, the run None",
    ]
    other = {**FINGERPRINT, "recipe": {**FINGERPRINT["recipe"], "train.seed": 1}}  # type: ignore[dict-item]
    assert checkpoint.differences(state, other) == ["train.seed: the checkpoint has 0, the run 1"]


@pytest.mark.parametrize("before, text", [(True, "made with ema"), (False, "made without ema")])
def test_another_kind_of_state_is_refused(tmp_path: Path, before: bool, text: str) -> None:
    write(tmp_path, 5, parts(ema=before))
    state = checkpoint.newest(tmp_path)
    assert state is not None
    with pytest.raises(UserError, match=text):
        checkpoint.restore(state, parts(ema=not before))


def test_the_manifest_lists_every_other_file(tmp_path: Path) -> None:
    write(tmp_path, 5, parts())
    folder = tmp_path / "checkpoints" / "step-0000005"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert sorted(manifest["files"]) == ["state.pt", "trained.safetensors"]
    assert manifest["step"] == 5

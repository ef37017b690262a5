"""The plan at a run's start: one line, or a refusal before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tuner import build, memory, recipe
from tuner.errors import UserError
from tuner.memory import here
from tuner.memory.here import Room

pytestmark = pytest.mark.plans_memory
CPU: Any = SimpleNamespace(device=torch.device("cpu"), num_processes=1, process_index=0)
TEXT = """\
base: {base}
method: lora
data: {{source: none, resolution: 64}}
train: {{steps: 2, batch_size: 8, learning_rate: 1e-4, precision: fp32}}
output: none
"""


@pytest.fixture
def asked(tmp_path: Path, sd1_folder: Path) -> recipe.Recipe:
    path = tmp_path / "r.yaml"
    path.write_text(TEXT.format(base=sd1_folder))
    return recipe.load(path)


def test_one_line(asked: recipe.Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    memory.admit(asked, CPU)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("memory: about ") and "GiB" in line


def test_refused_before_anything_is_loaded(asked: recipe.Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine has a little less than a step needs: the message names what would need less."""
    needs = memory.plan(asked)
    most = needs.most(("training",)) - needs.activations // 4
    monkeypatch.setattr(here, "available", lambda device: Room(most, most))
    monkeypatch.setattr(build, "adapted", lambda *_: pytest.fail("something is loaded"))
    with pytest.raises(UserError, match="needs about .*\n  train.accumulate=") as caught:
        build.build(asked, CPU)
    assert "nothing here makes it fit" not in str(caught.value)


def test_little_is_free_now(
    asked: recipe.Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(here, "available", lambda device: Room(2**20, 2**40))
    memory.admit(asked, CPU)
    assert "only 1.0 MiB are free now" in capsys.readouterr().out
    monkeypatch.setattr(here, "plan", lambda *_: 1 / 0)
    memory.admit(asked, CPU)
    assert "memory: not planned: division by zero" in capsys.readouterr().out


def test_what_is_there() -> None:
    room = memory.available("cpu")
    assert room is not None and 0 < room.free <= room.total and room.total > 2**28

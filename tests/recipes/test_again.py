"""The same command again: a finished run is recognised, another one refused, a new start asked for."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tuner import device, loop
from tuner.log import read

Digests = Callable[[Path], dict[str, str]]
RECIPE = "textual_inversion.yaml"  # the quickest
EXPORT = "export/crescent.safetensors"


@pytest.fixture(scope="module")
def made(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a finished run; only to be read, or moved aside and back."""
    output: Path = tmp_path_factory.mktemp("again") / "out"
    assert tiny.start(RECIPE, output) == 0
    return output


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*_: object) -> bool:
        raise AssertionError("it trains")

    monkeypatch.setattr(loop, "train", train)


def test_a_finished_run_is_skipped(
    tiny: Any, made: Path, digests: Digests, no_training: None, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digests(made)
    assert tiny.start(RECIPE, made) == 0
    assert "finished before with this recipe, base and data; nothing to do" in capsys.readouterr().out
    assert len(before) > 10
    assert digests(made) == before


@pytest.mark.parametrize(
    "changed, line",
    [
        ({"train.seed": 1}, "train.seed: the checkpoint has 0, the run 1"),
        ({"train.learning_rate": 0.5}, "train.learning_rate: the checkpoint has 0.01, the run 0.5"),
        ({"train.steps": 1}, "the checkpoint has 2 steps, the run 1"),
    ],
)
def test_another_run_is_refused(
    tiny: Any,
    made: Path,
    digests: Digests,
    no_training: None,
    capsys: pytest.CaptureFixture[str],
    changed: dict[str, Any],
    line: str,
) -> None:
    before = digests(made)
    assert tiny.start(RECIPE, made, **changed) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[0].endswith("step-0000002 belongs to another run:")
    assert told[1] == f"  {line}" and len(told) == 4 + (changed.keys() == {"train.steps"})
    assert told[-2].startswith(
        "May change: train.steps and train.epochs (where train.schedule is constant), "
    )
    assert told[-1] == "Choose another output, or start anew there with train.resume=never."
    assert digests(made) == before


def test_what_is_not_in_the_way_is_told_too(
    tiny: Any, made: Path, no_training: None, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"train.seed": 1, "train.precision": "bf16", "preview.every": 0, "train.threads": 2}
    assert tiny.start(RECIPE, made, **more) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[1:-2] == [
        "  precision: the checkpoint has 'fp32', the run 'bf16'",
        "  train.precision: the checkpoint has 'fp32', the run 'bf16'",
        "  train.seed: the checkpoint has 0, the run 1",
        "Not in the way: preview.every 1 -> 0, train.threads 1 -> 2.",
    ]


def test_other_data_is_refused(
    tiny: Any, made: Path, no_training: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny.shapes / "concept", tmp_path / "concept")
    listing = tmp_path / "concept" / "metadata.jsonl"
    listing.write_text("".join(line + "\n" for line in listing.read_text().splitlines()[:4]))
    (tmp_path / "concept" / "000004.png").unlink()
    assert tiny.start(RECIPE, made, **{"data.source": tmp_path / "concept"}) == 2
    told = capsys.readouterr().err
    assert "\n  data files: the checkpoint has " in told and "\n  data.source: the checkpoint has " in told


def copied(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "out")
    return tmp_path / "out"


def test_a_finished_run_without_checkpoints_is_not_written_over(
    tiny: Any, made: Path, tmp_path: Path, no_training: None, capsys: pytest.CaptureFixture[str]
) -> None:
    output = copied(made, tmp_path)
    shutil.rmtree(output / "checkpoints")
    assert tiny.start(RECIPE, output, train__seed=1) == 2
    assert "holds a finished run without a checkpoint to compare" in capsys.readouterr().err
    assert (output / "finished.json").is_file()


def test_a_new_start_leaves_nothing_of_the_old_one(
    tiny: Any, made: Path, tmp_path: Path, digests: Digests
) -> None:
    output = copied(made, tmp_path)
    (output / "mine.txt").write_text("the user's own")
    more = {"train.seed": 1, "train.steps": 1, "train.resume": "never", "export.name": "other"}
    more |= {"evaluate.samples": 0}
    assert tiny.start(RECIPE, output, **more) == 0
    assert sorted(p.name for p in (output / "checkpoints").iterdir()) == ["step-0000001"]
    assert sorted(p.name for p in (output / "previews").iterdir()) == [
        "step-000001.json",
        "step-000001.png",
    ]
    assert not (output / "evaluation").exists()
    assert digests(output)[EXPORT] != digests(made)[EXPORT]
    assert [step for step, _ in read(output / "metrics.jsonl").scalars["loss"]] == [1]
    assert (output / "mine.txt").read_text() == "the user's own"


def test_more_steps_continue_a_finished_run(
    tiny: Any, made: Path, tmp_path: Path, digests: Digests, capsys: pytest.CaptureFixture[str]
) -> None:
    # The learning rate is constant: a run of three steps begins as one of two.
    output = copied(made, tmp_path)
    assert tiny.start(RECIPE, output, train__steps=3) == 0
    said = capsys.readouterr().out
    assert "(2 of 3 steps are done)" in said
    assert "changed since, as may be: " in said and "train.steps 2 -> 3" in said
    assert "the result will be, bit for bit, that of a run that was not stopped" in said
    assert tiny.start(RECIPE, tmp_path / "whole", train__steps=3) == 0
    assert digests(output)[EXPORT] == digests(tmp_path / "whole")[EXPORT] != digests(made)[EXPORT]


@pytest.mark.parametrize(
    "changed, line",
    [
        ({"train.threads": 2}, "threads were 1 and are 2 (train.threads)"),
        (
            {"train.accumulate": 2},
            "the batch was divided by 1 x 1 (processes x train.accumulate) and is by 1 x 2",
        ),
    ],
)
def test_what_changes_the_rounding_goes_on_and_is_told(
    tiny: Any, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: Any, line: str
) -> None:
    output = copied(made, tmp_path)
    assert tiny.start(RECIPE, output, train__steps=3, evaluate__samples=0, **changed) == 0
    said = capsys.readouterr().out
    assert f"equal to a run that was not stopped within rounding, not bit for bit: {line}" in said
    assert "the result will be, bit for bit" not in said


def test_other_code_is_told(
    tiny: Any,
    made: Path,
    tmp_path: Path,
    no_training: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from tuner import build, resume

    monkeypatch.setattr(resume, "code_digest", lambda: "other")
    versions = build.versions()
    monkeypatch.setattr(build, "versions", lambda: {**versions, "torch": "9"})
    with pytest.raises(AssertionError, match="it trains"):
        tiny.start(RECIPE, copied(made, tmp_path), train__steps=3)
    said = capsys.readouterr().out
    assert "not bit for bit: the code of tuner is another; torch was " in said and " and is 9" in said


def test_never_starts_a_finished_run_anew(tiny: Any, made: Path, tmp_path: Path, no_training: None) -> None:
    output = copied(made, tmp_path)
    for _ in range(2):
        with pytest.raises(AssertionError, match="it trains"):
            tiny.start(RECIPE, output, train__resume="never")
        assert not list((output / "checkpoints").iterdir())


def test_the_same_bits_are_asked_of_torch(tiny: Any, made: Path, tmp_path: Path, digests: Digests) -> None:
    # On the CPU they are the same without asking; an operation that had none would be an error.
    output = tmp_path / "asked"
    try:
        assert tiny.start(RECIPE, output, train__deterministic=True) == 0
        assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        device.deterministic(False)
    name = "checkpoints/step-0000002/trained.safetensors"
    assert digests(output)[name] == digests(made)[name]
    assert not torch.are_deterministic_algorithms_enabled()


def test_an_attempt_that_stopped_before_its_end_is_finished(
    tiny: Any, made: Path, tmp_path: Path, digests: Digests
) -> None:
    # Stopped between the last step and the end: nothing is trained, and nothing told twice.
    output = copied(made, tmp_path)
    (output / "finished.json").unlink()
    (output / EXPORT).unlink()
    assert tiny.start(RECIPE, output) == 0
    assert digests(output)[EXPORT] == digests(made)[EXPORT]
    old, new = (read(folder / "metrics.jsonl") for folder in (made, output))
    assert new.events == old.events and len(new.events) == 1
    assert new.measures == old.measures and len(new.measures) == 2
    assert new.scalars["loss"] == old.scalars["loss"]
    assert new.finished and (output / "finished.json").is_file()


def test_the_page_is_written_again(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tuner.cli import main

    output = copied(made, tmp_path)
    (output / "report.html").write_text("old")
    capsys.readouterr()
    assert main(["report", str(output)]) == 0
    assert capsys.readouterr().out.strip() == str(output / "report.html")
    assert "<html" in (output / "report.html").read_text(encoding="utf-8")


def test_the_summary_says_what_it_was(made: Path) -> None:
    summary = json.loads((made / "finished.json").read_text())
    assert summary.keys() == {"steps", "fingerprint", "recipe"}
    assert summary["steps"] == 2 and summary["recipe"]["train"]["seed"] == 0

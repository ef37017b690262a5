"""What metrics.jsonl holds, a continued run's file against an uninterrupted one's, the other loggers."""

from __future__ import annotations

import json
import math
import resource
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tuner import log
from tuner.disk import DiskError


def open_log(output: Path, resume_step: int | None = None, **changes: Any) -> log.Log:
    settings = {"tensorboard": False, "wandb": None, "main": True, **changes}
    return log.Log(output, resume_step=resume_step, **settings)


def write_steps(written: log.Log, first: int, last: int) -> None:
    for step in range(first, last + 1):
        written.scalars(step, {"loss": 1 / step, "learning_rate": 1e-4})
        if step % 3 == 0:
            written.event(step, f"validated at {step}")


def test_lines_are_exact(tmp_path: Path) -> None:
    with open_log(tmp_path) as written:
        written.scalars(12, {"loss": 0.1, "learning_rate": 1e-4, "images_per_second": 33.1})
        written.event(12, "edges followed")
        written.measures("edge F1", {"columns": ["strict"], "rows": {"floor": [0.5]}})
        # read while the log is open: every line is flushed
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines == [
        '{"step": 12, "loss": 0.1, "learning_rate": 0.0001, "images_per_second": 33.1}',
        '{"step": 12, "event": "edges followed"}',
        '{"measure": "edge F1", "values": {"columns": ["strict"], "rows": {"floor": [0.5]}}}',
    ]


def test_a_line_that_cannot_be_written_leaves_those_before_it(tmp_path: Path) -> None:
    written, place = open_log(tmp_path), tmp_path / "metrics.jsonl"
    written.scalars(1, {"loss": 1.0})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (place.stat().st_size + 9, hard))
    try:
        with pytest.raises(DiskError, match=r"metrics\.jsonl: cannot be written: File too large"), written:
            written.scalars(2, {"loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert place.read_text().startswith('{"step": 1, "loss": 1.0}\n{"step":')
    assert log.read(place).scalars == {"loss": [(1, 1.0)]}


def test_read_gives_back_what_was_written(tmp_path: Path) -> None:
    with open_log(tmp_path) as written:
        written.scalars(1, {"loss": 0.5})
        written.scalars(2, {"loss": 0.25, "validation_loss": 0.75})
        written.event(2, "a mark")
        written.measures("m", {"a": 1})
        written.measures("m", {"a": 2})
        unfinished = log.read(tmp_path / "metrics.jsonl")
        written.event(2, log.FINISHED)
    records = log.read(tmp_path / "metrics.jsonl")
    assert records.scalars == {"loss": [(1, 0.5), (2, 0.25)], "validation_loss": [(2, 0.75)]}
    assert records.measures == {"m": {"a": 2}}
    assert records.events == [(2, "a mark")]
    assert (unfinished.finished, records.finished, records.last_step) == (False, True, 2)


def test_values_that_are_not_finite_are_valid_json(tmp_path: Path) -> None:
    with open_log(tmp_path) as written:
        written.scalars(1, {"a": math.nan, "b": math.inf, "c": -math.inf})
        written.measures("m", {"rows": {"r": [math.nan, 1.5]}})
    text = (tmp_path / "metrics.jsonl").read_text()

    def refuse(word: str) -> None:
        raise AssertionError(word)

    first, second = (json.loads(line, parse_constant=refuse) for line in text.splitlines())
    assert first == {"step": 1, "a": "nan", "b": "inf", "c": "-inf"}
    assert second["values"]["rows"]["r"] == ["nan", 1.5]
    scalars = log.read(tmp_path / "metrics.jsonl").scalars
    assert math.isnan(scalars["a"][0][1])
    assert (scalars["b"][0][1], scalars["c"][0][1]) == (math.inf, -math.inf)


def test_numbers_of_numpy_are_numbers_and_other_objects_are_refused(tmp_path: Path) -> None:
    with open_log(tmp_path) as written:
        written.measures("m", {"a": np.float32(0.5), "b": np.int64(3), "c": True, "d": None})
        with pytest.raises(TypeError, match="object"):
            written.measures("n", {"a": object()})
    assert log.read(tmp_path / "metrics.jsonl").measures == {"m": {"a": 0.5, "b": 3, "c": True, "d": None}}


@pytest.mark.parametrize("k", [0, 1, 3, 5, 9])
def test_a_continued_file_equals_an_uninterrupted_one(tmp_path: Path, k: int) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    with open_log(whole) as written:
        write_steps(written, 1, 9)
        written.measures("m", {"a": 1})
        written.event(9, log.FINISHED)
    with open_log(parted) as written:
        write_steps(written, 1, 9)  # went on beyond its last checkpoint, to the final figures
        written.measures("m", {"a": 7})
        written.event(9, log.FINISHED)
    with (parted / "metrics.jsonl").open("a") as torn:
        torn.write('{"step": 10, "lo')
    with open_log(parted, resume_step=k) as written:
        write_steps(written, k + 1, 9)
        written.measures("m", {"a": 1})
        written.event(9, log.FINISHED)
    assert (parted / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert sorted(path.name for path in parted.iterdir()) == ["metrics.jsonl"]


def test_a_new_run_starts_a_new_file(tmp_path: Path) -> None:
    for _ in range(2):
        with open_log(tmp_path) as written:
            written.scalars(1, {"loss": 1.0})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 1.0}\n'


def test_continuing_without_a_file_starts_one(tmp_path: Path) -> None:
    with open_log(tmp_path, resume_step=4) as written:
        written.scalars(5, {"loss": 1.0})
    assert log.read(tmp_path / "metrics.jsonl").scalars == {"loss": [(5, 1.0)]}


def test_other_processes_write_nothing(tmp_path: Path) -> None:
    output = tmp_path / "never"
    with open_log(output, main=False, tensorboard=True, wandb="project") as written:
        written.scalars(1, {"loss": 1.0})
        written.measures("m", {"a": 1})
        written.event(1, "e")
    assert not output.exists()


def test_a_line_being_written_is_left_out_and_a_wrong_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    assert log.read(path).scalars == {"loss": [(1, 1.0)]}
    wrong = ["not json", '{"loss": 1.0}', '{"measure": "m"}', '{"step": 1, "loss": "low"}', "[]", ""]
    for line in wrong:
        path.write_text('{"step": 1, "loss": 1.0}\n' + line + "\n")
        with pytest.raises(log.LogError, match=r"metrics\.jsonl:2: "):
            log.read(path)


def test_measures_can_be_replaced_in_a_finished_file(tmp_path: Path) -> None:
    with open_log(tmp_path) as written:
        written.scalars(1, {"loss": 1.0})
        written.measures("a", {"x": 1})
        written.measures("b", {"x": 2})
        written.event(1, log.FINISHED)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    log.replace_measures(tmp_path, {"b": {"x": 3}})
    after = (tmp_path / "metrics.jsonl").read_bytes()
    assert after == before.replace(b'"x": 2', b'"x": 3')
    log.replace_measures(tmp_path, {"c": {"x": 4}, "b": {"x": 3}})
    assert (tmp_path / "metrics.jsonl").read_bytes() == after + b'{"measure": "c", "values": {"x": 4}}\n'
    assert log.read(tmp_path / "metrics.jsonl").finished


def test_tensorboard_holds_the_scalars_of_a_continued_run_once(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_log(tmp_path, tensorboard=True) as written:
        write_steps(written, 1, 6)
    with open_log(tmp_path, resume_step=4, tensorboard=True) as written:
        write_steps(written, 5, 7)
        written.measures("m", {"a": 1})
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    loss = [(event.step, event.value) for event in board.Scalars("loss")]
    assert loss == [(step, pytest.approx(1 / step, rel=1e-6)) for step in range(1, 8)]
    assert "measures/m/text_summary" in board.Tags()["tensors"]


def test_wandb_that_is_not_there_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # what makes an import fail
    with pytest.raises(log.LogError, match="pip install wandb"):
        open_log(tmp_path / "out", wandb="project")
    assert not (tmp_path / "out").exists()


def test_wandb_is_given_the_recipe_and_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Run:
        id = "abc"
        summary: dict[str, Any] = {}

        def log(self, values: dict[str, Any], step: int) -> None:
            calls.append((step, values))

        def finish(self) -> None:
            calls.append("finish")

    def init(**given: Any) -> Run:
        calls.append({name: given[name] for name in ("project", "config", "id", "resume")})
        return Run()

    module = types.ModuleType("wandb")
    monkeypatch.setattr(module, "init", init, raising=False)
    monkeypatch.setitem(sys.modules, "wandb", module)
    recipe = {"train": {"steps": 2}}
    with open_log(tmp_path, wandb="project", config=recipe) as written:
        written.scalars(1, {"loss": 1.0})
        written.measures("m", {"a": math.nan})
    with open_log(tmp_path, resume_step=1, wandb="project", config=recipe) as written:
        written.event(2, "e")
    assert calls == [
        {"project": "project", "config": recipe, "id": None, "resume": None},
        (1, {"loss": 1.0}),
        "finish",
        {"project": "project", "config": recipe, "id": "abc", "resume": "allow"},
        (2, {"event": "e"}),
        "finish",
    ]
    assert Run.summary == {"m": {"a": "nan"}}


def test_a_reserved_name_is_refused(tmp_path: Path) -> None:
    with open_log(tmp_path) as written, pytest.raises(AssertionError, match="event"):
        written.scalars(1, {"event": 1.0})

"""A run that is stopped at any moment continues, and ends as if it had never been."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

STEPS, EVERY = 48, 8
# Everything that a checkpoint must carry: an average, a schedule, a gradient's moments, dropout's chance.
RUN = {
    "train.steps": STEPS,
    "train.checkpoint.every": EVERY,
    "train.ema": 0.9,
    "method.lora.dropout": 0.1,
    "validate.every": 10,
    "preview.every": 20,
    "evaluate.samples": 0,
}
EXPORT = "export/lora.safetensors"
TIMES = {"images_per_second", "data_wait", "seconds"}


@pytest.fixture(scope="module")
def whole(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of the run that was never stopped."""
    output: Path = tmp_path_factory.mktemp("whole") / "out"
    assert tiny.start("lora.yaml", output, **RUN) == 0
    return output


def lines(output: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without its times."""
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    rows = [{key: value for key, value in row.items() if key not in TIMES} for row in rows]
    return [row for row in rows if row.keys() != {"step"}]


def assert_the_same(whole: Path, output: Path) -> None:
    assert (output / EXPORT).read_bytes() == (whole / EXPORT).read_bytes()
    assert lines(output) == lines(whole)
    assert len(lines(whole)) == STEPS + STEPS // 10 + 2  # losses, validations, verified, finished
    previews = sorted(p.name for p in (whole / "previews").iterdir())
    assert len(previews) == 6
    assert sorted(p.name for p in (output / "previews").iterdir()) == previews
    for name in previews:
        assert (output / "previews" / name).read_bytes() == (whole / "previews" / name).read_bytes()


def interrupt(command: list[str], number: int, ready: Callable[[], bool]) -> tuple[int, str]:
    """Start `command`, send it a signal as soon as it is ready; its exit code and what it printed."""
    unset = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    env = {name: value for name, value in os.environ.items() if name not in unset} | {"OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        until = time.monotonic() + 240
        while running.poll() is None and not ready() and time.monotonic() < until:
            time.sleep(0.005)
        assert running.poll() is None, running.communicate()[0]
        running.send_signal(number)
        printed, _ = running.communicate(timeout=240)
    finally:
        if running.poll() is None:
            running.kill()
    return running.returncode, printed


@pytest.mark.parametrize(
    "number, code",
    [
        (signal.SIGTERM, 0),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, -signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_ends_as_one_that_was_not(
    tiny: Any, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int, code: int
) -> None:
    output = tmp_path / "out"
    recipe = str(tiny.root / "recipes" / "lora.yaml")
    command = [sys.executable, str(tiny.root / "tuner" / "train.py"), recipe]
    command += tiny.overrides("lora.yaml", output, **RUN)
    metrics, first = output / "metrics.jsonl", output / "checkpoints" / f"step-{EVERY:07d}"
    killed = number == signal.SIGKILL

    def ready() -> bool:
        return first.is_dir() if killed else metrics.is_file() and metrics.stat().st_size > 0

    found, printed = interrupt(command, number, ready)
    assert found == code, printed
    assert not (output / "finished.json").exists() and not (output / "export").exists()
    assert "Traceback" not in printed
    steps = sorted(int(p.name[5:]) for p in (output / "checkpoints").glob("step-*"))
    assert steps and steps[-1] < STEPS, printed
    if not killed:
        kept = output / "checkpoints" / f"step-{steps[-1]:07d}"
        told = f"stopped. Kept: {kept} is whole ({steps[-1]} steps); the same command continues from it."
        assert printed.splitlines()[-1] == told
        assert "unfinished, at step" in (output / "report.html").read_text()

    capsys.readouterr()
    assert tiny.start("lora.yaml", output, **RUN) == 0
    said = capsys.readouterr().out
    assert f"step-{steps[-1]:07d} ({steps[-1]} of {STEPS} steps are done)" in said
    assert_the_same(whole, output)


def test_a_damaged_checkpoint_is_named_and_the_one_before_continues(
    tiny: Any, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    (output / "finished.json").unlink()
    kept = sorted(p.name for p in (output / "checkpoints").iterdir())
    assert kept == ["step-0000040", "step-0000048"]  # the newest two
    newest = output / "checkpoints" / kept[-1] / "trained.safetensors"
    content = bytearray(newest.read_bytes())
    content[-5] ^= 0x10
    newest.write_bytes(content)
    assert tiny.start("lora.yaml", output, **RUN) == 0
    said = capsys.readouterr().out
    assert f"{newest.parent}: damaged (trained.safetensors)" in said
    assert f"step-0000040 (40 of {STEPS} steps are done)" in said
    assert_the_same(whole, output)
    assert sorted(p.name for p in (output / "checkpoints").iterdir()) == kept


def test_from_a_named_checkpoint_into_another_output(
    tiny: Any, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, start = tmp_path / "out", whole / "checkpoints" / "step-0000040"
    assert tiny.start("lora.yaml", output, **RUN, train__resume=start) == 0
    # The bytes differ: the recipe in the metadata says where the run began.
    one, other = load_file(whole / EXPORT), load_file(output / EXPORT)
    assert one.keys() == other.keys() and len(one) > 10
    assert all(bool((one[name] == other[name]).all()) for name in one)
    # Stopped before its end, the same command goes on where it was, not from the named one again.
    (output / "finished.json").unlink()
    capsys.readouterr()
    assert tiny.start("lora.yaml", output, **RUN, train__resume=start) == 0
    assert f"continuing from {output / 'checkpoints' / 'step-0000048'} (48 of" in capsys.readouterr().out
    assert tiny.start("lora.yaml", output, **RUN, train__resume=whole / "nowhere") == 2
    assert f"train.resume: {whole / 'nowhere'}: no whole checkpoint there" in capsys.readouterr().err

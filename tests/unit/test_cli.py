"""The command line: exit codes, what is printed where, and how little is imported for it."""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from tuner import cli, recipe
from tuner.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
GOOD = """\
base: embedded
method: full
data: {source: pictures, resolution: 64}
train: {steps: 1, batch_size: 1, learning_rate: 1}
output: runs/x
"""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Stands in for tuner.run: notes what it was called with, and does as `then` says."""
    seen: dict[str, Any] = {"then": lambda: 0}

    def train(loaded: recipe.Recipe) -> int:
        seen.update(recipe=loaded)
        code: int = seen["then"]()
        return code

    module = types.ModuleType("tuner.run")
    module.train = train  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tuner.run", module)
    monkeypatch.setattr(sys.modules["tuner"], "run", module, raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text(GOOD)
    return seen


def test_train_loads_the_recipe_with_its_overrides(run: dict[str, Any]) -> None:
    assert cli.main(["train", "x.yaml", "train.seed=7", "output=elsewhere"]) == 0
    assert (run["recipe"].train.seed, run["recipe"].output) == (7, "elsewhere")


@pytest.mark.parametrize("code", [0, 1, 130])
def test_train_ends_with_the_code_of_the_run(run: dict[str, Any], code: int) -> None:
    run["then"] = lambda: code
    assert cli.main(["train", "x.yaml"]) == code


def test_mistakes_are_told_on_stderr(run: dict[str, Any], capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "x.yaml", "train.stpes=4", "train.seed=a"]) == 2
    out, err = capfd.readouterr()
    lines = err.splitlines()
    assert out == "" and len(lines) == 2 and "recipe" not in run
    assert lines[0].startswith("command line: train.stpes=4: train.stpes: unknown key; did you mean steps?")
    assert lines[1] == "command line: train.seed=a: train.seed: found the text 'a', expected a whole number"


@pytest.mark.parametrize("rank, text", [("0", "a mistake\n"), ("1", "")])
def test_one_process_tells_the_mistake(
    run: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    rank: str,
    text: str,
) -> None:
    def fail() -> int:
        raise UserError("a mistake")

    run["then"] = fail
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert cli.main(["train", "x.yaml"]) == 2
    assert capfd.readouterr().err == text


def test_faults_of_the_program_are_not_hidden(run: dict[str, Any]) -> None:
    def fail() -> int:
        raise ValueError("a fault")

    run["then"] = fail
    with pytest.raises(ValueError, match="a fault"):
        cli.main(["train", "x.yaml"])


def test_interrupt(run: dict[str, Any]) -> None:
    def interrupt() -> int:
        raise KeyboardInterrupt

    run["then"] = interrupt
    assert cli.main(["train", "x.yaml"]) == 130


def test_schema(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schema"]) == 0
    assert json.loads(capfd.readouterr().out) == recipe.json_schema()


def test_report(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    module = types.ModuleType("tuner.report")
    module.write = lambda output: output / "report.html"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tuner.report", module)
    monkeypatch.setattr(sys.modules["tuner"], "report", module, raising=False)
    assert cli.main(["report", "runs/x"]) == 0
    assert capfd.readouterr().out == f"{Path('runs/x/report.html')}\n"


def test_report_of_no_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path / "nope")]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith(f"{tmp_path / 'nope'}: no such folder") and err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["trian"], ["train"], ["train", "--seed", "1"]])
def test_usage_mistakes(capfd: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert cli.main(arguments) == 2
    assert "Usage: tuner" in capfd.readouterr().err


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from tuner.cli import main; assert main(['--help']) == 0; "
        "print(sorted({'torch', 'numpy', 'pydantic', 'diffusers', 'ruamel'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(command in done.stdout for command in ("train", "schema", "report"))


def test_the_schema_that_recipes_name_is_the_present_one() -> None:
    shipped = Path(__file__).resolve().parents[2] / "recipes" / "recipe.schema.json"
    assert json.loads(shipped.read_text(encoding="utf-8")) == recipe.json_schema()

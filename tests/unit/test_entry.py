"""`python tuner/train.py RECIPE`, as accelerate launch and torchrun start it, installed and not installed."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BAD = "base: embedded\nbase: embedded\nmethd: full\n"
PROBE = """
import tuner.cli
print(os.path.realpath(tuner.cli.__file__))
print(os.path.realpath(sys.path[0]))
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package elsewhere, without its weights; no installed `tuner` is that one."""
    skip = shutil.ignore_patterns("__pycache__", "embedded")
    shutil.copytree(ROOT / "tuner", tmp_path / "copy" / "tuner", ignore=skip)
    (tmp_path / "bad.yaml").write_text(BAD)
    return tmp_path / "copy"


def start(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    unset = ("PYTHONPATH", "LOCAL_RANK", "PYTHONSAFEPATH")
    env = {name: value for name, value in os.environ.items() if name not in unset} | environment
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True, timeout=120
    )


def assert_told(done: subprocess.CompletedProcess[str], times: int = 1) -> None:
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert lines.count("bad.yaml:2: base: given twice: here and in line 1") == times, done.stderr
    assert (
        sum(line.startswith("bad.yaml:3: methd: unknown key; did you mean method?") for line in lines)
        == times
    )
    assert "Traceback" not in done.stderr and done.stdout == ""


@pytest.mark.parametrize("option", [[], ["-P"]], ids=["plain", "safe-path"])
def test_from_a_checkout(tmp_path: Path, copy: Path, option: list[str]) -> None:
    # -P leaves the script's folder out of sys.path.
    assert_told(start(tmp_path, *option, "copy/tuner/train.py", "bad.yaml"))


def test_the_other_ranks_are_silent(tmp_path: Path, copy: Path) -> None:
    done = start(tmp_path, "copy/tuner/train.py", "bad.yaml", LOCAL_RANK="1")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_not_installed(tmp_path: Path, copy: Path) -> None:
    # -S leaves site-packages out, and with it the links of an editable install; the libraries come back by
    # PYTHONPATH, which reads no links.
    libraries = os.pathsep.join(dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib")))
    probe = "import importlib.util as u; print(u.find_spec('pydantic') is None, u.find_spec('tuner') is None)"
    found = start(tmp_path, "-S", "-c", probe, PYTHONPATH=libraries).stdout.split()
    assert found[0] == "False"
    if found[1] == "False":
        pytest.skip("tuner is installed as a copy among the libraries")
    assert_told(start(tmp_path, "-S", "copy/tuner/train.py", "bad.yaml", PYTHONPATH=libraries))


def test_the_checkout_wins_over_an_installed_copy(tmp_path: Path, copy: Path) -> None:
    script = copy / "tuner" / "train.py"
    text = script.read_text()
    assert text.count("from tuner.cli import main") == 1
    script.write_text(text.replace('if __name__ == "__main__":\n', PROBE + '\nif __name__ == "__main__":\n'))
    done = start(tmp_path, "copy/tuner/train.py", "bad.yaml")
    assert done.stdout.splitlines() == [
        os.path.realpath(copy / "tuner" / "cli.py"),
        os.path.realpath(copy),
    ]


def test_only_os_and_sys_come_before_the_path_is_set() -> None:
    tree = ast.parse((ROOT / "tuner" / "train.py").read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [getattr(node, "module", None) or node.names[0].name for node in imports]  # type: ignore[union-attr]
    assert names == ["__future__", "os", "sys", "tuner.cli"]
    assert len((ROOT / "tuner" / "train.py").read_text(encoding="utf-8").splitlines()) <= 20


def test_torchrun_tells_the_mistake_once(tmp_path: Path, copy: Path) -> None:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = start(tmp_path, *command, "copy/tuner/train.py", "bad.yaml")
    assert done.returncode != 0
    assert done.stderr.count("bad.yaml:3: methd: unknown key") == 1, done.stderr

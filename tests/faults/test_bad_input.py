"""Users' mistakes, one after the other through the real command line.

Of each: exit code 2, one clear message that names the place and the way out, no traceback, nothing trained,
and nothing that existed before is changed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from accelerate.state import AcceleratorState

ROOT = Path(__file__).resolve().parents[2]
LEAST = 100


def _table() -> ModuleType:
    """bad_input/table.py as a package, of which the files beside it are parts."""
    folder = Path(__file__).with_name("bad_input")
    spec = importlib.util.spec_from_file_location(
        "tuner_test_bad_input", folder / "table.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its parts look for it
    spec.loader.exec_module(module)
    return module


TABLE: Any = _table()
NAMES = [f"{area}: {case.name}" for area, case in TABLE.CASES]


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps one state for a process; each run here is to begin as in a process of its own."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture
def world(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The folder that a mistake is made in."""
    root = tmp_path / "w"
    root.mkdir()
    monkeypatch.chdir(root)
    # What a mistake in the settings would reach: the user's own cache and home are others here.
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home" / "cache"))
    # The plan of the memory takes two thirds of the time of a case here, and has tests of its own.
    monkeypatch.setattr("tuner.memory.admit", lambda recipe, accelerator: None)
    monkeypatch.setattr("tuner.check.checking.needs", lambda *_: None)
    monkeypatch.setattr("tuner.check.others.LONGEST", 300.0)  # machines are busy
    made = TABLE.World(root, folders, monkeypatch)
    yield made
    for undo in reversed(made.undo):
        undo()


def seen(root: Path) -> dict[str, tuple[Any, ...]]:
    """Names, bytes and times of everything below a folder; links and what they lead to."""
    found: dict[str, tuple[Any, ...]] = {}
    for folder, folders, files in os.walk(root, followlinks=True):
        for name in (*folders, *files):
            place = Path(folder, name)
            about = place.lstat()
            small = place.is_file() and about.st_size < 2**20
            try:
                digest = hashlib.sha256(place.read_bytes()).hexdigest() if small else ""
            except OSError:  # a case took the right to read it away
                digest = "?"
            found[str(place)] = (about.st_mode, about.st_size, about.st_mtime_ns, digest)
    return found


OTHERWISE = {
    "base: no weights": ("base/unet: expected diffusion_pytorch_model.safetensors", "download it again"),
    "base: no weights of words": ("base/text_encoder: expected model.safetensors", "download it again"),
    "base: a name too many": ("base/unet: its files do not fit its config.json", "conv_in.weight is missing"),
    "base: a pickle alone": ("base/unet: expected", "found diffusion_pytorch_model.bin", "convert it to"),
    "base: width of the text": ("base/unet: its files do not fit its config.json", "expected [64, 48]"),
    "base: channels of the UNet": ("base/unet: its files do not fit", "expected [64, 5, 3, 3]"),
    "environment: base without right": ("base/unet/config.json: Permission denied", "ls -l"),
}
"""What a check says in other words than a run, as it reads headers where a run reads files."""


def trained(root: Path) -> list[str]:
    """What a training step would have left."""
    left = [*root.rglob("metrics.jsonl"), *root.rglob("step-*"), *root.rglob("trained.safetensors")]
    return sorted(str(place) for place in left)


def check_told(case: Any, told: str) -> None:
    lines = [line for line in told.splitlines() if line.strip()]
    assert 1 <= len(lines) <= case.lines, told
    assert "Traceback" not in told and "\x1b" not in told, told
    assert all(len(line) < 600 for line in lines), told
    lacking = [part for part in case.told if part not in told]
    assert not lacking, f"lacking {lacking} in:\n{told}"
    same = [
        other.name for _, other in TABLE.CASES if other is not case and all(p in told for p in other.told)
    ]
    assert not same, f"this message would do for {same} too:\n{told}"


def test_the_table_is_long_and_each_case_its_own() -> None:
    assert len(TABLE.CASES) >= LEAST
    assert len(set(NAMES)) == len(NAMES)
    assert {area: len(cases) >= 8 for area, cases in TABLE.AREAS.items()} == dict.fromkeys(TABLE.AREAS, True)
    assert len({case.told for _, case in TABLE.CASES}) == len(TABLE.CASES)


def test_nothing_is_wrong_before_a_mistake_is_made(world: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """Else every case would be told for a reason of the folder's own."""
    from tuner.cli import main

    world.save()
    before = seen(world.root)
    assert main(["train", *world.words]) == 0, capfd.readouterr().err
    assert trained(world.root)  # so that the check of every case can see a step
    after = seen(world.root)
    assert {name: after[name] for name in before} == before and len(before) >= 20


EACH = 6  # a second look at the table is taken at one in so many where slow tests are not asked for
LATER = [[] if number % EACH == 0 else [pytest.mark.slow] for number in range(len(NAMES))]
ALONE = [pytest.param(*case, False, id=name) for case, name in zip(TABLE.CASES, NAMES, strict=True)]
WITH_REST = [
    pytest.param(*case, True, id=f"{name}, with the rest", marks=marks)
    for case, name, marks in zip(TABLE.CASES, NAMES, LATER, strict=True)
]


@pytest.mark.parametrize("area, case, rest", [*ALONE, *WITH_REST])
def test_a_mistake_is_told(
    world: Any, capfd: pytest.CaptureFixture[str], area: str, case: Any, rest: bool
) -> None:
    """With the rest: a look at all else, which takes as long as the run until then, finds nothing more."""
    from tuner.cli import main

    if not rest:
        world.patch.setattr("tuner.check.others.others", lambda recipe, told: [])
    case.make(world)
    world.save()
    steps, before = trained(world.root), seen(world.root)
    code = main(["train", *world.words])
    after = seen(world.root)
    for undo in reversed(world.undo):
        undo()
    world.undo.clear()
    told = capfd.readouterr()
    assert code == 2, told
    check_told(case, told.err)
    assert "Traceback" not in told.out
    assert {name: after.get(name) for name in before} == before
    assert trained(world.root) == steps
    assert not (world.root / "ran").exists()  # what the pickles would do
    assert os.path.lexists(world.root / "out") == (str(world.root / "out") in before)


AGAIN = [
    pytest.param(*case, id=name, marks=marks)
    for case, name, marks in zip(TABLE.CASES, NAMES, LATER, strict=True)
]


@pytest.mark.parametrize("area, case", AGAIN)
def test_a_check_tells_it_too(world: Any, capfd: pytest.CaptureFixture[str], area: str, case: Any) -> None:
    """Everything here can be known before the first step, and `tuner check` changes nothing either."""
    from tuner.cli import main

    case.make(world)
    world.save()
    before = seen(world.root)
    capfd.readouterr()
    code = main(["check", *world.words])
    after = seen(world.root)
    for undo in reversed(world.undo):
        undo()
    world.undo.clear()
    told = capfd.readouterr()
    assert code == 2 and "Traceback" not in told.out + told.err, told
    lacking = [part for part in OTHERWISE.get(f"{area}: {case.name}", case.told) if part not in told.out]
    assert not lacking, f"lacking {lacking} in:\n{told.out}"
    assert {name: after.get(name) for name in before} == before
    assert not (world.root / "ran").exists()


SAMPLE = ("recipe: unknown key", "base: cut off", "recipe: a bomb of aliases", "recipe: binary",
          "recipe: a wrong value", "environment: output of the user's")  # fmt: skip
"""The first two, before and after what is slow to import, also by default."""


@pytest.mark.parametrize(
    "name", [*SAMPLE[:2], *(pytest.param(n, marks=pytest.mark.slow) for n in SAMPLE[2:])]
)
def test_a_sample_by_the_script(world: Any, name: str) -> None:
    """As `accelerate launch` and people start it: tuner/train.py in a process of its own."""
    case = {f"{area}: {case.name}": case for area, case in TABLE.CASES}[name]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    case.make(world)
    world.save()
    before = seen(world.root)
    script = [sys.executable, str(ROOT / "tuner" / "train.py"), *world.words]
    done = subprocess.run(
        script, cwd=world.root, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2, done.stderr
    check_told(case, done.stderr)
    after = seen(world.root)
    assert {place: after.get(place) for place in before} == before and trained(world.root) == []

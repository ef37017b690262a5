"""`tuner push` of a finished run against the Hub's stand-in: what arrives."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from huggingface_hub import snapshot_download
from PIL import Image

from tuner import cli
from tuner.push import finished, usage

REPO = "tester/thing"
LICENCE = ["--licence", "apache-2.0"]
ALWAYS = {".gitattributes", "README.md", "recipe.yaml", "thing.safetensors"}
DRAWN = {"pictures/step-000007.png", "pictures/style.png", *(f"pictures/{n}.png" for n in range(1, 5))}

Push = Callable[..., int]
Said = pytest.CaptureFixture[str]
Digests = Callable[[Path], dict[str, str]]


@pytest.fixture
def run(lora_run: Path, tmp_path: Path) -> Path:
    """A finished run of a test's own."""
    return shutil.copytree(lora_run, tmp_path / "runs" / "thing")


def test_a_run_arrives_whole(push: Push, hub: Any, run: Path, digests: Digests, capfd: Said) -> None:
    before = digests(run)
    assert push(run, REPO, *LICENCE) == 0
    repo = hub.repos["model", REPO]
    assert not repo.private and repo.history() == ["thing: lora, 7 steps", "initial commit"]
    files = repo.files()
    assert set(files) == ALWAYS | DRAWN
    assert files["thing.safetensors"] == (run / "export" / "thing.safetensors").read_bytes()
    assert digests(run) == before
    assert f"pushed and compared: {hub.url}/{REPO}" in capfd.readouterr().out
    here = Path(snapshot_download(REPO))
    assert {
        path.relative_to(here).as_posix(): path.read_bytes() for path in here.rglob("*") if path.is_file()
    } == files
    sizes = [Image.open(here / path).size for path in sorted(DRAWN) if path.startswith("pictures/s") is False]
    assert sizes == [(16, 16)] * 4


def test_pictures_are_those_of_the_sheet(
    push: Push, hub: Any, run: Path, tmp_path: Path, finished_runs: ModuleType
) -> None:
    assert push(run, REPO, *LICENCE) == 0
    wanted = finished_runs.columns("base alone", "adapted")["adapted"]
    for number in range(4):
        place = tmp_path / "one.png"
        place.write_bytes(hub.repos["model", REPO].files()[f"pictures/{number + 1}.png"])
        assert np.array_equal(np.asarray(Image.open(place)), wanted[number])


def test_nothing_private_is_in_it(push: Push, hub: Any, run: Path, tmp_path: Path) -> None:
    assert push(run, REPO, *LICENCE) == 0
    seen = b"".join(hub.repos["model", REPO].files().values())
    assert len(seen) > 10_000
    for private in (tmp_path, Path.home(), Path.cwd(), "/home/", "somebody", "gone/away"):
        assert str(private).encode() not in seen, private
    text = hub.repos["model", REPO].files()["recipe.yaml"].decode()
    assert "path: pictures of a cat\n" in text and "path: cats\n" in text and "output" not in text
    assert "path: someone/tiny-sd1\n" in text


def test_something_private_in_an_export(push: Push, hub: Any, run: Path, capfd: Said) -> None:
    (run / "export" / "config.json").write_text(json.dumps({"_name_or_path": str(run.resolve() / "base")}))
    assert push(run, REPO, *LICENCE) == 2
    assert "config.json names a place on this machine" in capfd.readouterr().err and not hub.requests


def test_again_sends_what_is_new(push: Push, hub: Any, run: Path) -> None:
    assert push(run, REPO, *LICENCE, "--message", "first") == 0
    assert push(run, REPO, *LICENCE, "--message", "again") == 0
    assert hub.repos["model", REPO].history() == ["first", "initial commit"]
    (run / "export" / "note.txt").write_text("more")
    assert push(run, REPO, *LICENCE, "--message", "more") == 0
    assert hub.repos["model", REPO].history() == ["more", "first", "initial commit"]
    assert hub.asked("PUT", "/lfs/") == 1


def test_a_branch(push: Push, hub: Any, run: Path, capfd: Said) -> None:
    assert push(run, REPO, *LICENCE, "--revision", "try/1") == 0
    repo = hub.repos["model", REPO]
    assert set(repo.files()) == {".gitattributes"} and set(repo.files("try/1")) == ALWAYS | DRAWN
    assert 'revision="try/1"' in repo.files("try/1")["README.md"].decode()
    assert f"{hub.url}/{REPO}/tree/try/1" in capfd.readouterr().out


def test_private(push: Push, hub: Any, run: Path, capfd: Said) -> None:
    assert push(run, REPO, *LICENCE, "--private") == 0
    assert hub.repos["model", REPO].private
    assert push(run, "guild/thing", *LICENCE) == 0
    before = hub.repos["model", "guild/thing"].history()
    assert push(run, "guild/thing", *LICENCE, "--private", "--message", "hidden") == 2
    assert "there already, and public" in capfd.readouterr().err
    assert hub.repos["model", "guild/thing"].history() == before


def test_exports_of_a_step(push: Push, hub: Any, run: Path, capfd: Said) -> None:
    (run / "export" / "step-4" / "thing.safetensors").rename(run / "export" / "step-4" / "early.safetensors")
    assert push(run, REPO, *LICENCE, "--step", 5) == 2
    assert capfd.readouterr().err == "--step 5: no exports of that step; there are 4\n"
    assert push(run, REPO, *LICENCE, "--step", 4) == 0
    files = hub.repos["model", REPO].files()
    assert "early.safetensors" in files and "thing.safetensors" not in files
    assert "pictures/step-000004.png" in files and "pictures/style.png" not in files
    card = files["README.md"].decode()
    assert "| Steps | 4 of 2 pictures |" in card and "What was measured" not in card
    assert "| Loss on held-out samples | 0.500 |" in card


def test_a_dry_run_needs_no_hub(
    offline_push: Push, hub: Any, run: Path, monkeypatch: pytest.MonkeyPatch, capfd: Said
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert offline_push(run, REPO, *LICENCE, "--dry-run") == 0
    assert not hub.requests
    out = capfd.readouterr().out
    listed, card = out.split("\n\n---\n", 1)
    assert {line.split()[-1] for line in listed.splitlines()} == (ALWAYS | DRAWN) - {".gitattributes"}
    size = (run / "export" / "thing.safetensors").stat().st_size
    assert f"{size:>13,}  thing.safetensors" in listed.splitlines()
    assert card.startswith("license: apache-2.0\n") and "# thing\n" in card


def test_a_new_word_is_written_once(run: Path) -> None:
    words = usage.Part("toy.safetensors", "embedding", "one tensor", "sd1", ("<toy>",))
    place = run / "previews" / "step-000007.json"
    told = json.loads(place.read_text()) | {
        "prompts": ["a <toy> <toy>_1 <toy>_2, red", "<toy>", "<toy> <toys>_1"]
    }
    place.write_text(json.dumps(told))
    previews = dataclasses.replace(finished.read(run), parts=[words]).previews()
    assert previews is not None and previews.prompts == ["a <toy>, red", "<toy>", "<toy> <toys>_1"]


def test_another_sheet_is_shown_whole(run: Path, capfd: Said) -> None:
    Image.new("RGB", (100, 50)).save(run / "previews" / "step-000007.png")
    previews = finished.read(run).previews()
    assert previews is not None and previews.rows == [] and previews.columns == ["base alone", "adapted"]
    assert cli.main(["push", str(run), REPO, *LICENCE, "--dry-run"]) == 0
    assert "shown whole only" in capfd.readouterr().out


def test_the_environment_is_heeded(hub: Any, run: Path, tmp_path: Path) -> None:
    code = "import sys; from tuner import cli; sys.exit(cli.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, "push", str(run), REPO, *LICENCE],
        env=hub.environment(tmp_path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert set(hub.repos["model", REPO].files()) == ALWAYS | DRAWN

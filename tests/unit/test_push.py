"""`tuner push` against the Hub's stand-in: what arrives, what is refused, what is tried again."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
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
import torch
from huggingface_hub import constants, snapshot_download
from PIL import Image
from safetensors import safe_open

from tuner import build, cli, recipe, sample
from tuner.export import metadata
from tuner.log import Log
from tuner.method import Card
from tuner.push import finished, usage

REPO = "tester/thing"
LICENCE = ["--licence", "apache-2.0"]
RECIPE = """\
base: someone/tiny-sd1
method: {lora: {rank: 2}}
data:
  source: [{path: /home/somebody/pictures of a cat}, {path: gone/away/cats}]
  resolution: 32
train: {steps: 7, batch_size: 2, learning_rate: 1e-3}
preview: {every: 7, prompts: [a red toy, ""], steps: 3}
export: {name: thing, every: 4}
output: OUTPUT
"""
PROMPTS = ["a red toy", "", "three", "four", "five"]
ALWAYS = {".gitattributes", "README.md", "recipe.yaml", "thing.safetensors"}
DRAWN = {"pictures/step-000007.png", "pictures/style.png", *(f"pictures/{n}.png" for n in range(1, 5))}

Start = Callable[..., Path]


def columns(*names: str) -> dict[str, list[sample.Picture]]:
    """Pictures of noise, 16 pixels wide, below these names."""
    draw = np.random.default_rng(0)
    return {name: [draw.integers(0, 256, (16, 16, 3), np.uint8) for _ in PROMPTS] for name in names}


def finish(output: Path, method: Any, family: Any, text: str) -> Path:
    """A finished run's folder around real exports."""
    (output / "previews").mkdir(parents=True)
    given = output.with_suffix(".yaml")
    given.write_text(text.replace("OUTPUT", str(output)))
    loaded = recipe.load(given)
    (output / "recipe.yaml").write_text(loaded.resolved_yaml())
    (output / "versions.json").write_text(json.dumps(build.versions()))
    title = (
        loaded.base.path if "/" in loaded.base.path and not Path(loaded.base.path).exists() else family.title
    )
    about = metadata.build(
        method.kind,
        name=loaded.name,
        recipe_text=metadata.recipe_text(loaded.resolved()),
        versions=build.versions(),
        base_name=title,
        base_digest="{}",
        data_digests={},
        extra={"family": family.name, **method.labels()},
    )
    card = Card(loaded.name, torch.float16, {method.kind: about})
    for place in (output / "export", output / "export" / "step-4"):
        place.mkdir(parents=True)
        method.export(family, place, card)
    drawn = (
        columns("condition", "base alone", "adapted")
        if method.condition
        else columns("base alone", "adapted")
    )
    for step in (4, 7):
        sheet = output / "previews" / f"step-{step:06d}.png"
        sample.sheet(drawn, PROMPTS).save(sheet)
        sheet.with_suffix(".json").write_text(json.dumps({"prompts": PROMPTS, "columns": list(drawn)}))
    (output / "evaluation").mkdir()
    Image.new("RGB", (8, 8)).save(output / "evaluation" / "style.png")
    with Log(output, False, None, True, None) as log:
        log.scalars(4, {"validation_loss": 0.5})
        log.scalars(7, {"validation_loss": 0.25})
        rows = {"floor": [0.1], "LoRA": [0.9]}
        about_style = {"verdict": "style | of <it>", "columns": ["share"], "rows": rows}
        log.measures("style", about_style | {"picture": "evaluation/style.png"})
        log.event(7, "finished")
    return output


@pytest.fixture(scope="module")
def lora_run(models: ModuleType, sd1_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family = models.family_of(sd1_folder, "lora")
    method = models.move(models.method_of("lora", family, rank=2))
    place = tmp_path_factory.mktemp("runs")
    (place / "gone" / "away" / "cats").mkdir(parents=True)
    with contextlib.chdir(place):  # there while it was trained, not when it is pushed
        return finish(place / "thing", method, family, RECIPE)


@pytest.fixture
def run(lora_run: Path, tmp_path: Path) -> Path:
    """A finished run of a test's own."""
    return shutil.copytree(lora_run, tmp_path / "runs" / "thing")


@pytest.fixture
def push(hub: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """`tuner push`, the stand-in being the Hub."""
    hub.take_in(monkeypatch, tmp_path)
    return lambda *arguments: cli.main(["push", *map(str, arguments)])


def digests(folder: Path) -> dict[str, str]:
    """Every file of a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    assert len(files) > 5
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_a_run_arrives_whole(
    push: Callable[..., int], hub: Any, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
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
    push: Callable[..., int], hub: Any, run: Path, tmp_path: Path
) -> None:
    assert push(run, REPO, *LICENCE) == 0
    wanted = columns("base alone", "adapted")["adapted"]
    for number in range(4):
        place = tmp_path / "one.png"
        place.write_bytes(hub.repos["model", REPO].files()[f"pictures/{number + 1}.png"])
        assert np.array_equal(np.asarray(Image.open(place)), wanted[number])


def test_nothing_private_is_in_it(push: Callable[..., int], hub: Any, run: Path, tmp_path: Path) -> None:
    assert push(run, REPO, *LICENCE) == 0
    seen = b"".join(hub.repos["model", REPO].files().values())
    assert len(seen) > 10_000
    for private in (tmp_path, Path.home(), Path.cwd(), "/home/", "somebody", "gone/away"):
        assert str(private).encode() not in seen, private
    text = hub.repos["model", REPO].files()["recipe.yaml"].decode()
    assert "path: pictures of a cat\n" in text and "path: cats\n" in text and "output" not in text
    assert "path: someone/tiny-sd1\n" in text


def test_something_private_in_an_export(
    push: Callable[..., int], hub: Any, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (run / "export" / "config.json").write_text(json.dumps({"_name_or_path": str(run.resolve() / "base")}))
    assert push(run, REPO, *LICENCE) == 2
    assert "config.json names a place on this machine" in capfd.readouterr().err and not hub.requests


def test_again_sends_what_is_new(push: Callable[..., int], hub: Any, run: Path) -> None:
    assert push(run, REPO, *LICENCE, "--message", "first") == 0
    assert push(run, REPO, *LICENCE, "--message", "again") == 0
    assert hub.repos["model", REPO].history() == ["first", "initial commit"]
    (run / "export" / "note.txt").write_text("more")
    assert push(run, REPO, *LICENCE, "--message", "more") == 0
    assert hub.repos["model", REPO].history() == ["more", "first", "initial commit"]
    assert hub.asked("PUT", "/lfs/") == 1


def test_a_branch(push: Callable[..., int], hub: Any, run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert push(run, REPO, *LICENCE, "--revision", "try/1") == 0
    repo = hub.repos["model", REPO]
    assert set(repo.files()) == {".gitattributes"} and set(repo.files("try/1")) == ALWAYS | DRAWN
    assert 'revision="try/1"' in repo.files("try/1")["README.md"].decode()
    assert f"{hub.url}/{REPO}/tree/try/1" in capfd.readouterr().out


def test_private(push: Callable[..., int], hub: Any, run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert push(run, REPO, *LICENCE, "--private") == 0
    assert hub.repos["model", REPO].private
    assert push(run, "guild/thing", *LICENCE) == 0
    before = hub.repos["model", "guild/thing"].history()
    assert push(run, "guild/thing", *LICENCE, "--private", "--message", "hidden") == 2
    assert "there already, and public" in capfd.readouterr().err
    assert hub.repos["model", "guild/thing"].history() == before


def test_exports_of_a_step(
    push: Callable[..., int], hub: Any, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
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
    push: Callable[..., int],
    hub: Any,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("HF_TOKEN")
    assert push(run, REPO, *LICENCE, "--dry-run") == 0
    assert not hub.requests
    out = capfd.readouterr().out
    listed, card = out.split("\n\n---\n", 1)
    assert {line.split()[-1] for line in listed.splitlines()} == (ALWAYS | DRAWN) - {".gitattributes"}
    size = (run / "export" / "thing.safetensors").stat().st_size
    assert f"{size:>13,}  thing.safetensors" in listed.splitlines()
    assert card.startswith("license: apache-2.0\n") and "# thing\n" in card


def unfinished(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if "finished" not in line))


def without_exports(run: Path) -> None:
    shutil.rmtree(run / "export")


def licensed(run: Path) -> None:
    """The export says its licence."""
    from safetensors.torch import load_file, save_file

    path = run / "export" / "thing.safetensors"
    with safe_open(path, framework="pt") as file:
        about = dict(file.metadata())
    save_file(load_file(path), path, about | {"modelspec.license": "mit"})


@pytest.mark.parametrize(
    "change, arguments, wanted",
    [
        (unfinished, ["RUN", REPO, *LICENCE], "is not finished (at step 7)"),
        (without_exports, ["RUN", REPO, *LICENCE], "export: nothing is exported there"),
        (None, ["RUN/export", REPO, *LICENCE], "is no run's folder; expected the folder that a run wrote to"),
        (None, ["RUN/../thinng", REPO, *LICENCE], "thing?"),
        (None, ["RUN/recipe.yaml", REPO, *LICENCE], "is a file; expected the folder"),
        (None, ["RUN", "thing", *LICENCE], "thing: expected owner/name"),
        (None, ["RUN", "a/b/c", *LICENCE], "a/b/c: no name of a repository"),
        (None, ["RUN", "tester/a--b", *LICENCE], "tester/a--b: no name of a repository"),
        (None, ["RUN", REPO], "the licence is not known: give --licence"),
        (
            None,
            ["RUN", REPO, "--licence", "Apache 2"],
            "expected an identifier of the Hub's in small letters",
        ),
        (licensed, ["RUN", REPO, *LICENCE], "--licence apache-2.0: the exported files say mit"),
    ],
)
def test_mistakes(
    push: Callable[..., int],
    hub: Any,
    run: Path,
    capfd: pytest.CaptureFixture[str],
    change: Callable[[Path], None] | None,
    arguments: list[str],
    wanted: str,
) -> None:
    if change is not None:
        change(run)
    assert push(*(one.replace("RUN", str(run)) for one in arguments)) == 2
    out, err = capfd.readouterr()
    assert wanted in err and "Traceback" not in err and out == ""
    assert not hub.requests


def test_the_licence_of_the_files(push: Callable[..., int], hub: Any, run: Path) -> None:
    licensed(run)
    assert push(run, REPO) == 0
    assert hub.repos["model", REPO].files()["README.md"].startswith(b"---\nlicense: mit\n")


@pytest.mark.parametrize(
    "token, repo, wanted",
    [
        (None, REPO, "there is no token for the Hub: log in by `hf auth login`"),
        ("hf_wrong", REPO, "the Hub does not know this token"),
        (
            "hf_token_of_the_guest",
            REPO,
            "the token of guest has no right to write to tester; it needs the role write, "
            "and guest has to be tester or to belong to it",
        ),
        ("hf_token_of_the_tester", "nobody/x", "the token of tester has no right to write to nobody"),
    ],
)
def test_tokens(
    push: Callable[..., int],
    hub: Any,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    token: str | None,
    repo: str,
    wanted: str,
) -> None:
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    assert push(run, repo, *LICENCE) == 2
    assert wanted in capfd.readouterr().err and hub.repos == {}


def test_the_stored_login(
    push: Callable[..., int], hub: Any, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    place = Path(constants.HF_TOKEN_PATH)
    place.parent.mkdir(parents=True)
    place.write_text("hf_token_of_the_tester")
    assert push(run, REPO, *LICENCE) == 0 and ("model", REPO) in hub.repos


def test_offline(
    push: Callable[..., int],
    hub: Any,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert push(run, REPO, *LICENCE) == 2
    assert "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set" in capfd.readouterr().err and not hub.requests


@pytest.mark.parametrize(
    "method, pattern, how, times",
    [
        ("GET", "/whoami", "close", 1),
        ("POST", "/validate-yaml", 503, 1),
        ("POST", "/repos/create", "lost", 1),
        ("POST", "/branch/", "close", 2),
        ("POST", "/preupload/", 500, 1),
        ("PUT", "/lfs/", "close", 7),  # more than the library's own patience
        ("POST", "/commit/", "close", 3),
        ("POST", "/commit/", "lost", 1),
        ("POST", "/commit/", 502, 1),
        ("POST", "/paths-info/", "half", 1),
    ],
)
def test_what_breaks_is_tried_again(
    push: Callable[..., int], hub: Any, run: Path, method: str, pattern: str, how: Any, times: int
) -> None:
    hub.fail(method, pattern, how, times)
    assert push(run, REPO, *LICENCE, "--revision", "b") == 0
    repo = hub.repos["model", REPO]
    assert hub.faults[0].left == 0 and set(repo.files("b")) == ALWAYS | DRAWN
    assert repo.history("b") == [
        "thing: lora, 7 steps",
        "initial commit",
    ]  # once, also where its answer was lost


def test_a_hub_that_stays_broken(
    push: Callable[..., int], hub: Any, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = digests(run)
    hub.fail("POST", "/commit/", "close", times=99)
    assert push(run, REPO, *LICENCE) == 2
    err = capfd.readouterr().err
    assert "uploading: no success in 4 attempts: " in err and "Traceback" not in err
    assert "nothing on this machine was changed" in err and hub.asked("POST", "/commit/") == 4
    assert digests(run) == before and set(hub.repos["model", REPO].files()) == {".gitattributes"}
    hub.faults.clear()
    assert push(run, REPO, *LICENCE) == 0
    assert set(hub.repos["model", REPO].files()) == ALWAYS | DRAWN and hub.asked("PUT", "/lfs/") == 1


def test_no_hub_at_all(
    push: Callable[..., int],
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert push(run, REPO, *LICENCE) == 2
    err = capfd.readouterr().err
    assert "asking whose the token is: no success in 4 attempts" in err and "http://127.0.0.1:9;" in err


def test_a_hub_without_xet(
    push: Callable[..., int], run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    assert push(run, REPO, *LICENCE) == 2
    assert "HF_HUB_DISABLE_XET=1 does without Xet" in capfd.readouterr().err


def test_refusals_are_not_tried_again(
    push: Callable[..., int], hub: Any, run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.fail("POST", "/validate-yaml", 400)
    assert push(run, REPO, *LICENCE) == 2
    assert "having the card checked: the Hub refused" in capfd.readouterr().err and hub.repos == {}
    hub.fail("POST", "/commit/", 413)
    assert push(run, REPO, *LICENCE) == 2
    assert hub.asked("POST", "/commit/") == 1


def test_another_content_is_noticed(
    push: Callable[..., int], hub: Any, run: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    from huggingface_hub import HfApi

    whole = HfApi.get_paths_info

    def without_one(self: HfApi, repo: str, paths: list[str], **more: Any) -> Any:
        return [one for one in whole(self, repo, paths, **more) if one.path != "thing.safetensors"]

    monkeypatch.setattr(HfApi, "get_paths_info", without_one)
    assert push(run, REPO, *LICENCE) == 2
    assert "thing.safetensors: the Hub has another content than was sent" in capfd.readouterr().err


def test_a_new_word_is_written_once(run: Path) -> None:
    words = usage.Part("toy.safetensors", "embedding", "one tensor", "sd1", ("<toy>",))
    place = run / "previews" / "step-000007.json"
    told = json.loads(place.read_text()) | {
        "prompts": ["a <toy> <toy>_1 <toy>_2, red", "<toy>", "<toy> <toys>_1"]
    }
    place.write_text(json.dumps(told))
    previews = dataclasses.replace(finished.read(run), parts=[words]).previews()
    assert previews is not None and previews.prompts == ["a <toy>, red", "<toy>", "<toy> <toys>_1"]


def test_another_sheet_is_shown_whole(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
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

"""`tuner push` against the Hub's stand-in: what is refused, what is tried again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from safetensors import safe_open

REPO = "tester/thing"
LICENCE = ["--licence", "apache-2.0"]
ALWAYS = {".gitattributes", "README.md", "recipe.yaml", "thing.safetensors"}
DRAWN = {"pictures/step-000007.png", "pictures/style.png", *(f"pictures/{n}.png" for n in range(1, 5))}

Push = Callable[..., int]
Said = pytest.CaptureFixture[str]
Digests = Callable[[Path], dict[str, str]]


def unfinished(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if "finished" not in line))


def without_exports(run: Path) -> None:
    shutil.rmtree(run / "export")


def licensed(run: Path, licence: str = "mit") -> None:
    """The export says its licence."""
    from safetensors.torch import load_file, save_file

    path = run / "export" / "thing.safetensors"
    with safe_open(path, framework="pt") as file:
        about = dict(file.metadata())
    save_file(load_file(path), path, about | {"modelspec.license": licence})


@pytest.fixture
def run(lora_run: Path, tmp_path: Path) -> Path:
    """A finished run of a test's own."""
    return shutil.copytree(lora_run, tmp_path / "runs" / "thing")


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
            "expected an identifier of the Hub's in small letters, such as creativeml-openrail-m or "
            "apache-2.0; other for one that it does not list; did you mean apache-2.0",
        ),
        (
            None,
            ["RUN", REPO, "--licence", "foo"],
            "licence 'foo': expected an identifier of the Hub's in small letters",
        ),
        (None, ["RUN", REPO, "--licence", "creativeml-openrail"], "did you mean creativeml-openrail-m"),
        (licensed, ["RUN", REPO, *LICENCE], "--licence apache-2.0: the exported files say mit"),
    ],
)
def test_mistakes(
    push: Push,
    hub: Any,
    run: Path,
    capfd: Said,
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


def test_the_licence_of_the_files(push: Push, hub: Any, run: Path) -> None:
    licensed(run)
    assert push(run, REPO) == 0
    assert hub.repos["model", REPO].files()["README.md"].startswith(b"---\nlicense: mit\n")


def test_a_licence_that_the_hub_has_no_name_for(push: Push, hub: Any, run: Path, capfd: Said) -> None:
    licensed(run, "ours, ask us")
    assert push(run, REPO) == 2
    assert "licence 'ours, ask us': expected an identifier of the Hub's" in capfd.readouterr().err
    assert push(run, REPO, "--licence", "other") == 0
    assert hub.repos["model", REPO].files()["README.md"].startswith(b"---\nlicense: other\n")


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
    push: Push,
    hub: Any,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: Said,
    token: str | None,
    repo: str,
    wanted: str,
) -> None:
    monkeypatch.delenv("HF_TOKEN") if token is None else monkeypatch.setenv("HF_TOKEN", token)
    assert push(run, repo, *LICENCE) == 2
    assert wanted in capfd.readouterr().err and hub.repos == {}


def test_the_stored_login(push: Push, hub: Any, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    place = Path(constants.HF_TOKEN_PATH)
    place.parent.mkdir(parents=True)
    place.write_text("hf_token_of_the_tester")
    assert push(run, REPO, *LICENCE) == 0 and ("model", REPO) in hub.repos


def test_offline(offline_push: Push, hub: Any, run: Path, capfd: Said) -> None:
    assert offline_push(run, REPO, *LICENCE) == 2
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
    push: Push, hub: Any, run: Path, method: str, pattern: str, how: Any, times: int
) -> None:
    hub.fail(method, pattern, how, times)
    assert push(run, REPO, *LICENCE, "--revision", "b") == 0
    repo = hub.repos["model", REPO]
    assert hub.faults[0].left == 0 and set(repo.files("b")) == ALWAYS | DRAWN
    assert repo.history("b") == [
        "thing: lora, 7 steps",
        "initial commit",
    ]  # once, also where its answer was lost


def test_a_hub_that_stays_broken(push: Push, hub: Any, run: Path, digests: Digests, capfd: Said) -> None:
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


def test_no_hub_at_all(push: Push, run: Path, monkeypatch: pytest.MonkeyPatch, capfd: Said) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert push(run, REPO, *LICENCE) == 2
    err = capfd.readouterr().err
    assert "asking whose the token is: no success in 4 attempts" in err and "http://127.0.0.1:9;" in err


def test_a_hub_without_xet(push: Push, run: Path, monkeypatch: pytest.MonkeyPatch, capfd: Said) -> None:
    pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    assert push(run, REPO, *LICENCE) == 2
    assert "HF_HUB_DISABLE_XET=1 does without Xet" in capfd.readouterr().err


def test_refusals_are_not_tried_again(push: Push, hub: Any, run: Path, capfd: Said) -> None:
    hub.fail("POST", "/validate-yaml", 400)
    assert push(run, REPO, *LICENCE) == 2
    assert "having the card checked: the Hub refused" in capfd.readouterr().err and hub.repos == {}
    hub.fail("POST", "/commit/", 413)
    assert push(run, REPO, *LICENCE) == 2
    assert hub.asked("POST", "/commit/") == 1


def test_another_content_is_noticed(
    push: Push, hub: Any, run: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    from huggingface_hub import HfApi

    whole = HfApi.get_paths_info

    def without_one(self: HfApi, repo: str, paths: list[str], **more: Any) -> Any:
        return [one for one in whole(self, repo, paths, **more) if one.path != "thing.safetensors"]

    monkeypatch.setattr(HfApi, "get_paths_info", without_one)
    assert push(run, REPO, *LICENCE) == 2
    assert "thing.safetensors: the Hub has another content than was sent" in capfd.readouterr().err

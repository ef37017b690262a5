"""The Hub's stand-in of tests/hub.py, as huggingface_hub and datasets see it."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from PIL import Image

NAME = "tester/thing"


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    """Files of both kinds in a folder `given`."""
    made = {
        "a.txt": b"plain",
        "sub/b.safetensors": random.Random(0).randbytes(5000),
        "sub/deep/c.json": b"{}",
        "empty": b"",
    }
    for name, content in made.items():
        place = tmp_path / "given" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    return made


@pytest.fixture
def api(hub: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> HfApi:
    hub.take_in(monkeypatch, tmp_path)
    return HfApi()


def read(folder: str | Path) -> dict[str, bytes]:
    """What lies in a folder, without hidden files at its top."""
    root = Path(folder)
    found = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith(".")}


def push(api: HfApi, folder: Path, **more: Any) -> Any:
    api.create_repo(NAME, exist_ok=True)
    return api.upload_folder(repo_id=NAME, folder_path=folder, commit_message="pushed", **more)


def test_what_is_uploaded_is_downloaded(
    api: HfApi, hub: Any, files: dict[str, bytes], tmp_path: Path
) -> None:
    commit = push(api, tmp_path / "given")
    repo = hub.repos["model", NAME]
    assert repo.history() == ["pushed", "initial commit"] and commit.oid == repo.branches["main"]
    assert {name: blob.large for name, blob in repo.commits[commit.oid].files.items()} == {
        ".gitattributes": False,
        **{name: name.endswith(".safetensors") for name in files},
    }
    assert hub.asked("PUT", "/lfs/") == 1
    snapshot = api.snapshot_download(NAME)
    assert read(snapshot) == files and Path(snapshot).is_relative_to(tmp_path)
    assert hub.asked("GET", "/cdn/") == 1  # the client sends no token there, or it would be refused


def test_nothing_is_sent_twice(api: HfApi, hub: Any, files: dict[str, bytes], tmp_path: Path) -> None:
    first = push(api, tmp_path / "given")
    again = push(api, tmp_path / "given")
    assert again.oid == first.oid and len(hub.repos["model", NAME].commits) == 2
    (tmp_path / "given" / "a.txt").write_bytes(b"changed")
    push(api, tmp_path / "given")
    assert hub.asked("PUT", "/lfs/") == 1
    assert hub.repos["model", NAME].files()["a.txt"] == b"changed"


def test_large_files_in_parts(api: HfApi, hub: Any, files: dict[str, bytes], tmp_path: Path) -> None:
    hub.part = 2000
    push(api, tmp_path / "given")
    assert hub.repos["model", NAME].files()["sub/b.safetensors"] == files["sub/b.safetensors"]
    assert (hub.asked("PUT", "/lfs/"), hub.asked("POST", "/complete"), hub.parts) == (3, 1, {})


def test_branches_deletions_and_parents(
    api: HfApi, hub: Any, files: dict[str, bytes], tmp_path: Path
) -> None:
    first = push(api, tmp_path / "given")
    api.create_branch(NAME, branch="try/1")
    with pytest.raises(HfHubHTTPError, match="already exists"):
        api.create_branch(NAME, branch="try/1")
    api.create_branch(NAME, branch="try/1", exist_ok=True)
    wish = [CommitOperationDelete("sub/"), CommitOperationAdd("new.txt", b"new")]
    api.create_commit(NAME, wish, commit_message="less", revision="try/1", parent_commit=first.oid)
    repo = hub.repos["model", NAME]
    assert set(repo.files("try/1")) == {".gitattributes", "a.txt", "empty", "new.txt"}
    assert set(repo.files()) == {".gitattributes", *files}
    assert {branch.name for branch in api.list_repo_refs(NAME).branches} == {"main", "try/1"}
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit(
            NAME, [CommitOperationAdd("x", b"x")], commit_message="late", revision="try/1",
            parent_commit=first.oid,
        )  # fmt: skip
    with pytest.raises(RevisionNotFoundError):
        api.list_repo_files(NAME, revision="try/2")


def test_listings(api: HfApi, hub: Any, files: dict[str, bytes], tmp_path: Path) -> None:
    hub.serve(tmp_path / "given", NAME)
    every = [one.path for one in api.list_repo_tree(NAME, recursive=True)]
    assert every == ["a.txt", "empty", "sub", "sub/b.safetensors", "sub/deep", "sub/deep/c.json"]
    hub.page = 2
    assert [one.path for one in api.list_repo_tree(NAME, recursive=True)] == every
    assert hub.asked("GET", "/tree/") == 1 + 3
    assert [one.path for one in api.list_repo_tree(NAME)] == ["a.txt", "empty", "sub"]
    below = list(api.list_repo_tree(NAME, "sub", expand=True))
    assert [one.path for one in below] == ["sub/b.safetensors", "sub/deep"]
    assert all(one.last_commit is not None and one.last_commit.title == "as served" for one in below)
    infos = api.get_paths_info(NAME, ["sub/b.safetensors", "a.txt", "nothing", "sub"])
    assert [one.path for one in infos] == ["sub/b.safetensors", "a.txt", "sub"]
    first: Any = infos[0]
    assert first.lfs is not None and first.lfs.size == first.size == 5000
    found = api.model_info(NAME)
    assert found.sha == hub.repos["model", NAME].branches["main"] and not found.private
    assert api.file_exists(NAME, "a.txt") and not api.file_exists(NAME, "b.txt")
    with pytest.raises(RemoteEntryNotFoundError):
        api.hf_hub_download(NAME, "b.txt")
    with pytest.raises(HfHubHTTPError, match="404"):
        list(api.list_repo_tree(NAME, "sup"))


def test_what_strangers_may_not(api: HfApi, hub: Any, files: dict[str, bytes], tmp_path: Path) -> None:
    assert api.whoami()["name"] == "tester"
    hub.serve(tmp_path / "given", NAME, private=True)
    assert read(api.snapshot_download(NAME)) == files
    for token in (False, "hf_token_of_the_guest"):
        with pytest.raises(RepositoryNotFoundError):
            api.model_info(NAME, token=token)
        with pytest.raises(HfHubHTTPError):
            api.create_repo(NAME, token=token)
    with pytest.raises(HfHubHTTPError, match="Invalid"):
        api.whoami(token="hf_wrong")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("tester/nothing")
    hub.serve(tmp_path / "given", "guild/open")
    assert read(api.snapshot_download("guild/open", token=False)) == files
    guest = HfApi(token="hf_token_of_the_guest")
    with pytest.raises(HfHubHTTPError, match="no right"):
        guest.upload_file(path_in_repo="x", path_or_fileobj=b"x", repo_id="guild/open")
    assert api.create_repo("guild/closed", private=True).repo_id == "guild/closed"
    assert hub.repos["model", "guild/closed"].private


@pytest.mark.parametrize(
    "method, pattern, how",
    [
        ("POST", "/preupload/", 503),
        ("POST", "/objects/batch", "close"),
        ("PUT", "/lfs/", "close"),
        ("PUT", "/lfs/", "lost"),
        ("POST", "/verify", "half"),
    ],
)
def test_broken_uploads_are_tried_again_by_the_client(
    api: HfApi, hub: Any, files: dict[str, bytes], tmp_path: Path, method: str, pattern: str, how: Any
) -> None:
    hub.fail(method, pattern, how)
    push(api, tmp_path / "given")
    assert hub.asked(method, pattern) == 2
    assert {name: hub.repos["model", NAME].files()[name] for name in files} == files


@pytest.mark.parametrize("pattern, how", [("/preupload/", 400), ("/commit/", "close"), ("/create", "close")])
def test_others_are_not(
    api: HfApi, hub: Any, files: dict[str, bytes], tmp_path: Path, pattern: str, how: Any
) -> None:
    from huggingface_hub import errors

    hub.fail("POST", pattern, how)
    broken: Any = errors.HTTPError  # type: ignore[attr-defined]
    with pytest.raises(broken):
        push(api, tmp_path / "given")
    assert hub.asked("POST", pattern) == 1
    assert [path for repo in hub.repos.values() for path in repo.files()] in ([], [".gitattributes"])


def test_a_lost_answer_to_a_commit(api: HfApi, hub: Any, files: dict[str, bytes], tmp_path: Path) -> None:
    from huggingface_hub import errors

    hub.fail("POST", "/commit/", "lost")
    with pytest.raises(errors.HTTPError):  # type: ignore[attr-defined]
        push(api, tmp_path / "given")
    assert hub.repos["model", NAME].history() == ["pushed", "initial commit"]  # it was made all the same


def test_broken_downloads_go_on(
    api: HfApi, hub: Any, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.serve(tmp_path / "given", NAME)
    hub.fail("GET", "/cdn/", "half")
    assert Path(api.hf_hub_download(NAME, "sub/b.safetensors")).read_bytes() == files["sub/b.safetensors"]
    assert [status for _, path, status in hub.requests if "/cdn/" in path] == [200, 206]
    hub.fail("GET", "/api/models/", 500, times=9)
    with pytest.raises(LocalEntryNotFoundError, match="500"):
        api.snapshot_download("tester/other")


def test_it_takes_nothing_of_the_users(api: HfApi, hub: Any, tmp_path: Path) -> None:
    assert hub.url == constants.ENDPOINT == api.endpoint
    assert all(
        Path(place).is_relative_to(tmp_path) for place in (constants.HF_HUB_CACHE, constants.HF_TOKEN_PATH)
    )
    environment = hub.environment(tmp_path, token=None)
    assert {name for name in environment if name.startswith(("HF_", "HUGGING"))} == {
        "HF_ENDPOINT",
        "HF_HOME",
        "HF_HUB_DISABLE_XET",
        "HF_HUB_DISABLE_TELEMETRY",
        "HF_HUB_DISABLE_PROGRESS_BARS",
    }


@pytest.fixture
def in_process(hub: Any, tmp_path: Path) -> Callable[[str], str]:
    """Runs code in a process that takes the stand-in for the Hub; what it printed last."""

    def run(code: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=hub.environment(tmp_path),
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-1]

    return run


def test_datasets_of_both_forms(hub: Any, tmp_path: Path, in_process: Callable[[str], str]) -> None:
    import pyarrow
    from pyarrow import parquet

    table = tmp_path / "table" / "data"
    table.mkdir(parents=True)
    parquet.write_table(pyarrow.table({"n": [1, 2, 3]}), table / "train-00000-of-00001.parquet")
    hub.serve(tmp_path / "table", "tester/table", kind="dataset", private=True)
    pictures = tmp_path / "pictures" / "train"
    pictures.mkdir(parents=True)
    for number in range(2):
        Image.new("RGB", (8 + number, 8), (90 * number, 0, 0)).save(pictures / f"{number}.png")
    lines = "".join(f'{{"file_name": "{n}.png", "text": "picture {n}"}}\n' for n in range(2))
    (pictures / "metadata.jsonl").write_text(lines)
    hub.serve(tmp_path / "pictures", "tester/pictures", kind="dataset")
    hub.fail("GET", "/cdn/", "half")
    assert (
        in_process(
            "from datasets import load_dataset\n"
            "table = load_dataset('tester/table', split='train')\n"
            "pictures = load_dataset('tester/pictures', split='train')\n"
            "flow = load_dataset('tester/table', split='train', streaming=True)\n"
            "print(table['n'][:], [(p['image'].width, p['text']) for p in pictures], [r['n'] for r in flow])"
        )
        == "[1, 2, 3] [(8, 'picture 0'), (9, 'picture 1')] [1, 2, 3]"
    )

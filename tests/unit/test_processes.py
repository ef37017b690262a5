"""Processes that train together (tuner/processes.py): how long they wait, what they say, whose part is it."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState

from tuner import checkpoint, device, processes, recipe, resume, surroundings
from tuner.checkpoint import State
from tuner.data import index
from tuner.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")
GLOO = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:2718. "
)
GLOO += "This is typically caused by a remote worker crashing. Check the logs."
NCCL = """NCCL error in: ProcessGroupNCCL.cpp:94, invalid usage
ncclInvalidUsage: This usually reflects invalid usage of NCCL library.
Last error:
Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 15000"""


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher has said anything."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of one, as tuner.device starts it."""
    AcceleratorState._reset_state(True)
    monkeypatch.setattr(processes, "_now", processes.WAIT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    for name, value in zip(NAMES, "010101", strict=True):
        monkeypatch.setenv(name, value)
    threads = torch.get_num_threads()
    assert device.start("fp32", 1).device.type == "cpu"
    yield
    dist.destroy_process_group()
    AcceleratorState._reset_state(True)
    torch.set_num_threads(threads)


def waits() -> timedelta:
    """How long the backend waits for the others."""
    found: timedelta = (
        dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu")).options._timeout
    )
    return found


@pytest.mark.skipif(torch.accelerator.is_available(), reason="asks gloo")
def test_one_may_work_alone_for_long_and_steps_are_short(group: None) -> None:
    wait, step = processes.WAIT, processes.STEP
    assert step <= timedelta(minutes=30) and wait >= timedelta(hours=2)
    assert waits() == processes.WAIT  # from the very beginning: data may be fetched first
    with processes.patient():
        assert waits() == processes.WAIT
    assert waits() == processes.WAIT
    for _ in range(2):
        processes.brisk()
        assert waits() == processes.STEP
        with pytest.raises(ZeroDivisionError), processes.patient():
            assert waits() == processes.WAIT
            raise ZeroDivisionError
        assert waits() == processes.STEP


@pytest.mark.parametrize(
    "error, count, told",
    [
        (RuntimeError(GLOO), 2, "Connection closed by peer [127.0.0.1]:2718"),
        (RuntimeError("Timed out waiting 1800000ms for recv operation to complete"), 2, "Timed out waiting"),
        (RuntimeError(GLOO), 1, None),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), 2, None),
        (dist.DistBackendError(NCCL), 2, "Duplicate GPU detected : rank 1"),
        (dist.DistNetworkError("The client socket has timed out"), 1, "The client socket has timed out"),
    ],
)
def test_what_is_said_of_a_process_that_is_gone(
    monkeypatch: pytest.MonkeyPatch, error: RuntimeError, count: int, told: str | None
) -> None:
    monkeypatch.setattr(processes, "count", lambda: count)
    found = processes.lost(error)
    assert (found is None) == (told is None)
    assert found is None or (found.startswith(str(told)) and "\n" not in found and "typically" not in found)


@pytest.mark.parametrize(
    "said, machines, local",
    [
        ({}, 1, (0, 1)),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "3"}, 1, (3, 4)),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "1"}, 2, (1, 4)),
        # Machines of three and of one: of one mind about how many machines they are.
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "3", "GROUP_WORLD_SIZE": "2"}, 2, (0, 3)),
        ({"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "1", "GROUP_WORLD_SIZE": "2"}, 2, (0, 1)),
        ({"WORLD_SIZE": "2"}, 1, (0, 1)),
    ],
)
def test_machines_and_places_on_them(
    monkeypatch: pytest.MonkeyPatch, said: dict[str, str], machines: int, local: tuple[int, int]
) -> None:
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert processes.machines() == machines and processes.local() == local


def test_on_one_machine_nothing_is_tried(tmp_path: Path) -> None:
    assert processes.same_folder(tmp_path / "none") == [True] and not (tmp_path / "none").exists()
    processes.check_same_folder(tmp_path / "none", "output", "")


def test_another_folder_of_that_name_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setattr(processes, "AGAIN", 0.01)
    assert processes.same_folder(tmp_path) == [True] and list(tmp_path.iterdir()) == []
    monkeypatch.setattr(processes, "_lists", lambda file: not file.exists())  # as on another machine
    assert processes.same_folder(tmp_path, 0.05) == [False] and list(tmp_path.iterdir()) == []
    monkeypatch.setattr(processes, "same_folder", lambda folder: [True, False, True, False])
    with pytest.raises(
        UserError, match=r"output: .* of 4 processes on 2 machines these do not see it: 1, 3\. So"
    ):
        processes.check_same_folder(tmp_path, "output", "So.")


def test_what_lags_behind_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "AGAIN", 0.01)
    looks = iter([False, False, True])
    assert processes.until(lambda: next(looks), 30.0) and next(looks, None) is None
    assert not processes.until(lambda: False, 0.05)


def test_machines_without_a_common_cache_work_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(processes, "rank", lambda: 3)
    for seen, rank, count in (([True] * 4, 3, 4), ([True, True, False, False], 1, 2)):
        monkeypatch.setattr(processes, "same_folder", lambda folder, patience, seen=seen: seen)
        share = index.shared_out(tmp_path, lambda: None)
        assert (share.rank, share.processes, share.first) == (rank, count, False)
        assert ("is not one folder for all machines" in capsys.readouterr().out) == (count == 2)


def test_a_mistake_of_the_first_is_a_mistake_of_all() -> None:
    def wrong() -> None:
        raise UserError("so it is")

    assert processes.as_first(lambda: 3) == 3
    with pytest.raises(UserError, match="so it is"):
        processes.as_first(wrong)


def test_one_of_a_machine_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert processes.first("words")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert not processes.first("words")


@pytest.mark.parametrize("started, refused", [(1, False), (2, False), (3, True)])
def test_no_two_processes_have_one_gpu(monkeypatch: pytest.MonkeyPatch, started: int, refused: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(started))
    if refused:
        with pytest.raises(UserError, match=r"3 processes were started on this machine, which has 2 GPU"):
            device._check_devices()
    else:
        device._check_devices()


@pytest.mark.parametrize(
    "resume, restarts, refused", [("never", "2", True), ("never", "0", False), ("auto", "2", False)]
)
def test_a_run_that_is_started_again_continues(
    monkeypatch: pytest.MonkeyPatch, resume: str, restarts: str, refused: bool
) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", restarts)
    about = recipe.load(ROOT / "recipes/lora.yaml", [f"train.resume={resume}"])
    if refused:
        with pytest.raises(UserError, match="torchrun may start the run again 2 times, each time from the"):
            surroundings._restarts(about)
    else:
        surroundings._restarts(about)


def test_a_checkpoint_that_not_all_see_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = State(tmp_path / "step-0000004", 4, {"threads": 1}, {})
    seen: dict[Path, State | None] = {}
    monkeypatch.setattr(processes, "until", lambda look: look())
    monkeypatch.setattr(processes, "as_first", lambda find: find())
    monkeypatch.setattr(processes, "everyone", lambda own: [True, own])  # as the second of two processes
    monkeypatch.setattr(checkpoint, "at", lambda folder: seen.get(folder))
    assert checkpoint.agreed(lambda: None) is None
    for other in (None, State(first.folder, 4, {"threads": 2}, {})):
        seen[first.folder] = other
        with pytest.raises(
            UserError, match=r"step-0000004: .* of 2 processes these see none, or another: 1\."
        ):
            checkpoint.agreed(lambda: first)
    seen[first.folder] = first
    assert checkpoint.agreed(lambda: first) == first


def test_processes_that_would_train_different_things_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    made = {"code": "c", "device": "one GPU", "torch": "2"}
    about = {"recipe": {"train.seed": 0}, "data files": "d", "threads": 1, "made with": made}
    told: list[dict[str, Any]] = []

    def everyone(own: dict[str, Any]) -> list[dict[str, Any]]:
        told.append(own)
        return list(told)

    monkeypatch.setattr(processes, "everyone", everyone)

    def check(**other: Any) -> None:
        resume.check_alike(cast(Any, SimpleNamespace(fingerprint={**about, **other})))

    check()
    check(threads=2, **{"made with": {**made, "device": "another GPU"}})
    for other, words in (
        ({"data files": "e"}, r"data files: 'd' and 'e'"),
        ({"made with": {**made, "code": "b"}}, r"made with\.code: 'c' and 'b'"),
    ):
        with pytest.raises(
            UserError, match=f"process 0 and process 2 would .*\n  {words}\nAll machines need"
        ):
            check(**other)
        told.pop()
    assert len(told) == 2

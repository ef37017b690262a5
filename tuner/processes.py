"""Processes that train together: how long they wait for one another, what all must see, and who speaks."""

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from tuner.errors import UserError

WAIT, STEP = timedelta(hours=3), timedelta(minutes=30)
"""For so long the others wait where one process works alone (it fetches data, draws previews, writes, exports
or measures), and in training's steps.

The backends' own limits (nccl 10 minutes, gloo 30) would end runs that work alone for longer. A process that
was killed is noticed at once, as its connections break; a machine without power or network only after this.
"""
PATIENCE = 30.0
"""Seconds after which what one machine wrote must be seen by another; network file systems lag behind."""
AGAIN, ANSWER = 1.0, 5.0  # seconds between two looks; that an answer may take
GONE = ("connection closed", "connection reset", "broken pipe", "timed out wait", "gloo", "nccl")
"""In small letters, of which one is in what the backends say of a process that does not answer."""
REMARK = "last error:"  # of nccl's, before what it was

Item = TypeVar("Item")


def machines() -> int:
    """On how many machines the processes run, as torchrun or, of equal ones, another launcher says it."""
    whole = os.environ.get("WORLD_SIZE", "1")
    equal = int(whole) // int(os.environ.get("LOCAL_WORLD_SIZE", whole))
    return int(os.environ.get("GROUP_WORLD_SIZE", str(equal)))


def local() -> tuple[int, int]:
    """This process's number on its machine, and how many there are."""
    return int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def everyone(value: Item) -> list[Item]:
    """What each process gives, in the order of their ranks; all of them have to call it."""
    if count() == 1:
        return [value]
    found: list[Item | None] = [None] * count()
    dist.all_gather_object(found, value)
    return found  # type: ignore[return-value]


def brisk() -> None:
    """From here on all processes go at one pace: each waits for the others for STEP at most."""
    _limit(STEP)


@contextmanager
def patient() -> Iterator[None]:
    """Within it, or in what it decorates, one process works alone, and the others wait for WAIT at most."""
    before = _limit(WAIT)
    try:
        yield
    finally:
        _limit(before)


_now = WAIT  # as the process group begins (tuner.device.start)


def _limit(time: timedelta) -> timedelta:
    """Set how long is waited from here on; what it was."""
    global _now
    before, _now = _now, time
    if time != before and dist.is_available() and dist.is_initialized():
        distributed_c10d._set_pg_timeout(time)
    return before


def as_first(work: Callable[[], Item]) -> Item:
    """What the first process finds, for all; the others do not look. All of them have to call it.

    Raises:
        UserError: on all of them, where `work` raises one.
    """
    found: Item | UserError | None = None
    if rank() == 0:
        try:
            found = work()
        except UserError as error:
            found = UserError(str(error))
    told = everyone(found)[0]
    if isinstance(told, UserError):
        raise told
    return told  # type: ignore[return-value]


def rank() -> int:
    """This process's number among all of the run."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def count() -> int:
    """How many processes the run has."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def until(seen: Callable[[], bool], patience: float = PATIENCE) -> bool:
    """Look again and again whether something is there, for so many seconds."""
    end = time.monotonic() + patience
    while not (found := seen()) and time.monotonic() < end:
        time.sleep(AGAIN)
    return found


def same_folder(folder: Path, patience: float = PATIENCE) -> list[bool]:
    """Of each process whether it sees what the first one writes into a folder; all have to call it.

    Processes of one machine do. Among several machines it is tried with a file, which is taken away again.

    Args:
        patience: seconds.

    Raises:
        OSError: the first process cannot write there.
    """
    if machines() == 1:
        return [True] * count()
    mark = folder / f".{uuid.uuid4().hex}.partial"
    main = rank() == 0
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
    try:
        mark = folder / everyone(mark.name)[0]
        return everyone(until(lambda: _lists(mark), patience))
    finally:
        if main:
            mark.unlink(missing_ok=True)


def _lists(file: Path) -> bool:
    """Whether a file is in its folder's list, which a network file system asks its server for."""
    with suppress(OSError):
        return file.name in os.listdir(file.parent)
    return False


def check_same_folder(folder: Path, key: str, why: str) -> None:
    """Raises UserError, on all processes, where some have another folder of this name than the first one.

    Args:
        key: the recipe's that names it; why: it has to be the same, a sentence.
    """
    seen = same_folder(folder)
    if not all(seen):
        blind = ", ".join(str(rank) for rank, sees in enumerate(seen) if not sees)
        raise UserError(
            f"{key}: {folder}: process 0 writes there, and of {len(seen)} processes on {machines()} machines "
            f"these do not see it: {blind}. {why} Choose a folder on a file system that all machines share."
        )


def lost(error: BaseException) -> str | None:
    """What is said where processes lost one another; None where an error is something else."""
    text = str(error)
    told = count() > 1 and any(word in text.lower() for word in GONE)
    if not told and not isinstance(error, dist.DistError):
        return None
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    after = [number + 1 for number, line in enumerate(lines[:-1]) if line.lower().startswith(REMARK)]
    if after:
        return lines[after[0]]
    return re.sub(r"^\[[^\]]*\]\s*", "", lines[0]).split(". ")[0]  # without its source file, and its advice


def first(words: str) -> bool:
    """Whether this process is the first of its machine that has these words to say, so that one says them.

    What all find alike is said once, and what only one finds is said, too.
    """
    number, _ = local()
    if count() == 1:
        return number == 0
    machine = os.environ.get("GROUP_RANK", "0")
    name = f"said {machine} {hashlib.sha256(words.encode()).hexdigest()}"
    before: list[int] = []

    def ask() -> None:
        with suppress(RuntimeError):  # it was kept by a process that has ended
            before.append(distributed_c10d._get_default_store().add(name, 1))

    # Of a machine that cannot be reached no answer comes, and no error either for many minutes.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(ANSWER)
    return before[0] == 1 if before else number == 0


def is_parted(tensor: object) -> bool:
    """Whether a tensor is one that processes share out (torch's DTensor)."""
    return hasattr(tensor, "to_local")


def own_part(tensor: Tensor) -> Tensor:
    """This process's part of a tensor: all of one that is not parted."""
    part: Tensor = tensor.to_local() if is_parted(tensor) else tensor  # type: ignore[attr-defined]
    return part

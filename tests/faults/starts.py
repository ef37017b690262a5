"""Starts runs by fork: processes of their own, without importing everything again for each.

A start has a session of its own, as one of torchrun or of a terminal: a leader, and under it the training
processes, where there are several. A signal to the group reaches all of them and their loading processes.
"""

from __future__ import annotations

import fnmatch
import hashlib
import importlib
import json
import os
import pkgutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ASKED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
Hooks = Sequence[Sequence[Any]]
"""Names and arguments of functions in HOOKS: called in each training process before it begins."""


def warm() -> int:
    """Import all that a run needs, once; how many modules of tuner that is. Nothing is computed."""
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "CUDA_VISIBLE_DEVICES": ""}
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    import tuner

    names = [found.name for found in pkgutil.walk_packages(tuner.__path__, "tuner.")]
    wanted = [name for name in names if name.split(".")[1] not in ("train", "captioning", "push", "memory")]
    for name in wanted:
        importlib.import_module(name)
    from tuner import resume

    resume.code_digest()  # of the code that all starts run, also where the files change meanwhile
    return len(wanted)


class Start:
    """A run that was started: `tuner train ARGUMENTS`, in so many processes."""

    def __init__(self, arguments: Sequence[str], processes: int, printed: Path, hooks: Hooks = ()) -> None:
        """`printed`: the file that gets what it says."""
        printed.parent.mkdir(parents=True, exist_ok=True)
        sys.stdout.flush()
        sys.stderr.flush()
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            place = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(place, 1)
            os.dup2(place, 2)
            os._exit(_train(arguments, hooks) if processes == 1 else _lead(arguments, processes, hooks))
        with suppress(ProcessLookupError):
            while os.getpgid(self.pid) != self.pid:
                time.sleep(0.001)

    def poll(self) -> int | None:
        """The exit code, below 0 for a signal; None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self, seconds: float = 300.0) -> int:
        """The exit code; kills what takes longer."""
        until = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > until:
                self.send(signal.SIGKILL)
                raise TimeoutError(f"a run did not end in {seconds} s")
            time.sleep(0.002)
        assert self.code is not None
        return self.code

    def send(self, number: int) -> None:
        """Send a signal to the whole group."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, number)


def _lead(arguments: Sequence[str], processes: int, hooks: Hooks) -> int:
    """Fork the training processes, wait for them, and take over the worst exit code, as torchrun does."""
    for number in ASKED:
        signal.signal(number, signal.SIG_IGN)  # the training processes are meant
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(processes):
        pids.append(os.fork())
        if pids[-1] == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
            os.environ |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
            os.environ |= {"MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
            os._exit(_train(arguments, hooks))
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return max(abs(code) for code in codes)


def _train(arguments: Sequence[str], hooks: Hooks) -> int:
    for number in ASKED:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    code = 1
    try:
        from tuner.cli import main

        for name, *given in hooks:
            HOOKS[name](*given)
        code = main(["train", *arguments])
    except BaseException:  # noqa: BLE001 - a forked process must not go on in the code of its parent
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def in_accumulation(step: int, delay: float) -> None:
    """Kill the whole group `delay` seconds into a second forward pass, of step `step` (from 0) or later."""
    from tuner import counted

    seed = counted.seed_libraries

    def seed_and_kill(number: int, at: int, micro: int, rank: int) -> None:
        seed(number, at, micro, rank)
        if at >= step and micro > 0 and rank == 0:
            threading.Timer(delay, lambda: os.killpg(0, signal.SIGKILL)).start()

    counted.seed_libraries = seed_and_kill


def slow_step(step: int, seconds: float, place: str) -> None:
    """Let a step (from 0) take so long, and make a file when it begins."""
    from tuner import counted

    seed = counted.seed_libraries

    def seed_and_wait(number: int, at: int, micro: int, rank: int) -> None:
        seed(number, at, micro, rank)
        if at == step:
            Path(place).touch()
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                time.sleep(0.01)

    counted.seed_libraries = seed_and_wait


def record(place: str) -> None:
    """Write down what each micro-batch holds, in a file PLACE-RANK.jsonl; without loading processes only."""
    from tuner.data.loader import Feed

    made = Feed.batch

    def batch(self: Any, slots: Sequence[Any], total: float) -> Any:
        found = made(self, slots, total)
        noise = hashlib.sha256(found.noise.numpy().tobytes() + found.u.numpy().tobytes()).hexdigest()
        about = {
            "names": [Path(n).name for n in found.names],
            "noise": noise,
            "weight": found.weight.tolist(),
        }
        about["each"] = [hashlib.sha256(one.numpy().tobytes()).hexdigest() for one in found.noise]
        with open(f"{place}-{os.environ.get('RANK', '0')}.jsonl", "a") as file:
            file.write(json.dumps(about) + "\n")
        return found

    Feed.batch = batch  # type: ignore[method-assign]


def full(pattern: str, number: int) -> None:
    """Let every write to a path of this pattern fail with this error, as a disk does that is full."""
    import safetensors
    import safetensors.torch

    def check(path: object) -> None:
        if fnmatch.fnmatch(str(path), pattern):
            raise OSError(number, os.strerror(number))

    def guarded(real: Any, mode: int | None = None) -> Any:
        def call(self: Path, *args: Any, **kwargs: Any) -> Any:
            if mode is None or any(one in str((*args, "r")[0]) for one in "wax+"):
                check(self)
            return real(self, *args, **kwargs)

        return call

    serialize = safetensors.torch.serialize_file

    def serialize_file(tensors: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        try:
            check(path)
        except OSError as error:
            text = f"I/O error: {error.strerror} (os error {error.errno})"
            raise safetensors.SafetensorError(f"Error while serializing: {text}") from None
        serialize(tensors, path, *args, **kwargs)

    safetensors.torch.serialize_file = serialize_file
    for name in ("write_bytes", "write_text"):
        setattr(Path, name, guarded(getattr(Path, name)))
    Path.open = guarded(Path.open, 0)  # type: ignore[method-assign]


def full_log(lines: int, number: int) -> None:
    """Let the log fail after so many lines."""
    from tuner import log

    dump, count = log._dump, iter(range(1 << 30))

    def dump_or_fail(record: Any) -> str:
        if next(count) >= lines:
            raise OSError(number, os.strerror(number))
        return dump(record)

    log._dump = dump_or_fail


HOOKS: dict[str, Callable[..., None]] = {
    "in_accumulation": in_accumulation,
    "record": record,
    "slow_step": slow_step,
    "full": full,
    "full_log": full_log,
}


def serve() -> None:
    """Start what is asked for on standard input, a JSON list a line, and answer with one value a line."""
    warm()
    running: list[Start] = []
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        command, *rest = json.loads(line)
        answer: int | None = None
        if command == "start":
            arguments, processes, printed, hooks = rest
            running.append(Start(arguments, processes, Path(printed), hooks))
            answer = len(running) - 1
        elif command == "poll":
            answer = running[rest[0]].poll()
        elif command == "wait":
            answer = running[rest[0]].wait()
        elif command == "send":
            running[rest[0]].send(rest[1])
        print(json.dumps(answer), flush=True)
    for one in running:
        one.send(signal.SIGKILL)


if __name__ == "__main__":
    serve()

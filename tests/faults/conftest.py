"""Runs that are killed, signalled, or find the disk full: processes forked off one that has imported all."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent


class Server:
    """tests/faults/starts.py, started once."""

    def __init__(self) -> None:
        command = [sys.executable, str(HERE / "starts.py")]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.answer() == "ready"

    def answer(self) -> Any:
        """The next line it says."""
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def ask(self, *command: Any) -> Any:
        """A command, and what it gave."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        """End it, and what it started."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


@dataclass
class Run:
    """A run of a method on a tiny base, as kill_loop.py makes them, in a folder of its own."""

    server: Server
    ground: Any
    place: Path

    @property
    def output(self) -> Path:
        """The run's."""
        return self.place / "out"

    @property
    def printed(self) -> str:
        """All that its starts said."""
        return (self.place / "printed.txt").read_text()

    def start(self, hooks: Sequence[Any] = (), processes: int = 1, **settings: str) -> int:
        """Start it; the number to wait for. Settings have __ for the dot."""
        values = {"data.cache": "on", "data.workers": "0"}
        values |= {key.replace("__", "."): value for key, value in settings.items()}
        arguments = self.ground.command(self.output, values)
        number: int = self.server.ask("start", arguments, processes, str(self.place / "printed.txt"), hooks)
        return number

    def wait(self, number: int) -> int:
        """The exit code."""
        code: int = self.server.ask("wait", number)
        return code

    def run(self, hooks: Sequence[Any] = (), processes: int = 1, **settings: str) -> int:
        """Start it and wait for its end; the exit code."""
        return self.wait(self.start(hooks, processes, **settings))


@pytest.fixture(scope="session")
def kill_loop() -> ModuleType:
    """tests/faults/kill_loop.py."""
    spec = importlib.util.spec_from_file_location("tuner_fault_kill_loop", HERE / "kill_loop.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made
    spec.loader.exec_module(made)
    return made


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """What forks runs."""
    made = Server()
    yield made
    made.close()


@pytest.fixture(scope="session")
def new_run(
    kill_loop: ModuleType, server: Server, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, Path], Run]:
    """Makes a run of a method in a folder; every method has its base and scenes once."""
    grounds: dict[str, Any] = {}

    def make(method: str, place: Path) -> Run:
        if method not in grounds:
            grounds[method] = kill_loop.Ground(method, 1, tmp_path_factory.mktemp(method), None)
            kill_loop.prepare(grounds[method])
        return Run(server, grounds[method], place)

    return make

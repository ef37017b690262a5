"""Two machines, each with an agent of torchrun: on one computer, and with networks and disks of their own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tuner import checkpoint
from tuner.data.cache import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SCRIPT = Path(__file__).with_name("machine.py")
STEPS = 8
SETTINGS = {"data.cache": "on", "data.workers": "0", "train.steps": str(STEPS), "train.accumulate": "1"}
# As in test_divided.py: plain descent makes no whole step of a rounding.
PLAIN = {"method.lora.dropout": "0", "train.optimiser": "sgd", "train.learning_rate": "0.5"}
PLAIN |= {"train.clip": "null", "train.schedule": "constant"}
# An agent that is gone is forgotten by the others after three of its signs of life did not come.
RENDEZVOUS = "keep_alive_interval=1,keep_alive_max_attempt=3,join_timeout=200,read_timeout=30"
BOUND = 60.0
"""Seconds in which the others have to notice that one is gone."""
NAMES, LINKS = ("tuner-a", "tuner-b"), ("tuner-va", "tuner-vb")
"""Of two network namespaces and the ends of the cable between them."""
GONE = "a process of this run is gone, or cannot be reached"


@dataclass
class Agents:
    """torchrun's agents of one run, machine 0 and machine 1.

    Attributes:
        within: what a machine's commands begin with, where it has a network of its own.
    """

    ground: Any
    place: Path
    addresses: tuple[str, str] = ("127.0.0.1", "127.0.0.1")
    within: tuple[tuple[str, ...], ...] = ((), ())
    restarts: int = 0
    running: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    starts: int = 0

    def __post_init__(self) -> None:
        self.place.mkdir(parents=True, exist_ok=True)
        self.pids.mkdir()
        self.new_port()

    @property
    def output(self) -> Path:
        """The run's."""
        return self.place / "out"

    @property
    def pids(self) -> Path:
        """Where the training processes leave their numbers, by machine and torchrun's attempt."""
        return self.place / "pids"

    def new_port(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    def start(self, machine: int, hooks: Sequence[Any] = (), **settings: str) -> None:
        """Start a machine's agent."""
        values = SETTINGS | {key.replace("__", "."): value for key, value in settings.items()}
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
        torchrun += ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{self.addresses[0]}:{self.port}"]
        host = f"is_host={int(machine == 0)}"  # else on one computer the first that comes holds it
        torchrun += ["--rdzv_id", "tests", "--rdzv_conf", f"{RENDEZVOUS},{host}"]
        torchrun += ["--max_restarts", str(self.restarts)]
        torchrun += ["--log_dir", str(self.place / f"log-{machine}-{self.starts}"), "--redirects", "3"]
        torchrun += ["--local_addr", self.addresses[machine]]
        command = [*self.within[machine], *torchrun, str(SCRIPT), json.dumps(list(hooks)), str(machine)]
        command += self.ground.command(self.output, values)
        env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        env |= {"ACCELERATE_USE_CPU": "true", "PIDS": str(self.pids), "NO_COLOR": "1"}
        # Else an agent that comes anew is never told where the others meet (torch 2.13).
        env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        if self.within[machine]:
            env["GLOO_SOCKET_IFNAME"] = LINKS[machine]  # the computer's name means another network
        with (self.place / f"agent-{machine}.txt").open("ab") as file:
            self.running[machine] = subprocess.Popen(
                command, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def both(self, hooks: Sequence[Any] = (), others: Sequence[Any] = (), **settings: str) -> None:
        """Start both; hooks on machine 0's, and others on machine 1's."""
        for old in self.pids.iterdir():
            old.unlink()
        self.starts += 1
        self.start(0, hooks, **settings)
        self.start(1, others, **settings)

    def wait(self, machine: int, seconds: float = 400.0) -> int:
        """An agent's exit code."""
        return self.running[machine].wait(seconds)

    def run(self, **settings: str) -> list[int]:
        """Start both, wait for their ends; their exit codes."""
        self.both((), **settings)
        return [self.wait(machine) for machine in (0, 1)]

    def kill(self, machine: int, attempt: int = 0) -> None:
        """kill -9 a machine: its agent and its training process."""
        trainer = int((self.pids / f"{machine}-{attempt}").read_text())
        with suppress(ProcessLookupError):
            os.killpg(self.running[machine].pid, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.kill(trainer, signal.SIGKILL)
        self.running[machine].wait(20)

    def printed(self, machine: int) -> str:
        """What a machine's training processes said, start after start."""
        files = sorted(self.place.glob(f"log-{machine}-*/**/std*.log"))
        return "".join(file.read_text() for file in files)

    def close(self) -> None:
        """End what is left of it."""
        for machine, one in self.running.items():
            if one.poll() is None:
                with suppress(OSError):
                    os.killpg(one.pid, signal.SIGKILL)
            for file in self.pids.glob(f"{machine}-*"):
                with suppress(OSError, ValueError):
                    pid = int(file.read_text())
                    if b"machine.py" in Path(f"/proc/{pid}/cmdline").read_bytes():
                        os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def ground(kill_loop: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tiny base and a few scenes."""
    made = kill_loop.Ground("lora", 2, tmp_path_factory.mktemp("ground"), None)
    kill_loop.prepare(made)
    return made


@pytest.fixture
def agents(ground: Any, tmp_path: Path) -> Iterator[Agents]:
    made = Agents(ground, tmp_path / "run")
    yield made
    made.close()


@pytest.fixture(scope="module")
def alone(
    kill_loop: ModuleType, ground: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """The bytes that two machines end in that nothing disturbs."""
    made = Agents(ground, tmp_path_factory.mktemp("alone") / "run")
    assert made.run() == [0, 0], made.printed(0) + made.printed(1)
    yield contents(kill_loop, made.output)
    made.close()


def contents(kill_loop: ModuleType, output: Path) -> dict[str, str]:
    kill_loop.STEPS = STEPS
    found: dict[str, str] = kill_loop.contents(output)
    assert len(found) >= 2
    return found


def ready(place: Path, agents: Agents, seconds: float = 200.0) -> None:
    """Wait for a file, as long as all agents run."""
    until = time.monotonic() + seconds
    while not place.exists():
        codes = [one.poll() for one in agents.running.values()]
        assert codes == [None, None] and time.monotonic() < until, (codes, agents.printed(0))
        time.sleep(0.02)


def test_two_machines_train_as_one(new_run: Any, agents: Agents, tmp_path: Path) -> None:
    run = new_run("lora", tmp_path / "one")
    plain = {key.replace(".", "__"): value for key, value in PLAIN.items()}
    assert run.run((), 1, **plain, train__accumulate="2", train__steps=str(STEPS)) == 0, run.printed
    agents.ground = run.ground
    assert agents.run(**plain) == [0, 0], agents.printed(0)
    name = f"checkpoints/step-{STEPS:07d}/trained.safetensors"
    one, other = load_file(run.output / name), load_file(agents.output / name)
    assert one.keys() == other.keys() and len(one) > 10
    for key, tensor in one.items():
        torch.testing.assert_close(other[key], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("killed", [1, 0])  # 0 holds the rendezvous, and is the one that writes
def test_a_machine_is_lost_and_both_start_again(
    kill_loop: ModuleType, agents: Agents, alone: dict[str, str], killed: int
) -> None:
    left, inside, go = 1 - killed, agents.place / "in-step", agents.place / "go"
    agents.both([["hold", 5, str(inside), str(go)]])
    ready(inside, agents)
    agents.kill(killed)
    began = time.monotonic()
    go.touch()
    assert agents.wait(left, BOUND) != 0, agents.printed(left)
    assert time.monotonic() - began < BOUND
    said = agents.printed(left)
    assert said.count(GONE) == 1 and "Traceback" not in said, said
    whole = agents.output / "checkpoints" / "step-0000004"
    assert f"Kept: {whole} is whole (4 steps); the same command continues from it." in said
    assert not (agents.output / "export").exists()
    agents.new_port()
    assert agents.run() == [0, 0], agents.printed(0)
    assert f"step-0000004 (4 of {STEPS} steps are done)" in agents.printed(0) + agents.printed(1)
    assert contents(kill_loop, agents.output) == alone


def test_torchrun_starts_the_run_again(kill_loop: ModuleType, agents: Agents, alone: dict[str, str]) -> None:
    agents.restarts = 2
    inside, go = agents.place / "in-step", agents.place / "go"
    agents.both([["hold", 5, str(inside), str(go)]])
    ready(inside, agents)
    agents.kill(1)
    go.touch()
    agents.start(1)  # as a scheduler does it
    assert [agents.wait(machine) for machine in (0, 1)] == [0, 0], agents.printed(0)
    said = agents.printed(0)
    assert said.count(GONE) == 1 and (agents.pids / "0-1").exists()
    assert f"step-0000004 (4 of {STEPS} steps are done)" in said + agents.printed(1)
    assert contents(kill_loop, agents.output) == alone


def test_a_long_checkpoint_is_waited_for_and_a_stalled_step_is_not(agents: Agents) -> None:
    inside, go = agents.place / "in-step", agents.place / "go"
    # Machine 0 stalls in a step, as one without power or network does for the others: no connection breaks.
    slow = [["brisk", 4.0], ["busy", 8.0]]
    agents.both([*slow, ["hold", 5, str(inside), str(go)]], slow)
    ready(inside, agents)  # behind the checkpoint of step 4
    assert agents.wait(1, BOUND) != 0
    said = agents.printed(1)
    assert said.count(GONE) == 1 and "imed out" in said and "Traceback" not in said, said
    go.touch()
    assert agents.wait(0, BOUND) != 0


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def apart(agents: Agents) -> Iterator[Agents]:
    """Two machines with networks of their own, and a cable between them."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("networks of their own need `ip` and root")
    try:
        for name in NAMES:
            ip("netns", "add", name)
        ip("link", "add", LINKS[0], "type", "veth", "peer", "name", LINKS[1])
        for number, (name, link) in enumerate(zip(NAMES, LINKS, strict=True)):
            ip("link", "set", link, "netns", name)
            ip("-n", name, "addr", "add", f"10.77.0.{number + 1}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
            ip("-n", name, "link", "set", "lo", "up")
    except subprocess.CalledProcessError as error:
        remove()
        pytest.skip(f"no networks of their own here: {error.stderr}")
    agents.addresses = ("10.77.0.1", "10.77.0.2")
    agents.within = tuple(("ip", "netns", "exec", name) for name in NAMES)
    yield agents
    agents.close()
    remove()


def remove() -> None:
    for name in NAMES:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
    subprocess.run(["ip", "link", "del", LINKS[0]], capture_output=True)


def own_disk(agents: Agents, folder: Path) -> None:
    """Let machine 1 have a folder of this name for itself."""
    own = agents.place / f"own-{folder.name}"
    own.mkdir()
    folder.mkdir(exist_ok=True)
    script = f"mount --make-rprivate / && mount --bind '{own}' '{folder}' && exec \"$@\""
    agents.within = (agents.within[0], (*agents.within[1], "unshare", "-m", "sh", "-c", script, "sh"))


def test_machines_with_caches_of_their_own(
    kill_loop: ModuleType, apart: Agents, alone: dict[str, str]
) -> None:
    cache = apart.place / "cache"
    own_disk(apart, cache)
    assert apart.run() == [0, 0], apart.printed(0)
    said = apart.printed(0) + apart.printed(1)
    assert f"data.cache: {cache} is not one folder for all machines: each of them encodes everything" in said
    entries = [len(Store(place / "latents")) for place in (cache, apart.place / "own-cache")]
    assert entries[0] == entries[1] >= kill_loop.SAMPLES
    assert contents(kill_loop, apart.output) == alone


def test_machines_with_outputs_of_their_own_are_refused(apart: Agents) -> None:
    plain = {key.replace(".", "__"): value for key, value in PLAIN.items()}
    assert apart.run(**plain | {"train__steps": "4"}) == [0, 0], apart.printed(0)
    own_disk(apart, apart.output)
    kept = apart.output / "checkpoints" / "step-0000004"
    again = f"{kept}: process 0 would continue from it, and of 2 processes these see none, or another: 1."
    assert again in refused(apart, plain) and checkpoint.at(kept) is not None
    kept.rename(apart.place / "moved")
    (apart.output / "finished.json").unlink()
    anew = f"output: {apart.output}: process 0 writes there, and of 2 processes on 2 machines these do not"
    assert anew in refused(apart, plain)
    assert [p.name for p in (apart.output / "checkpoints").iterdir()] == []


def refused(agents: Agents, plain: dict[str, str]) -> str:
    """Start, and see that it is refused; what was said, by both."""
    assert agents.run(**plain) == [1, 1]  # torchrun makes 1 of 2
    said = [agents.printed(machine) for machine in (0, 1)]
    assert all("process 0" in one and "Traceback" not in one and GONE not in one for one in said), said
    return said[0]


def test_a_cable_is_cut(kill_loop: ModuleType, apart: Agents, alone: dict[str, str]) -> None:
    inside, go = apart.place / "in-step", apart.place / "go"
    slow = [["brisk", 4.0]]
    apart.both([*slow, ["hold", 5, str(inside), str(go)]], slow)
    ready(inside, apart)
    ip("-n", NAMES[1], "link", "set", LINKS[1], "down")
    go.touch()
    assert [apart.wait(machine, BOUND) != 0 for machine in (0, 1)] == [True, True]
    for machine in (0, 1):
        said = apart.printed(machine)
        assert said.count(GONE) == 1 and "Traceback" not in said, said
    ip("-n", NAMES[1], "link", "set", LINKS[1], "up")
    assert apart.run() == [0, 0], apart.printed(0)
    assert f"step-0000004 (4 of {STEPS} steps are done)" in apart.printed(0)
    assert contents(kill_loop, apart.output) == alone

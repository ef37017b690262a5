"""The scripts of launch/ hand signals on to the processes that train; torchrun and Slurm are stand-ins."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("quickstart.sh", "setup.sh", "slurm.sh", "test.sh", "train.sh")
TRAINER = """
import os, signal, sys, time
place = os.environ["TOLD"]
def told(text):
    with open(place, "a") as file:
        file.write(text + "\\n")
def ask(number, frame):
    told(signal.Signals(number).name)
    time.sleep(0.5)  # the step is finished, a checkpoint written
    told("saved")
    sys.exit(130 if number == signal.SIGINT else 0)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, ask)
told(f"ready {' '.join(sys.argv[1:])}")
time.sleep(60)
"""
# As torchrun: trainers in sessions of their own, 1 for any failure, ended at once by a signal to itself.
TORCHRUN = """#!{python}
import subprocess, sys
count = int(sys.argv[sys.argv.index("--nproc_per_node") + 1])
script = sys.argv.index("tuner/train.py")
command = [sys.executable, *sys.argv[script:]]
open("torchrun.txt", "a").write(" ".join(sys.argv[1:script]) + "\\n")
running = [subprocess.Popen(command, start_new_session=True) for _ in range(count)]
sys.exit(int(any(one.wait() for one in running)))
"""
SCONTROL = """#!/bin/bash
echo "$@" >> scontrol.txt
if [[ $1 == show ]]; then printf 'one\\ntwo\\n'; fi
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout with the scripts, a trainer that only listens, and commands that stand in."""
    place = tmp_path / "checkout"
    for folder in ("launch", "tuner", ".venv/bin", "bin"):
        (place / folder).mkdir(parents=True)
    for name in ("train.sh", "slurm.sh"):
        shutil.copy(ROOT / "launch" / name, place / "launch")
    (place / "launch/setup.sh").write_text("echo set up >> setup.txt\n")
    (place / "tuner/train.py").write_text(TRAINER)
    commands = {
        ".venv/bin/python": f'#!/bin/sh\nexec {sys.executable} "$@"\n',
        ".venv/bin/torchrun": TORCHRUN.format(python=sys.executable),
        "bin/srun": '#!/bin/bash\n[[ $1 == --* ]] && shift\nexec "$@"\n',
        "bin/scontrol": SCONTROL,
    }
    for name, text in commands.items():
        (place / name).write_text(text)
        (place / name).chmod(0o755)
    return place


def clean() -> dict[str, str]:
    """The environment without what the scripts are told by it."""
    unset = {"RANK", "WORLD_SIZE", "NODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "PROCESSES", "SETUP"}
    unset |= {"RESTARTS", "RUN_ID", "UNFINISHED", "WAIT", "SLURM_JOB_ID", "SLURM_NODEID"}
    return {name: value for name, value in os.environ.items() if name not in unset}


def begin(checkout: Path, script: str, ready: int, *arguments: str, **more: str) -> subprocess.Popen[str]:
    """Start a script and wait until so many trainers are ready."""
    env = clean() | {
        "TOLD": str(checkout / "told.txt"),
        "PATH": f"{checkout / 'bin'}:{os.environ['PATH']}",
        **more,
    }
    command = ["bash", str(checkout / "launch" / script), *arguments]
    running = subprocess.Popen(
        command,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        # Tests started in the background or by nohup ignore these, and no shell below could trap them.
        preexec_fn=lambda: [signal.signal(each, signal.SIG_DFL) for each in (signal.SIGINT, signal.SIGHUP)],
    )
    until = time.monotonic() + 60
    while told(checkout).count("ready recipe.yaml key=1") < ready and time.monotonic() < until:
        assert running.poll() is None, running.communicate()[0]
        time.sleep(0.01)
    return running


def told(checkout: Path) -> list[str]:
    """What the trainers wrote down."""
    place = checkout / "told.txt"
    return place.read_text().splitlines() if place.exists() else []


@pytest.mark.parametrize("name", SCRIPTS)
def test_bash_reads_the_script(name: str) -> None:
    assert {path.name for path in (ROOT / "launch").glob("*.sh")} == set(SCRIPTS)
    subprocess.run(["bash", "-n", str(ROOT / "launch" / name)], check=True)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(
    "sent, arrives, code",
    [
        (signal.SIGTERM, "SIGTERM", 0),
        (signal.SIGHUP, "SIGTERM", 0),
        (signal.SIGUSR1, "SIGUSR1", 0),
        (signal.SIGINT, "SIGINT", 130),
    ],
)
def test_train_hands_signals_on_and_waits(
    checkout: Path, processes: int, sent: int, arrives: str, code: int
) -> None:
    running = begin(checkout, "train.sh", processes, "recipe.yaml", "key=1", PROCESSES=str(processes))
    running.send_signal(sent)
    printed, _ = running.communicate(timeout=60)
    assert running.returncode == code, printed
    assert f"train: {'SIGINT' if code else arrives} was handed on; the same command continues" in printed
    assert sorted(told(checkout)[processes:]) == sorted([arrives, "saved"] * processes)
    assert (checkout / "setup.txt").read_text() == "set up\n"
    if processes > 1:
        assert (checkout / "torchrun.txt").read_text() == "--nproc_per_node 2 --standalone\n"


@pytest.mark.parametrize(
    "more, started",
    [
        ({}, "--nproc_per_node 1 --standalone --max_restarts 3\n"),
        (
            {"NODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "one", "RUN_ID": "mine"},
            "--nproc_per_node 1 --nnodes 2 --rdzv_backend c10d --rdzv_endpoint one:29500 --rdzv_id mine "
            "--rdzv_conf is_host=1 --max_restarts 3\n",
        ),
        (
            {"NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "one", "MASTER_PORT": "7"},
            "--nproc_per_node 1 --nnodes 2 --rdzv_backend c10d --rdzv_endpoint one:7 --rdzv_id tuner "
            "--rdzv_conf is_host=0 --max_restarts 3\n",
        ),
        (
            {"NODES": "2", "MASTER_ADDR": "one"},
            "--nproc_per_node 1 --nnodes 2 --rdzv_backend c10d --rdzv_endpoint one:29500 --rdzv_id tuner "
            "--max_restarts 3\n",
        ),
    ],
)
def test_train_with_restarts(checkout: Path, more: dict[str, str], started: str) -> None:
    running = begin(checkout, "train.sh", 1, "recipe.yaml", "key=1", PROCESSES="1", RESTARTS="3", **more)
    running.send_signal(signal.SIGINT)
    printed, _ = running.communicate(timeout=60)
    # As TERM: of a process that ended by Ctrl-C torchrun would think that it failed, and start it again.
    assert told(checkout)[1:] == ["SIGTERM", "saved"]
    assert running.returncode == 130 and "train: SIGINT was handed on" in printed
    assert (checkout / "torchrun.txt").read_text() == started


def test_second_ctrl_c_stops_at_once_with_restarts(checkout: Path) -> None:
    (checkout / "tuner/train.py").write_text(TRAINER.replace("time.sleep(0.5)", "time.sleep(60)"))
    running = begin(checkout, "train.sh", 2, "recipe.yaml", "key=1", PROCESSES="2", RESTARTS="3")
    before = psutil.Process(running.pid).children(recursive=True)
    running.send_signal(signal.SIGINT)
    until = time.monotonic() + 60
    while told(checkout).count("SIGTERM") < 2 and time.monotonic() < until:
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    assert running.wait(30) == 130
    assert "saved" not in told(checkout)
    trainers = [one for one in before if one.pid != running.pid]
    assert len(trainers) >= 3  # torchrun and its two
    _, alive = psutil.wait_procs(trainers, timeout=30)
    assert alive == []


ENDING = """
import os, signal, sys
from pathlib import Path
mark = Path("begun-" + os.environ["RANK"])
first = not mark.exists()
mark.touch()
if first and os.environ["RANK"] == "1":
    os.kill(os.getpid(), signal.SIGKILL)
Path(os.environ["TOLD"]).open("a").write(f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}\\n")
if first:
    signal.pause()  # torchrun ends it
"""


@pytest.mark.parametrize("nodes", [1, 2])
def test_torchrun_starts_again_what_was_lost(checkout: Path, nodes: int) -> None:
    torchrun = f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run "$@"\n'
    (checkout / ".venv/bin/torchrun").write_text(torchrun)
    (checkout / "tuner/train.py").write_text(ENDING)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    more = {"PROCESSES": str(2 // nodes), "RESTARTS": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    env = clean() | {"TOLD": str(checkout / "told.txt"), "NODES": str(nodes), "WAIT": "5", **more}
    command = ["bash", str(checkout / "launch/train.sh"), "recipe.yaml"]
    machines = [
        subprocess.Popen(
            command,
            env=env | {"NODE_RANK": str(rank)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(nodes)
    ]
    try:
        printed = "".join(machine.communicate(timeout=120)[0] for machine in machines)
    finally:
        for machine in machines:
            if machine.poll() is None:
                for one in psutil.Process(machine.pid).children(recursive=True):
                    one.kill()
                machine.kill()
    assert [machine.returncode for machine in machines] == [0] * nodes, printed
    assert "-9" in printed  # one was killed
    assert sorted(told(checkout))[-1] == "rank 1 of 2" and told(checkout).count("rank 1 of 2") == 1
    assert 1 <= told(checkout).count("rank 0 of 2") <= 2


RECIPE = """
base: embedded
method: lora
data: {source: pictures, resolution: 64}
train: {steps: 5, batch_size: 4, learning_rate: 1e-4}
output: elsewhere
"""


@pytest.mark.parametrize("ended, code", [(False, 75), (True, 0)])
def test_train_tells_a_run_that_was_stopped_from_one_that_ended(
    checkout: Path, ended: bool, code: int
) -> None:
    (checkout / "recipe.yaml").write_text(RECIPE)
    (checkout / "out").mkdir()
    # The other machine was asked to stop: the trainers of this one end, too, and no signal came here.
    done = "open('out/finished.json', 'w')" if ended else "pass"
    (checkout / "tuner/train.py").write_text(done)
    env = clean() | {"PROCESSES": "1", "UNFINISHED": "75"}
    command = ["bash", str(checkout / "launch/train.sh"), "recipe.yaml", "output=out"]
    found = subprocess.run(command, env=env, text=True, capture_output=True, timeout=120)
    assert found.returncode == code, found.stderr
    assert ("stopped before its end; exit code 75" in found.stderr) == (not ended)


@pytest.mark.parametrize("name", ["NODES", "PROCESSES", "RESTARTS", "UNFINISHED", "WAIT"])
def test_train_takes_whole_numbers(checkout: Path, name: str) -> None:
    command = ["bash", str(checkout / "launch/train.sh"), "recipe.yaml"]
    found = subprocess.run(command, env=clean() | {name: "2:4"}, text=True, capture_output=True)
    assert found.returncode == 2
    assert found.stderr == f"train: {name}: found 2:4; expected a whole number\n"


def test_train_keeps_the_exit_code_of_a_run(checkout: Path) -> None:
    (checkout / "tuner/train.py").write_text("import sys; sys.exit(2)")
    done = subprocess.run(
        ["bash", str(checkout / "launch/train.sh"), "recipe.yaml"], env={**os.environ, "PROCESSES": "1"}
    )
    assert done.returncode == 2
    assert subprocess.run(["bash", str(checkout / "launch/train.sh")]).returncode == 2


SLURM = {"SLURM_JOB_ID": "77", "SLURM_NODEID": "0", "PROCESSES": "2"}


@pytest.mark.parametrize("sent, requeued", [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_slurm_saves_and_goes_back_into_the_queue(checkout: Path, sent: int, requeued: bool) -> None:
    more = {**SLURM, "SLURM_SUBMIT_DIR": str(checkout)}
    running = begin(checkout, "slurm.sh", 2, "recipe.yaml", "key=1", **more)
    running.send_signal(sent)
    printed, _ = running.communicate(timeout=60)
    assert running.returncode == 0, printed
    assert sorted(told(checkout)[2:]) == sorted(["SIGUSR1", "saved"] * 2)
    asked = checkout / "scontrol.txt"
    assert (asked.read_text() if asked.exists() else "") == ("requeue 77\n" if requeued else "")
    assert (checkout / "setup.txt").read_text() == "set up\n"  # once: the tasks do not


@pytest.mark.parametrize("restarts", [False, True])
def test_slurm_with_several_machines(checkout: Path, restarts: bool) -> None:
    several = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "[one-two]"}
    several |= {"RESTARTS": "2"} if restarts else {}
    more = {**SLURM, **several, "SLURM_SUBMIT_DIR": str(checkout)}
    running = begin(checkout, "slurm.sh", 2, "recipe.yaml", "key=1", **more)
    running.send_signal(signal.SIGUSR1)
    assert running.wait(60) == 0
    where = "--nproc_per_node 2 --nnodes 2 --node_rank 0 --master_addr one --master_port 20077\n"
    if restarts:
        where = "--nproc_per_node 2 --nnodes 2 --rdzv_backend c10d --rdzv_endpoint one:20077 --rdzv_id 77 "
        where += "--rdzv_conf is_host=1 --max_restarts 2\n"
    assert (checkout / "torchrun.txt").read_text() == where
    assert (checkout / "scontrol.txt").read_text() == "show hostnames [one-two]\nrequeue 77\n"


def test_slurm_requeues_nothing_that_failed(checkout: Path) -> None:
    (checkout / "tuner/train.py").write_text(TRAINER.replace("sys.exit(130 if", "sys.exit(3 if True or"))
    more = {**SLURM, "PROCESSES": "1", "SLURM_SUBMIT_DIR": str(checkout)}
    running = begin(checkout, "slurm.sh", 1, "recipe.yaml", "key=1", **more)
    running.send_signal(signal.SIGUSR1)
    assert running.wait(60) == 3
    assert not (checkout / "scontrol.txt").exists()


@pytest.mark.parametrize(
    "submitted, arguments, says",
    [
        (".", ["recipe.yaml", "train.resume=never"], "would start anew each time"),
        ("launch", ["recipe.yaml"], "is no checkout of tuner"),
    ],
)
def test_slurm_refuses(checkout: Path, submitted: str, arguments: list[str], says: str) -> None:
    done = subprocess.run(
        ["bash", str(checkout / "launch/slurm.sh"), *arguments],
        env={**os.environ, **SLURM, "SLURM_SUBMIT_DIR": str(checkout / submitted)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and says in done.stderr
    assert not (checkout / "told.txt").exists()

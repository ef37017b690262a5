"""The scripts of launch/ hand signals on to the processes that train; torchrun and Slurm are stand-ins."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

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


def begin(checkout: Path, script: str, ready: int, *arguments: str, **more: str) -> subprocess.Popen[str]:
    """Start a script and wait until so many trainers are ready."""
    unset = ("RANK", "WORLD_SIZE", "NODES", "PROCESSES", "SETUP")
    env = {name: value for name, value in os.environ.items() if name not in unset}
    env |= {"TOLD": str(checkout / "told.txt"), "PATH": f"{checkout / 'bin'}:{os.environ['PATH']}", **more}
    command = ["bash", str(checkout / "launch" / script), *arguments]
    running = subprocess.Popen(
        command,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        # Tests that were started in the background ignore Ctrl-C, and no shell below them could trap it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
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
        assert (checkout / "torchrun.txt").read_text() == "--standalone --nproc_per_node 2\n"


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


def test_slurm_with_several_machines(checkout: Path) -> None:
    several = {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "[one-two]"}
    more = {**SLURM, **several, "SLURM_SUBMIT_DIR": str(checkout)}
    running = begin(checkout, "slurm.sh", 2, "recipe.yaml", "key=1", **more)
    running.send_signal(signal.SIGUSR1)
    assert running.wait(60) == 0
    where = "--nproc_per_node 2 --nnodes 2 --node_rank 0 --master_addr one --master_port 20077\n"
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

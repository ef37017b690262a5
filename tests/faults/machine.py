"""`tuner train ARGUMENTS` under torchrun, with something that happens on the way; run by test_machines.py.

    python machine.py HOOKS MACHINE ARGUMENTS...

HOOKS: a JSON list of [name, argument...], functions of HOOKS that are called first, in the first of
torchrun's attempts only. Of every attempt the training process leaves its number in the file
$PIDS/MACHINE-ATTEMPT.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])


def hold(step: int, inside: str, go: str) -> None:
    """In a step (from 0) make the file `inside`, and wait until there is a file `go`."""
    from tuner import counted

    seed = counted.seed_libraries

    def seed_and_wait(number: int, at: int, micro: int, rank: int) -> None:
        seed(number, at, micro, rank)
        if at == step:
            Path(inside).touch()
            while not Path(go).exists():
                time.sleep(0.01)

    counted.seed_libraries = seed_and_wait


def brisk(seconds: float) -> None:
    """Let steps wait for so long at most."""
    from tuner import processes

    processes.STEP = timedelta(seconds=seconds)


def busy(seconds: float) -> None:
    """Let the writing of a checkpoint take so much longer."""
    from tuner import checkpoint

    complete = checkpoint._recover

    def recover(root: Path) -> None:
        time.sleep(seconds)
        complete(root)

    checkpoint._recover = recover


HOOKS: dict[str, Callable[..., None]] = {"hold": hold, "brisk": brisk, "busy": busy}


def main(hooks: str, machine: str, arguments: list[str]) -> int:
    """Hook in, and train."""
    from tuner import memory, processes
    from tuner.cli import main as run

    memory.admit = lambda recipe, accelerator: None  # planning takes as long as a run

    assert int(os.environ["WORLD_SIZE"]) == 2 == processes.machines()
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    Path(os.environ["PIDS"], f"{machine}-{attempt}").write_text(str(os.getpid()))
    for name, *given in json.loads(hooks) if attempt == "0" else ():
        HOOKS[name](*given)
    return run(["train", *arguments])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3:]))

"""The measured case of benchmarks/scaling.py, in each of the processes that torchrun starts (gloo, CPU).

    scaling_run.py METHOD SIDE BATCH STEPS FOLDER

The product's run from its recipe on; each step is timed, and behind them one all-reduce of as many float32
numbers as are trained, in the buckets that DDP sends them in, while nothing else is computed.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from scaling_paper import BUCKET
from steps_case import Case
from torch import distributed as dist

WARM = 3


def main() -> None:
    """Print the figures on the first process, in one line of JSON."""
    from steps_run import built

    from tuner import loop
    from tuner.data.flow import batches
    from tuner.log import Log

    method, side, batch, steps, folder = sys.argv[1], *map(int, sys.argv[2:5]), Path(sys.argv[5])
    run = built(Case(method, "embedded", batch, "fp32", side, 1), folder)
    count = run.accelerator.num_processes
    made = loop.make(run, Log(run.output, False, None, False, None))
    coming = batches(run.data, run.plan, run.division, 0, WARM + steps, 0, False)
    seconds = []
    for number in range(WARM + steps):
        run.accelerator.wait_for_everyone()
        start = time.perf_counter()
        loop.one_step(run, made, coming, number)
        seconds.append(time.perf_counter() - start)
    trained = sum(parameter.numel() for parameter in run.task.trained())
    found: dict[str, Any] = {
        "processes": count,
        "method": method,
        "pictures": batch,
        "trained": trained,
        "step_seconds": statistics.median(seconds[WARM:]),
        "all_reduce_seconds": reduced(trained, steps) if count > 1 else 0.0,
    }
    if run.accelerator.is_main_process:
        print(json.dumps(found), flush=True)
    run.accelerator.end_training()


def reduced(numbers: int, times: int) -> float:
    """Seconds of adding up so many float32 numbers over the processes, in DDP's buckets."""
    parts = torch.zeros(numbers).split(BUCKET // 4)
    seconds = []
    for _ in range(WARM + times):
        dist.barrier()
        start = time.perf_counter()
        for part in parts:
            dist.all_reduce(part)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[WARM:])


if __name__ == "__main__":
    main()

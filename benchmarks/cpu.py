"""What a training step on the CPU gains by fused LoRA, and by an allocator that keeps what is freed.

    python benchmarks/cpu.py [--batch 4 8] [--precision fp32] [--threads 2] [--rounds 12] [--json FILE]

Fused layers are compared with peft's in one process, stretch after stretch in turn (A-B-A-B), on the embedded
base at 128 pixels with everything cached; what is compared are the medians of steps. The allocator's settings
hold for a whole process, so their page faults a step are from two.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

from envelope import RESULTS, write
from steps_case import Case, recipe_of

METHODS = ("lora", "textual_inversion", "controlnet")
STRETCH = 3  # steps of one side before the other's turn


def prepare(case: Case, folder: Path) -> tuple[Any, Any, Any]:
    """A run with its optimiser, and the batches that come."""
    from tuner import allocator, build, device, loop, memory
    from tuner.data.flow import batches, begun
    from tuner.log import Log

    memory.admit = lambda *_: None
    if os.environ.get("KEEP") == "no":
        allocator.keep_freed = lambda: False
    recipe = recipe_of(case, folder)
    run = build.build(recipe, device.start(case.precision, case.threads))
    log = Log(folder / "output", False, None, True, None, {})
    made = loop.make(run, log.__enter__())
    return run, made, begun(batches(run.data, run.plan, run.division, 0, 10**6, 0, False))


@contextmanager
def unfused(run: Any) -> Iterator[None]:
    """Within it LoRA is computed as peft does."""
    from peft.tuners.lora.layer import Linear

    from tuner.adapters.fused import FusedLinear

    layers = [m for net in run.family.modules().values() for m in net.modules() if type(m) is FusedLinear]
    for layer in layers:
        layer.__class__ = Linear
    try:
        yield
    finally:
        for layer in layers:
            layer.__class__ = FusedLinear


def compare(step: Callable[[str], None], sides: tuple[str, str], rounds: int) -> dict[str, Any]:
    """Medians of both sides' steps, and their ratio; the ratios of single rounds show the spread."""
    times: dict[str, list[list[float]]] = {side: [] for side in sides}
    for number in range(rounds + 2):
        for side in sides:
            stretch = []
            for _ in range(STRETCH):
                began = time.perf_counter()
                step(side)
                stretch.append(time.perf_counter() - began)
            if number >= 2:
                times[side].append(stretch)
    first, second = ([t for stretch in times[side] for t in stretch] for side in sides)
    each = sorted(median(a) / median(b) for a, b in zip(times[sides[0]], times[sides[1]], strict=True))
    return {
        f"{sides[0]} ms": 1000 * median(first),
        f"{sides[1]} ms": 1000 * median(second),
        "ratio": median(first) / median(second),
        "quartiles": [each[len(each) // 4], each[3 * len(each) // 4]],
    }


def layers(batch: int, asked: argparse.Namespace) -> dict[str, Any]:
    """The row of a LoRA's step, with peft's layers and with fused ones."""
    from tuner import loop

    case = Case("lora", "embedded", batch, asked.precision, 128, asked.threads)
    with tempfile.TemporaryDirectory() as folder:
        run, made, coming = prepare(case, Path(folder))
        number = iter(range(10**6))

        def step(side: str) -> None:
            with nullcontext() if side == "fused" else unfused(run):
                loop.one_step(run, made, coming, next(number))

        row = {"method": "lora", "batch": batch, "what": "fused LoRA"}
        row |= compare(step, ("peft", "fused"), asked.rounds)
    print(row, flush=True)
    return row


def faults(method: str, threads: int) -> None:
    """Print the page faults a step of this process, and its peak in MiB."""
    from tuner import loop

    case = Case(method, "embedded", 4, "fp32", 128, threads)
    with tempfile.TemporaryDirectory() as folder:
        run, made, coming = prepare(case, Path(folder))
        for number in range(15):
            if number == 5:
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            loop.one_step(run, made, coming, number)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        print(json.dumps({"faults a step": (after - before) / 10}))


def allocators(method: str, threads: int) -> dict[str, Any]:
    """The row of a method: glibc as it is, and told to keep what is freed."""
    row: dict[str, Any] = {"method": method, "batch": 4, "what": "allocator"}
    for name, keep in (("as it is", "no"), ("keeping", "yes")):
        command = [sys.executable, __file__, "--faults", method, "--threads", str(threads)]
        done = subprocess.run(
            command, env={**os.environ, "KEEP": keep}, capture_output=True, text=True, check=True
        )
        row[name] = json.loads(done.stdout.splitlines()[-1])
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--json", type=Path, default=RESULTS / "cpu.json")
    parser.add_argument("--faults", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    if asked.faults:
        faults(asked.faults, asked.threads)
        return
    rows = [layers(batch, asked) for batch in asked.batch]
    rows += [allocators(method, asked.threads) for method in METHODS]
    write(asked.json, "cpu", vars(asked), rows)


if __name__ == "__main__":
    main()

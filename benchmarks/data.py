"""How a run with very many pictures starts, what memory it takes, and how long its steps wait for data.

    python benchmarks/data.py [--count 100000] [--folder /tmp/tuner-data] [--cache on off] [--workers 0 2]

The pictures (32x32 PNGs, no two alike) are drawn once and kept in the folder, and so are the cache and a tiny
base. Each figure is from a process of its own, from the end of its imports on: the time to the first loss in
the first run (which looks at all pictures and, with the cache, encodes them) and in the second, memory while
an epoch is loaded, and the share of a training run's time in which its steps wait for data. The table is
printed, and all of it is written to FOLDER/figures.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tiny import ROOT, base, draw, status

POINTS = 20  # of memory in an epoch


def recipe(folder: Path, count: int, cached: bool, workers: int, **more: Any) -> Any:
    """A LoRA on the tiny base and all pictures."""
    from tuner import recipe as recipes

    place, cache = folder / "run.yaml", folder / f"cache-{count}" if cached else "'off'"
    place.write_text(
        f"base: {folder / 'base'}\nmethod: lora\n"
        f"data: {{source: {folder / str(count)}, resolution: 32, workers: {workers}, "
        f"cache: {cache}}}\n"
        "train: {epochs: 1, batch_size: 64, learning_rate: 1e-4, precision: fp32, threads: 1}\n"
        f"log: {{tensorboard: false}}\noutput: {folder / 'output'}\n"
    )
    return recipes.load(place, [f"{key}={value}" for key, value in more.items()])


def memory(pid: int | str = "self") -> float:
    """MiB that a process has for itself, with its share of what it shares with others (PSS)."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("Pss:"))) / 1024


def everyone() -> float:
    """MiB of this process and its workers together."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return memory() + sum(memory(pid) for pid in children)


def imports() -> None:
    """All that a run imports, so that it is in no figure."""
    import diffusers
    import transformers

    from tuner import build, gather, run  # noqa: F401
    from tuner.data.sources import folder  # noqa: F401
    from tuner.families import sd1  # noqa: F401
    from tuner.methods import lora  # noqa: F401

    for module, name in (
        (diffusers, "UNet2DConditionModel"),
        (diffusers, "AutoencoderKL"),
        (diffusers, "DDIMScheduler"),
        (transformers, "CLIPTextModel"),
        (transformers, "CLIPTokenizer"),
    ):
        getattr(module, name)


def begin(folder: Path, count: int, cached: bool, workers: int) -> tuple[Any, Any, Any, dict[str, Any]]:
    """A run up to its first loss: the run, the batches that follow, and the figures of it."""
    imports()
    before, clock, processor = memory(), time.perf_counter(), time.process_time()
    from tuner import build, device
    from tuner.data.loader import stream

    asked = recipe(folder, count, cached, workers)
    accelerator = device.start(asked.train.precision, asked.train.threads)
    made = build.build(asked, accelerator)
    built = time.perf_counter() - clock
    batches = stream(made.data, made.plan, made.division, 0, made.steps, workers)
    made.task(next(batches))
    figures = {
        "built_s": built,
        "first_loss_s": time.perf_counter() - clock,
        "cpu_s": time.process_time() - processor,
        "imported_mib": before,
        "started_mib": everyone(),
        "peak_mib": status("VmHWM"),
    }
    return made, batches, asked, figures


def start(folder: Path, count: int, cached: bool, workers: int) -> dict[str, Any]:
    """Figures of a start alone."""
    return begin(folder, count, cached, workers)[3]


def epoch(folder: Path, count: int, cached: bool, workers: int) -> dict[str, Any]:
    """Figures of a start and of an epoch of loading after it."""
    made, batches, _, figures = begin(folder, count, cached, workers)
    clock, processor, seen, points = time.perf_counter(), time.process_time(), 0, []
    every = max(1, made.steps // POINTS)
    for step, batch in enumerate(batches, 2):
        seen += len(batch.names)
        if step % every == 0:
            points.append(round(everyone(), 1))
    seconds = time.perf_counter() - clock
    # The first points are of the warming up: allocators and workers take what they need.
    growth = points[-1] / points[1] - 1 if len(points) > 2 else 0.0
    return figures | {
        "epoch_s": seconds,
        "epoch_cpu_s": time.process_time() - processor,
        "images_per_second": seen / seconds,
        "epoch_mib": points,
        "growth": growth,
    }


def waiting(folder: Path, count: int, cached: bool, workers: int) -> dict[str, Any]:
    """How long the steps of a training run wait for data."""
    imports()
    from tuner import run
    from tuner.log import FILE, read

    shutil.rmtree(folder / "output", ignore_errors=True)
    asked = recipe(folder, count, cached, workers, **{"train.epochs": "null", "train.steps": 150})
    assert run.train(asked) == 0
    found = read(folder / "output" / FILE).scalars
    shares = [value for step, value in found["data_wait"] if step > 50]  # the first steps fill queues
    return {"waits": sum(shares) / len(shares), "images_per_second": found["images_per_second"][-1][1]}


MEASURES = {"start": start, "epoch": epoch, "waiting": waiting}


def measured(what: str, folder: Path, count: int, cached: bool, workers: int) -> dict[str, Any]:
    """A measure from a process of its own."""
    asked = [what, str(folder), str(count), str(int(cached)), str(workers)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--measure", *asked]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    *said, last = done.stdout.splitlines()
    found: dict[str, Any] = json.loads(last)
    name = f"{what}, cache {'on' if cached else 'off'}, {workers} workers"
    shown = {key: round(value, 3) for key, value in found.items() if not isinstance(value, list)}
    print(f"{name:32} " + "  ".join(f"{key} {value:g}" for key, value in shown.items()), flush=True)
    return {"measure": what, "cache": cached, "workers": workers, "said": said, **found}


def main() -> None:
    """Print the table and write the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/tuner-data"))
    parser.add_argument("--cache", nargs="+", choices=("on", "off"), default=["on", "off"])
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 2])
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        what, place, count, cached, workers = arguments.measure
        print(json.dumps(MEASURES[what](Path(place), int(count), bool(int(cached)), int(workers))))
        return
    folder, count = arguments.folder, arguments.count
    folder.mkdir(parents=True, exist_ok=True)
    draw(folder / str(count), count)
    base(folder / "base")
    figures = []
    for cached in [one == "on" for one in arguments.cache]:
        figures.append(measured("start", folder, count, cached, 0))
        for workers in arguments.workers:
            figures.append(measured("epoch", folder, count, cached, workers))
            figures.append(measured("waiting", folder, count, cached, workers))
    (folder / "figures.json").write_text(json.dumps({"count": count, "figures": figures}, indent=1))


if __name__ == "__main__":
    main()

"""Where moving bytes between GPUs takes longer than computing: on paper, and a small case that is measured.

    python benchmarks/scaling.py [--families sd15,sd21,sdxl] [--methods lora,controlnet]
        [--measured lora,controlnet] [--rate 316] [--side 128] [--batch 4] [--steps 10]
        [--json benchmarks/results/scaling.json] [--write docs/scaling.md] [--from FILE]

On paper (scaling_paper.py): the bytes come from the product's own networks on the meta device, the time of a
picture from its counted FLOPs (flops.py) at a rate that is said. Measured (scaling_run.py): the embedded base
on two CPU processes that torchrun starts and that talk by gloo, beside one process with half of the batch.
With `--write` the tables go between the markers of a document; `--from` takes the figures of an earlier run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from envelope import RESULTS, envelope, write
from tables import about, put, table

ROOT = Path(__file__).resolve().parents[1]
NOTHING = 1e-12  # a share of a second that no table shows


def main() -> None:
    """Measure, print, and write what is asked for."""
    from steps_case import METHODS, SIDES

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", default=",".join(name for name in SIDES if name != "embedded"))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--measured", default=",".join(METHODS), help="methods of the measured case")
    parser.add_argument("--rate", type=float, default=316.0, help="TFLOP/s of a GPU: 40 percent of 790")
    parser.add_argument("--side", type=int, default=128, help="of the measured case, in pixels")
    parser.add_argument("--batch", type=int, default=4, help="pictures in its step, over both processes")
    parser.add_argument("--steps", type=int, default=10, help="steps that are timed")
    parser.add_argument("--json", type=Path, default=RESULTS / "scaling.json")
    parser.add_argument("--write", type=Path)
    parser.add_argument("--from", dest="stored", type=Path)
    arguments = parser.parse_args()
    if arguments.stored is not None:
        result = json.loads(arguments.stored.read_text(encoding="utf-8"))
    else:
        result = found(arguments)
    for name, lines in sections(result).items():
        print(f"\n{name}\n", *lines, sep="\n", flush=True)
    if arguments.write is not None:
        old = arguments.write.read_text(encoding="utf-8")
        arguments.write.write_text(put(old, sections(result)), encoding="utf-8")


def found(arguments: argparse.Namespace) -> dict[str, Any]:
    """The result of a new run, which is written down."""
    import scaling_paper
    from steps import listed
    from steps_case import METHODS, SIDES

    methods = listed(arguments.methods, METHODS)
    rows: list[dict[str, Any]] = []
    for method in listed(arguments.measured, METHODS):
        one, two = (measured(arguments, method, count) for count in (1, 2))
        rows.append({"kind": "measured", **two, "alone_seconds": one["step_seconds"]})
        print(rows[-1], flush=True)
    for row in scaling_paper.rows(listed(arguments.families, SIDES), methods):
        rows.append({"kind": "paper", **row})
        print(rows[-1], flush=True)
    given = {k: v for k, v in vars(arguments).items() if k not in ("json", "write", "stored")}
    write(arguments.json, "scaling", given, rows)
    return envelope("scaling", given, rows)


def measured(arguments: argparse.Namespace, method: str, processes: int) -> dict[str, Any]:
    """The figures of so many processes; each has as many pictures in a step as each of two."""
    from steps_case import draw

    with tempfile.TemporaryDirectory() as place:
        batch = arguments.batch * processes // 2
        folder = Path(place)
        word = " <new>" if method == "textual_inversion" else ""
        draw(folder / "pictures", max(16, 2 * batch), arguments.side, f"a picture of a{word} thing")
        script = Path(__file__).with_name("scaling_run.py")
        asked = [method, arguments.side, batch, arguments.steps, folder]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(processes), str(script), *map(str, asked)]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONWARNINGS": "ignore",
        }
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"processes"')]
    if done.returncode or len(lines) != 1:
        raise SystemExit(f"{method}, {processes} processes: {done.stdout[-2000:]}{done.stderr[-4000:]}")
    figures: dict[str, Any] = json.loads(lines[0])
    assert figures["processes"] == processes, figures
    return figures


def sections(result: Mapping[str, Any]) -> dict[str, list[str]]:
    """The document's tables by the names of their markers."""
    from scaling_paper import Moved

    rate = float(result["arguments"]["rate"])
    rows = [{k: v for k, v in row.items() if k != "kind"} for row in result["rows"] if row["kind"] == "paper"]
    paper = [Moved(**row) for row in rows]
    small = [row for row in result["rows"] if row["kind"] == "measured"]
    assert paper and small
    return {
        "moved": moved(paper, rate),
        "ddp": times(paper, rate, "ddp"),
        "fsdp": times(paper, rate, "fsdp"),
        "measured": [about(result), "", *in_small(small)],
    }


def moved(paper: Sequence[Any], rate: float) -> list[str]:
    """Bytes and FLOPs."""
    names = ["", "trained numbers", "gradients G, MB", "FSDP2 gathers A, MB", "FSDP2 parts P, MB"]
    names += ["TFLOP a picture", f"ms a picture at {rate:g} TFLOP/s"]
    lines = [
        [
            f"{one.family} {one.side} px, {one.method}",
            f"{one.trained:,}",
            mega(one.gradients),
            mega(one.gathered),
            mega(one.parted),
            f"{one.forward + one.backward:.3f}",
            f"{1e3 * one.picture(rate):.2f}",
        ]
        for one in paper
    ]
    return table(names, lines)


def times(paper: Sequence[Any], rate: float, how: str) -> list[str]:
    """For each link and number of GPUs how long a step's bytes take, and how many pictures take as long."""
    from scaling_paper import GPUS, LINKS

    names = ["", *(f"{link}, {gpus}" for link in LINKS for gpus in GPUS)]
    lines = []
    for one in paper:
        cells = [f"{one.family}, {one.method}"]
        for link in LINKS:
            for gpus in GPUS:
                seconds = getattr(one, how)(gpus, link)
                cells.append(f"{few(1e3 * seconds)} ms; {few(seconds / max(one.picture(rate), NOTHING))}")
        lines.append(cells)
    return table(names, lines)


def in_small(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The measured case."""
    names = ["method", "trained numbers", "ms a step, 2 processes", "ms of one all-reduce", "its share"]
    names += ["ms a step, 1 process with half of the batch", "pictures a second, 2 by 1"]
    lines = [
        [
            str(row["method"]),
            f"{row['trained']:,}",
            f"{1e3 * row['step_seconds']:.0f}",
            few(1e3 * row["all_reduce_seconds"]),
            f"{row['all_reduce_seconds'] / row['step_seconds']:.1%}",
            f"{1e3 * row['alone_seconds']:.0f}",
            f"{2 * row['alone_seconds'] / row['step_seconds']:.2f}",
        ]
        for row in rows
    ]
    return table(names, lines)


def mega(count: int) -> str:
    """Bytes in 10^6."""
    return f"{count / 1e6:,.0f}" if count >= 1e7 else f"{count / 1e6:.3g}"


def few(number: float) -> str:
    """Two digits of a small number, all of a large one."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


if __name__ == "__main__":
    main()

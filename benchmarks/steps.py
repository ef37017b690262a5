"""Our own training step: how fast, where its time goes, how much of it is the loop around the tensor work.

    python benchmarks/steps.py [--methods lora,textual_inversion,controlnet,full] [--families embedded]
        [--batch 4] [--precision fp32] [--resolution N] [--threads N] [--compile WORD] [--uncached]
        [--steps 20] [--repeats 5] [--warm 3] [--json FILE]

Several values stand between commas; each case of all combinations runs in a process of its own. Bases beside
the embedded one are of full size, with random weights from tuner/configs. The runs have no end, so that
`--compile auto` always finds on a GPU that compiling pays; `--warm` has to leave it the steps to do so (30).
For each case:

- steps and images a second: the median of some stretches of steps of the product's loop (steps_run.py), with
  their least and most: what lies between them is noise;
- the peak of memory: this process's resident set on the CPU, what torch has given out on a GPU;
- the share of each part of a step (steps_timers.py);
- the FLOPs of a step as counted, the least that its layers need (flops.py), and whether the two are the same;
  FLOPs a second as a part of what products of large square matrices reach in the same process and precision,
  and of 790 TFLOP/s on an H200;
- the overhead: the product's time over that of a bare loop that does the same tensor work (steps_bare.py), in
  turns in one process; the median of the turns' ratios, with their least and most. At most 1.03 is aimed at.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from envelope import write
from steps_case import METHODS, SIDES, Case

ROOT = Path(__file__).resolve().parents[1]
BAR = 1.03


def cases(arguments: argparse.Namespace) -> list[Case]:
    """All combinations of what was asked for."""
    made = []
    for method, family, batch, precision in itertools.product(
        listed(arguments.methods, METHODS), listed(arguments.families, SIDES), arguments.batch.split(","),
        listed(arguments.precision, ("fp32", "bf16")),
    ):  # fmt: skip
        made.append(
            Case(
                method,
                family,
                int(batch),
                precision,
                arguments.resolution or SIDES[family],
                arguments.threads,
                arguments.compile,
                not arguments.uncached,
            )
        )
    return made


def listed(text: str, known: Any) -> list[str]:
    """The names between the commas.

    Raises:
        SystemExit: one is not known.
    """
    names = [name for name in text.split(",") if name]
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"unknown: {', '.join(unknown)}; expected some of {', '.join(known)}")
    return names


def in_process(case: Case, steps: int, repeats: int, warm: int) -> dict[str, Any]:
    """The row of a case, from a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--do", json.dumps(asdict(case))]
    command += ["--steps", str(steps), "--repeats", str(repeats), "--warm", str(warm)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{case.title()}: {done.stdout[-2000:]}{done.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def line(title: str, row: dict[str, Any]) -> str:
    """A row in words."""
    over, seconds = row["overhead"], row["seconds_per_step"]
    shares = ", ".join(f"{part} {share:.0%}" for part, share in row["shares"].items() if share >= 0.005)
    peak = row["percent_of_matrix_rate"]
    return (
        f"{title}: {row['images_per_second']:.2f} images/s, step {seconds['median'] * 1e3:.1f} ms "
        f"({seconds['min'] * 1e3:.1f} to {seconds['max'] * 1e3:.1f}), {row['peak_mib']:.0f} MiB, "
        f"{row['tflop']['counted']:.4g} TFLOP ({'exact' if row['exact'] else 'NOT the least'}), "
        f"{peak:.0f} % of the matrix rate, overhead {over['median']:.3f} "
        f"({over['min']:.3f} to {over['max']:.3f}; bar {BAR}); {shares}"
    )


def main() -> None:
    """Print a line for each case, and write all as JSON where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--families", default="embedded")
    parser.add_argument("--batch", default="4")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--compile", choices=["auto", "on", "off"], help="train.compile")
    parser.add_argument("--uncached", action="store_true", help="encode pictures and captions in each step")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of a stretch")
    parser.add_argument("--repeats", type=int, default=5, help="stretches of each kind")
    parser.add_argument("--warm", type=int, default=3, help="steps before; with a compiler it has to be done")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--do", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.do:
        from steps_run import Length, measure

        case = Case(**json.loads(arguments.do))
        print(json.dumps(measure(case, Length(arguments.steps, arguments.repeats, arguments.warm))))
        return
    rows = []
    for case in cases(arguments):
        rows.append(in_process(case, arguments.steps, arguments.repeats, arguments.warm))
        print(line(case.title(), rows[-1]), flush=True)
    if arguments.json is not None:
        write(arguments.json, "steps", {k: v for k, v in vars(arguments).items() if k != "do"}, rows)


if __name__ == "__main__":
    main()

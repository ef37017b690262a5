"""Put the benchmarks' results into documents, as tables between markers.

    python benchmarks/tables.py docs/benchmarks.md [--results benchmarks/results]

Each `NAME.json` of the results, in the form of envelope.py, becomes what stands in the document between

    <!-- NAME: begin -->
    <!-- NAME: end -->

A result without markers in the document, and markers without a result, are an error: nothing is left out, and
nothing old stays. What is between markers is never edited by hand.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from envelope import RESULTS

Row = Mapping[str, Any]
MARK = re.compile(r"<!-- (?P<name>[\w-]+): begin -->\n.*?<!-- (?P=name): end -->", re.DOTALL)
SHARES = ("data", "text", "autoencoder", "unet", "branch", "backward", "optimiser", "host")


def main() -> None:
    """Write the tables into the document."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("document", type=Path)
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    found = {path.stem: json.loads(path.read_text()) for path in sorted(arguments.results.glob("*.json"))}
    old = arguments.document.read_text(encoding="utf-8")
    sections = {name: section(result) for name, result in found.items() if name not in ELSEWHERE}
    arguments.document.write_text(put(old, sections), encoding="utf-8")
    print(f"{arguments.document}: {len(sections)} tables")


ELSEWHERE = ("scaling",)
"""Results that stand in a document of their own."""


def put(document: str, sections: Mapping[str, Sequence[str]]) -> str:
    """The document with these lines between the markers of these names.

    Raises:
        SystemExit: markers and sections are not the same.
    """
    marked = [found["name"] for found in MARK.finditer(document)]
    lacking, old = sorted(sections.keys() - set(marked)), sorted(set(marked) - sections.keys())
    if lacking or old or len(set(marked)) < len(marked):
        raise SystemExit(
            f"markers: without one in the document: {', '.join(lacking) or 'none'}; "
            f"without a result: {', '.join(old) or 'none'}; found {', '.join(marked) or 'none'}"
        )

    def filled(found: re.Match[str]) -> str:
        name = found["name"]
        return "\n".join([f"<!-- {name}: begin -->", *sections[name], f"<!-- {name}: end -->"])

    return MARK.sub(filled, document)


def section(result: Mapping[str, Any]) -> list[str]:
    """A result's lines: where and when it was measured, and its table."""
    rows: Sequence[Row] = result["rows"]
    made = KNOWN.get(result["what"], plain)(rows)
    return [about(result), "", *made]


def about(result: Mapping[str, Any]) -> str:
    """Machine, versions, date, and what it was started with."""
    machine, versions = result["machine"], result["versions"]
    where = [str(machine["processor"]), f"{machine['cores']} cores"]
    count = machine["threads"]
    where += [] if count is None else [f"{count} thread{'s' * (count > 1)}"]
    where += [f"{machine['memory_gib']} GiB"] + ([machine["gpu"]] if machine["gpu"] else [])
    named = ", ".join(f"{name} {number}" for name, number in versions.items())
    given = {k: v for k, v in result["arguments"].items() if v not in (None, False) and k != "json"}
    with_ = ", ".join(f"{key} {value}" for key, value in given.items())
    return f"{', '.join(where)}; {named}; {result['date']}." + (f" Arguments: {with_}." if with_ else "")


def table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table's lines."""
    assert rows and all(len(row) == len(names) for row in rows)
    return [f"| {' | '.join(line)} |" for line in (names, ["---"] * len(names), *rows)]


def steps(rows: Sequence[Row]) -> list[str]:
    """Of benchmarks/steps.py: speed, and where the time goes."""
    speed, parts = [], []
    for row in rows:
        case = f"{row['method']}, {row['family']} {row['side']} px, batch {row['batch']}, {row['precision']}"
        case += "" if row["cached"] else ", nothing cached"
        case += f", compile {row['compile']}" if row["compile"] else ""
        time, over, flop = row["seconds_per_step"], row["overhead"], row["tflop"]
        of_790 = row["percent_of_790"]
        speed.append(
            [
                case,
                f"{row['images_per_second']:.2f}",
                f"{time['median'] * 1e3:.1f} ({time['min'] * 1e3:.1f} to {time['max'] * 1e3:.1f})",
                f"{over['median']:.3f} ({over['min']:.3f} to {over['max']:.3f})",
                f"{row['peak_mib']:.0f}",
                f"{flop['counted']:.4g}{'' if row['exact'] else ' (not what the layers need)'}",
                f"{row['percent_of_matrix_rate']:.0f}" + (f", {of_790:.0f}" if of_790 else ""),
            ]
        )
        parts.append([case, *(f"{row['shares'][part]:.1%}" for part in SHARES)])
    last = "% of the matrix rate" + (", of 790 TFLOP/s" if any(row["percent_of_790"] for row in rows) else "")
    names = ["case", "images/s", "ms a step (range)", "overhead (range)", "peak MiB", "TFLOP a step", last]
    return [*table(names, speed), "", *table(["share of the step", *SHARES], parts)]


def peers(rows: Sequence[Row]) -> list[str]:
    """Of benchmarks/peers.py: both sides, and theirs over ours."""
    names = ["method", "setting", "precision", "s to the last step", "steps/s", "peak MiB", "validation loss"]
    ratios = ["from cold start (rounds)", "steady", "CPU seconds", "memory"]
    lines = []
    for row in rows:
        sides = (row["theirs"], row["ours"])

        def both(key: str, form: str, sides: tuple[Row, Row] = sides) -> str:
            return " / ".join(format(side[key], form) for side in sides)

        lines.append(
            [
                row["method"],
                row["setting"],
                both("precision", ""),
                both("to_last_step", ".0f"),
                both("steps_per_second", ".2f"),
                both("peak_mib", ".0f"),
                both("validation_loss", ".5f"),
                f"{row['cold_start_ratio']:.2f} ({', '.join(f'{pair:.2f}' for pair in row['pairs'])})",
                *(f"{row[key]:.2f}" for key in ("steady_ratio", "cpu_ratio", "memory_ratio")),
            ]
        )
    return ["Theirs / ours:", "", *table([*names, *ratios], lines)]


def plain(rows: Sequence[Row]) -> list[str]:
    """Any result: a column for each value that differs between rows, and a line for those that do not."""
    flat = [flattened(row) for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    same = [n for n in names if len(rows) > 1 and len({repr(row.get(n)) for row in flat}) == 1]
    shown = [name for name in names if name not in same]
    made = table(shown, [[shape(row.get(name)) for name in shown] for row in flat]) if shown else []
    everywhere = ", ".join(f"{name} {shape(flat[0][name])}" for name in same)
    return made + (["", f"In all rows: {everywhere}."] if same else [])


def flattened(row: Row, before: str = "") -> dict[str, Any]:
    """A row's values by name; of those within another, `outer inner`."""
    found: dict[str, Any] = {}
    for key, value in row.items():
        name = f"{before} {key}".strip().replace("_", " ")
        found |= flattened(value, name) if isinstance(value, Mapping) else {name: value}
    return found


def shape(value: Any) -> str:
    """A value as a cell shows it."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(shape(one) for one in value)
    return str(value).replace("|", "\\|")


KNOWN: dict[str, Callable[[Sequence[Row]], list[str]]] = {"peers": peers, "steps": steps}

if __name__ == "__main__":
    main()

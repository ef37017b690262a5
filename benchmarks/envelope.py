"""The form of every benchmark's JSON: what was measured, on what machine, with which versions, and when.

    from envelope import write
    write(Path("benchmarks/results/steps.json"), "steps", vars(arguments), rows)

The machine is told in general words: nothing names a computer, a user or a path.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "numpy", "bitsandbytes", "torchao")


def write(path: Path, what: str, arguments: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a benchmark's result; the file appears whole.

    Args:
        path: where; `RESULTS / "NAME.json"` for one that docs/benchmarks.md shows.
        what: the benchmark's name.
        arguments: those it was started with; paths are told by their last part.
        rows: one for each case, of plain values.
    """
    made = envelope(what, arguments, rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
    beside.replace(path)


def envelope(what: str, arguments: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A benchmark's result as its file holds it."""
    return {
        "what": what,
        "machine": machine(),
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "arguments": {key: _plain(value) for key, value in arguments.items()},
        "rows": list(rows),
    }


def machine() -> dict[str, Any]:
    """This computer: processor model, cores that may be used, torch's threads, memory, GPU or None."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": _threads(),
        "memory_gib": _memory_gib(),
        "gpu": _gpu(),
    }


def versions() -> dict[str, str]:
    """Python's, and those of the libraries that are here."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    about = Path("/proc/cpuinfo")
    if about.is_file():
        for line in about.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _threads() -> int | None:
    """torch's threads; a parent that only starts processes has not loaded torch, and has none."""
    torch = sys.modules.get("torch")
    return None if torch is None else int(torch.get_num_threads())


def _memory_gib() -> float | None:
    """The memory that may be used: the machine's, or a container's limit where that is less."""
    try:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text(encoding="ascii").strip()).isdigit():
        whole = min(whole, int(text))
    return round(whole / 2**30, 1)


def _gpu() -> str | None:
    """The first GPU's name, where torch is loaded and sees one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    return str(torch.cuda.get_device_name(0))


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, Path):
        return value.name
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(one) for one in value]
    return value

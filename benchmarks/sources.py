"""How long a large source takes to open, and what it keeps in memory.

    python benchmarks/sources.py [--count 100000] [--folder /tmp/tuner-sources] [--kinds beside table]

The pictures (8x8 PNGs) are drawn once and kept in the folder. Each figure is from a process of its own, from
the end of its imports on: the first and second opening, the memory that the samples keep, the time to make
every sample once and ask for the stamp of its picture, and how much memory that leaves behind.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pyarrow as pa
from PIL import Image
from pyarrow import parquet

KINDS = ("listing", "beside", "tar", "table")
ENDINGS = {"tar": ".tar", "table": ".parquet"}


def png(number: int) -> bytes:
    """A small picture; no two of 16 million are alike."""
    data = io.BytesIO()
    Image.new("RGB", (8, 8), (number >> 16, number >> 8 & 255, number & 255)).save(data, "PNG")
    return data.getvalue()


def make(kind: str, place: Path, count: int) -> None:
    """Draw the pictures of one kind of source, where they are not there yet."""
    done = place.with_name(f"{place.name}.{count}.done")
    if done.exists():
        return
    print(f"drawing {count} pictures: {place}", flush=True)
    if kind == "table":
        place.parent.mkdir(parents=True, exist_ok=True)
        cells = [{"bytes": png(number), "path": None} for number in range(count)]
        texts = [f"caption {number}" for number in range(count)]
        parquet.write_table(pa.table({"image": cells, "text": texts}), place, row_group_size=1000)
    elif kind == "tar":
        place.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(place, "w") as tar:
            for number in range(count):
                for ending, data in (("png", png(number)), ("txt", f"caption {number}".encode())):
                    info = tarfile.TarInfo(f"{number:06d}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                tar.members.clear()
    else:
        place.mkdir(parents=True, exist_ok=True)
        lines = []
        for number in range(count):
            (place / f"{number:06d}.png").write_bytes(png(number))
            if kind == "beside":
                (place / f"{number:06d}.txt").write_text(f"caption {number}")
            lines.append(json.dumps({"file_name": f"{number:06d}.png", "text": f"caption {number}"}))
        if kind == "listing":
            (place / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    done.touch()


def resident() -> float:
    """MiB of memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def measure(place: Path) -> None:
    """Print one line of figures."""
    from tuner.data.sources import folder, hub, tar  # noqa: F401 -- so that imports are not in the figures
    from tuner.data.sources.opening import open_spec
    from tuner.data.sources.spec import SourceSpec

    spec, before = SourceSpec(path=str(place)), resident()
    start = time.perf_counter()
    samples = open_spec(spec, lambda line: None, place.parent / "index")
    opened = time.perf_counter() - start
    kept = resident() - before
    start, seen = time.perf_counter(), 0
    for sample in samples:  # type: ignore[union-attr]
        seen += sample.picture.stamp() is not None
    walked = time.perf_counter() - start
    left = resident() - before - kept
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    print(
        f"opened in {opened:5.2f} s, keeps {kept:4.0f} MiB (peak {peak:4.0f}); "
        f"{seen} samples and stamps in {walked:5.2f} s, which left {left:3.0f} MiB"
    )


def main() -> None:
    """Print figures for each kind of source, twice."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/tuner-sources"))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure is not None:
        return measure(arguments.measure)
    for kind in arguments.kinds:
        place = arguments.folder / f"{kind}{ENDINGS.get(kind, '')}"
        make(kind, place, arguments.count)
        for turn in ("first", "second"):
            print(f"{kind:8} {turn:6} ", end="", flush=True)
            subprocess.run([sys.executable, __file__, "--measure", str(place)], check=True)
    return None


if __name__ == "__main__":
    main()

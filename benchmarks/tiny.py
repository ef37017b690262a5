"""What measurements of growth need: very many pictures, and a base that takes next to no time."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def draw(place: Path, count: int) -> None:
    """32x32 PNGs with a metadata.jsonl, where they are not there yet; no two are alike, nor captions."""
    import numpy as np
    from PIL import Image

    done = place.with_name(f"{place.name}.done")
    if done.exists():
        return
    print(f"drawing {count} pictures: {place.name}", flush=True)
    lines = []
    for number in range(count):
        folder = f"{number // 1000:04d}"
        (place / folder).mkdir(parents=True, exist_ok=True)
        pixels = np.zeros((32, 32, 3), np.uint8)
        pixels[number % 29 :, : number // 29 % 31 + 1] = (number >> 16, number >> 8 & 255, number & 255)
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, "PNG", compress_level=1)
        name = f"{folder}/{number:06d}.png"
        (place / name).write_bytes(data.getvalue())
        lines.append(json.dumps({"file_name": name, "text": f"caption {number}"}))
    (place / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    done.touch()


def base(place: Path) -> None:
    """The tests' tiny base, where it is not there yet."""
    if place.exists():
        return
    spec = importlib.util.spec_from_file_location("tuner_tiny_models", ROOT / "tests" / "models.py")
    assert spec is not None and spec.loader is not None
    models = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = models
    spec.loader.exec_module(models)
    models.tiny_sd1(place)


def status(field: str) -> float:
    """MiB in a field of this process's status: VmRSS, what it has in memory; VmHWM, the most it ever had."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024

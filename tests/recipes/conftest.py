"""Whole runs on a tiny base and a handful of scenes."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

ROOT = Path(__file__).resolve().parents[2]
SPLITS = {"train": 8, "heldout": 4, "style": 8, "concept": 5}


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps one state for a process; each run here is to begin as in a process of its own."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a few scenes of some splits of the shapes world, drawn by its own prepare.py."""
    spec = importlib.util.spec_from_file_location("shapes_prepare", ROOT / "datasets/shapes/prepare.py")
    assert spec is not None and spec.loader is not None
    prepare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prepare)
    root = tmp_path_factory.mktemp("shapes")
    for split, count in SPLITS.items():
        (root / split).mkdir()
        lines = prepare.draw(root / split, split, 0, count)
        assert len(lines) == count
        (root / split / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


@dataclass
class Tiny:
    """Runs of shipped recipes, made small by overrides."""

    base: Path
    shapes: Path
    root: Path = ROOT
    common: dict[str, Any] = field(default_factory=dict)

    def overrides(self, recipe: str, output: Path, **more: Any) -> list[str]:
        """What makes a shipped recipe tiny; `more` replaces it, by dotted keys with __ for the dot."""
        method = METHOD_OF[recipe]
        values: dict[str, Any] = {
            "base": self.base,
            "data.source": self.shapes / SOURCE_OF.get(recipe, "train"),
            "data.heldout": self.shapes / "heldout",
            "data.resolution": 64,
            "data.cache": output.parent / f"{output.name}-cache",
            "train.steps": 2,
            "train.batch_size": 4,
            "train.warmup": 0,
            "train.precision": "fp32",
            "train.threads": 1,
            "validate.samples": 2,
            "log.tensorboard": False,
            "output": output,
        }
        if method not in ("autoencoder", "contrastive"):
            values |= {"preview.every": 1, "preview.steps": 1, "preview.count": 1}
        if method in ("controlnet", "textual_inversion", "lora"):
            values |= {"evaluate.samples": 2, "evaluate.steps": 1}
        if method == "autoencoder":
            values |= {"method.autoencoder.crop": 32}
        if method == "contrastive":
            values |= {"data.resolution": 32}  # what the tiny image encoder takes
        if method == "textual_inversion":
            values |= {"method.textual_inversion.init": "toy"}  # one token of the tiny base
        if new := NEW_OF.get(recipe):
            del values["base"]
            values |= {"base.path": self.base, "base.new": json.dumps(new)}
        values |= {key.replace("__", "."): value for key, value in more.items()}
        return [f"{key}={written(value)}" for key, value in values.items() if value is not ...]

    def start(self, recipe: str, output: Path, **more: Any) -> int:
        """Train in this process; the exit code."""
        from tuner.cli import main

        return main(["train", str(ROOT / "recipes" / recipe), *self.overrides(recipe, output, **more)])


def written(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(value)


METHOD_OF = {
    "controlnet_canny.yaml": "controlnet",
    "lora.yaml": "lora",
    "textual_inversion.yaml": "textual_inversion",
    "embedded/1_autoencoder.yaml": "autoencoder",
    "embedded/2_clip.yaml": "contrastive",
    "embedded/3_unet_64.yaml": "full",
    "embedded/4_unet_128.yaml": "full",
}
SOURCE_OF = {"lora.yaml": "style", "textual_inversion.yaml": "concept"}
NEW_OF = {
    "embedded/1_autoencoder.yaml": ["vae"],
    "embedded/2_clip.yaml": ["text_encoder", "image_encoder"],
    "embedded/3_unet_64.yaml": ["unet"],
}


@pytest.fixture(scope="session")
def tiny(sd1_folder: Path, shapes: Path) -> Tiny:
    """Starts shipped recipes on the tiny base."""
    return Tiny(sd1_folder, shapes)


@pytest.fixture(scope="session")
def digests() -> Callable[[Path], dict[str, str]]:
    """Every file under a folder with the hash of its bytes."""

    def of(folder: Path) -> dict[str, str]:
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

    return of

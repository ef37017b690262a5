"""One mistake, and the folder that it is made in."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ruamel.yaml import YAML

LONGEST = 8
"""Lines that a message may have where its case does not say more."""

CAPTION = "a red toy"


@dataclass
class World:
    """A folder with a recipe, a base and a few pictures, all right until a case changes something.

    Attributes:
        root: the folder; also the current one while the case runs.
        bases: tiny bases by family, shared and only to be read.
        patch: undone when the case is over.
        tree: the recipe; written to recipe.yaml unless `text` or `raw` says otherwise.
        words: of the command line, behind `train`.
        undo: called when the case is over.
    """

    root: Path
    bases: Mapping[str, Path]
    patch: pytest.MonkeyPatch
    tree: dict[str, Any] = field(default_factory=dict)
    text: str | None = None
    raw: bytes | None = None
    words: list[str] = field(default_factory=lambda: ["recipe.yaml"])
    undo: list[Callable[[], None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tree = {
            "base": {"path": "base"},
            "method": {"lora": {"rank": 2}},
            "data": {"source": [{"path": "data"}], "resolution": 64, "cache": "cache", "workers": 0},
            "train": {
                "steps": 2,
                "batch_size": 2,
                "learning_rate": 0.001,
                "precision": "fp32",
                "threads": 1,
            },
            "log": {"tensorboard": False},
            "output": "out",
        }
        (self.root / "base").symlink_to(self.bases["sd1"])
        self.pictures(4)

    def set(self, key: str, value: Any) -> None:
        """Set a dotted key of the recipe."""
        *above, last = key.split(".")
        node: Any = self.tree
        for part in above:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        node[last] = value

    def drop(self, key: str) -> None:
        """Take a dotted key out."""
        *above, last = key.split(".")
        node = self.tree
        for part in above:
            node = node[part]
        del node[last]

    def method(self, name: str, **config: Any) -> None:
        """Train this instead."""
        self.tree["method"] = {name: config}

    def words_learned(self, **config: Any) -> None:
        """Textual inversion of <toy>, by which nothing is wrong yet."""
        self.method("textual_inversion", **{"token": "<toy>", "init": "toy", "replace": "toy"} | config)

    def swap(self, old: str, new: str) -> None:
        """Change the recipe's text, where it is that of `written`."""
        text = self.written()
        assert text.count(old) == 1, (old, text)
        self.text = text.replace(old, new)

    def written(self) -> str:
        """The recipe as YAML."""
        made = StringIO()
        yaml = YAML(typ="safe", pure=True)
        yaml.default_flow_style = False
        yaml.dump(self.tree, made)
        return made.getvalue()

    def save(self) -> None:
        """Write the recipe, where there is to be one."""
        content = self.raw if self.raw is not None else (self.text or self.written()).encode()
        (self.root / "recipe.yaml").write_bytes(content)

    def pictures(self, count: int, folder: str = "data", caption: str = CAPTION) -> Path:
        """A folder of that many pictures with captions beside."""
        place = self.root / folder
        place.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            (place / f"{number}.png").write_bytes(picture(number))
            (place / f"{number}.txt").write_text(caption)
        return place

    def file(self, name: str, content: bytes | str) -> Path:
        """Write a file in the folder."""
        place = self.root / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content.encode() if isinstance(content, str) else content)
        return place

    def own_base(self, family: str = "sd1") -> Path:
        """A base that may be changed."""
        place = self.root / "base"
        place.unlink()
        shutil.copytree(self.bases[family], place)
        return place

    def config(self, name: str, **changes: Any) -> None:
        """Change a JSON file of a base of its own."""
        base = self.root / "base"
        place = (self.own_base() if base.is_symlink() else base) / name
        place.write_text(json.dumps(json.loads(place.read_text()) | changes))


@dataclass(frozen=True)
class Case:
    """A mistake.

    Attributes:
        name: in words.
        make: puts it into the folder.
        told: parts of the message, among them the place and the way out.
        lines: how many the message may have.
    """

    name: str
    make: Callable[[World], Any]
    told: tuple[str, ...]
    lines: int = LONGEST


def case(name: str, make: Callable[[World], Any], *told: str, lines: int = LONGEST) -> Case:
    """A case, written short."""
    assert len(told) >= 2, f"{name}: the place and the way out"
    return Case(name, make, told, lines)


def sets(**values: Any) -> Callable[[World], None]:
    """A recipe with these keys; two underscores stand for a dot."""

    def make(world: World) -> None:
        for key, value in values.items():
            world.set(key.replace("__", "."), value)

    return make


def picture(number: int = 0, kind: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (64, 64)) -> bytes:
    """The bytes of a picture of noise, equal for equal arguments."""
    noise = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    stream = BytesIO()
    Image.fromarray(noise).convert(mode).save(stream, kind)
    return stream.getvalue()


def tensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with this header, which may lie; `length`: what is said of the header's own."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data

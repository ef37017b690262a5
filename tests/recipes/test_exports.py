"""An export's bytes: the same in every folder, and nothing in them of the machine they were made on."""

from __future__ import annotations

import getpass
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

COUNTS = {"controlnet_canny.yaml": 3, "lora.yaml": 1, "textual_inversion.yaml": 1}
PLANTED = {"USER": "ottokar", "LOGNAME": "ottokar", "HOSTNAME": "quagmire", "HOME": "/home/ottokar"}
QUICK = {"preview.every": 0, "evaluate.samples": 0, "validate.every": 0}


@pytest.mark.parametrize("recipe", COUNTS)
def test_two_runs_in_two_places_export_equal_bytes(
    tiny: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    digests: Callable[[Path], dict[str, str]],
    recipe: str,
) -> None:
    # The same base, data and recipe in another place, by another user, with its own cache.
    there = tmp_path / "xylophone"
    shutil.copytree(tiny.base, there / tiny.base.name)
    shutil.copytree(tiny.shapes, there / "scenes")
    assert tiny.start(recipe, tmp_path / "first", **QUICK) == 0
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    moved = replace(tiny, base=there / tiny.base.name, shapes=there / "scenes")
    assert moved.start(recipe, there / "outpost", **QUICK) == 0

    one, other = digests(tmp_path / "first" / "export"), digests(there / "outpost" / "export")
    assert len(one) == COUNTS[recipe]
    assert one == other
    assert (there / "outpost-cache").is_dir()
    private = {*PLANTED.values(), "xylophone", "outpost", str(tmp_path), str(tiny.base), str(tiny.shapes)}
    private |= {name for name in (socket.gethostname(), getpass.getuser()) if len(name) > 5}
    for name in other:
        content = (there / "outpost" / "export" / name).read_bytes()
        assert [text for text in sorted(private) if text.encode() in content] == []


def test_another_seed_exports_other_bytes(
    tiny: Any, tmp_path: Path, digests: Callable[[Path], dict[str, str]]
) -> None:
    assert tiny.start("lora.yaml", tmp_path / "zero", **QUICK) == 0
    assert tiny.start("lora.yaml", tmp_path / "one", train__seed=1, **QUICK) == 0
    one, other = digests(tmp_path / "zero" / "export"), digests(tmp_path / "one" / "export")
    assert list(one) == list(other) == ["lora.safetensors"]
    assert one != other


def test_exports_along_the_way(tiny: Any, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert tiny.start("textual_inversion.yaml", output, train__steps=3, export__every=2, **QUICK) == 0
    found = sorted(str(p.relative_to(output / "export")) for p in (output / "export").rglob("*.safetensors"))
    assert found == ["crescent.safetensors", "step-2/crescent.safetensors"]

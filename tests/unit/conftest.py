"""What the tests of recipes share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tuner import recipe
from tuner.recipe import Recipe, load

GOOD = """\
base: embedded
method: lora
data:
  source: pictures
  resolution: 128
train:
  steps: 10
  batch_size: 12
  learning_rate: 1e-4
output: runs/x
"""
METHOD = """\
from typing import Literal
from pydantic import Field
from tuner.block import Block

class Config(Block):
    {fields}

class METHOD:
    COMBINES = {combines}
"""
FILES = {
    "lora": METHOD.format(
        fields="rank: int = Field(8, ge=1, description='rank')\n"
        "    layers: Literal['attention', 'all'] | list[str] = Field('attention', description='layers')",
        combines=("textual_inversion",),
    ),
    "textual_inversion": METHOD.format(
        fields="token: str = Field(description='new word')", combines=("lora",)
    ),
    "controlnet": METHOD.format(fields="pass", combines=("lora",)),  # lora does not name it in return
    "_shared": "raise RuntimeError('not a method')",
}
Loader = Callable[..., Recipe]


@pytest.fixture(scope="module")
def methods(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A package of methods whose blocks do not change with the real ones."""
    root = tmp_path_factory.mktemp("methods")
    name = "methods_for_recipe_tests"
    (root / name).mkdir()
    (root / name / "__init__.py").touch()
    for stem, text in FILES.items():
        (root / name / f"{stem}.py").write_text(text)
    sys.path.insert(0, str(root))
    yield name
    sys.path.remove(str(root))
    for module in [module for module in sys.modules if module.split(".")[0] == name]:
        del sys.modules[module]


@pytest.fixture
def read(methods: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Loader:
    """Loads a recipe's text, from x.yaml in the current directory."""
    monkeypatch.setattr(recipe, "METHODS", methods)
    monkeypatch.chdir(tmp_path)

    def read_text(text: str, *overrides: str) -> Recipe:
        Path("x.yaml").write_bytes(text.encode())
        return load(Path("x.yaml"), overrides)

    return read_text


@pytest.fixture
def good() -> str:
    """A recipe without a mistake."""
    return GOOD

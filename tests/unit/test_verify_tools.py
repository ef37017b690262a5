"""What the tools make of exported files, at the end of a run and of names before one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tuner import verify
from tuner.errors import UserError
from tuner.export import contents, files, metadata, rules_label
from tuner.export.rules import judge
from tuner.files import account, bases
from tuner.method import Card
from tuner.push import usage
from tuner.verify import VerifyError, single, tools

Export = Callable[..., tuple[Any, Any, Card, list[Path]]]
HEADS = "ComfyUI and Forge do not: heads 32 wide, it makes them 64 wide"
SIZES = "sd-webui-controlnet does not: it knows only the published sizes in cldm names"
FIVE = "diffusers, ComfyUI, A1111, Forge and kohya load all of it by their rules of naming"


@pytest.fixture
def export(folders: dict[str, Path], models: ModuleType, tmp_path: Path) -> Export:
    def made(base: str, kind: str, name: str = "case", /, **config: Any) -> tuple[Any, Any, Card, list[Path]]:
        family = models.family_of(folders[base], kind)
        method = models.move(models.method_of(kind, family, **config))
        card = dataclasses.replace(models.card_of(torch.float16, method), name=name)
        return family, method, card, method.export(family, tmp_path / "export", card)

    return made


@pytest.mark.parametrize(
    ("base", "kind", "told"),
    [
        ("sd1", "textual_inversion", FIVE),
        ("sdxl", "textual_inversion", FIVE),
        ("sd1", "controlnet", f"diffusers loads all of it by its rules of naming; {HEADS}; {SIZES}"),
        (
            "sd2",
            "controlnet",
            f"diffusers, ComfyUI and Forge load all of it by their rules of naming; {SIZES}",
        ),
        (
            "sdxl",
            "controlnet",
            "ComfyUI and Forge load all of it by their rules of naming; diffusers does not: it does not "
            f"read a sdxl ControlNet in cldm names; {SIZES}",
        ),
        (
            "sd1_inpaint",
            "controlnet",
            f"diffusers loads all of it by its rules of naming; {HEADS}; {SIZES}",
        ),
        (
            "sd1",
            "full",
            "diffusers loads all of it by its rules of naming; ComfyUI, A1111, Forge and kohya do not: it "
            "does not recognise a base of this size",
        ),
    ],
)
def test_the_line_says_which_tools_load_a_file(base: str, kind: str, told: str, export: Export) -> None:
    family, method, card, written = export(base, kind)
    lines = dict(zip(written, verify.check(family, [method], written, card), strict=True))
    single = [path for path in written if not (path.parent / "config.json").is_file()]
    assert len(single) == 1 and lines[single[0]].endswith(f"; {told}")
    assert all("by its rules" not in lines[path] for path in written if path not in single)


def strange(tensors: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {**tensors, key: torch.ones(1, 32).half()}


@pytest.mark.parametrize(
    ("kind", "key", "tool"),
    [
        ("textual_inversion", "<toy>_1", "ComfyUI would load part of it: not loaded: <toy>_1"),
        ("controlnet", "control_model.x", "diffusers would load part of it: not loaded: control_model.x"),
        (
            "full",
            "model.diffusion_model.x",
            "diffusers would load part of it: not loaded: model.diffusion_model.x",
        ),
    ],
)
def test_a_tool_that_would_load_a_part_is_an_error_whatever_the_method(
    kind: str, key: str, tool: str, export: Export
) -> None:
    family, _, _, written = export("sd1", kind)
    (path,) = (path for path in written if not (path.parent / "config.json").is_file())
    tensors, told = files.load(path)
    files.save(path, strange(tensors, key), told)
    with pytest.raises(VerifyError) as caught:
        tools.told(path, family)
    assert tool in str(caught.value) and path.name in str(caught.value)


def test_a_file_of_no_known_kind_is_an_error(sd1_folder: Path, models: ModuleType, tmp_path: Path) -> None:
    path = files.save(tmp_path / "x.safetensors", {"x": torch.ones(2, 2, 2)}, {})
    with pytest.raises(VerifyError, match="there are no rules for this kind of file"):
        tools.told(path, models.family_of(sd1_folder, "lora"))


NAMES = {  # the export's name -> the tools that take the file for another thing, on SD1 and on SDXL
    "canny": ([], []),
    "my_shuffle": (["ComfyUI", "Forge", "sd-webui-controlnet"], ["ComfyUI", "Forge"]),
    "x_shuffle_fp16": (["ComfyUI", "Forge", "sd-webui-controlnet"], ["ComfyUI", "Forge"]),
    "Shuffled": (["sd-webui-controlnet"], []),
    "like_Instant_ID_2": (["sd-webui-controlnet"], ["sd-webui-controlnet"]),
    "instantid": ([], []),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_are_asked_before_training(name: str, folders: dict[str, Path], models: ModuleType) -> None:
    for base, wrong in zip(("sd1", "sdxl"), NAMES[name], strict=True):
        family = models.family_of(folders[base], "controlnet")
        method = models.method_of("controlnet", family)
        if not wrong:
            verify.check_names(name, family, [method])
            continue
        with pytest.raises(UserError) as caught:
            verify.check_names(name, family, [method])
        first, *lines = str(caught.value).splitlines()
        assert first == f"export.name: found {name}; choose another one:"
        assert [line.split(":")[0].strip() for line in lines] == wrong
    family = models.family_of(folders["sd1"], "lora")
    verify.check_names(name, family, [models.method_of("lora", family)])  # of a LoRA's the name says nothing


def test_a_run_asks_for_the_name(sd1_folder: Path, export: Export) -> None:
    family, method, card, written = export("sd2", "controlnet", "x_shuffle")
    with pytest.raises(VerifyError, match="ComfyUI would load part of it: loaded wrongly: .*the file's name"):
        verify.check(family, [method], written, card)


# --- labels

OWN, ANY = "modelspec.architecture", {"format": "pt"}
LABELS = [  # tool, metadata, what it shows
    ("A1111", {}, None),
    ("A1111", ANY, "sd1"),
    ("A1111", {"ss_base_model_version": "sd_v1"}, "sd1"),
    ("A1111", {"ss_base_model_version": "sdxl_base_v1-0"}, "sdxl"),
    ("A1111", {"ss_v2": "True"}, "sd2"),
    ("A1111", {OWN: "stable-diffusion-xl-v1-base/lora"}, "sd1"),
    ("Forge", {}, None),
    ("Forge", ANY, None),
    ("Forge", {"ss_base_model_version": "sd_v1"}, None),
    ("Forge", {"ss_base_model_version": "sdxl_base_v1-0"}, "sdxl"),
    ("Forge", {"ss_v2": "True"}, "sd2"),
    ("Forge", {OWN: "stable-diffusion-xl-v1-base/lora"}, "sdxl"),
    ("Forge", {OWN: "stable-diffusion-v1/lora"}, "sd1"),
    ("Forge", {OWN: "stable-diffusion-v1/lora", "ss_base_model_version": "sdxl_base_v1-0"}, "sdxl"),
]


@pytest.mark.parametrize(("tool", "told", "shown"), LABELS, ids=str)
def test_labels_of_the_web_uis(tool: str, told: dict[str, str], shown: str | None) -> None:
    assert rules_label.shown(tool, told)[0] == shown
    for family in ("sd1", "sd2", "sdxl"):
        caution = rules_label.caution(tool, told, family)
        assert bool(caution) == (shown != family)
        assert ("Unknown" in caution) == (shown is None)
        assert ("hides it" in caution) == (tool == "A1111" and shown not in (None, family))
    for other in ("diffusers", "ComfyUI", "kohya"):
        assert rules_label.caution(other, told, "sdxl") == ""


def test_a_wrong_label_is_a_caution_of_the_tools(lora: Path, folder: Path) -> None:
    read, base = contents.read(lora), bases.named(str(folder))
    other = {"sd1": "sdxl", "sd2": "sd1", "sdxl": "sd1"}[base.family]
    wrong, right = (
        metadata.build(
            "lora", name="x", recipe_text="{}", versions={}, base_name="x", base_digest="0", data_digests={},
            extra={"family": family, "prediction_type": predicts, "rank": 4, "alpha": 4.0},
        )
        for family, predicts in ((other, "epsilon"), (base.family, "v_prediction"))
    )  # fmt: skip
    for tool in ("diffusers", "ComfyUI", "A1111", "Forge", "kohya"):
        found = judge(tool, read._replace(metadata=wrong), base)
        assert found.loads == "all" and len(found.cautions) == (tool in ("A1111", "Forge"))
        assert judge(tool, read._replace(metadata=right), base).cautions == []


# --- files made of others


def test_a_summary_of_a_written_file(
    folder: Path, tmp_path: Path, write_lora: Any, adapters: ModuleType
) -> None:
    from tuner.export import kohya, peft_format

    base, path = bases.named(str(folder)), tmp_path / "x.safetensors"
    write_lora(path, base)
    assert account.summary(path, base) == f"x.safetensors: {FIVE} (on {base.name})"
    modules = adapters.loras(base, only=lambda place: place.endswith(("conv_in", "to_q")))
    files.save(path, kohya.to_kohya(modules, kohya.naming(base.family, base.unet)), {})
    found = account.summary(path, base)
    assert "; kohya would load part of it: not loaded: lora_unet_" in found
    assert found.startswith("x.safetensors: diffusers, ComfyUI, A1111 and Forge load all of it")
    files.save(path, peft_format.to_peft(modules)[0], {})
    alone = account.summary(path, base, ("diffusers",))
    assert alone == f"x.safetensors: diffusers loads all of it by its rules of naming (on {base.name})"
    with pytest.raises(UserError, match="no tool loads all of it: kohya would load nothing of it"):
        account.summary(path, base, ("kohya",))


# --- single files beside diffusers' own reader, kinds that it does not read, words, cards


def test_a_checkpoint_is_read_by_diffusers_too(export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    family, method, card, written = export("sd1", "full", text_encoder=True)
    (line,) = [line for line in verify.check(family, [method], written, card) if "original layout" in line]
    assert "diffusers' from_single_file reads the same unet and text_encoder" in line
    real = single.read

    def changed(path: Path, name: str, *more: Any) -> torch.nn.Module:
        network = real(path, name, *more)
        with torch.no_grad():
            next(network.parameters()).mul_(1.01 if name == "text_encoder" else 1.0)
        return network

    monkeypatch.setattr(single, "read", changed)
    with pytest.raises(VerifyError, match="read by diffusers: text_encoder: .* is not what was trained"):
        verify.check(family, [method], written, card)


@pytest.mark.parametrize(("kind", "name"), [("loha", "LoHa"), ("lokr", "LoKr"), ("lora", "")])
def test_what_diffusers_and_kohya_do_not_read_is_told(kind: str, name: str, export: Export) -> None:
    family, method, card, written = export("sd1", "lora", kind=kind)
    (line,) = verify.check(family, [method], written, card)
    told = f"; diffusers and kohya read no {name}: `tuner resize --rank N` makes a LoRA of it that they read"
    assert line.endswith(told) if name else "resize" not in line


def test_which_tensor_of_a_word_is_read(folders: dict[str, Path]) -> None:
    from tuner.export import rules_embedding

    rows = torch.ones(2, 32)
    for base, named in (("sd1", "clip_l"), ("sd2", "clip_h")):
        made = bases.named(str(folders[base]))
        for keys, comfy, kohya in (
            (["emb_params"], [], []),
            (["a", named], ["a"], [named]),  # ComfyUI looks for its encoder's key, kohya for none
            (["a", "emb_params"], ["emb_params"], ["emb_params"]),
        ):
            found = contents.of(dict.fromkeys(keys, rows), {}, "a.safetensors")
            for tool, lost in (("ComfyUI", comfy), ("kohya", kohya)):
                assert list(rules_embedding.judge(tool, found, made).dropped) == lost, (base, keys, tool)


def test_cards_name_the_tools_whose_rules_load_a_file(export: Export, folders: dict[str, Path]) -> None:
    _, _, _, written = export("sd2", "controlnet")
    place = written[0].parents[1]
    by_kind, by_rules = (
        {tool for part in usage.parts(place, base) for tool in part.places}
        for base in (None, str(folders["sd2"]))
    )
    assert by_kind == {"ComfyUI", "A1111", "Forge"} and by_rules == {"ComfyUI", "Forge"}


def test_rows_of_a_file_that_is_loaded_in_part(tmp_path: Path, adapters: ModuleType) -> None:
    from tuner.export import kohya

    base = bases.named("sd15")
    for ending, tools_ in (("conv_in", set()), ("0.attn2.to_k", {"kohya sd-scripts"})):
        modules = adapters.loras(base, only=lambda path, end=ending: path.endswith((end, "0.attn2.to_k")))
        files.save(tmp_path / "x.safetensors", kohya.to_kohya(modules), {})
        (part,) = usage.parts(tmp_path)
        assert set(part.places) == {"ComfyUI", "A1111", "Forge"} | tools_


@pytest.mark.usefixtures("surroundings")
def test_training_does_not_begin_under_such_a_name(run: Any, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "base: embedded\nmethod: controlnet\ndata: {source: pictures, resolution: 128}\n"
        "train: {steps: 1, batch_size: 1, learning_rate: 1e-4}\nexport: {name: my_shuffle}\n"
        f"output: {tmp_path / 'out'}\n"
    )
    code, _, err = run("train", recipe)
    assert code == 2 and "export.name: found my_shuffle; choose another one:" in err
    assert not (tmp_path / "out").exists()

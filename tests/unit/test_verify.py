"""Every check of an export can fail: files are damaged one way at a time."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tuner import verify
from tuner.errors import UserError
from tuner.export import cldm, files
from tuner.method import Card, Method
from tuner.verify import VerifyError, component
from tuner.verify import controlnet as controlnet_check
from tuner.verify import lora as lora_check
from tuner.verify import textual_inversion as inversion_check

Tensors = dict[str, Tensor]


@dataclasses.dataclass
class Export:
    """A method's export in a folder of its own."""

    family: Any
    method: Method
    card: Card
    written: list[Path]
    folder: Path

    def check(self) -> list[str]:
        return verify.check(self.family, [self.method], self.written, self.card)

    def damage(self, name: str, change: Callable[[Tensors], object]) -> Path:
        """Change the tensors of the file whose path ends with `name`."""
        (path,) = [path for path in self.written if path.as_posix().endswith(name)]
        tensors, metadata = files.load(path)
        change(tensors)
        metadata["modelspec.hash_sha256"] = f"0x{files.data_digest(tensors)}"
        return files.save(path, tensors, metadata)


@pytest.fixture(scope="module")
def made(
    sd1_folder: Path, models: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Export]:
    """Each method's export, written once."""
    kept: dict[str, Export] = {}

    def make(name: str) -> Export:
        if name not in kept:
            family = models.family_of(sd1_folder, name)
            method = models.move(models.method_of(name, family))
            card = models.card_of(torch.float16, method)
            folder = tmp_path_factory.mktemp(name)
            kept[name] = Export(family, method, card, method.export(family, folder, card), folder)
        return kept[name]

    return make


@pytest.fixture
def export(made: Callable[[str], Export], tmp_path: Path) -> Callable[[str], Export]:
    """A fresh copy of a method's export, to be damaged."""

    def copied(name: str) -> Export:
        whole = made(name)
        shutil.copytree(whole.folder, tmp_path / "export")
        written = [tmp_path / "export" / path.relative_to(whole.folder) for path in whole.written]
        return dataclasses.replace(whole, written=written, folder=tmp_path / "export")

    return copied


def drop(name: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(name)


def rename(name: str, other: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({other: tensors.pop(name)})


def swap(one: str, other: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({one: tensors[other], other: tensors[one]})


def scale(name: str, by: float) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({name: tensors[name] * by})


LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_"
DOWN = f"{LAYER}q.lora_down.weight"
TEXT = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
FOLDER = "diffusers/diffusion_pytorch_model.safetensors"
SINGLE = "control_sd15_case.safetensors"
UNET, VAE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"
WORD, TOY = "textual_inversion", "toy.safetensors"
TEXTS, LOOKS = "text_encoder/model.safetensors", "image_encoder/model.safetensors"
DAMAGED = [
    ("lora", "case.safetensors", drop(f"{LAYER}q.alpha"), f"1 missing ({LAYER}q.alpha)"),
    ("lora", "case.safetensors", drop(f"{TEXT}.lora_up.weight"), f"{TEXT}.lora_up.weight"),
    ("lora", "case.safetensors", rename(f"{LAYER}q.alpha", "lora_unet_nowhere.alpha"), "lora_unet_nowhere"),
    ("lora", "case.safetensors", scale(f"{LAYER}q.alpha", 0.5), f"{LAYER}q changes its layer otherwise"),
    ("lora", "case.safetensors", scale(f"{LAYER}q.alpha", 1.02), f"{LAYER}q changes its layer otherwise"),
    ("lora", "case.safetensors", scale(f"{TEXT}.lora_up.weight", -1), f"{TEXT} changes its layer otherwise"),
    ("lora", "case.safetensors", swap(f"{LAYER}q.lora_up.weight", f"{LAYER}k.lora_up.weight"), f"{LAYER}q"),
    (
        "lora",
        "case.safetensors",
        lambda t: t.update({f"{LAYER}q.alpha": t[f"{LAYER}q.alpha"].half()}),
        "q.alpha is float16, expected float32",
    ),
    (
        "lora",
        "case.safetensors",
        lambda t: t.update({DOWN: t[DOWN].float()}),
        "q.lora_down.weight is float32, expected float16",
    ),
    ("lora", "case.safetensors", lambda t: t.update({DOWN: t[DOWN][:2]}), "do not fit each other"),
    (
        "lora",
        "case.safetensors",
        lambda t: t.update({DOWN: t[DOWN][:, :8]}),
        "changes [64, 8] numbers, expected",
    ),
    (WORD, TOY, rename("<toy>", "<toi>"), "1 missing (<toy>)"),
    (WORD, TOY, scale("<toy>", 1.01), "<toy> is not what was trained"),
    (WORD, TOY, lambda t: t.update({"<toy>": t["<toy>"][:2]}), "[2, 32]"),
    (WORD, TOY, lambda t: t.update({"b": t["<toy>"]}), "1 unexpected (b)"),
    (
        WORD,
        TOY,
        lambda t: t.update({"<toy>": t["<toy>"].flip(0)}),
        "<toy> is not",
    ),
    (WORD, TOY, scale("<toy>", float("nan")), "not finite"),
    ("controlnet", FOLDER, drop("controlnet_mid_block.bias"), "1 missing (controlnet_mid_block.bias)"),
    ("controlnet", FOLDER, rename("conv_in.bias", "conv_out.bias"), "1 unexpected (conv_out.bias)"),
    ("controlnet", FOLDER, scale("controlnet_mid_block.weight", 1.01), "controlnet_mid_block.weight is not"),
    (
        "controlnet",
        FOLDER,
        swap("controlnet_down_blocks.0.weight", "controlnet_down_blocks.1.weight"),
        "controlnet_down_blocks.0.weight is not",
    ),
    ("controlnet", SINGLE, drop("control_model.input_hint_block.14.bias"), "1 missing"),
    ("controlnet", SINGLE, rename("control_model.zero_convs.0.0.bias", "zero_convs.0.0.bias"), "unexpected"),
    (
        "controlnet",
        SINGLE,
        scale("control_model.middle_block_out.0.weight", 2),
        "controlnet_mid_block.weight",
    ),
    ("controlnet", SINGLE, lambda t: t.update({k: v.float() for k, v in t.items()}), "is float32"),
    ("full", UNET, drop("conv_out.bias"), "1 missing (conv_out.bias)"),
    ("full", UNET, rename("conv_out.bias", "conv_out.b"), "1 unexpected (conv_out.b)"),
    ("full", UNET, scale("conv_out.weight", 1.01), "conv_out.weight is not what was trained"),
    ("autoencoder", VAE, drop("quant_conv.bias"), "1 missing (quant_conv.bias)"),
    ("autoencoder", VAE, rename("quant_conv.bias", "b"), "1 unexpected (b)"),
    (
        "autoencoder",
        VAE,
        swap("encoder.conv_norm_out.bias", "decoder.conv_norm_out.bias"),
        "conv_norm_out.bias",
    ),
    ("contrastive", TEXTS, drop("final_layer_norm.bias"), "final_layer_norm.bias"),
    (
        "contrastive",
        LOOKS,
        rename("visual_projection.weight", "v"),
        "unexpected (v)",
    ),
    (
        "contrastive",
        LOOKS,
        scale("visual_projection.weight", -1),
        "visual_projection",
    ),
]


def label(value: object) -> str:
    """A short name of a case's part; a change is known by its file and message."""
    return "change" if callable(value) else str(value)[:40]


@pytest.mark.parametrize(("name", "file", "change", "message"), DAMAGED, ids=label)
def test_a_damaged_file_is_named(
    name: str, file: str, change: Callable[[Tensors], object], message: str, export: Callable[[str], Export]
) -> None:
    case = export(name)
    case.damage(file, change)
    with pytest.raises(VerifyError) as caught:
        case.check()
    assert message in str(caught.value), caught.value
    assert Path(file).name in str(caught.value)


def test_every_method_has_damaged_files(models: ModuleType) -> None:
    counts = {name: sum(case[0] == name for case in DAMAGED) for name in models.CONFIGS}
    assert len(counts) == 6 and min(counts.values()) >= 3
    assert issubclass(VerifyError, UserError)


CONFIGURATIONS = [
    ("controlnet", "diffusers", {"attention_head_dim": 1}, "attention_head_dim 1, trained was 2"),
    ("full", "diffusers/unet", {"norm_eps": 1e-4}, "norm_eps"),
    ("full", "diffusers/unet", {"block_out_channels": [64, 128]}, "does not load as UNet2DConditionModel"),
    (
        "full",
        "diffusers/unet",
        {"_class_name": "UNet3DConditionModel"},
        "class UNet3DConditionModel, trained",
    ),
    ("autoencoder", "diffusers/vae", {"act_fn": "mish"}, "act_fn"),
    ("contrastive", "diffusers/text_encoder", {"num_attention_heads": 4}, "num_attention_heads"),
    ("contrastive", "diffusers/image_encoder", {"hidden_act": "gelu"}, "hidden_act"),
]


@pytest.mark.parametrize(("name", "folder", "change", "message"), CONFIGURATIONS, ids=label)
def test_a_wrong_configuration_is_named(
    name: str,
    folder: str,
    change: dict[str, Any],
    message: str,
    export: Callable[[str], Export],
    tmp_path: Path,
) -> None:
    case = export(name)
    place = tmp_path / "export" / folder / "config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | change))
    with pytest.raises(VerifyError) as caught:
        case.check()
    assert message in str(caught.value), caught.value


@pytest.mark.parametrize(
    ("name", "folder", "change"),
    [
        ("controlnet", "diffusers", {"attention_head_dim": 1}),
        ("full", "diffusers/unet", {"attention_head_dim": 1}),
        ("autoencoder", "diffusers/vae", {"act_fn": "relu"}),
        ("contrastive", "diffusers/text_encoder", {"hidden_act": "relu"}),
    ],
)
def test_another_effect_is_seen_by_the_effect_alone(
    name: str,
    folder: str,
    change: dict[str, Any],
    export: Callable[[str], Export],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = export(name)
    place = tmp_path / "export" / folder / "config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | change))
    monkeypatch.setattr(component, "same_config", lambda *_: None)
    with pytest.raises(VerifyError, match=r"float16 allows 0\.0"):
        case.check()


def test_a_loras_effect_is_compared_beside_its_layers(
    export: Callable[[str], Export], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = export("lora")
    monkeypatch.setattr(lora_check, "_same_layers", lambda *_: None)
    path = case.damage("case.safetensors", scale(f"{LAYER}v.lora_up.weight", 3))
    with pytest.raises(VerifyError, match="the prediction is another one than the stored tensors give"):
        case.check()
    tensors, _ = files.load(path)
    ups = [name for name in tensors if name.endswith("lora_up.weight")]
    assert len(ups) == 82
    case.damage("case.safetensors", lambda t: t.update({name: 0 * t[name] for name in ups}))
    monkeypatch.setattr(lora_check, "same_reading", lambda *_: None)
    with pytest.raises(VerifyError, match="changes nothing.*may be too small for float16"):
        case.check()


def test_a_lora_that_diffusers_cannot_load_is_an_error(
    export: Callable[[str], Export], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = export("lora")
    monkeypatch.setattr(lora_check, "same_keys", lambda *_: 1)
    monkeypatch.setattr(lora_check, "from_kohya", lambda _, trained, *__: trained)
    case.damage("case.safetensors", rename(f"{LAYER}q.lora_up.weight", "nonsense"))
    with pytest.raises(VerifyError, match="does not load in diffusers"):
        case.check()


def test_a_lora_compared_with_another_base_is_an_error(
    export: Callable[[str], Export], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = export("lora")
    monkeypatch.setattr(type(case.method), "off", lambda *_: nullcontext())
    with pytest.raises(VerifyError, match="not the base that the check copied"):
        case.check()


def test_a_lora_that_cannot_be_unloaded_is_an_error(
    export: Callable[[str], Export], monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import StableDiffusionPipeline

    case = export("lora")
    monkeypatch.setattr(StableDiffusionPipeline, "unload_lora_weights", lambda _: None)
    with pytest.raises(VerifyError, match="does not give the base back"):
        case.check()


def test_a_words_encoding_is_compared_beside_its_vectors(
    export: Callable[[str], Export], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = export("textual_inversion")
    monkeypatch.setattr(inversion_check, "same_tensors", lambda *_: 1)
    case.damage("toy.safetensors", scale("<toy>", 50))
    with pytest.raises(VerifyError, match="the encoded prompt differs by"):
        case.check()
    case.damage("toy.safetensors", lambda t: t.update({"<toy>": t["<toy>"][:2]}))
    with pytest.raises(VerifyError, match="diffusers loads other words from it than <toy>, <toy>_1, <toy>_2"):
        case.check()
    case.damage("toy.safetensors", lambda t: t.update({"<toy>": t["<toy>"][:, :16]}))
    with pytest.raises(VerifyError, match="does not load in diffusers"):
        case.check()


def test_a_controlnets_residuals_and_converters_are_compared(
    export: Callable[[str], Export], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = export("controlnet")
    monkeypatch.setattr(component, "same_tensors", lambda *_: 1)
    case.damage(FOLDER, scale("controlnet_mid_block.weight", 1.5))
    with pytest.raises(VerifyError, match="residual 4 is another one than the stored tensors give"):
        case.check()
    case.damage(FOLDER, scale("controlnet_mid_block.weight", 1 / 1.5))
    monkeypatch.setattr(controlnet_check, "_same_residuals", lambda *_: 1)
    monkeypatch.setattr(cldm, "from_cldm", lambda tensors, _: files.load(case.written[0])[0])
    case.damage(SINGLE, scale("control_model.zero_convs.0.0.weight", 1.5))
    with pytest.raises(VerifyError, match="read by diffusers,: controlnet_down_blocks.0.weight is not"):
        case.check()


def test_the_autoencoders_scale_is_the_measured_one(
    export: Callable[[str], Export], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = export("autoencoder")
    measured = torch.tensor([100.0, 0.0, 900.0], dtype=torch.float64)  # deviation 3
    monkeypatch.setattr(case.method, "moments", measured)
    with pytest.raises(VerifyError, match=r"scaling_factor 0\.5 does not fit the latents' deviation 3"):
        case.check()
    case.written = case.method.export(case.family, tmp_path / "again", case.card)
    assert len(case.check()) == 1


def test_a_file_that_is_not_there_or_not_known_is_an_error(export: Callable[[str], Export]) -> None:
    case = export("lora")
    extra = case.written[0].with_name("other.safetensors")
    shutil.copy(case.written[0], extra)
    with pytest.raises(VerifyError, match=r"1 of 2 exported files have no check: \['other.safetensors'\]"):
        verify.check(case.family, [case.method], [*case.written, extra], case.card)
    case.written[0].write_bytes(case.written[0].read_bytes()[:1000])
    with pytest.raises(VerifyError, match=r"case.safetensors cannot be read"):
        case.check()
    case.written[0].unlink()
    with pytest.raises(VerifyError, match=r"case.safetensors is not there"):
        case.check()


def test_a_config_file_with_a_path_is_not_public(export: Callable[[str], Export], tmp_path: Path) -> None:
    case = export("full")
    place = tmp_path / "export" / "diffusers" / "unet" / "config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"_name_or_path": "/data/base/unet"}))
    with pytest.raises(
        VerifyError, match=r"unet/config.json holds a path of this machine: '/data/base/unet'"
    ):
        case.check()

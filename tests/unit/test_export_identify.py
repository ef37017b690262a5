"""What a file is said to be, from files of peft, diffusers and our own exporter."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor

from tuner.errors import UserError
from tuner.export import cldm, contents, embedding, files, kohya, lycoris, metadata, peft_format
from tuner.export.identify import Identity, identify
from tuner.export.kohya import LoraModule
from tuner.files import bases

SD1 = {"ss_base_model_version": "sd_v1"}


def what(tensors: dict[str, Tensor], told: dict[str, str] | None = None, name: str = "x") -> Identity:
    return identify(contents.of(tensors, told or {}, f"{name}.safetensors"))


def attention(wide: int, rank: int = 4, scale: float = 2.0) -> dict[str, LoraModule]:
    """One cross-attention of a published width, and one layer of a text encoder."""
    at = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    text = "text_encoder.encoder.layers.0.self_attn.q_proj"
    return {
        at: LoraModule(torch.ones(rank, wide), torch.ones(640, rank), scale),
        text: LoraModule(torch.ones(rank, 768), torch.ones(768, rank), scale),
    }


@pytest.mark.parametrize(("family", "wide"), [("sd1", 768), ("sd2", 1024), ("sdxl", 2048)])
def test_a_lora_tells_its_family_by_the_width_of_its_text(family: str, wide: int) -> None:
    unet = bases.named({"sd1": "sd15", "sd2": "sd21", "sdxl": "sdxl"}[family]).unet
    tensors = kohya.to_kohya(attention(wide), kohya.naming(family, unet))
    found = what(tensors)
    assert (found.kind, found.family) == ("LoRA", family)
    assert found.layout == ("kohya (original names)" if family == "sdxl" else "kohya")
    assert (found.ranks, found.alphas) == ({4: 2}, {8.0: 2})
    assert found.networks == {"text_encoder": 1, "unet": 1} and found.dtypes == {"F32": 6}
    peft, told = peft_format.to_peft(attention(wide))
    found = what(peft, told)
    assert (found.kind, found.layout, found.family) == ("LoRA", "peft", family)
    assert (found.ranks, found.alphas) == ({4: 2}, {8.0: 2})


def test_the_metadata_tells_the_family_where_sizes_do_not() -> None:
    tensors = kohya.to_kohya({p: m for p, m in attention(32).items() if p.startswith("unet")})
    assert what(tensors).family is None
    for family, prediction in (("sd1", None), ("sd2", None), ("sd2", "v_prediction"), ("sdxl", None)):
        labels = metadata.labels_of(family, prediction)
        assert what(tensors, {"ss_base_model_version": labels.base_version}).family == family
        assert what(tensors, {"modelspec.architecture": f"{labels.architecture}/lora"}).family == family


def test_kinds_of_adapters() -> None:
    modules = attention(768)
    names = [kohya.kohya_name(path) for path in modules]
    lora = kohya.to_kohya(modules)
    assert what(lora | {f"{name}.dora_scale": torch.ones(640, 1) for name in names}).kind == "DoRA"
    peft, told = peft_format.to_peft(
        modules, {path: torch.ones(m.up.shape[0]) for path, m in modules.items()}
    )
    assert what(peft, told).kind == "DoRA"
    ones = torch.ones(2, 2)
    loha = lycoris.to_lycoris({path: lycoris.LohaModule(ones, ones, ones, ones, 0.5) for path in modules})
    assert (what(loha).kind, what(loha).ranks, what(loha).alphas) == ("LoHa", {2: 2}, {1.0: 2})
    lokr = lycoris.to_lycoris(
        {path: lycoris.LokrModule(0.5, w1=ones, w2_a=ones, w2_b=ones) for path in modules}
    )
    assert (what(lokr).kind, what(lokr).ranks) == ("LoKr", {2: 2})
    both = lycoris.to_lycoris(
        {path: lycoris.LokrModule(0.5, None, ones, ones, None, ones, ones) for path in modules}
    )
    assert what(both).ranks == {2: 2}
    diff = lycoris.to_lycoris({path: lycoris.Difference(torch.ones(4, 4)) for path in modules})
    assert (what(diff, SD1).kind, what(diff, SD1).family) == ("full differences", "sd1")
    assert (
        what(lora | {f"lora_unet_conv_in.{part}": ones for part in ("hada_w1_a",)}).kind
        == "adapter of several kinds"
    )
    old = {f"unet.a.attn1.processor.to_q_lora.{half}.weight": ones for half in ("down", "up")}
    assert what(old).layout == "diffusers (before peft)"


def test_vectors_of_words() -> None:
    found = what(embedding.to_file("<toy>", torch.ones(3, 768)))
    assert (found.kind, found.layout, found.family) == ("embedding", "one tensor", "sd1")
    assert found.tokens == {"<toy>": 3}
    assert what({"x": torch.ones(1024)}).tokens == {"x": 1} and what({"x": torch.ones(1024)}).family == "sd2"
    pair = what({"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)}, name="toy")
    assert (pair.layout, pair.family, pair.tokens) == ("clip_l + clip_g", "sdxl", {"toy": 2})
    several = what({"<toy>": torch.ones(1, 768), "<toy>_1": torch.ones(1, 768)})
    assert (several.kind, several.layout) == ("embedding", "several tensors")


CONTROL: dict[str, Any] = {
    "block_out_channels": (32, 64, 64, 64),
    "cross_attention_dim": 768,
    "attention_head_dim": 2,
}


def test_networks() -> None:
    with torch.device("meta"):
        control = ControlNetModel(**CONTROL, layers_per_block=1)
        unet = UNet2DConditionModel(**CONTROL, layers_per_block=1)
    found = what(control.state_dict())
    assert (found.kind, found.layout, found.family) == ("ControlNet", "diffusers", "sd1")
    named = cldm.to_cldm(control.state_dict(), control.config)
    assert (what(named).kind, what(named).layout) == ("ControlNet", "cldm")
    bare = {key.removeprefix(cldm.PREFIX): value for key, value in named.items()}
    assert (what(bare).kind, what(bare).layout) == ("ControlNet", "cldm")
    assert (what(unet.state_dict()).kind, what(unet.state_dict()).family) == ("UNet", "sd1")
    ldm = {
        f"model.diffusion_model.{k}": v
        for k, v in cldm.rename(unet.state_dict(), cldm.unet_names(unet.config)).items()
    }
    assert (what(ldm).kind, what(ldm).family) == ("checkpoint", "sd1")


def test_the_folders_of_a_base(folders: dict[str, Path]) -> None:
    seen = 0
    for family in ("sd1", "sd2", "sdxl"):
        for place, kind in (("unet", "UNet"), ("vae", "autoencoder"), ("text_encoder", "text encoder")):
            (path,) = bases.weights_files(folders[family] / place)
            found = identify(contents.read(path))
            assert found.kind == kind, (family, place)
            assert found.family == (family if place == "unet" else None)
            seen += 1
    (path,) = bases.weights_files(folders["sdxl"] / "text_encoder_2")
    assert identify(contents.read(path)).kind == "text encoder with projection"
    (path,) = bases.weights_files(folders["sd1"] / "image_encoder")
    assert identify(contents.read(path)).kind == "image encoder"
    assert seen == 9


def test_of_anything_else_it_is_said_that_it_is_unknown(tmp_path: Path) -> None:
    assert what({"x": torch.ones(3, 3, 3)}).kind == "unknown"
    assert what({}).kind == "unknown"
    with pytest.raises(UserError, match="no such file"):
        contents.read(tmp_path / "x.safetensors")
    (tmp_path / "y.safetensors").write_bytes(b"no tensors here at all, none")
    with pytest.raises(UserError, match="no safetensors file"):
        contents.read(tmp_path / "y.safetensors")


def test_reading_a_header_and_seeing_tensors_give_the_same(tmp_path: Path, adapters: ModuleType) -> None:
    tensors = kohya.to_kohya(attention(768)) | {"half": torch.ones(2).half(), "b": torch.ones(2).bfloat16()}
    path = files.save(tmp_path / "x.safetensors", tensors, {"format": "pt"})
    read = contents.read(path)
    order = {key: tensors[key] for key in read.shapes}
    assert contents.of(order, {"format": "pt"}, "x.safetensors") == read
    assert list(contents.of(order, {}, "").shapes) == list(read.shapes) and len(read.alphas) == 2

"""Bases that are not whole, not what they say, or not for what is asked of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .case import Case, World, case, sets, tensors

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 3438167534\n"
PICKLE = b"\x80\x02cos\nsystem\nq\x00X\x09\x00\x00\x00touch ranq\x01\x85q\x02Rq\x03."
"""A pickle that makes a file `ran` when it is read."""


def own(change: Callable[[World, Path], Any], family: str = "sd1") -> Callable[[World], None]:
    return lambda world: (change(world, world.own_base(family)), None)[1]


def without(name: str) -> Callable[[World], None]:
    def change(world: World, base: Path) -> None:
        place = base / name
        shutil.rmtree(place) if place.is_dir() else place.unlink()

    return own(change)


def content(name: str, data: bytes | str) -> Callable[[World], None]:
    return own(lambda world, base: world.file(f"base/{name}", data))


def cut(name: str) -> Callable[[World], None]:
    def change(world: World, base: Path) -> None:
        data = (base / name).read_bytes()
        (base / name).write_bytes(data[: len(data) // 2])

    return own(change)


def lying(name: str, lie: Callable[[dict[str, Any]], Any]) -> Callable[[World], None]:
    """The header of a file of the base says something else than is behind it."""

    def change(world: World, base: Path) -> None:
        data = (base / name).read_bytes()
        size = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:size])
        lie(header)
        (base / name).write_bytes(tensors(header, data[size:]))

    return own(change)


def config(name: str, **changes: Any) -> Callable[[World], None]:
    return lambda world: world.config(name, **changes)


def stretch(header: dict[str, Any]) -> None:
    """A tensor that reaches beyond the end of the file."""
    last = max(
        (key for key in header if key != "__metadata__"), key=lambda key: header[key]["data_offsets"][1]
    )
    header[last]["data_offsets"][1] += 2**40


def reshape(header: dict[str, Any]) -> None:
    """A tensor with another shape than it has bytes for."""
    header["conv_in.weight"]["shape"] = [7, 7]


def renamed(header: dict[str, Any]) -> None:
    header["conv_in.wieght"] = header.pop("conv_in.weight")


def pickled(world: World) -> None:
    base = world.own_base()
    (base / UNET).unlink()
    world.file("base/unet/diffusion_pytorch_model.bin", PICKLE)


def as_file(name: str, data: bytes | str) -> Callable[[World], None]:
    def make(world: World) -> None:
        world.file(name, data)
        world.set("base.path", name)

    return make


def flux(world: World) -> None:
    world.file("flux/model_index.json", json.dumps({"_class_name": "FluxPipeline"}))
    world.file("flux/transformer/config.json", json.dumps({"_class_name": "FluxTransformer2DModel"}))
    (world.root / "flux" / "text_encoder").mkdir()
    world.set("base.path", "flux")


def empty(world: World) -> None:
    (world.root / "nothing").mkdir()
    world.set("base.path", "nothing")


def shards(*parts: str) -> Callable[[World], None]:
    def change(world: World, base: Path) -> None:
        (base / UNET).rename(world.root / "unet.safetensors")
        names = {f"conv_{number}.weight": part for number, part in enumerate(parts)}
        world.file(f"base/{UNET}.index.json", json.dumps({"metadata": {}, "weight_map": names}))

    return own(change)


def many_words(world: World) -> None:
    base = world.own_base()
    place = base / "text_encoder" / "config.json"
    about = json.loads(place.read_text())
    place.write_text(json.dumps(about | {"vocab_size": about["vocab_size"] - 9}))
    from safetensors.torch import load_file, save_file

    state = load_file(base / TEXT)
    name = next(key for key in state if key.endswith("token_embedding.weight"))
    state[name] = state[name][:-9].clone()
    save_file(state, base / TEXT, {"format": "pt"})


def lora_file(world: World, width: int) -> None:
    import torch
    from safetensors.torch import save_file

    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    save_file(
        {
            f"{stem}.lora_down.weight": torch.ones(2, width),
            f"{stem}.lora_up.weight": torch.ones(64, 2),
            f"{stem}.alpha": torch.tensor(2.0),
        },
        world.root / "lora.safetensors",
    )


def offline(world: World) -> None:
    import huggingface_hub

    world.patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    world.set("base.path", "owner/name")


def lora_as_base(world: World) -> None:
    lora_file(world, 32)
    world.set("base.path", "lora.safetensors")


def lora_of_another(world: World) -> None:
    lora_file(world, 2048)
    world.method("lora", start="lora.safetensors")


def other_autoencoder(world: World) -> None:
    world.own_base()
    shutil.copytree(world.root / "base" / "vae", world.root / "vae16")
    place = world.root / "vae16" / "config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | {"latent_channels": 16}))
    (world.root / "vae16" / "diffusion_pytorch_model.safetensors").unlink()
    from diffusers import AutoencoderKL

    AutoencoderKL.from_config(AutoencoderKL.load_config(world.root / "vae16")).save_pretrained(
        world.root / "vae16"
    )
    world.set("base.vae", "vae16")


def contrastive_alone(world: World) -> None:
    shutil.rmtree(world.own_base() / "image_encoder")
    world.method("contrastive")
    world.set("data.resolution", 32)


def controlnet_from(world: World, kind: str, text: str) -> None:
    world.file("start/config.json", text)
    world.method("controlnet", start="start")


BASES: list[Case] = [
    case("nowhere", sets(base="nowhere"), "base.path: nowhere: no such folder or file", "a Hub id"),
    case("an empty folder", empty, "base nothing: none of the families", "no unet/config.json"),
    case("of another kind", flux, "base flux: none of the families", "sd1, sd2, sdxl"),
    case("no unet", without("unet"), "base base: ", "no unet/config.json"),
    case("no text encoder", without("text_encoder"), "base base: the component text_encoder is missing",
         "no text_encoder/config.json"),
    case("no autoencoder", without("vae"), "base base: the component vae is missing", "no vae/config.json"),
    case("no tokeniser", without("tokenizer"), "base base: the component tokenizer is missing", "vocab.json"),
    case("no scheduler", without("scheduler"), "base base: the component scheduler", "scheduler_config.json"),
    case("no weights", without(UNET), "base base: the component unet does not load",
         "has no diffusion_pytorch_model.safetensors", "download it again"),
    case("no weights of words", without(TEXT), "the component text_encoder does not load",
         "has no model.safetensors", "download it again"),
    case("cut off", cut(UNET), UNET, "not a whole", "file not fully covered; download it again"),
    case("words cut off", cut(TEXT), TEXT, "not a whole", "file not fully covered; download it again"),
    case("a tensor beyond the end", lying(VAE, stretch), VAE, "not a whole",
         "invalid shape, data type, or offset for tensor; download it again"),
    case("a shape without bytes", lying(UNET, reshape), UNET, "not a whole",
         "invalid shape, data type, or offset for tensor; download it again"),
    case("a header without end", content(VAE, tensors({}, b"", 2**62)), VAE, "not a whole",
         "header too large; download it again"),
    case("a header that is no JSON", content(TEXT, tensors(b"{'a': 1}  ")), TEXT, "not a whole",
         "invalid JSON in header", "download it again"),
    case("a name too many", lying(UNET, renamed), "base base: the component unet",
         "conv_in.weight is missing in its weights", "config.json"),
    case("not downloaded", content(UNET, LFS), UNET, "a Git LFS pointer", "git lfs pull"),
    case("a pickle alone", pickled, "the component unet", "diffusion_pytorch_model.bin",
         "convert it to .safetensors"),
    case("a pickle by another name", content(TEXT, PICKLE), TEXT, "a pickle", "which can run any code"),
    case("a checkpoint that is a pickle", as_file("model.ckpt", PICKLE), "model.ckpt is a pickle",
         "convert it"),
    case("a zip for a checkpoint", as_file("m.safetensors", b"PK\x03\x04" + b"\0" * 64),
         "m.safetensors is a pickle", "expected a .safetensors checkpoint"),
    case("a web page for a checkpoint", as_file("m.safetensors", "<!doctype html>"),
         "m.safetensors is a web page", "not the download"),
    case("half a checkpoint", as_file("half.safetensors", tensors({"a": {"dtype": "F32", "shape": [9],
         "data_offsets": [0, 36]}})), "half.safetensors: not a whole", "download it again"),
    case("a LoRA for a base", lora_as_base, "lora.safetensors is a LoRA",
         "expected a Stable Diffusion checkpoint"),
    case("a LoRA of another base", lora_of_another, "method.lora.start: lora.safetensors", "2048", "32"),
    case("width of the text", config("unet/config.json", cross_attention_dim=48),
         "the component unet does not load", "48", "config.json"),
    case("width told and kept", own(lambda w,
         b: shutil.rmtree(b / "text_encoder") or shutil.copytree(w.bases["sdxl"] / "text_encoder_2",
         b / "text_encoder")),
         "cross_attention_dim 32", "text encoders' width 64"),
    case("channels of the UNet", config("unet/config.json", in_channels=5),
         "the component unet does not load", "conv_in.weight expected shape", "config.json"),
    case("no JSON", content("unet/config.json", "{"), "base/unet/config.json", "is no JSON",
         "download it again"),
    case("JSON of another kind", content("vae/config.json", "[1, 2]"), "base/vae/config.json",
         "expected an object"),
    case("tokeniser's words", content("tokenizer/tokenizer.json", "{"), "base/tokenizer/tokenizer.json",
         "is no JSON", "download it again"),
    case("more words than rows", many_words, "base/tokenizer", "tokens, but the text_encoder has",
         "expected the files of one base"),
    case("of no known schedule", config("scheduler/scheduler_config.json", beta_schedule="mine"),
         "base base: the component scheduler does not load: mine is not implemented",
         "the files of one base"),
    case("a part that is missing", shards("a.safetensors"), "unet", "its part a.safetensors is missing",
         "download it again"),
    case("a part that is elsewhere", shards("../../unet.safetensors"), "../../unet.safetensors",
         "leaves the folder"),
    case("another autoencoder", other_autoencoder, "in_channels 4; expected 16",
         "is base.vae that of another family?"),
    case("no autoencoder there", sets(base__vae="data"), "base.vae: data: expected a folder", "config.json"),
    case("new in vain", sets(base__new=["image_encoder"]), "base.new: image_encoder has no effect", "loads"),
    case("revision of a folder", sets(base__revision="main"), "base.revision: main has no effect", "Hub id"),
    case("prediction of a folder", sets(base__prediction="epsilon"),
         "base.prediction: epsilon has no effect", "scheduler"),
    case("clip skip", sets(base__clip_skip=9), "base.clip_skip: found 9",
         "expected 1 to 2: the text_encoder of this base"),
    case("not on this machine", offline, "base.path: owner/name", "HF_HUB_OFFLINE keeps from asking"),
    case("not for this method", contrastive_alone, "base base: the component image_encoder is missing",
         "no image_encoder/config.json"),
    case("second of one", lambda w: w.words_learned(text_encoders="second"),
         "text_encoders: second has no effect", "one text encoder"),
    case("no ControlNet", lambda w: controlnet_from(w, "", "{"), "method.controlnet.start: start",
         "is no JSON"),
]  # fmt: skip

"""LoHa, LoKr and DoRA: the file's change is peft's own, and comes back from the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from tuner.export import adapter, kohya, lycoris
from tuner.export.kohya import LoraError
from tuner.export.lycoris import Change, LohaModule, LokrModule
from tuner.files import bases

FORMS: dict[str, tuple[type, dict[str, Any]]] = {
    "loha": (peft.LoHaConfig, {}),
    "loha with a core": (peft.LoHaConfig, {"use_effective_conv2d": True}),
    "lokr": (peft.LoKrConfig, {}),
    "lokr of small factors": (peft.LoKrConfig, {"decompose_both": True, "decompose_factor": 4, "r": 1}),
    "lokr with a core": (peft.LoKrConfig, {"use_effective_conv2d": True, "r": 1}),
    "lokr unfactored": (peft.LoKrConfig, {"r": 64}),
}


class Layers(nn.Module):
    """A linear layer, a convolution, and a convolution of one pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(32, 64, bias=False)
        self.conv1 = nn.Conv2d(64, 48, 3)
        self.proj_in = nn.Conv2d(64, 64, 1)


def adapted(name: str, alpha: float = 3.0) -> tuple[dict[str, Any], dict[str, Change]]:
    """peft's layers with random factors by path, and the same as modules of ours."""
    torch.manual_seed(0)
    model, (kind, options) = Layers(), FORMS[name]
    config = kind(**{"r": 4, "alpha": alpha, "target_modules": ["to_q", "conv1", "proj_in"], **options})
    peft.inject_adapter_in_model(config, model)
    state: dict[str, Tensor] = {}
    layers = {}
    for path, layer in model.named_modules():
        if not isinstance(layer, peft.tuners.lycoris_utils.LycorisLayer):
            continue
        layers[path] = layer
        for part, tensor in layer.named_parameters():
            if "base_layer" not in part:
                nn.init.normal_(tensor)
                state[f"{path}.{part}"] = tensor.detach()
    assert len(layers) == 3
    scales = {path: layer.scaling["default"] for path, layer in layers.items()}
    return layers, lycoris.from_peft(state, scales)


@pytest.mark.parametrize("name", FORMS)
def test_the_change_is_pefts(name: str) -> None:
    layers, modules = adapted(name)
    for path, layer in layers.items():
        own = lycoris.change(modules[path], tuple(layer.get_base_layer().weight.shape))
        theirs = layer.get_delta_weight("default").detach().double()
        assert theirs.abs().max() > 0.1
        torch.testing.assert_close(own, theirs, rtol=1e-5, atol=1e-4)
    kinds = {type(module) for module in modules.values()}
    assert kinds == {LohaModule if "loha" in name else LokrModule}


def test_the_forms_cover_every_factor() -> None:
    """Which of LoKr's factors each form has, so that none goes untested."""
    seen = set()
    for name in FORMS:
        for module in adapted(name)[1].values():
            seen |= {role for role, value in module._asdict().items() if value is not None}
    assert seen == {*LohaModule._fields, *LokrModule._fields}


def placed(modules: dict[str, Change]) -> dict[str, Change]:
    """The three layers as layers of the tiny base's UNet."""
    at = "unet.down_blocks.0.attentions.0"
    where = {
        "to_q": f"{at}.transformer_blocks.0.attn1.to_q",
        "conv1": "unet.down_blocks.0.resnets.0.conv1",
        "proj_in": f"{at}.proj_in",
    }
    return {where[path]: module for path, module in modules.items()}


@pytest.mark.parametrize("name", FORMS)
def test_a_file_holds_all_of_it(name: str, sd1_folder: Path) -> None:
    base = bases.named(str(sd1_folder))
    modules = placed(adapted(name)[1])
    tensors = lycoris.to_lycoris(modules)
    back = adapter.read(tensors, {}, base)
    assert back.magnitudes == {} and sorted(back.modules) == sorted(modules)
    for path, module in modules.items():
        shape = {"to_q": (64, 32), "conv1": (48, 64, 3, 3), "proj_in": (64, 64, 1, 1)}[
            path.rpartition(".")[2]
        ]
        old, new = lycoris.change(module, shape), lycoris.change(back.modules[path], shape)
        torch.testing.assert_close(new, old, rtol=1e-6, atol=1e-6)
        factored = not isinstance(module, LokrModule) or module.rank is not None
        if factored:  # nothing was multiplied: bit by bit
            assert back.modules[path]._asdict().keys() == module._asdict().keys()
            for role, value in module._asdict().items():
                other = back.modules[path]._asdict()[role]
                assert torch.equal(other, value) if isinstance(value, Tensor) else other == value, role
    again = lycoris.to_lycoris(back.modules)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in tensors.items())


def test_alpha_is_read_of_factored_products_alone(sd1_folder: Path) -> None:
    """ComfyUI, A1111, Forge and LyCORIS use alpha / r only where a factor says r: the scale is baked."""
    modules = placed(adapted("lokr unfactored", alpha=128.0)[1])
    whole = [
        path for path, module in modules.items() if isinstance(module, LokrModule) and module.rank is None
    ]
    assert len(whole) >= 2
    tensors = lycoris.to_lycoris(modules)
    for path in whole:
        module, name = modules[path], kohya.kohya_name(path)
        assert isinstance(module, LokrModule) and module.scale == 2.0 and module.w2 is not None
        assert torch.equal(tensors[f"{name}.lokr_w2"], 2 * module.w2)
        tensors[f"{name}.alpha"] = torch.tensor(77.0)
    back = adapter.read(tensors, {}, bases.named(str(sd1_folder)))
    assert all(back.modules[path].scale == 1.0 for path in whole)  # type: ignore[union-attr]


@pytest.mark.parametrize("conv", [False, True])
def test_dora_baked_is_what_peft_merges(conv: bool) -> None:
    torch.manual_seed(1)
    model = Layers()
    target = "conv1" if conv else "to_q"
    plain = getattr(model, target).weight.detach().clone()
    config = peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=[target])
    peft.inject_adapter_in_model(config, model)
    layer = getattr(model, target)
    up, down = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    magnitude = layer.lora_magnitude_vector["default"].weight
    nn.init.normal_(up)
    magnitude.data *= torch.rand_like(magnitude) + 0.5
    module = kohya.LoraModule(down.detach(), up.detach(), layer.scaling["default"])
    found = lycoris.from_dora(plain, module, magnitude.detach())
    layer.merge()
    merged = layer.get_base_layer().weight.detach()
    assert (merged - plain).abs().max() > 0.1
    torch.testing.assert_close(plain + found.weight, merged, rtol=1e-5, atol=1e-5)
    with pytest.raises(LoraError, match="3 magnitudes for"):
        lycoris.from_dora(plain, module, torch.ones(3))


def test_faults_are_named() -> None:
    loha, lokr = adapted("loha")[1]["to_q"], adapted("lokr")[1]["to_q"]
    assert isinstance(loha, LohaModule) and isinstance(lokr, LokrModule)
    with pytest.raises(LoraError, match="no module"):
        lycoris.to_lycoris({})
    with pytest.raises(LoraError, match="plain LoRA"):
        lycoris.to_lycoris({"unet.conv_in": kohya.LoraModule(torch.ones(2, 2), torch.ones(2, 2), 1.0)})
    with pytest.raises(LoraError, match="same name"):
        lycoris.to_lycoris({"unet.a.b_c": loha, "unet.a_b.c": loha})
    with pytest.raises(LoraError, match=r"make \[64, 32\], the layer is \[32, 32\]"):
        lycoris.change(loha, (32, 32))
    parts = {f"x.hada_{role}": torch.ones(2, 2) for role in ("w1_a", "w1_b", "w2_a", "w2_b")}
    assert isinstance(lycoris.from_peft(parts, {"x": 1.0})["x"], LohaModule)
    for fault, message in (
        ({"x.hada_w2_b": None}, "not the factors of a Loha"),
        ({"x.hada_t1": torch.ones(2, 2, 3, 3)}, "not the factors of a Loha"),
        ({"x.lokr_w1": torch.ones(2, 2)}, "LoHa and LoKr at once"),
        ({"x.lora_A.weight": torch.ones(2, 2)}, "not a factor of a LoHa or LoKr"),
    ):
        state = {key: tensor for key, tensor in (parts | fault).items() if tensor is not None}
        with pytest.raises(LoraError, match=message):
            lycoris.from_peft(state, {"x": 1.0})
    with pytest.raises(LoraError, match="tensors but no scale"):
        lycoris.from_peft(parts, {})
    for roles in (["w1"], ["w1", "w1_a", "w1_b", "w2"], ["w1_a", "w2"]):
        with pytest.raises(LoraError, match="not the factors of a Lokr"):
            lycoris.module("x", "lokr", {role: torch.ones(2, 2) for role in roles}, 1.0)

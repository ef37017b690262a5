from __future__ import annotations

from typing import Any

import pytest
import torch

from tuner.export import kohya
from tuner.export.kohya import LoraError, LoraModule


def module(rank: int, scale: float, *, conv: bool = False, seed: int = 0) -> LoraModule:
    torch.manual_seed(seed)
    if conv:
        return LoraModule(torch.randn(rank, 6, 3, 3), torch.randn(5, rank, 1, 1), scale)
    return LoraModule(torch.randn(rank, 6), torch.randn(5, rank), scale)


def product(lora: LoraModule) -> torch.Tensor:
    """The weight's change in float64, [out, in, ...]."""
    down = lora.down.double()
    return lora.scale * (lora.up.double().flatten(1) @ down.flatten(1)).unflatten(1, down.shape[1:])


UNET = "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0"
CONV = "unet.up_blocks.2.resnets.0.conv1"
TEXT = "text_encoder.encoder.layers.3.self_attn.q_proj"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (UNET, "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_out_0"),
        (TEXT, "lora_te_text_model_encoder_layers_3_self_attn_q_proj"),
        ("text_encoder.text_model.encoder.layers.0.mlp.fc1", "lora_te_text_model_encoder_layers_0_mlp_fc1"),
    ],
)
def test_names(path: str, name: str) -> None:
    assert kohya.kohya_name(path) == name


XL_UNET: dict[str, Any] = {  # what decides the names, of SDXL as published
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "addition_embed_type": "text_time",
}


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (
            "text_encoder.encoder.layers.3.self_attn.q_proj",
            "te1_text_model_encoder_layers_3_self_attn_q_proj",
        ),
        ("text_encoder_2.text_model.encoder.layers.0.mlp.fc1", "te2_text_model_encoder_layers_0_mlp_fc1"),
        ("text_encoder_2.text_projection", "te2_text_projection"),
        (
            "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
            "unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        ),
        ("unet.down_blocks.1.resnets.0.conv_shortcut", "unet_input_blocks_4_0_skip_connection"),
        ("unet.down_blocks.0.downsamplers.0.conv", "unet_input_blocks_3_0_op"),
        ("unet.mid_block.attentions.0.proj_in", "unet_middle_block_1_proj_in"),
        ("unet.mid_block.resnets.1.conv2", "unet_middle_block_2_out_layers_3"),
        (
            "unet.up_blocks.0.attentions.2.transformer_blocks.9.attn2.to_out.0",
            "unet_output_blocks_2_1_transformer_blocks_9_attn2_to_out_0",
        ),
        ("unet.up_blocks.0.upsamplers.0.conv", "unet_output_blocks_2_2_conv"),
        ("unet.up_blocks.2.resnets.0.time_emb_proj", "unet_output_blocks_6_0_emb_layers_1"),
        ("unet.conv_in", "unet_input_blocks_0_0"),
        ("unet.conv_out", "unet_out_2"),
        ("unet.time_embedding.linear_2", "unet_time_embed_2"),
        ("unet.add_embedding.linear_1", "unet_label_emb_0_0"),
    ],
)
def test_names_of_sdxl_are_those_of_the_original_code(path: str, name: str) -> None:
    names = kohya.naming("sdxl", XL_UNET)
    assert kohya.kohya_name(path, names) == f"lora_{name}"
    modules = {path: module(4, 2.0)}
    tensors = kohya.to_kohya(modules, names)
    assert {key.partition(".")[0] for key in tensors} == {f"lora_{name}"}
    back = kohya.from_kohya(tensors, [path, "unet.up_blocks.1.attentions.0.proj_in"], names)[path]
    assert torch.equal(back.down, modules[path].down) and torch.equal(back.up, modules[path].up)
    assert back.scale == 2.0


def test_sd2_has_the_names_of_sd1() -> None:
    assert kohya.naming("sd2", XL_UNET) == kohya.naming("sd1", XL_UNET) == kohya.SD1


def test_what_the_original_code_has_no_place_for_is_told() -> None:
    with pytest.raises(LoraError, match="unet.class_embedding: the original layout has no place"):
        kohya.kohya_name("unet.class_embedding", kohya.naming("sdxl", XL_UNET))


@pytest.mark.parametrize("path", ["unet", "vae.conv_in", "down_blocks.0"])
def test_paths_of_other_networks_are_refused(path: str) -> None:
    with pytest.raises(LoraError, match="expected a path"):
        kohya.kohya_name(path)


def test_one_rank_and_one_alpha_are_kept_as_they_are() -> None:
    modules = {UNET: module(4, 2.0), CONV: module(4, 2.0, conv=True), TEXT: module(4, 2.0)}
    tensors = kohya.to_kohya(modules)
    assert len(tensors) == 9
    assert {key.partition(".")[2] for key in tensors} == {"lora_down.weight", "lora_up.weight", "alpha"}
    alphas = [value for key, value in tensors.items() if key.endswith(".alpha")]
    assert [(alpha.item(), alpha.dtype, alpha.ndim) for alpha in alphas] == [(8.0, torch.float32, 0)] * 3
    back = kohya.from_kohya(tensors, [*modules, "unet.conv_in"])
    assert sorted(back) == sorted(modules) and len(back) == 3
    for path, lora in modules.items():
        assert torch.equal(back[path].down, lora.down) and torch.equal(back[path].up, lora.up), path
        assert back[path].scale == lora.scale


@pytest.mark.parametrize(("rank", "alpha"), [(3, 1.0), (7, 5.0), (49, 1.0), (6, 0.1)])
def test_the_scale_comes_back_exactly(rank: int, alpha: float) -> None:
    alpha = torch.tensor(alpha).item()  # what a float32 tensor can hold
    modules = {UNET: module(rank, alpha / rank)}
    assert kohya.from_kohya(kohya.to_kohya(modules), modules)[UNET].scale == alpha / rank


def test_several_ranks_and_scales_become_one_of_the_same_effect() -> None:
    modules = {UNET: module(4, 2.0), CONV: module(2, 0.5, conv=True), TEXT: module(8, 8**-0.5)}
    tensors = kohya.to_kohya(modules)
    alphas = [value.item() for key, value in tensors.items() if key.endswith(".alpha")]
    assert alphas == [8.0, 8.0, 8.0]
    back = kohya.from_kohya(tensors, modules)
    assert len(back) == 3
    for path, lora in modules.items():
        assert back[path].scale == 1.0 and back[path].down.shape[0] == 8
        torch.testing.assert_close(product(back[path]), product(lora), rtol=1e-6, atol=1e-6)


def test_one_rank_with_two_scales_is_not_uniform() -> None:
    tensors = kohya.to_kohya({UNET: module(4, 1.0), TEXT: module(4, 2.0)})
    assert [value.item() for key, value in tensors.items() if key.endswith(".alpha")] == [4.0, 4.0]
    doubled = tensors[f"{kohya.kohya_name(TEXT)}.lora_up.weight"]
    assert torch.equal(doubled, module(4, 2.0).up * 2)


def test_types_are_kept() -> None:
    lora = LoraModule(torch.randn(2, 6).half(), torch.randn(5, 2).half(), 3.0)
    tensors = kohya.to_kohya({UNET: lora, TEXT: module(4, 1.0)})
    name = kohya.kohya_name(UNET)
    assert (
        tensors[f"{name}.lora_up.weight"].dtype == tensors[f"{name}.lora_down.weight"].dtype == torch.float16
    )


def test_alpha_may_be_absent() -> None:
    tensors = kohya.to_kohya({UNET: module(4, 2.0)})
    del tensors[f"{kohya.kohya_name(UNET)}.alpha"]
    assert kohya.from_kohya(tensors, [UNET])[UNET].scale == 1.0


def test_faults_are_named() -> None:
    with pytest.raises(LoraError, match="no LoRA module"):
        kohya.to_kohya({})
    with pytest.raises(LoraError, match="same name"):
        kohya.to_kohya({"unet.a.b_c": module(4, 1.0), "unet.a_b.c": module(4, 1.0)})
    with pytest.raises(LoraError, match="do not fit"):
        kohya.to_kohya({UNET: LoraModule(torch.zeros(4, 6), torch.zeros(5, 3), 1.0)})
    tensors = kohya.to_kohya({UNET: module(4, 2.0)})
    with pytest.raises(LoraError, match="3 of 3 tensors fit no module"):
        kohya.from_kohya(tensors, [CONV])
    with pytest.raises(LoraError, match="same name"):
        kohya.from_kohya(tensors, ["unet.a.b_c", "unet.a_b.c"])
    del tensors[f"{kohya.kohya_name(UNET)}.lora_up.weight"]
    with pytest.raises(LoraError, match="lora_up is missing"):
        kohya.from_kohya(tensors, [UNET])


@pytest.mark.parametrize("adapter", ["", ".default"])
@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_from_peft(adapter: str, prefix: str) -> None:
    lora = module(4, 2.0)
    state = {
        f"{prefix}{path}.lora_{half}{adapter}.weight": tensor
        for path in (UNET, TEXT)
        for half, tensor in (("A", lora.down), ("B", lora.up))
    }
    modules = kohya.from_peft(state, {UNET: 2.0, TEXT: 0.5})
    assert {path: found.scale for path, found in modules.items()} == {UNET: 2.0, TEXT: 0.5}
    assert all(found.down is lora.down and found.up is lora.up for found in modules.values())


def test_from_peft_refuses_what_the_format_cannot_hold() -> None:
    lora = module(4, 2.0)
    state = {f"{UNET}.lora_A.weight": lora.down, f"{UNET}.lora_B.weight": lora.up}
    with pytest.raises(LoraError, match="not a plain LoRA factor"):
        kohya.from_peft(state | {f"{UNET}.lora_magnitude_vector": torch.ones(5)}, {UNET: 1.0})
    with pytest.raises(LoraError, match="not a plain LoRA factor"):
        kohya.from_peft(state | {f"{UNET}.lora_B.bias": torch.ones(5)}, {UNET: 1.0})
    with pytest.raises(LoraError, match="several adapters"):
        kohya.from_peft(state | {f"{UNET}.lora_A.second.weight": lora.down}, {UNET: 1.0})
    with pytest.raises(LoraError, match="only lora_A"):
        kohya.from_peft({f"{UNET}.lora_A.weight": lora.down}, {UNET: 1.0})
    with pytest.raises(LoraError, match="tensors but no scale"):
        kohya.from_peft(state, {})
    with pytest.raises(LoraError, match="scale but no tensors"):
        kohya.from_peft(state, {UNET: 1.0, TEXT: 1.0})

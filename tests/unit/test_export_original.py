from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tuner
from tuner import components
from tuner.export import files, original
from tuner.export.cldm import LayoutError

SHIPPED = Path(tuner.__file__).parent / "configs"
FAMILIES = {"sd1": "sd1", "sd2": "sd2", "sdxl": "sdxl", "sd1_inpaint": "sd1", "sdxl_inpaint": "sdxl"}
PUBLISHED = {"sd15": "sd1", "sd21": "sd2", "sdxl": "sdxl"}

Parts = dict[str, dict[str, Tensor]]
Configs = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def bases(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny bases, with an autoencoder as the published ones: with attention, its widths differing."""
    from diffusers import AutoencoderKL

    made = {}
    for name, folder in folders.items():
        made[name] = tmp_path_factory.mktemp("whole") / name
        shutil.copytree(folder, made[name])
        vae = AutoencoderKL(
            block_out_channels=(8, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=2,
            norm_num_groups=4,
        )
        shutil.rmtree(made[name] / "vae")
        vae.save_pretrained(made[name] / "vae")
    assert sorted(made) == sorted(FAMILIES)
    return made


def parts_of(folder: Path, family: str) -> tuple[Parts, Configs]:
    """State dicts and configurations of a base's components."""
    networks: dict[str, Any] = {
        name: components.load(name, folder / name) for name in original.PLACES[family]
    }
    return {name: network.state_dict() for name, network in networks.items()}, configs_of(networks)


def configs_of(networks: dict[str, Any]) -> Configs:
    return {
        name: network.config.to_dict() if name.startswith("text") else dict(network.config)
        for name, network in networks.items()
    }


def unequal(left: Parts, right: Parts) -> list[str]:
    """The components, and tensors as component.key, that one side lacks or that differ in type or value."""
    assert all(len(tensors) > 30 for tensors in left.values())
    found = sorted(left.keys() ^ right.keys())
    for name in sorted(left.keys() & right.keys()):
        one, other = left[name], right[name]
        differ = [
            key
            for key in one.keys() & other.keys()
            if one[key].dtype != other[key].dtype or not torch.equal(one[key], other[key])
        ]
        found += [f"{name}.{key}" for key in sorted([*differ, *(one.keys() ^ other.keys())])]
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back_is_exact(bases: dict[str, Path], name: str) -> None:
    family = FAMILIES[name]
    parts, configs = parts_of(bases[name], family)
    parts["unet"] = {key: value.half() for key, value in parts["unet"].items()}
    whole = original.to_original(parts, configs, family)
    # Each layer of an OpenCLIP encoder has six tensors in the place of its q, k and v, and two in the file.
    open_clip = {"sd1": None, "sd2": "text_encoder", "sdxl": "text_encoder_2"}[family]
    fused = 4 * configs[open_clip]["num_hidden_layers"] - 1 if open_clip else 0  # logit_scale is one more
    added = 12 + 1 if family == "sd2" else 0  # the block that passes on, and text_projection
    assert len(whole) == sum(map(len, parts.values())) - fused + added
    assert all(key.startswith(tuple(original.PLACES[family].values())) for key in whole)
    assert unequal(original.from_original(whole, configs, family), parts) == []
    again = original.to_original(original.from_original(whole, configs, family), configs, family)
    assert sorted(again) == sorted(whole)
    assert all(torch.equal(again[key], whole[key]) for key in whole)


@pytest.mark.parametrize(
    ("config", "counts"),
    [
        ("sd15", {"unet": 686, "vae": 248, "text_encoder": 196}),
        ("sd21", {"unet": 686, "vae": 248, "text_encoder": 294}),
        ("sdxl", {"unet": 1680, "vae": 248, "text_encoder": 196, "text_encoder_2": 390}),
    ],
)
def test_published_sizes(config: str, counts: dict[str, int]) -> None:
    # The files of these models have as many tensors (besides position_ids, schedules and moving averages).
    family = PUBLISHED[config]
    with torch.device("meta"):
        networks = {name: components.fresh(name, SHIPPED / config / name, 0) for name in counts}
    parts = {name: network.state_dict() for name, network in networks.items()}
    whole = original.to_original(parts, configs_of(networks), family)
    found = {
        name: sum(k.startswith(prefix) for k in whole) for name, prefix in original.PLACES[family].items()
    }
    assert found == counts
    assert sum(found.values()) == len(whole)
    back = original.from_original(whole, configs_of(networks), family)
    shapes = {name: {key: t.shape for key, t in state.items()} for name, state in parts.items()}
    assert {name: {key: t.shape for key, t in state.items()} for name, state in back.items()} == shapes
    assert whole["first_stage_model.encoder.mid.attn_1.q.weight"].shape == (512, 512, 1, 1)
    assert whole["first_stage_model.decoder.up.0.block.2.conv2.weight"].shape == (128, 128, 3, 3)
    assert whole["first_stage_model.decoder.up.3.upsample.conv.weight"].shape == (512, 512, 3, 3)
    attention = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
    assert whole[attention].shape[1] == {"sd1": 768, "sd2": 1024, "sdxl": 2048}[family]
    if family == "sd2":
        assert whole["cond_stage_model.model.transformer.resblocks.23.attn.in_proj_weight"].shape == (
            3072,
            1024,
        )
    if family == "sdxl":
        assert whole["model.diffusion_model.label_emb.0.0.weight"].shape == (1280, 2816)
        assert whole["model.diffusion_model.middle_block.1.transformer_blocks.9.norm3.bias"].shape == (1280,)
        assert "model.diffusion_model.output_blocks.9.0.in_layers.0.weight" not in whole


@pytest.mark.parametrize("name", FAMILIES)
def test_diffusers_reads_the_file(bases: dict[str, Path], name: str, tmp_path: Path) -> None:
    import diffusers

    family = FAMILIES[name]
    parts, configs = parts_of(bases[name], family)
    path = files.save(
        tmp_path / "x.safetensors", original.to_original(parts, configs, family), {"format": "pt"}
    )
    pipeline = {"sdxl": "StableDiffusionXL"}.get(family, "StableDiffusion")
    kind = getattr(diffusers, pipeline + ("InpaintPipeline" if "inpaint" in name else "Pipeline"))
    loaded = kind.from_single_file(
        str(path), config=str(bases[name]), local_files_only=True, torch_dtype=torch.float32
    )
    found = {part: getattr(loaded, part).state_dict() for part in original.PLACES[family]}
    assert unequal(found, parts) == []


def test_the_added_block_passes_its_input_on(bases: dict[str, Path]) -> None:
    from transformers import CLIPTextModel

    parts, configs = parts_of(bases["sd2"], "sd2")
    whole = original.to_original(parts, configs, "sd2")
    prefix = original.PLACES["sd2"]["text_encoder"]
    state = {key.removeprefix(prefix): value for key, value in whole.items() if key.startswith(prefix)}
    assert torch.equal(state["text_projection"], torch.eye(32))
    assert float(state["logit_scale"]) == pytest.approx(4.6052, abs=1e-4)
    layers = configs["text_encoder"]["num_hidden_layers"]
    deeper = configs["text_encoder"] | {"num_hidden_layers": layers + 1}
    tensors = original.component_from_original("text_encoder", state, deeper, "sd2")
    short: Any = components.load("text_encoder", bases["sd2"] / "text_encoder")
    long = CLIPTextModel(type(short.config)(**deeper))
    long.load_state_dict(tensors)
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    with torch.no_grad():
        assert torch.equal(long.eval()(ids).last_hidden_state, short.eval()(ids).last_hidden_state)


def test_open_clip_names_mean_what_open_clip_computes(bases: dict[str, Path]) -> None:
    # OpenCLIP's text tower, written with torch.nn alone: pre-norm blocks, x @ text_projection at the end.
    parts, configs = parts_of(bases["sdxl"], "sdxl")
    at = original.component_to_original(
        "text_encoder_2", parts["text_encoder_2"], configs["text_encoder_2"], "sdxl"
    )
    config = configs["text_encoder_2"]
    width, heads = config["hidden_size"], config["num_attention_heads"]
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    mask = torch.full((8, 8), -torch.inf).triu(1)
    functional = torch.nn.functional
    x = at["token_embedding.weight"][ids] + at["positional_embedding"][:8]
    for layer in range(config["num_hidden_layers"]):
        block = {
            k.split(".", 3)[3]: v for k, v in at.items() if k.startswith(f"transformer.resblocks.{layer}.")
        }
        assert len(block) == 12
        attention = torch.nn.MultiheadAttention(width, heads, batch_first=True)
        attention.load_state_dict(
            {k.removeprefix("attn."): v for k, v in block.items() if k.startswith("attn.")}
        )
        y = functional.layer_norm(x, (width,), block["ln_1.weight"], block["ln_1.bias"])
        x = x + attention(y, y, y, need_weights=False, attn_mask=mask)[0]
        y = functional.layer_norm(x, (width,), block["ln_2.weight"], block["ln_2.bias"])
        y = functional.gelu(functional.linear(y, block["mlp.c_fc.weight"], block["mlp.c_fc.bias"]))
        x = x + functional.linear(y, block["mlp.c_proj.weight"], block["mlp.c_proj.bias"])
    x = functional.layer_norm(x, (width,), at["ln_final.weight"], at["ln_final.bias"])
    encoder: Any = components.load("text_encoder_2", bases["sdxl"] / "text_encoder_2")
    with torch.no_grad():
        output = encoder.eval()(ids)
        pooled = encoder.text_projection(output.last_hidden_state)
    torch.testing.assert_close(x, output.last_hidden_state, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x @ at["text_projection"], pooled, atol=1e-5, rtol=1e-5)


def test_an_sdxl_that_predicts_v_is_marked(bases: dict[str, Path]) -> None:
    parts, configs = parts_of(bases["sdxl"], "sdxl")
    plain = original.to_original(parts, configs, "sdxl")
    for scheduler, markers in (
        ({"prediction_type": "epsilon", "rescale_betas_zero_snr": True}, set()),
        ({"prediction_type": "v_prediction"}, {"v_pred"}),
        ({"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, {"v_pred", "ztsnr"}),
    ):
        whole = original.to_original(parts, {**configs, "scheduler": scheduler}, "sdxl")
        assert set(whole) - set(plain) == markers
        assert unequal(original.from_original(whole, configs, "sdxl"), parts) == []


def test_variants_in_the_wild_are_read(bases: dict[str, Path]) -> None:
    parts, configs = parts_of(bases["sd1"], "sd1")
    whole = original.to_original(parts, configs, "sd1")
    place = "cond_stage_model.transformer."
    # position_ids of older transformers; no `text_model.` of still older ones; attention as linear layers.
    old = {key.replace(f"{place}text_model.", place): value for key, value in whole.items()}
    old = {k: v[:, :, 0, 0] if ".attn_1." in k and v.ndim == 4 else v for k, v in old.items()}
    assert sum(whole[key].shape != old.get(key, whole[key]).shape for key in whole) == 8
    old[f"{place}embeddings.position_ids"] = torch.arange(77)[None]
    old["first_stage_model.loss.logvar"] = torch.zeros(())
    assert unequal(original.from_original(old, configs, "sd1"), parts) == []
    # SD2 written by others: without the last block, the projection and the scale.
    parts, configs = parts_of(bases["sd2"], "sd2")
    whole = original.to_original(parts, configs, "sd2")
    layers = configs["text_encoder"]["num_hidden_layers"]
    fewer = {k: v for k, v in whole.items() if not re.search(rf"resblocks\.{layers}\.|text_proj|logit", k)}
    assert len(whole) - len(fewer) == 14
    assert unequal(original.from_original(fewer, configs, "sd2"), parts) == []


def test_faults_are_named(bases: dict[str, Path]) -> None:
    parts, configs = parts_of(bases["sdxl"], "sdxl")
    whole = original.to_original(parts, configs, "sdxl")
    zero = torch.zeros(1)

    def without(text: str) -> dict[str, Tensor]:
        kept = {key: value for key, value in whole.items() if text not in key}
        assert len(kept) < len(whole)
        return kept

    for state, words in (
        (whole | {"model_ema.decay": zero}, "model_ema.decay: belongs to no component of sdxl"),
        (whole | {"model.diffusion_model.extra.weight": zero}, r"extra\.weight: no place"),
        (whole | {"first_stage_model.encoder.mid.attn_2.q.weight": zero}, r"attn_2\.q\.weight: no place"),
        (whole | {"conditioner.embedders.1.model.visual.proj": zero}, r"visual\.proj: no place"),
        (whole | {"conditioner.embedders.0.transformer.text_model.x": zero}, "x: no place"),
        (whole | {"conditioner.embedders.0.transformer.final_layer_norm.bias": zero}, "with and without"),
        (without("label_emb.0.2"), r"unet: label_emb\.0\.2 is missing \(1 of"),
        (without("middle_block.1."), r"unet: middle_block\.1 is missing"),
        (without("decoder.norm_out"), r"vae: decoder\.norm_out is missing"),
        (without("resblocks.1.attn.in_proj_bias"), r"text_encoder_2: .*1\.attn\.in_proj_bias is missing"),
        (without("resblocks.1.ln_2"), r"text_encoder_2: transformer\.resblocks\.1\.ln_2 is missing"),
        (without("text_projection"), "text_encoder_2: text_projection is missing"),
        (without("layers.2.mlp.fc1"), r"text_encoder: encoder\.layers\.2\.mlp\.fc1 is missing"),
    ):
        with pytest.raises(LayoutError, match=words):
            original.from_original(state, configs, "sdxl")
    with pytest.raises(LayoutError, match="unknown family 'sd3'; known are sd1, sd2, sdxl"):
        original.to_original(parts, configs, "sd3")
    with pytest.raises(LayoutError, match=r"holds .*, vae; found text_encoder, text_encoder_2, unet$"):
        original.to_original({k: v for k, v in parts.items() if k != "vae"}, configs, "sdxl")
    broken = parts["text_encoder_2"].copy()
    del broken["text_projection.weight"]
    with pytest.raises(LayoutError, match=r"text_projection\.weight is missing"):
        original.to_original({**parts, "text_encoder_2": broken}, configs, "sdxl")
    del broken["text_model.encoder.layers.0.self_attn.k_proj.bias"]
    with pytest.raises(LayoutError, match=r"0\.self_attn\.k_proj\.bias is missing"):
        original.to_original({**parts, "text_encoder_2": broken}, configs, "sdxl")
    parts, configs = parts_of(bases["sd2"], "sd2")
    configs["text_encoder"]["num_hidden_layers"] = 24
    with pytest.raises(LayoutError, match="has 24 layers; .* only 23 have a place"):
        original.to_original(parts, configs, "sd2")


def test_names_of_text_encoders_with_and_without_text_model(bases: dict[str, Path]) -> None:
    # A folder made with an older transformers gives its keys with `text_model.`.
    parts, configs = parts_of(bases["sd1"], "sd1")
    older = {f"text_model.{key}": value for key, value in parts["text_encoder"].items()}
    whole = original.to_original({**parts, "text_encoder": older}, configs, "sd1")
    assert sorted(whole) == sorted(original.to_original(parts, configs, "sd1"))

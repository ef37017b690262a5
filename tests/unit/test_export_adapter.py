"""Adapter files in kohya's and peft's names: the effect in diffusers, and there and back bit by bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from torch import Tensor

from tuner.export import adapter, contents, files, kohya, lycoris, peft_format, rules
from tuner.export.kohya import LoraError, LoraModule
from tuner.export.places import Base
from tuner.files import bases

TARGETS = {
    "unet": [
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "ff.net.2",
        "proj_in",
        "conv1",
        "time_emb_proj",
        "downsamplers.0.conv",
    ],
    "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1"],
    "text_encoder_2": ["q_proj", "k_proj", "v_proj", "out_proj", "fc2"],
}
MIXED: dict[str, dict[str, Any]] = {
    "unet": {"rank_pattern": {"to_q": 2, "conv1": 6}, "alpha_pattern": {"to_q": 4, "to_v": 1, "conv1": 12}},
    "text_encoder": {"alpha_pattern": {"fc1": 9, "q_proj": 2}},
    "text_encoder_2": {"rank_pattern": {"fc2": 3}},
}
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {name: {} for name in TARGETS},
    "rslora": {name: {"use_rslora": True} for name in TARGETS},
    "mixed": MIXED,
    "dora": {name: {"use_dora": True} for name in TARGETS},
}


@pytest.fixture(scope="module", params=["sd1", "sd2", "sdxl"])
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


def base_of(folder: Path) -> Base:
    return bases.named(str(folder))


def trained(folder: Path, options: Mapping[str, Mapping[str, Any]], adapters: ModuleType) -> Any:
    """A pipeline with random peft adapters in all its networks."""
    pipe = adapters.pipeline(folder)
    torch.manual_seed(3)
    for name, network in adapters.networks(pipe).items():
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS[name], **options[name])
        network.add_adapter(config, adapter_name="x")
        for path, parameter in network.named_parameters():
            if "lora_B" in path:
                torch.nn.init.normal_(parameter, std=0.1)
            if "magnitude" in path:
                parameter.data *= torch.rand_like(parameter) + 0.5
    return pipe


def saved(pipe: Any, place: Path, form: str, adapters: ModuleType) -> Path:
    """The pipeline's adapters as training scripts save them through diffusers."""
    options: dict[str, Any] = {}
    for name, network in adapters.networks(pipe).items():
        state = peft.get_peft_model_state_dict(network, adapter_name="x")
        options[f"{name}_lora_layers"] = (
            convert_state_dict_to_diffusers(state) if "converted" in form else state
        )
        if "without" not in form:
            options[f"{name}_lora_adapter_metadata"] = network.peft_config["x"].to_dict()
    pipe.save_lora_weights(place, **options, weight_name="peft.safetensors")
    return place / "peft.safetensors"


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys() and len(found) > 40
    for path, tensor in expected.items():
        torch.testing.assert_close(found[path], tensor, rtol=0, atol=tolerance * tensor.abs().max().item())


def read(path: Path, base: Base) -> adapter.Adapter:
    return adapter.read(*files.load(path), base)


@pytest.mark.parametrize("options", ["plain", "rslora", "mixed"])
def test_a_saved_lora_becomes_a_kohya_file_of_the_same_effect(
    options: str, folder: Path, tmp_path: Path, adapters: ModuleType
) -> None:
    pipe, base = trained(folder, OPTIONS[options], adapters), base_of(folder)
    found = read(saved(pipe, tmp_path, "peft", adapters), base)
    expected = adapters.differences(pipe, adapters.pipeline(folder))
    assert expected.keys() == found.modules.keys() and found.magnitudes == {}
    path = files.save(tmp_path / "kohya.safetensors", adapter.to_kohya(found, base), {"format": "pt"})
    assert len({t.item() for key, t in files.load(path)[0].items() if key.endswith(".alpha")}) == 1
    fresh = adapters.pipeline(folder)
    fresh.load_lora_weights(tmp_path, weight_name="kohya.safetensors", adapter_name="x")
    same(adapters.differences(fresh, adapters.pipeline(folder)), expected, 1e-5)


@pytest.mark.parametrize("options", ["plain", "rslora", "mixed", "dora"])
def test_peft_files_of_ours_have_the_same_effect(
    options: str, folder: Path, tmp_path: Path, adapters: ModuleType
) -> None:
    pipe, base = trained(folder, OPTIONS[options], adapters), base_of(folder)
    source = saved(pipe, tmp_path, "peft", adapters)
    found = read(source, base)
    assert (len(found.magnitudes) == len(found.modules)) == (options == "dora")
    tensors, metadata = adapter.to_peft(found)
    theirs, told = files.load(source)
    # Ours are the tensors that diffusers saved, bit by bit and under the same names.
    # (but that a text encoder's magnitudes need `.weight`: as they are saved, they do not load).
    short = {key.replace("magnitude_vector.weight", "magnitude_vector"): t for key, t in tensors.items()}
    assert short.keys() == theirs.keys() and len(tensors) > 80
    assert all(torch.equal(short[key], tensor) for key, tensor in theirs.items())
    assert json.loads(metadata[peft_format.METADATA]).keys() <= json.loads(told[peft_format.METADATA]).keys()
    files.save(tmp_path / "ours.safetensors", tensors, {"format": "pt", **metadata})
    fresh = adapters.pipeline(folder)
    fresh.load_lora_weights(tmp_path, weight_name="ours.safetensors", adapter_name="x")
    expected = adapters.differences(pipe, adapters.pipeline(folder))
    same(adapters.differences(fresh, adapters.pipeline(folder)), expected, 1e-6)


@pytest.mark.parametrize("form", ["peft", "converted", "converted without metadata", "without metadata"])
def test_every_form_in_which_diffusers_saves_is_read_as_diffusers_reads_it(
    form: str, folder: Path, tmp_path: Path, adapters: ModuleType
) -> None:
    pipe, base = trained(folder, OPTIONS["plain"], adapters), base_of(folder)
    path = saved(pipe, tmp_path, form, adapters)
    found = read(path, base).loras("this")
    fresh = adapters.pipeline(folder)
    fresh.load_lora_weights(tmp_path, weight_name=path.name, adapter_name="x")
    loaded = adapters.loaded(fresh)
    # Scripts that convert attention alone write two forms into one file, of which diffusers reads one.
    verdict = rules.judge("diffusers", contents.read(path), base)
    lost = {key.partition(".lora.")[0] for key in verdict.dropped}
    assert (len(lost) > 10 and all(".attn" in place for place in lost)) if "converted" in form else not lost
    assert found.keys() - lost == loaded.keys() and len(loaded) > 20
    for place in loaded:
        module = found[place]
        assert torch.equal(module.down, loaded[place].down) and torch.equal(module.up, loaded[place].up), (
            place
        )
        assert module.scale == loaded[place].scale == (1.0 if "without" in form else 2.0)


@pytest.mark.parametrize(("rank", "alpha"), [(4, 8.0), (3, 1.0), (7, 5.0), (49, 1.0), (6, 0.1)])
def test_kohya_to_peft_and_back_is_exact(rank: int, alpha: float, folder: Path, adapters: ModuleType) -> None:
    base = base_of(folder)
    alpha = torch.tensor(alpha).item()  # what a float32 tensor can hold
    modules = adapters.loras(base, rank, alpha / rank, only=lambda path: "text_projection" not in path)
    first = kohya.to_kohya(modules, kohya.naming(base.family, base.unet))
    middle, metadata = adapter.to_peft(adapter.read(first, {}, base))
    last = adapter.to_kohya(adapter.read(middle, metadata, base), base)
    assert first.keys() == last.keys() and len(first) > 200
    for key, tensor in first.items():
        assert torch.equal(last[key], tensor) and last[key].dtype == tensor.dtype, key


def test_peft_to_kohya_and_back_keeps_the_product(folder: Path, adapters: ModuleType) -> None:
    base = base_of(folder)
    modules = adapters.loras(base, 4, 2.0, only=lambda path: path.endswith(("to_q", "conv1")))
    modules |= adapters.loras(base, 2, 0.5, only=lambda path: path.endswith("to_k"))
    back = adapter.read(adapter.to_kohya(adapter.Adapter(dict(modules), {}), base), {}, base)
    layers = base.layers()
    for path, module in modules.items():
        old, new = (lycoris.change(m, layers[path]) for m in (module, back.modules[path]))
        torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-5)
    assert len({m.down.shape[0] for m in back.loras("this").values()}) == 1 and len(modules) > 10


def test_one_module_in_all_spellings_that_tools_read(folders: dict[str, Path], adapters: ModuleType) -> None:
    """Whatever a file's origin, the module is found: names of old and new diffusers, ComfyUI, LyCORIS."""
    base = base_of(folders["sdxl"])
    path = "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_out.0"
    module = LoraModule(torch.randn(2, 64), torch.randn(64, 2), 1.0)
    assert base.layers()[path] == (64, 64)
    old = "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.processor.to_out"
    rest = "down_blocks_1_attentions_0_transformer_blocks_1_attn1_to_out_0"
    for down, up in (
        (f"{path}.lora_A.weight", f"{path}.lora_B.weight"),
        (f"{path}.lora.down.weight", f"{path}.lora.up.weight"),
        (f"{old}_lora.down.weight", f"{old}_lora.up.weight"),
        (f"lora_unet_{rest}.lora_down.weight", f"lora_unet_{rest}.lora_up.weight"),
        (f"lycoris_{rest}.lora_down.weight", f"lycoris_{rest}.lora_up.weight"),
        *(
            (f"{name}.lora_down.weight", f"{name}.lora_up.weight")
            for name in (
                "lora_unet_input_blocks_3_1_transformer_blocks_1_attn1_to_out_0",
                "diffusion_model.input_blocks.3.1.transformer_blocks.1.attn1.to_out.0",
            )
        ),
    ):
        found = adapter.read({down: module.down, up: module.up}, {}, base).loras("this")
        assert list(found) == [path], down
        assert torch.equal(found[path].down, module.down) and torch.equal(found[path].up, module.up)


def test_dora_becomes_whole_differences(sd1_folder: Path, tmp_path: Path, adapters: ModuleType) -> None:
    pipe, base = trained(sd1_folder, OPTIONS["dora"], adapters), base_of(sd1_folder)
    found = read(saved(pipe, tmp_path, "peft", adapters), base)
    bare = adapters.pipeline(sd1_folder)
    weights = {
        f"{name}.{path}": module.weight.detach()
        for name, network in adapters.networks(bare).items()
        for path, module in network.named_modules()
        if hasattr(module, "weight")
    }
    whole = adapter.Adapter(dict(found.differences(weights)), {})
    tensors = adapter.to_kohya(whole, base)
    assert all(key.endswith(".diff") for key in tensors) and len(tensors) == len(found.modules) > 40
    back = {
        p: m.weight.double()
        for p, m in adapter.read(tensors, {}, base).modules.items()
        if isinstance(m, lycoris.Difference)
    }
    same(back, adapters.differences(pipe, bare), 1e-4)
    with pytest.raises(LoraError, match="DoRA"):
        adapter.to_kohya(found, base)
    with pytest.raises(LoraError, match="not possible for a DoRA"):
        found.loras("merging")


def test_faults_are_named(sd1_folder: Path, adapters: ModuleType) -> None:
    base = base_of(sd1_folder)
    tensors = kohya.to_kohya(adapters.loras(base, only=lambda path: path.endswith("to_q")))
    key = next(key for key in tensors if key.endswith("lora_up.weight"))
    name = key.removesuffix(".lora_up.weight")
    for more, message in (
        (
            {"lora_unet_x.alpha": torch.tensor(1.0)},
            "1 of .* keys name no module of tiny-sd1: lora_unet_x.alpha",
        ),
        ({f"{name}.hada_w1_a": torch.ones(2, 2)}, "factors of several kinds"),
        ({f"{name}.lora_mid.weight": torch.ones(2, 2)}, "three factors"),
        ({key: torch.ones(65, 2)}, r"the factors make \[65, 64\], the layer of tiny-sd1 is \[64, 64\]"),
        ({f"{name.replace('lora_unet', 'lycoris')}.lora_up.weight": torch.ones(2, 2)}, "there twice"),
    ):
        with pytest.raises(LoraError, match=message):
            adapter.read(tensors | more, {}, base)
    with pytest.raises(LoraError, match="lacks up"):
        adapter.read({k: v for k, v in tensors.items() if k != key}, {}, base)
    peft_tensors, metadata = adapter.to_peft(adapter.read(tensors, {}, base))
    settings = json.loads(metadata[peft_format.METADATA])
    for wrong in ({**settings, "unet.r": 3}, [1]):
        with pytest.raises(LoraError, match="rank is 2, the metadata says 3|not as diffusers writes it"):
            adapter.read(peft_tensors, {peft_format.METADATA: json.dumps(wrong)}, base)
    modules = adapter.read(tensors, {}, base).loras("this")
    with pytest.raises(LoraError, match="has no magnitudes"):
        peft_format.to_peft(modules, {next(iter(modules)): torch.ones(64)})
    mixed = dict(adapter.read(tensors, {}, base).modules)
    mixed["unet.conv_in"] = lycoris.Difference(torch.ones(64, 4, 3, 3))
    with pytest.raises(LoraError, match="LoRA and Difference in one file"):
        adapter.to_kohya(adapter.Adapter(mixed, {}), base)

"""Each tool's rules: against diffusers itself, and the silent failures that files have had in the tools."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tuner.export import contents, kohya, lycoris, peft_format, rules, spelling, tools
from tuner.export.places import Base
from tuner.export.rules import Verdict
from tuner.files import bases

ALL = ("diffusers", "ComfyUI", "A1111", "Forge", "kohya")
ATTENTION: Callable[[str], bool] = lambda path: ".attn" in path  # noqa: E731
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module", params=["sd1", "sd2", "sdxl"])
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


def base_of(folder: Path) -> Base:
    return bases.named(str(folder))


def verdict(tool: str, tensors: Tensors, base: Base) -> Verdict:
    return rules.judge(tool, contents.of(tensors, {}, "x.safetensors"), base)


def loads(tensors: Tensors, base: Base) -> dict[str, str]:
    return {tool: verdict(tool, tensors, base).loads for tool in ALL}


def whole(**others: str) -> dict[str, str]:
    return dict.fromkeys(ALL, "all") | others


def in_diffusers(folder: Path, tensors: Tensors, adapters: ModuleType) -> set[str] | str:
    """The modules that diffusers loads from a file as it stands, or the kind of its error."""
    pipe = adapters.pipeline(folder)
    try:
        pipe.load_lora_weights(dict(tensors), adapter_name="x")
    except (KeyError, ValueError, RuntimeError, IndexError) as error:
        return type(error).__name__
    return {path for path, module in adapters.loaded(pipe).items() if module.up.any()}


def judged(tensors: Tensors, base: Base) -> set[str] | str:
    """The same by the rules."""
    found = verdict("diffusers", tensors, base)
    if found.refused is not None:
        return "refused"
    names = rules.everything(base)
    keys = [key for key in tensors if key not in found.dropped and key not in found.wrong]
    return {names[split.name] for key in keys if (split := spelling.split(key)) is not None}


def test_our_own_files_are_loaded_by_all(folder: Path, adapters: ModuleType) -> None:
    base = base_of(folder)
    names = kohya.naming(base.family, base.unet)
    modules = adapters.loras(base, rank=4, scale=2.0, only=lambda path: "text_projection" not in path)
    inside = {path: m for path, m in modules.items() if not path.startswith("unet.") or "_block" in path}
    assert 4 <= len(modules) - len(inside) <= 6 and len(inside) > 60
    tensors = kohya.to_kohya(inside, names)
    assert loads(tensors, base) == whole()
    assert in_diffusers(folder, tensors, adapters) == set(inside)
    # sd-scripts makes adapters in blocks alone: the outermost layers have no place there.
    tensors = kohya.to_kohya(modules, names)
    assert loads(tensors, base) == whole(kohya="part")
    dropped = verdict("kohya", tensors, base).dropped
    assert len(dropped) == 3 * (len(modules) - len(inside))
    assert in_diffusers(folder, tensors, adapters) == set(modules)


@pytest.mark.parametrize("form", range(9))
def test_diffusers_loads_what_the_rules_say_of_each_spelling(
    form: int, folder: Path, adapters: ModuleType
) -> None:
    spellings = [
        tools.UNET,
        tools.UNET_ORIGINAL,
        *(
            spelling.Spelling(
                component, prefix, joined=True, text_model=text_model, only=spelling.PROJECTIONS
            )
            for component, prefix in (
                ("text_encoder", "lora_te_"),
                ("text_encoder", "lora_te1_"),
                ("text_encoder_2", "lora_te2_"),
            )
            for text_model in (True, False)
        ),
        spelling.Spelling("unet", "diffusion_model_", joined=True),
    ]
    base = base_of(folder)
    tensors = adapters.spelled(base, adapters.loras(base), spellings[form])
    if not tensors:
        assert spellings[form].component == "text_encoder_2" and base.family != "sdxl"
        return
    found, expected = in_diffusers(folder, tensors, adapters), judged(tensors, base)
    if spellings[form].component == "text_encoder_2" and not spellings[form].text_model:
        assert expected == set() and found == "IndexError"
    elif expected == "refused":
        assert found in ("KeyError", "ValueError", "RuntimeError")
    else:
        assert found == expected


def edits(tensors: Tensors, path_end: str = "to_q") -> dict[str, Tensors]:
    """Files with one fault each, at the first module of that name."""
    up = next(key for key in tensors if key.endswith(f"{path_end}.lora_up.weight"))
    down, alpha = up.replace("lora_up", "lora_down"), up.replace("lora_up.weight", "alpha")
    renamed = {key: key.replace(path_end, f"{path_end}q") for key in (up, down, alpha)}

    def rename(*keys: str) -> Tensors:
        return {(renamed[key] if key in keys else key): value for key, value in tensors.items()}

    return {
        "renamed up": rename(up),
        "renamed down": rename(down),
        "renamed module": rename(up, down, alpha),
        "no down": {key: value for key, value in tensors.items() if key != down},
        "no up": {key: value for key, value in tensors.items() if key != up},
        "misfit": tensors | {up: torch.ones(7, 4)},
        "a factor of LoHa": tensors | {up.replace("lora_up.weight", "hada_w1_a"): torch.ones(2, 2)},
        "bundled words": tensors | {"bundle_emb.toy.clip_l": torch.ones(1, 32)},
        "a third text encoder": tensors | {"lora_te3_x.lora_up.weight": torch.ones(2, 2)},
        "magnitudes": tensors | {up.replace("lora_up.weight", "dora_scale"): torch.ones(64, 1)},
    }


EDITS = {  # what the tools do with each; diffusers is asked itself besides
    "renamed up": whole(diffusers="nothing", ComfyUI="part", A1111="nothing", Forge="part", kohya="part"),
    "renamed down": whole(
        diffusers="nothing", ComfyUI="nothing", A1111="nothing", Forge="nothing", kohya="part"
    ),
    "renamed module": dict.fromkeys(ALL, "part"),
    "no down": whole(diffusers="nothing", ComfyUI="nothing", A1111="nothing", Forge="nothing", kohya="part"),
    "no up": whole(diffusers="nothing", ComfyUI="part", A1111="nothing", Forge="part", kohya="part"),
    "misfit": whole(diffusers="nothing", ComfyUI="part", A1111="part", Forge="part", kohya="nothing"),
    "a factor of LoHa": whole(
        diffusers="nothing", ComfyUI="nothing", A1111="part", Forge="nothing", kohya="part"
    ),
    "bundled words": whole(diffusers="nothing", Forge="part", kohya="part"),
    "a third text encoder": whole(
        diffusers="nothing", ComfyUI="part", A1111="part", Forge="part", kohya="part"
    ),
    "magnitudes": dict.fromkeys(ALL, "part"),
}


@pytest.mark.parametrize("name", EDITS)
def test_faults_of_single_keys(name: str, folders: dict[str, Path], adapters: ModuleType) -> None:
    base = base_of(folders["sd1"])
    tensors = edits(kohya.to_kohya(adapters.loras(base, 4, only=ATTENTION)))[name]
    assert loads(tensors, base) == EDITS[name]
    found, expected = in_diffusers(folders["sd1"], tensors, adapters), judged(tensors, base)
    if expected == "refused":
        assert found in ("KeyError", "ValueError", "RuntimeError")
    elif name == "magnitudes":
        assert isinstance(found, set) and len(found) > 20  # with a warning; what they did is lost
    else:
        assert found == expected


def test_peft_names(folders: dict[str, Path], adapters: ModuleType) -> None:
    """ComfyUI knows attention under another name, web UIs and kohya nothing: silently."""
    base = base_of(folders["sd1"])
    tensors, _ = peft_format.to_peft(adapters.loras(base, only=ATTENTION))
    assert loads(tensors, base) == dict.fromkeys(ALL, "nothing") | {"diffusers": "all"}
    assert in_diffusers(folders["sd1"], tensors, adapters) == judged(tensors, base)
    assert len(verdict("ComfyUI", tensors, base).dropped) == len(tensors) > 20
    wide, _ = peft_format.to_peft(adapters.loras(base, only=lambda path: path.startswith("unet")))
    assert loads(wide, base) == whole(ComfyUI="part", A1111="nothing", Forge="nothing", kohya="nothing")
    lost = verdict("ComfyUI", wide, base).dropped
    assert 0 < len(lost) < len(wide) and all(".attn" in key for key in lost)
    assert "keys that it does not know" in str(verdict("Forge", wide, base).refused)
    with_alpha = tensors | {"unet.conv_in.alpha": torch.tensor(1.0)}
    assert loads(with_alpha, base)["diffusers"] == "nothing"
    assert in_diffusers(folders["sd1"], with_alpha, adapters) == "ValueError"


def test_flattened_text_encoder_names(folders: dict[str, Path], adapters: ModuleType) -> None:
    """transformers >= 5.6 saves a CLIPTextModel without `text_model.`; only diffusers knows such names."""
    for family in ("sd1", "sdxl"):
        base = base_of(folders[family])
        modules = adapters.loras(base, only=lambda path: path.startswith("text_encoder."))
        tensors, _ = peft_format.to_peft(modules)
        assert not any("text_model" in key for key in tensors) and len(tensors) >= 24
        assert loads(tensors, base) == dict.fromkeys(ALL, "nothing") | {"diffusers": "all"}
        named = {key.replace("text_encoder.", "text_encoder.text_model."): v for key, v in tensors.items()}
        assert loads(named, base) == whole(A1111="nothing", kohya="nothing")
        flat = {key.replace("text_model_", ""): v for key, v in kohya.to_kohya(modules, naming(base)).items()}
        assert loads(flat, base) == dict.fromkeys(ALL, "nothing") | {"diffusers": "all"}


def naming(base: Base) -> kohya.Naming:
    return kohya.naming(base.family, base.unet)


def test_text_encoder_prefixes(folders: dict[str, Path], adapters: ModuleType) -> None:
    expected = {
        ("sd1", "lora_te_"): whole(),
        ("sd1", "lora_te1_"): whole(kohya="nothing"),
        ("sd2", "lora_te_"): whole(),
        ("sd2", "lora_te1_"): whole(A1111="nothing", kohya="nothing"),
        ("sdxl", "lora_te_"): whole(A1111="nothing", kohya="nothing"),
        ("sdxl", "lora_te1_"): whole(),
    }
    for (family, prefix), found in expected.items():
        base = base_of(folders[family])
        form = spelling.Spelling(
            "text_encoder", prefix, joined=True, text_model=True, only=spelling.PROJECTIONS
        )
        assert loads(adapters.spelled(base, adapters.loras(base), form), base) == found, (family, prefix)


def test_differing_alphas(folders: dict[str, Path], adapters: ModuleType) -> None:
    """diffusers gives attention and text encoders the commonest alpha, and says nothing."""
    for family in ("sd1", "sdxl"):
        base = base_of(folders[family])
        keep = lambda path: ("_block" in path or path.startswith("text_enc")) and "projection" not in path  # noqa: E731
        modules = adapters.loras(base, rank=4, only=keep)
        tensors = kohya.to_kohya(modules, naming(base))
        alphas = [key for key in tensors if key.endswith(".alpha")]
        generator = torch.Generator().manual_seed(4)
        for key in alphas:
            tensors[key] = torch.tensor(float(torch.randint(1, 4, (), generator=generator)))
        missing = alphas[::7]
        tensors = {key: value for key, value in tensors.items() if key not in missing}
        assert loads(tensors, base) == whole(diffusers="part")
        pipe = adapters.pipeline(folders[family])
        pipe.load_lora_weights(dict(tensors), adapter_name="x")
        names = rules.everything(base)
        own = {
            names[key.removesuffix(".alpha")]: tensors.get(key, torch.tensor(4.0)).item() / 4
            for key in alphas
        }
        off = {path for path, module in adapters.loaded(pipe).items() if module.scale != own[path]}
        wrong = {
            names[key.rpartition(".lora")[0]]
            for key in verdict("diffusers", tensors, base).wrong
            if ".lora" in key
        }
        assert wrong == off and len(off) > 10


def test_mixed_ranks(folders: dict[str, Path], adapters: ModuleType) -> None:
    base = base_of(folders["sd1"])
    modules = adapters.loras(base, 4, only=lambda path: path.endswith("to_q"))
    modules |= adapters.loras(base, 2, only=lambda path: path.endswith("to_k"))
    plain = {
        f"{kohya.kohya_name(p)}.{part}": t
        for p, m in modules.items()
        for part, t in zip(kohya.PARTS, m[:2], strict=False)
    }
    assert loads(plain, base) == whole()
    alphas = {
        f"{kohya.kohya_name(path)}.alpha": torch.tensor(float(m.down.shape[0])) for path, m in modules.items()
    }
    assert loads(plain | alphas, base) == whole(diffusers="part")
    assert loads(kohya.to_kohya(modules), base) == whole()  # padded to one rank


def test_sdxl_in_diffusers_names(folders: dict[str, Path], adapters: ModuleType) -> None:
    """A1111 looks for the first upsampler where SD1 has it; diffusers loses the embedding of sizes."""
    base = base_of(folders["sdxl"])
    modules = adapters.loras(base, only=lambda path: "_block" in path and path.startswith("unet"))
    tensors = adapters.spelled(base, modules, tools.UNET)
    assert loads(tensors, base) == whole(A1111="part")
    assert {key.partition(".")[0] for key in verdict("A1111", tensors, base).dropped} == {
        "lora_unet_up_blocks_0_upsamplers_0_conv"
    }
    sizes = adapters.loras(base, only=lambda path: "add_embedding" in path)
    tensors = adapters.spelled(base, sizes, tools.UNET)
    assert loads(tensors, base) == whole(diffusers="nothing", A1111="nothing", kohya="nothing")
    assert in_diffusers(folders["sdxl"], tensors, adapters) == "NoMatchingPeftModuleError"
    assert loads(adapters.spelled(base, sizes, tools.UNET_ORIGINAL), base) == whole(kohya="nothing")
    half = adapters.loras(base, only=lambda path: path.endswith("to_k"))
    both = adapters.spelled(base, modules, tools.UNET_ORIGINAL) | adapters.spelled(base, half, tools.UNET)
    assert verdict("diffusers", both, base).loads == "part"
    assert in_diffusers(folders["sdxl"], both, adapters) == judged(both, base) == set(half)


def test_sd1_in_original_names(folders: dict[str, Path], adapters: ModuleType) -> None:
    base = base_of(folders["sd1"])
    tensors = adapters.spelled(base, adapters.loras(base, only=ATTENTION), tools.UNET_ORIGINAL)
    assert loads(tensors, base) == whole(diffusers="nothing", kohya="nothing")


def test_open_clip_attention_is_one_module_in_a1111(folders: dict[str, Path], adapters: ModuleType) -> None:
    for family, encoder in (("sd2", "text_encoder"), ("sdxl", "text_encoder_2")):
        base = base_of(folders[family])
        some = {
            path: module
            for path, module in adapters.loras(base).items()
            if path.startswith(f"{encoder}.") and path.endswith(("q_proj", "v_proj", "fc1"))
        }
        tensors = kohya.to_kohya(some, naming(base))
        assert loads(tensors, base) == whole(A1111="part")
        assert all("_proj" in key for key in verdict("A1111", tensors, base).dropped)
    base = base_of(folders["sd1"])
    assert loads(kohya.to_kohya(adapters.loras(base, only=lambda p: p.endswith("q_proj"))), base) == whole()


def test_dora(folders: dict[str, Path], adapters: ModuleType) -> None:
    base = base_of(folders["sd1"])
    modules = adapters.loras(base, only=ATTENTION)
    layers = base.layers()
    tensors = kohya.to_kohya(modules)
    per_output = {f"{kohya.kohya_name(p)}.dora_scale": torch.ones(layers[p][0], 1) for p in modules}
    assert loads(tensors | per_output, base) == dict.fromkeys(ALL, "part")
    assert len(verdict("ComfyUI", tensors | per_output, base).wrong) == len(modules)
    flat = {key: value.flatten() for key, value in per_output.items()}
    assert loads(tensors | flat, base) == dict.fromkeys(ALL, "part")
    per_input = {f"{kohya.kohya_name(p)}.dora_scale": torch.ones(1, layers[p][1]) for p in modules}
    assert loads(tensors | per_input, base) == whole(diffusers="part", kohya="part")
    peft, _ = peft_format.to_peft(modules, {path: torch.ones(layers[path][0]) for path in modules})
    assert loads(peft, base) == dict.fromkeys(ALL, "nothing") | {"diffusers": "all"}
    whole_network = peft_format.to_peft(
        both := adapters.loras(base, only=lambda p: p.endswith(("to_q", "q_proj"))),
        {path: torch.ones(layers[path][0]) for path in both},
    )[0]
    assert loads(whole_network, base)["diffusers"] == "all"
    # As diffusers itself saves them, a text encoder's magnitudes do not load.
    as_saved = {key.replace("vector.weight", "vector"): value for key, value in whole_network.items()}
    found = verdict("diffusers", as_saved, base)
    assert found.loads == "part" and len(found.dropped) == 2
    assert all(key.startswith("text_encoder") and "magnitude" in key for key in found.dropped)
    changes = {path: lycoris.Difference(torch.ones(layers[path])) for path in modules}
    assert loads(lycoris.to_lycoris(changes), base) == whole(diffusers="nothing", kohya="nothing")


def test_loha_and_lokr(folders: dict[str, Path]) -> None:
    for family in ("sd1", "sdxl"):
        base = base_of(folders[family])
        layers = {path: s for path, s in base.adaptable().items() if "_block" in path}
        loha = {
            path: lycoris.LohaModule(
                torch.ones(s[0], 2),
                torch.ones(2, torch.Size(s[1:]).numel()),
                torch.ones(s[0], 2),
                torch.ones(2, torch.Size(s[1:]).numel()),
                1.0,
            )
            for path, s in layers.items()
        }
        lokr = {
            path: lycoris.LokrModule(1.0, w1=torch.ones(2, 2), w2=torch.ones(s[0] // 2, s[1] // 2, *s[2:]))
            for path, s in layers.items()
        }
        for modules in (loha, lokr):
            tensors = lycoris.to_lycoris(modules, naming(base))
            assert loads(tensors, base) == whole(diffusers="nothing", kohya="nothing")
            assert len(tensors) >= 3 * len(layers) > 150
            key = next(key for key in tensors if key.endswith(("hada_w1_a", "lokr_w1")))
            broken = {k: v for k, v in tensors.items() if k != key}
            found = loads(broken, base)
            assert found["A1111"] == "nothing" and found["ComfyUI"] == "part", key
            assert loads(tensors | {key: torch.ones(3, 2)}, base)["ComfyUI"] == "part"


def test_forge_bears_twelve_strangers(folders: dict[str, Path], adapters: ModuleType) -> None:
    base = base_of(folders["sd1"])
    tensors = kohya.to_kohya(adapters.loras(base, only=ATTENTION))
    some = tensors | {f"lora_unet_x{index}.alpha": torch.tensor(1.0) for index in range(12)}
    assert loads(some, base)["Forge"] == "part"
    assert loads(some | {"lora_unet_y.alpha": torch.tensor(1.0)}, base)["Forge"] == "nothing"
    assert loads(some | {"lora_unet_y.alpha": torch.tensor(1.0)}, base)["ComfyUI"] == "part"


def test_convolutions_of_one_pixel_as_matrices(folders: dict[str, Path], adapters: ModuleType) -> None:
    base = base_of(folders["sd1"])
    tensors: dict[str, Any] = kohya.to_kohya(adapters.loras(base, only=lambda path: path.endswith("proj_in")))
    flat = {k: v if v.ndim == 0 else v.flatten(1) for k, v in tensors.items()}
    assert loads(flat, base) == whole(diffusers="nothing", kohya="nothing")
    assert in_diffusers(folders["sd1"], flat, adapters) == "RuntimeError"


def test_reasons_name_the_keys(folders: dict[str, Path], adapters: ModuleType) -> None:
    base = base_of(folders["sd1"])
    tensors = kohya.to_kohya(adapters.loras(base, only=lambda path: path.endswith("conv_in")))
    (reason,) = verdict("kohya", tensors, base).reasons()
    assert reason.startswith("not loaded: lora_unet_conv_in.lora_down.weight") and "way of naming" in reason
    (reason,) = verdict("ComfyUI", {"lora_unet_conf_in.alpha": torch.tensor(1.0)}, base).reasons()
    assert reason == "not loaded: lora_unet_conf_in.alpha: the base has no module of that name"

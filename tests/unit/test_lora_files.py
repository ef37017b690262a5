"""LoRA and kin from files: trained further, and added to the base."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from tuner import base, verify
from tuner.adapters import sources
from tuner.data.cache import Hashes
from tuner.errors import UserError
from tuner.export import adapter, files, kohya, lycoris
from tuner.export.kohya import LoraModule
from tuner.methods.lora import Config, Lora

FP16 = torch.float16
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"targets": "all"},
    "rslora": {"rslora": True, "alpha": 3.0},
    "dora": {"kind": "dora", "targets": "all"},
    "loha": {"kind": "loha", "targets": "all", "tucker": True, "alpha": 5.0},
    "lokr": {"kind": "lokr", "targets": "all", "tucker": True, "decompose_both": True},
    "lokr of whole factors": {"kind": "lokr", "rank": 64, "alpha": 3.0},
}
Load = Callable[[str], Any]


@pytest.fixture
def load(folders: dict[str, Path], tmp_path: Path) -> Load:
    """A fresh tiny base, as a run loads it."""

    def fresh(name: str = "sd1") -> Any:
        needs = ("unet", "vae", "text_encoder")
        return base.load(str(folders[name]), None, (), needs, 0, Hashes(tmp_path / "hashes"))

    return fresh


@pytest.fixture
def export(load: Load, models: ModuleType, tmp_path: Path) -> Callable[..., tuple[Lora, list[Path]]]:
    """A moved LoRA on a fresh base, and its files."""

    count = itertools.count()

    def made(name: str = "sd1", dtype: torch.dtype = FP16, **block: Any) -> tuple[Lora, list[Path]]:
        family = load(name)
        method = models.move(Lora(Config(**{"rank": 4, "text_encoder": True} | block), family, 3))
        return method, method.export(
            family, tmp_path / f"export {next(count)}", models.card_of(dtype, method)
        )

    return made


def looked(family: Any) -> Tensor:
    """What the base with its adapters makes of a prompt."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        text = family.encode_prompts(family.tokenize(["a red toy", ""]))
        x_t = torch.randn(2, 4, 8, 8, generator=generator)
        seen: Tensor = family.predict(family.denoiser, x_t, torch.tensor([3, 800]), family.condition(text))
    return seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_a_file_of_ours_trained_no_further_is_the_same_file(
    name: str, kind: str, load: Load, export: Any, models: ModuleType, tmp_path: Path
) -> None:
    first, written = export(name, **KINDS[kind])
    family = load(name)
    again = Lora(Config(start=str(written[0]), dropout=0.1), family, seed=9)
    assert again.how.kind == first.how.kind and again.components == first.components
    assert again.labels() == first.labels()
    assert again.trained().keys() == first.trained().keys() and len(again.weights) > 100
    stored = [t.to(FP16).float() for t in first.trained().values()]
    if not kind.startswith("lokr"):  # where no factor is low-rank its scale is multiplied into one of them
        assert all(torch.equal(a, b) for a, b in zip(again.weights, stored, strict=True))
    card = models.card_of(FP16, again)
    copies = again.export(family, tmp_path / "again", card)
    assert len(copies) == len(written) == (2 if kind == "dora" else 1)
    tensors, told = files.load(copies[0])
    wanted, meant = files.load(written[0])
    assert told == meant and tensors.keys() == wanted.keys() and len(tensors) > 100
    assert all(torch.equal(tensors[key], wanted[key]) for key in wanted)
    assert len(verify.check(family, [again], copies, card)) == len(copies)


@pytest.mark.parametrize("kind", KINDS)
def test_it_goes_on_with_what_the_file_does(kind: str, load: Load, export: Any) -> None:
    first, written = export(dtype=torch.float32, **KINDS[kind])
    family = load("sd1")
    bare = looked(family)
    method = Lora(Config(start=str(written[0])), family, seed=9)
    ours, other = looked(family), load("sd1")
    found = adapter.read(*files.load(written[0]), method.base)
    weights = {path: layer.weight.detach() for path, layer in method.bases.items()}
    for path, change in found.differences(weights).items():
        component, _, rest = path.partition(".")
        with torch.no_grad():
            other.modules()[component].get_submodule(rest).weight += change.weight.reshape(
                weights[path].shape
            )
    torch.testing.assert_close(ours, looked(other), rtol=1e-4, atol=1e-5)
    assert float((ours - bare).norm()) > 100 * float((ours - looked(other)).norm())
    assert all(parameter.requires_grad for parameter in method.trained().values())


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_a_file_that_peft_made_goes_on(name: str, load: Load, tmp_path: Path, adapters: ModuleType) -> None:
    family = load(name)
    torch.manual_seed(1)
    tensors: dict[str, Tensor] = {}
    for component, targets in (("unet", ["to_q", "proj_in"]), ("text_encoder", ["q_proj"])):
        # In SDXL nothing reads the first text encoder's last layer.
        kept = {"exclude_modules": r".*layers\.2.*"} if component == "text_encoder" and name == "sdxl" else {}
        config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=targets, **kept)
        wrapped = peft.get_peft_model(load(name).modules()[component], config)
        state = peft.get_peft_model_state_dict(wrapped)
        for key, value in state.items():
            tensors[key.replace("base_model.model", component)] = torch.randn_like(value)
    place = files.save(tmp_path / "made.safetensors", tensors, {"format": "pt"})
    method = Lora(Config(start=str(place)), family, 0)
    state = {key.replace(".tuner", ""): value for key, value in method.trained().items()}
    assert state.keys() == tensors.keys() and len(tensors) > 10
    assert all(torch.equal(state[key], tensors[key]) for key in tensors)
    assert {slot.alpha for slot in method.slots.values()} == {2.0}, "without alpha its scale is 1"


def kohya_file(place: Path, method_base: Any, names: kohya.Naming, **changes: Any) -> Path:
    """A LoRA on all text layers and some of the UNet, as kohya's scripts write theirs, without `lora_mid`."""
    generator = torch.Generator().manual_seed(4)
    chosen = {
        path: shape
        for path, shape in method_base.adaptable().items()
        if path.startswith("text_encoder")
        and "projection" not in path
        or ".mid_block." in path
        and "attn" in path
    }
    modules = {
        path: LoraModule(
            torch.randn(2, *shape[1:], generator=generator),
            0.01 * torch.randn(shape[0], 2, *[1] * (len(shape) - 2), generator=generator),
            0.5,
        )
        for path, shape in chosen.items()
    }
    tensors = {key: value.half() for key, value in kohya.to_kohya(modules, names).items()}
    return files.save(place, {**tensors, **changes}, {"ss_network_module": "networks.lora"})


def test_layers_that_nothing_reads_are_kept_as_they_were(
    load: Load, tmp_path: Path, models: ModuleType
) -> None:
    family = load("sdxl")
    about = sources.base_of(family)
    place = kohya_file(tmp_path / "k.safetensors", about, kohya.naming("sdxl", about.unet))
    method = Lora(Config(start=str(place)), family, 0)
    assert len(method.kept.modules) == 6 and all(
        "text_encoder.encoder.layers.2" in p for p in method.kept.modules
    )
    assert not method.kept.modules.keys() & method.slots.keys()
    card = models.card_of(FP16, method)
    (copy,) = method.export(family, tmp_path / "out", card)
    wanted, found = files.load(place)[0], files.load(copy)[0]
    assert found.keys() == wanted.keys() and len(wanted) > 100
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    models.move(method)
    (copy,) = method.export(family, tmp_path / "out", card)
    (line,) = verify.check(family, [method], [copy], card)
    assert f"into {len(wanted) // 3} layers" in line


def test_a_key_of_the_file_that_is_not_used_is_named(load: Load, tmp_path: Path) -> None:
    about = sources.base_of(load("sd1"))
    strange = {"lora_unet_nowhere.alpha": torch.tensor(1.0), "note": torch.zeros(2)}
    place = kohya_file(tmp_path / "k.safetensors", about, kohya.SD1, **strange)
    for block in ({"start": str(place)}, {"merge": [str(place)]}):
        with pytest.raises(UserError) as caught:
            Lora(Config(**block), load("sd1"), 0)  # type: ignore[arg-type]
        assert "2 of" in str(caught.value) and "lora_unet_nowhere.alpha, note" in str(caught.value)
        assert f"method.lora.{next(iter(block))}" in str(caught.value)


AGAINST: list[tuple[dict[str, Any], str]] = [
    ({"rank": 8}, "method.lora.rank: found 8, but"),
    ({"alpha": 1.0}, "method.lora.alpha: found 1.0, but"),
    ({"kind": "dora"}, "method.lora.kind: found dora, but"),
    ({"unet": False}, "method.lora.unet: found False"),
    ({"text_encoder": False}, "method.lora.text_encoder: found false"),
    ({"text_encoder": ["text_encoder_2"]}, "method.lora.text_encoder: found ['text_encoder_2']"),
    ({"targets": "all"}, "method.lora.targets: "),
    ({"targets": r".*to_q"}, "has, besides,"),
    ({"patterns": [{"match": "unet.conv_in", "learning_rate": 1.0}]}, "fits no layer that has an adapter"),
    ({"text_encoder_2_learning_rate": 1e-4}, "no adapter sits in text_encoder_2"),
]


@pytest.mark.parametrize(("block", "message"), AGAINST, ids=lambda value: str(value)[:40])
def test_what_the_recipe_says_against_the_file_is_an_error(
    block: dict[str, Any], message: str, load: Load, export: Any
) -> None:
    _, (place,) = export()
    with pytest.raises(UserError) as caught:
        Lora(Config(start=str(place), **block), load("sd1"), 0)
    assert message in str(caught.value)


def test_what_the_recipe_says_with_the_file_is_none(load: Load, export: Any) -> None:
    _, (place,) = export(alpha=2.0)
    said = {
        "rank": 4,
        "alpha": 2.0,
        "kind": "lora",
        "targets": "attention",
        "text_encoder": True,
        "unet": True,
    }
    pattern = {"match": r".*to_q", "learning_rate": 5.0}
    method = Lora(Config(start=str(place), patterns=[pattern], **said), load("sd1"), 0)  # type: ignore[arg-type]
    rates = {name: group["lr"] for group in method.groups(1.0) for name in [len(group["params"])]}
    assert sorted(rates.values()) == [1.0, 5.0]
    assert method.depends() == {"method.lora.start": place}


def test_what_cannot_be_trained_further_is_said(load: Load, export: Any, tmp_path: Path) -> None:
    _, written = export(kind="dora")
    loras, (one,) = export(targets=r".*\.to_q", text_encoder=False)
    tensors, _ = files.load(one)
    loha, _ = files.load(export(kind="loha", targets=r".*\.to_k", text_encoder=False)[1][0])
    cases = {
        "it holds full differences": written[1],
        "it holds LoHa and LoRA together": files.save(tmp_path / "both.safetensors", {**tensors, **loha}, {}),
        "there is no such file": tmp_path / "none.safetensors",
        "keys name no module of sd1": files.save(
            tmp_path / "word.safetensors", {"<x>": torch.ones(1, 32)}, {}
        ),
    }
    for message, place in cases.items():
        with pytest.raises(UserError, match=f"method.lora.start: .*{message}"):
            Lora(Config(start=str(place)), load("sd1"), 0)
    assert len(loras.slots) > 10


MERGED = [("sd1", "lora"), ("sd1", "dora"), ("sd1", "loha"), ("sdxl", "lora"), ("sdxl", "lokr")]


@pytest.mark.parametrize(("name", "kind"), MERGED)
def test_a_merged_base_is_the_sum_rounded_once(name: str, kind: str, load: Load, export: Any) -> None:
    first, written = export(name, dtype=torch.float32, **KINDS[kind])
    plain = load(name)
    family = load(name)
    block: Any = [{"file": str(written[0]), "weight": 0.5}, {"file": str(written[0]), "weight": -2.0}]
    method = Lora(Config(rank=2, merge=block), family, 0)
    whole = adapter.read(*files.load(written[0]), method.base)
    count = 0
    for component, network in plain.modules().items():
        now = {k.replace(".base_layer", ""): v for k, v in family.modules()[component].state_dict().items()}
        for key, old in network.state_dict().items():
            path = f"{component}.{key.removesuffix('.weight')}"
            expected = old
            if key.endswith(".weight") and path in whole.modules:
                module = whole.modules[path]
                if path in whole.magnitudes:
                    assert isinstance(module, LoraModule)
                    module = lycoris.from_dora(old.double(), module, whole.magnitudes[path])
                change = lycoris.change(module, tuple(old.shape))
                expected = (old.double() + 0.5 * change - 2.0 * change).float()
                count += 1
            assert torch.equal(now[key], expected), path
    assert count == len(first.bases) == len(whole.modules) > 50
    assert not method.kept.modules and method.components == ["unet"]


def test_digests_say_what_was_merged_where_it_was(load: Load, export: Any) -> None:
    _, (place,) = export(text_encoder=True)
    _, (other,) = export(text_encoder=False, rank=2)
    before = load("sd1").digests
    family = load("sd1")
    method = Lora(Config(rank=2, merge=[str(place), {"file": str(other), "weight": 0.25}]), family, 0)  # type: ignore[list-item]
    after = family.digests
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"unet", "text_encoder"} and len(before) > 3
    assert after["unet"].startswith(f"{before['unet']} + 1 x ") and " + 0.25 x " in after["unet"]
    assert " + 0.25 x " not in after["text_encoder"]
    assert method.depends() == {"method.lora.merge.0.file": place, "method.lora.merge.1.file": other}


def test_a_lora_on_a_merged_base_is_proved_on_it(
    load: Load, export: Any, models: ModuleType, tmp_path: Path
) -> None:
    _, (place,) = export()
    family = load("sd1")
    bare = looked(family)
    method = Lora(Config(rank=2, merge=[str(place)]), family, 0)  # type: ignore[list-item]
    with method.off(family):
        merged = looked(family)
    assert not torch.equal(merged, bare) and torch.equal(merged, looked(family))
    models.move(method)
    card = models.card_of(FP16, method)
    assert len(verify.check(family, [method], method.export(family, tmp_path / "out", card), card)) == 1


def test_a_bias_is_merged_and_one_that_is_not_there_is_an_error(load: Load, tmp_path: Path) -> None:
    tensors = {"lora_unet_conv_in.diff": torch.zeros(64, 4, 3, 3), "lora_unet_conv_in.diff_b": torch.ones(64)}
    place = files.save(tmp_path / "bias.safetensors", tensors, {})
    family, plain = load("sd1"), load("sd1")
    Lora(Config(rank=2, merge=[{"file": str(place), "weight": 0.5}]), family, 0)  # type: ignore[list-item]
    assert torch.equal(family.denoiser.conv_in.bias, plain.denoiser.conv_in.bias + 0.5)
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{name}.diff": torch.zeros(64, 64), f"{name}.diff_b": torch.ones(64)}
    place = files.save(tmp_path / "bias.safetensors", tensors, {})
    with pytest.raises(
        UserError, match="merge.0.file: unet.mid_block.*changes a bias, which the layer has not"
    ):
        Lora(Config(rank=2, merge=[str(place)]), load("sd1"), 0)  # type: ignore[list-item]

"""Which layers a preset, a regular expression and a pattern stand for."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import nn

from tuner.adapters.targets import PRESETS, Slot, TargetError, Wish, is_unread, layers, plan, select

EVERYTHING = ("unet", "text_encoder", "text_encoder_2")


@pytest.fixture(scope="module")
def families(folders: dict[str, Path], models: ModuleType) -> dict[str, Any]:
    return {name: models.family_of(folders[name], "lora") for name in ("sd1", "sd2", "sdxl")}


def found(family: Any) -> dict[str, nn.Module]:
    return layers(family, [name for name in EVERYTHING if name in family.modules()])


def count(family: Any, preset: str) -> dict[str, int]:
    """How many layers of each network a preset should have, counted by the classes of the libraries."""
    from diffusers.models.attention import FeedForward
    from diffusers.models.attention_processor import Attention
    from transformers.models.clip.modeling_clip import CLIPEncoderLayer

    blocks = [family.denoiser.down_blocks, family.denoiser.mid_block, family.denoiser.up_blocks]
    modules = [module for block in blocks for module in block.modules()]
    kinds = (nn.Linear, nn.Conv2d) if preset == "all" else (nn.Linear,)
    expected = {
        "attention": 4 * sum(isinstance(module, Attention) for module in modules),
        "feed-forward": 2 * sum(isinstance(module, FeedForward) for module in modules),
        "all": sum(isinstance(module, kinds) for module in modules),
    }
    unet = expected["all"] if preset.startswith("all") else expected["attention"]
    unet += expected["feed-forward"] if preset == "attention+feed-forward" else 0
    counts = {"unet": unet}
    for name, encoder in family.text_encoders.items():
        read = sum(isinstance(module, CLIPEncoderLayer) for module in encoder.modules())
        read -= len(family.unread(name))
        counts[name] = read * (4 if preset == "attention" else 6)
    return counts


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("base", ["sd1", "sd2", "sdxl"])
def test_a_preset_is_what_its_name_says(base: str, preset: str, families: dict[str, Any]) -> None:
    family = families[base]
    chosen = select(preset, found(family))
    expected = count(family, preset)
    assert min(expected.values()) > 3 and len(expected) == (3 if base == "sdxl" else 2)
    assert {name: sum(p.startswith(f"{name}.") for p in chosen) for name in expected} == expected
    assert len(set(chosen)) == len(chosen) == sum(expected.values())


def test_larger_presets_hold_the_smaller_ones(families: dict[str, Any]) -> None:
    for family in families.values():
        sets = [set(select(preset, found(family))) for preset in PRESETS]
        assert len(sets) == 4
        assert all(small < large for small, large in zip(sets, sets[1:], strict=False))


def test_layers_that_nothing_reads_are_no_targets(families: dict[str, Any]) -> None:
    family = families["sdxl"]
    paths = [f"text_encoder.{name}" for name, _ in family.modules()["text_encoder"].named_modules()]
    unread = [path for path in paths if is_unread(family, path)]
    assert len(unread) > 6 and all(".layers.2" in path for path in unread)
    assert not set(unread) & found(family).keys()
    assert not is_unread(family, "text_encoder_2.text_model.encoder.layers.2.mlp.fc1")
    assert not is_unread(family, "unet.conv_in")


def test_regular_expressions_fit_whole_paths(families: dict[str, Any]) -> None:
    every = found(families["sd1"])
    one = select(r"unet\.mid_block\..*\.attn1\.to_q", every)
    assert one == ["unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]
    two = select([r"unet\.conv_in", r"unet\.conv_(in|out)"], every)
    assert two == ["unet.conv_in", "unet.conv_out"]
    for part in (r"conv_in", r"unet\.conv"):
        with pytest.raises(TargetError, match="neither a preset"):
            select(part, every)


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        ("atention", "did you mean attention?"),
        (r"unet\.mid_block\..*\.attn1\.to_qq", "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"),
        ([r"unet\.conv_in", r"text_encoder\..*"], r"method.lora.targets: text_encoder\..*: neither"),
        (r"conv_short", "near are unet.up_blocks.0.resnets.0.conv_shortcut"),
    ],
)
def test_targets_that_fit_nothing_are_named_with_what_is_near(
    targets: Any, named: str, families: dict[str, Any]
) -> None:
    with pytest.raises(TargetError) as caught:
        select(targets, layers(families["sd1"], ["unet"]))
    assert named in str(caught.value)


USUAL = Slot(8, 4.0)
PATHS = ["unet.a.to_q", "unet.a.to_k", "unet.b.to_q"]


def test_of_the_patterns_that_fit_the_first_counts() -> None:
    wishes = [Wish(r"unet\.a\..*", rank=2, alpha=2.0), Wish(r".*to_q", learning_rate=0.5)]
    made = plan(dict.fromkeys(PATHS, USUAL), wishes)
    assert list(made) == PATHS
    assert made == {PATHS[0]: Slot(2, 2.0), PATHS[1]: Slot(2, 2.0), PATHS[2]: Slot(8, 4.0, 0.5)}
    assert plan(dict.fromkeys(PATHS, USUAL), []) == dict.fromkeys(PATHS, USUAL)


def test_a_pattern_without_effect_is_named() -> None:
    slots = dict.fromkeys(PATHS, USUAL)
    with pytest.raises(TargetError, match=r"unet\\.a: fits no layer .* near are unet.a.to_[qk]"):
        plan(slots, [Wish(r"unet\.a", rank=2)])
    wishes = [Wish(r"unet\.a.*", rank=2), Wish(".*to_k", rank=4)]
    with pytest.raises(TargetError, match=r"\.\*to_k: has no effect: .* unet\\.a\.\* has all of its layers"):
        plan(slots, wishes)

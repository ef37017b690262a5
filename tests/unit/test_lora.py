"""LoRA and kin: peft's own arithmetic, what is trained at which rate, and what cannot be."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from tuner import counted
from tuner.adapters.targets import TargetError
from tuner.errors import UserError
from tuner.export.adapter import Adapter
from tuner.methods.lora import Config, Lora

SEED = 7
QKV = r".*\.(to_q|to_k|to_v|to_out\.0)"
ALL = (
    r"(down_blocks|up_blocks|mid_block)\..*"
    r"(to_[qkv]|to_out\.0|ff\.net\.0\.proj|ff\.net\.2|proj_in|proj_out|conv\d?|conv_shortcut|time_emb_proj)"
)
KINDS: dict[str, tuple[dict[str, Any], Any]] = {  # the recipe's block, and peft's configuration
    "lora": ({"rank": 4, "alpha": 2.0}, peft.LoraConfig(r=4, lora_alpha=2, target_modules=QKV)),
    "rslora": (
        {"rank": 4, "rslora": True, "init": "gaussian", "dropout": 0.5},
        peft.LoraConfig(
            r=4,
            lora_alpha=4,
            use_rslora=True,
            init_lora_weights="gaussian",
            lora_dropout=0.5,
            target_modules=QKV,
        ),
    ),
    "orthogonal": (
        {"rank": 4, "init": "orthogonal"},
        peft.LoraConfig(r=4, lora_alpha=4, init_lora_weights="orthogonal", target_modules=QKV),
    ),
    "patterns": (
        {
            "rank": 4,
            "targets": "all",
            "patterns": [
                {"match": r"unet\..*conv.*", "rank": 2, "alpha": 1.0},
                {"match": r"unet\.up_.*", "rank": 3},
            ],
        },
        peft.LoraConfig(
            r=4,
            lora_alpha=4,
            target_modules=ALL,
            rank_pattern={"^.*conv.*": 2, "^up_.*": 3},
            alpha_pattern={"^.*conv.*": 1, "^up_.*": 3},
        ),
    ),
    "dora": (
        {"kind": "dora", "rank": 4, "targets": "all"},
        peft.LoraConfig(r=4, lora_alpha=4, use_dora=True, target_modules=ALL),
    ),
    "loha": (
        {"kind": "loha", "rank": 3, "alpha": 6.0, "targets": "all", "tucker": True},
        peft.LoHaConfig(r=3, alpha=6, use_effective_conv2d=True, target_modules=ALL),
    ),
    "lokr": (
        {"kind": "lokr", "rank": 2, "targets": "all", "factor": 4, "init": "lycoris"},
        peft.LoKrConfig(r=2, alpha=2, decompose_factor=4, init_weights="lycoris", target_modules=ALL),
    ),
    "lokr of two": (
        {"kind": "lokr", "rank": 2, "decompose_both": True},
        peft.LoKrConfig(r=2, alpha=2, decompose_both=True, target_modules=QKV),
    ),
}
Make = Callable[..., Lora]


@pytest.fixture
def family(request: pytest.FixtureRequest, folders: dict[str, Path], models: ModuleType) -> Any:
    """A fresh tiny base; `sd1` unless a test says another."""
    return models.family_of(folders[getattr(request, "param", "sd1")], "lora")


def looked(unet: Any) -> Tensor:
    """What a UNet makes of fixed inputs."""
    generator = torch.Generator().manual_seed(2)
    x, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 77, 32, generator=generator)
    with torch.no_grad():
        seen: Tensor = unet(x, torch.tensor([3, 800]), encoder_hidden_states=text).sample
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_pefts_own_bitwise(kind: str, family: Any, models: ModuleType) -> None:
    block, config = KINDS[kind]
    plain = copy.deepcopy(family.denoiser)
    bare = looked(plain)
    method = Lora(Config(**block), family, SEED)
    torch.manual_seed(SEED)
    wrapped = peft.get_peft_model(plain, copy.deepcopy(config)).eval()
    own = {name.replace(".tuner", ".default"): p for name, p in method.trained().items()}
    theirs = {f"unet.{n.removeprefix('base_model.model.')}": p for n, p in wrapped.named_parameters()}
    theirs = {name: p for name, p in theirs.items() if p.requires_grad}
    assert own.keys() == theirs.keys() and len(own) > 60
    assert all(torch.equal(own[name], theirs[name]) for name in own)

    models.move(method)
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(own[name])
    method.train_mode(False)
    made = looked(family.denoiser)
    assert torch.equal(made, looked(wrapped.model))
    assert not torch.equal(made, bare)


@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr"])
def test_dropout_is_a_function_of_the_step_alone(kind: str, family: Any, models: ModuleType) -> None:
    method = models.move(Lora(Config(kind=kind, rank=4, dropout=0.5), family, SEED))  # type: ignore[arg-type]
    method.train_mode(True)
    seen = []
    for step in (0, 1, 0):
        torch.rand(3 + step)  # what was drawn before does not count
        counted.seed_libraries(SEED, step, 0, 0)
        seen.append(looked(family.denoiser))
    method.train_mode(False)
    still = [looked(family.denoiser) for _ in range(2)]
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])
    assert torch.equal(*still) and not torch.equal(still[0], seen[0])
    assert all(not module.training for module in family.denoiser.modules()), "the base has no dropout on"


def test_without_dropout_nothing_is_drawn(family: Any) -> None:
    method = Lora(Config(kind="loha", rank=4), family, SEED)
    method.train_mode(True)
    state = torch.get_rng_state()
    before = looked(family.denoiser)
    assert torch.equal(before, looked(family.denoiser))
    assert (method.how.dropout, method.how.kind) == (0.0, "loha")
    assert len(method.layers) > 30 and state.numel() > 0


@pytest.mark.parametrize("family", ["sdxl"], indirect=True)
def test_every_network_factor_and_pattern_has_its_rate(family: Any) -> None:
    config = Config(
        rank=2,
        text_encoder=True,
        text_encoder_learning_rate=2e-4,
        text_encoder_2_learning_rate=3e-4,
        lora_plus_ratio=16.0,
        patterns=[{"match": r"unet\.mid_block\..*to_q", "learning_rate": 5e-4}],  # type: ignore[list-item]
    )
    method = Lora(config, family, SEED)
    groups = method.groups(1e-3)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert groups[0]["lr"] == 1e-3, "the first group's is logged"
    assert len(groups) == 8 and len(rates) == len(method.weights)
    counts: dict[str, int] = {}
    for name, parameter in method.trained().items():
        special = "mid_block" in name and "to_q" in name
        component = name.partition(".")[0]
        rate = {"unet": 5e-4 if special else 1e-3, "text_encoder": 2e-4, "text_encoder_2": 3e-4}[component]
        expected = rate * 16 if ".lora_B." in name else rate
        assert rates[id(parameter)] == pytest.approx(expected, rel=1e-12), name
        counts[f"{component} {special}"] = counts.get(f"{component} {special}", 0) + 1
    assert counts == {"unet False": 120, "unet True": 8, "text_encoder False": 16, "text_encoder_2 False": 24}


@pytest.mark.parametrize("family", ["sdxl"], indirect=True)
def test_the_second_text_encoder_has_the_firsts_rate(family: Any) -> None:
    method = Lora(Config(rank=2, text_encoder=True, text_encoder_learning_rate=2e-4), family, SEED)
    rates = {group["lr"]: len(group["params"]) for group in method.groups(1e-3)}
    assert rates == {1e-3: 128, 2e-4: 40}


@pytest.mark.parametrize("family", ["sdxl"], indirect=True)
@pytest.mark.parametrize(
    ("block", "components"),
    [
        ({}, ["unet"]),
        ({"text_encoder": True}, ["unet", "text_encoder", "text_encoder_2"]),
        ({"text_encoder": ["text_encoder_2"]}, ["unet", "text_encoder_2"]),
        ({"unet": False, "text_encoder": ["text_encoder"]}, ["text_encoder"]),
    ],
    ids=str,
)
def test_adapters_sit_in_the_networks_that_are_named(
    block: dict[str, Any], components: list[str], family: Any
) -> None:
    method = Lora(Config(rank=2, **block), family, SEED)
    assert method.components == components
    assert {name.partition(".")[0] for name in method.trained()} == set(components)
    assert (components == ["unet"]) == method.CACHES_TEXT


def test_the_metadata_tells_ranks_as_the_file_has_them(family: Any) -> None:
    pattern = {"match": r"unet\.mid.*", "rank": 6}
    told = Lora(Config(rank=2, alpha=1.0, patterns=[pattern]), family, SEED).labels()  # type: ignore[list-item]
    assert told == {"rank": 6, "alpha": 6.0, "algorithm": "lora"}


def test_one_rank_and_alpha_stand_in_the_metadata(family: Any) -> None:
    told = Lora(Config(kind="loha", rank=2, alpha=1.0), family, SEED).labels()
    assert told == {"rank": 2, "alpha": 1.0, "algorithm": "loha"}


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("sd1", {"text_encoder": ["text_encoder_2"]}, "text_encoder_2: this base has text_encoder only"),
    (
        "sd1",
        {"text_encoder": True, "text_encoder_2_learning_rate": 1e-4},
        "no adapter sits in text_encoder_2",
    ),
    ("sd1", {"targets": r"text_encoder\..*_proj"}, "method.lora.targets: text_encoder"),
    ("sd1", {"text_encoder": True, "targets": r"text_encoder\..*_proj"}, "method.lora.unet: has no effect"),
    ("sd1", {"text_encoder": True, "targets": r"unet\.mid.*"}, "method.lora.text_encoder: has no effect"),
    ("sd1", {"patterns": [{"match": "unet.conv_in", "rank": 4}]}, "fits no layer that has an adapter"),
    ("sd1", {"targets": "all", "init": "orthogonal"}, "for linear layers only, found unet."),
    ("sd1", {"rank": 3, "init": "orthogonal"}, "orthogonal needs even ranks, found 3 (unet."),
    ("sd1", {"kind": "loha", "tucker": True}, "method.lora.tucker: has no effect"),
    ("sd1", {"kind": "lokr", "rank": 64, "decompose_both": True}, "decompose_both: has no effect"),
    # What a tool would drop is told before anything is trained.
    (
        "sd1",
        {"targets": r"unet\.(conv_in|mid.*to_q)"},
        "kohya would load part of it: not loaded: lora_unet_conv_in",
    ),
    (
        "sdxl",
        {"text_encoder": ["text_encoder_2"], "targets": [r"unet\.mid.*to_q", r"text_encoder_2\..*q_proj"]},
        "A1111 would load part of it: not loaded: lora_te2_text_model_encoder_layers_0_self_attn_q_proj",
    ),
    (
        "sdxl",
        {"unet": False, "text_encoder": ["text_encoder_2"], "targets": r"text_encoder_2\..*proj.*"},
        "kohya would load part of it: not loaded: lora_te2_text_projection",
    ),
]


@pytest.mark.parametrize(
    ("family", "block", "message"), WRONG, indirect=["family"], ids=lambda v: str(v)[:40]
)
def test_what_does_not_fit_the_base_is_an_error(family: Any, block: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        Lora(Config(**block), family, SEED)
    assert message in str(caught.value) and "method.lora." in str(caught.value)
    assert issubclass(TargetError, UserError)


def test_convolutions_within_the_blocks_are_loaded_by_every_tool(family: Any) -> None:
    method = Lora(Config(rank=2, targets=[r"unet\.(down|mid|up)_block.*conv\d"]), family, SEED)
    assert len(method.layers) > 5 and all(isinstance(b, nn.Conv2d) for b in method.bases.values())


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"kind": "dora"}, "nf4 does not go with method.lora: kind dora"),
        ({"kind": "lokr", "merge": ["a.safetensors"]}, "kind lokr, merge"),
        ({"init": "orthogonal"}, "init orthogonal"),
    ],
)
def test_what_needs_the_bases_numbers_does_not_go_with_a_quantised_one(
    block: dict[str, Any], message: str, family: Any
) -> None:
    family.options = dataclasses.replace(family.options, quantise="nf4")
    with pytest.raises(UserError, match=message):
        Lora(Config(rank=2, **block), family, SEED)


def test_the_adapter_shares_the_weights_memory(family: Any) -> None:
    method = Lora(Config(rank=2), family, SEED)
    made = method.adapter()
    assert isinstance(made, Adapter) and len(made.modules) == len(method.layers) == len(method.weights) / 2
    places = {tensor.data_ptr() for module in made.modules.values() for tensor in module[:2]}  # type: ignore[union-attr]
    assert places == {weight.data_ptr() for weight in method.weights}

"""The recipe's block of LoRA: what is without effect or impossible is an error, and no default is one."""

from __future__ import annotations

from typing import Any

import pydantic
import pytest

from tuner.adapters.targets import Wish
from tuner.block import ConflictError
from tuner.methods.lora import Config

PATTERN = {"match": r"unet\..*", "rank": 4}
WRONG = [
    # Without effect.
    (
        {"text_encoder_learning_rate": 1e-4},
        "text_encoder_learning_rate: has no effect: text_encoder is false",
    ),
    ({"text_encoder_2_learning_rate": 1e-4}, "text_encoder_2_learning_rate: has no effect"),
    (
        {"text_encoder": ["text_encoder"], "text_encoder_2_learning_rate": 1e-4},
        "does not name text_encoder_2",
    ),
    ({"kind": "loha", "rslora": True}, "rslora: has no effect: it belongs to kind lora or dora, not to loha"),
    ({"kind": "lokr", "lora_plus_ratio": 16.0}, "lora_plus_ratio: has no effect"),
    ({"factor": 8}, "factor: has no effect: it belongs to kind lokr, not to lora"),
    ({"kind": "loha", "decompose_both": True}, "decompose_both: has no effect"),
    ({"kind": "dora", "tucker": True}, "tucker: has no effect: it belongs to kind loha or lokr"),
    ({"patterns": [{"match": ".*"}]}, "expected rank, alpha or learning_rate beside it"),
    ({"merge": [{"file": "a.safetensors", "weight": 0.0}]}, "weight: found the number 0"),
    ({"start": "a.safetensors", "init": "gaussian"}, "init: has no effect: start's file says it"),
    ({"start": "a.safetensors", "rslora": True}, "rslora: has no effect: start's file says it"),
    ({"start": "a.safetensors", "patterns": [PATTERN]}, "patterns.0.rank: has no effect: start's file says"),
    # Impossible.
    ({"unet": False}, "unet: found false, and text_encoder too: nothing is adapted"),
    ({"kind": "loha", "init": "gaussian"}, "init: found gaussian, kind loha has default"),
    ({"init": "lycoris"}, "init: found lycoris, kind lora has default, gaussian, orthogonal"),
    ({"targets": "unet.(*"}, "targets: found unet.(*, which is no regular expression"),
    ({"targets": ["attention", "["]}, "targets.1: found [, which is no regular expression"),
    ({"targets": []}, "targets: found nothing"),
    ({"patterns": [{"match": "(", "rank": 2}]}, "match: found (, which is no regular expression"),
    ({"text_encoder": []}, "text_encoder: expected true, false, or names"),
    ({"text_encoder": ["text_encoder"] * 2}, "text_encoder: expected true, false, or names"),
]


@pytest.mark.parametrize(("block", "message"), WRONG, ids=lambda value: str(value)[:50])
def test_what_has_no_effect_or_cannot_be_is_an_error(block: dict[str, Any], message: str) -> None:
    with pytest.raises((pydantic.ValidationError, ConflictError)) as caught:
        Config(**block)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "block",
    [
        {"rank": 0},
        {"alpha": 0.0},
        {"dropout": 1.0},
        {"kind": "oft"},
        {"init": "pissa"},
        {"text_encoder": ["text_encoder_3"]},
        {"patterns": {"unet": {"rank": 4}}},
        {"rank": "8"},
        {"ranks": 8},
        {"start": ""},
    ],
    ids=str,
)
def test_values_that_are_none_are_errors(block: dict[str, Any]) -> None:
    with pytest.raises(pydantic.ValidationError):
        Config(**block)


RIGHT: list[dict[str, Any]] = [
    {},
    {"kind": "dora", "rank": 4, "alpha": 2.0, "init": "orthogonal", "dropout": 0.1, "rslora": True},
    {"kind": "loha", "tucker": True, "targets": "all"},
    {"kind": "lokr", "init": "lycoris", "factor": 8, "decompose_both": True, "tucker": True},
    {"text_encoder": ["text_encoder_2"], "unet": False, "text_encoder_2_learning_rate": 1e-5},
    {"targets": [r"unet\..*", r"text_encoder\..*"], "text_encoder": True, "lora_plus_ratio": 16.0},
    {"patterns": [PATTERN, {"match": ".*", "learning_rate": 1e-3}], "merge": ["a.safetensors"]},
    {"start": "a.safetensors", "patterns": [{"match": ".*", "learning_rate": 1e-3}]},
    {"start": "a.safetensors", "rank": 8, "kind": "loha", "targets": "attention", "text_encoder": True},
    {"start": "a.safetensors", "text_encoder_learning_rate": 1e-5, "lora_plus_ratio": 4.0},
]


@pytest.mark.parametrize("block", RIGHT, ids=lambda block: "-".join(block) or "none")
def test_a_block_written_out_loads_again_to_the_same(block: dict[str, Any]) -> None:
    made = Config(**block)
    written = made.resolved()
    assert Config(**written) == made
    assert Config(**written).resolved() == written
    if "start" in block:  # what the file says is not said by a default
        assert not {"rank", "targets", "alpha"} & written.keys() - block.keys()
        assert {"start", "dropout", "merge"} <= written.keys()
    else:
        assert {"rank", "targets", "kind", "unet", "text_encoder"} <= written.keys()


def test_a_lone_file_to_merge_has_weight_one() -> None:
    (merge,) = Config(merge="a.safetensors").merge  # type: ignore[arg-type]
    assert (merge.file, merge.weight) == ("a.safetensors", 1.0)


def test_a_patterns_rank_without_alpha_has_the_alpha_of_all_or_itself() -> None:
    patterns = [{"match": "a", "rank": 4}, {"match": "b", "alpha": 3.0}, {"match": "c", "learning_rate": 0.1}]
    assert Config(patterns=patterns).wishes() == [  # type: ignore[arg-type]
        Wish("a", 4, 4.0),
        Wish("b", None, 3.0),
        Wish("c", None, None, 0.1),
    ]
    assert Config(alpha=1.0, patterns=patterns).wishes()[0] == Wish("a", 4, 1.0)  # type: ignore[arg-type]

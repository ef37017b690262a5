"""LoRA and DoRA in peft's names, as diffusers' pipelines save and load them.

`unet.<path>.lora_A.weight` and so on, with the settings of each network in the metadata: without these
diffusers reads every module at scale 1.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tuner.export.kohya import LoraError, LoraModule, check

METADATA = "lora_adapter_metadata"
_SETTINGS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")


def to_peft(
    modules: Mapping[str, LoraModule], magnitudes: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """LoRA modules by path -> tensors in peft's names, and the metadata that says their scales.

    The factors stay as they are, whatever their ranks and scales. `magnitudes` makes it a DoRA.

    Raises:
        LoraError: no modules, shapes that do not fit, or magnitudes that do not name exactly the modules.
    """
    if not modules:
        raise LoraError("there is no LoRA module to export")
    if magnitudes and (wrong := sorted(set(modules) ^ set(magnitudes))):
        raise LoraError(f"{wrong[0]}: has {'no magnitudes' if wrong[0] in modules else 'magnitudes alone'}")
    tensors: dict[str, Tensor] = {}
    for path in sorted(modules):
        check(path, modules[path])
        tensors |= {f"{path}.lora_A.weight": modules[path].down, f"{path}.lora_B.weight": modules[path].up}
        if magnitudes:
            # diffusers saves text encoders without `.weight`, too, and then loads them without magnitudes:
            # transformers 5.23 finds no such key, and says so in a log alone.
            ending = ".weight" * path.startswith("text_encoder")
            tensors[f"{path}.lora_magnitude_vector{ending}"] = magnitudes[path]
    settings: dict[str, Any] = {}
    for network in sorted({path.partition(".")[0] for path in modules}):
        own = {path.partition(".")[2]: m for path, m in modules.items() if path.startswith(f"{network}.")}
        settings |= {f"{network}.{key}": value for key, value in _settings(own, bool(magnitudes)).items()}
    return tensors, {METADATA: json.dumps(settings, indent=2, sort_keys=True)}


def scales(metadata: Mapping[str, str], ranks: Mapping[str, int]) -> dict[str, float]:
    """What peft multiplies up @ down with, for modules of these ranks by path, as the metadata says.

    Without metadata 1, as diffusers reads such a file.

    Raises:
        LoraError: the metadata is not what diffusers writes.
    """
    if METADATA not in metadata:
        return dict.fromkeys(ranks, 1.0)
    try:
        settings = dict(json.loads(metadata[METADATA]))
        return {path: _scale(settings, path, rank) for path, rank in ranks.items()}
    except (ValueError, TypeError, KeyError) as error:
        raise LoraError(f"the metadata {METADATA} is not as diffusers writes it: {error}") from error


def _settings(modules: Mapping[str, LoraModule], dora: bool) -> dict[str, Any]:
    """One network's LoraConfig: the commonest rank and alpha, and the others by path."""
    ranks = {path: int(module.down.shape[0]) for path, module in modules.items()}
    # In float32, as kohya's files hold them, so that an alpha comes back from there and here bit by bit.
    alphas = {
        path: torch.tensor(module.scale * ranks[path], dtype=torch.float32).item()
        for path, module in modules.items()
    }
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {path: value for path, value in sorted(ranks.items()) if value != rank},
        "alpha_pattern": {path: value for path, value in sorted(alphas.items()) if value != alpha},
        "target_modules": sorted(modules),
        "use_dora": dora,
    }


def _scale(settings: Mapping[str, Any], path: str, rank: int) -> float:
    """alpha / r of one module, or alpha / sqrt(r) for rsLoRA; patterns as peft matches them."""
    network, _, rest = path.partition(".")
    own = {key: settings.get(f"{network}.{key}") for key in _SETTINGS}
    if own["r"] is None:
        return 1.0
    found = _pattern(own["rank_pattern"] or {}, rest, own["r"])
    if found != rank:
        raise LoraError(f"{path}: the tensors' rank is {rank}, the metadata says {found}")
    alpha = float(_pattern(own["alpha_pattern"] or {}, rest, own["lora_alpha"]))
    return alpha / rank**0.5 if own["use_rslora"] else alpha / rank


def _pattern(patterns: Mapping[str, Any], path: str, usual: Any) -> Any:
    """The value of the first pattern that is the end of the path, from a dot on."""
    return next((v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", path)), usual)

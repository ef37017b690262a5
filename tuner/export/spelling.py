"""How adapter files spell their keys: the module's name in one of several ways, then the part of it.

Both are data. `Spelling` turns a module's path into a name; `ROLES` says what each ending is.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

from tuner.export import cldm
from tuner.export.kohya import LoraError, original_path
from tuner.export.places import Base

FAMILIES = ("sd1", "sd2", "sdxl")
BLOCKS = r"(down_blocks|up_blocks|mid_block)\..*"  # all of a UNet but its first, last and time layers
LAYERS = r"(text_model\.)?encoder\.layers\..*"
PROJECTIONS = r"(text_model\.)?encoder\.layers\.\d+\.(self_attn\.[qkv]_proj|self_attn\.out_proj|mlp\.fc[12])"
PROJECTION = "text_projection"


class Spelling(NamedTuple):
    """One way of naming the modules of one component.

    Attributes:
        component: unet, text_encoder or text_encoder_2.
        prefix: what every name begins with.
        joined: `_` stands in place of each dot.
        original: the UNet's modules are called as in the original code.
        text_model: a text encoder's names begin with `text_model.`, whatever its paths do.
        processor: attention layers are called as diffusers did before peft (`attn1.processor.to_q`).
        only: a regular expression that the module's path (without its component) must match as a whole.
        besides: one that it must not match.
        families: the families where the names are used.
    """

    component: str
    prefix: str
    joined: bool = False
    original: bool = False
    text_model: bool = False
    processor: bool = False
    only: str = ".*"
    besides: str = ""
    families: tuple[str, ...] = FAMILIES

    def spell(self, path: str, family: str, original: Mapping[str, str]) -> str | None:
        """The name of the module at `path`, component first; None where this spelling has none for it."""
        component, _, rest = path.partition(".")
        if component != self.component or family not in self.families:
            return None
        if not re.fullmatch(self.only, rest) or re.fullmatch(self.besides, rest):
            return None
        if component != "unet" and not rest.startswith(PROJECTION):
            rest = "text_model." * self.text_model + rest.removeprefix("text_model.")
        if self.original:
            try:
                rest = original_path(rest, original)
            except LoraError:
                return None
        if self.processor:
            rest = re.sub(r"\.to_out\.0$", ".to_out", rest).replace(".to_", ".processor.to_")
        return self.prefix + (rest.replace(".", "_") if self.joined else rest)


def table(base: Base, spellings: Iterable[Spelling]) -> Mapping[str, str]:
    """Names -> paths of the base's modules, by all of the spellings."""
    original = cldm.unet_names(base.unet)
    return _table(base.family, tuple(base.layers()), tuple(original.items()), tuple(spellings))


@functools.lru_cache(maxsize=64)  # every tool of every file asks again, of thousands of names
def _table(
    family: str,
    layers: tuple[str, ...],
    original: tuple[tuple[str, str], ...],
    spellings: tuple[Spelling, ...],
) -> Mapping[str, str]:
    names: dict[str, str] = {}
    places = dict(original)
    for spelling in spellings:
        for path in layers:
            name = spelling.spell(path, family, places)
            if name is not None:
                assert names.setdefault(name, path) == path, f"{name} is {path} and {names[name]}"
    return MappingProxyType(names)


# The ending of a key -> how factors are written (the dialect) and which one it is (the role).
ROLES: Mapping[str, tuple[str, str]] = {
    ".lora_down.weight": ("kohya", "down"),
    ".lora_up.weight": ("kohya", "up"),
    ".lora_mid.weight": ("kohya", "mid"),
    ".lora_A.weight": ("peft", "down"),
    ".lora_B.weight": ("peft", "up"),
    ".lora_magnitude_vector": ("peft", "magnitude"),
    ".lora_magnitude_vector.weight": ("peft", "magnitude"),
    ".lora.down.weight": ("diffusers", "down"),
    ".lora.up.weight": ("diffusers", "up"),
    "_lora.down.weight": ("processor", "down"),
    "_lora.up.weight": ("processor", "up"),
    ".lora_linear_layer.down.weight": ("linear_layer", "down"),
    ".lora_linear_layer.up.weight": ("linear_layer", "up"),
    **{f".hada_{role}": ("loha", role) for role in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{role}": ("lokr", role) for role in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    ".diff": ("diff", "weight"),
    ".diff_b": ("diff", "bias"),
    ".w_norm": ("norm", "weight"),
    ".b_norm": ("norm", "bias"),
    ".alpha": ("any", "alpha"),
    ".dora_scale": ("any", "dora"),
}
LORA = ("kohya", "peft", "diffusers", "processor", "linear_layer")  # dialects of up @ down
_ENDINGS = sorted(ROLES, key=len, reverse=True)


class Key(NamedTuple):
    """A key of an adapter file, taken apart."""

    name: str  # the module, as the file spells it
    ending: str
    dialect: str
    role: str


def split(key: str) -> Key | None:
    """The parts of a key; None where its ending is none that adapters have."""
    for ending in _ENDINGS:
        if key.endswith(ending) and len(key) > len(ending):
            return Key(key.removesuffix(ending), ending, *ROLES[ending])
    return None


def missing(dialect: str, roles: Iterable[str]) -> list[str]:
    """The roles that a module written in a dialect lacks, in the order in which they are needed."""
    have = set(roles)
    if dialect in LORA:
        return [role for role in ("down", "up") if role not in have]
    if dialect == "loha":
        needed = ["w1_a", "w1_b", "w2_a", "w2_b"] + (["t1", "t2"] if have & {"t1", "t2"} else [])
        return [role for role in needed if role not in have]
    if dialect == "lokr":
        lacking = []
        for side in ("w1", "w2"):
            if side not in have:
                lacking += [role for role in (f"{side}_a", f"{side}_b") if role not in have]
        return lacking
    return [] if "weight" in have else ["weight"]

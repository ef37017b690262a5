"""What a tool does with every key of an adapter file, by its rules in tools.py."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tuner.export.contents import Contents
from tuner.export.embedding import BOTH, BUNDLED
from tuner.export.places import Base
from tuner.export.rules_label import caution
from tuner.export.spelling import LORA, missing, split, table
from tuner.export.tools import ADAPTERS, Does, Rules

SHOWN = 5  # keys that a message names
_ORIGINAL = re.compile(r"input_blocks|middle_block|output_blocks")
_BEFORE_PEFT = re.compile(r"unet\..*[._]lora\.(down|up)\.weight")
_DIFFUSERS = re.compile(r"down_blocks|mid_block|up_blocks")
_WORD = re.compile(rf"{BUNDLED}\.(?P<name>[^.]*)\.(?P<part>.+)")
_VECTORS = "string_to_param.*"  # the part of a bundled word for a base with one text encoder


@dataclass
class Verdict:
    """What one tool does with one file.

    Attributes:
        tool: its name.
        keys: how many keys the file has.
        dropped: keys that have no effect in it -> why. It says so in its log at most.
        wrong: keys that it reads with another effect than they are meant to have -> why.
        missing: keys that the file should have.
        refused: why it does not load the file at all; None where it does.
        cautions: what no file can mend, or does not change what is loaded.
        unmeant: keys that were not written for it: it has other files beside, and what it does with these
            is no fault of the file.
        unfit: why it works with no file for such a base, or with none of this layout; empty where it may.
    """

    tool: str
    keys: int
    dropped: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    refused: str | None = None
    cautions: list[str] = field(default_factory=list)
    unmeant: set[str] = field(default_factory=set)
    unfit: str = ""

    @property
    def faulty(self) -> bool:
        """Whether it loads in part what was written for it."""
        return self.loads == "part" and self._lacks

    @property
    def _lacks(self) -> bool:
        return bool(self.dropped.keys() - self.unmeant or self.wrong or self.missing)

    @property
    def aside(self) -> str:
        """Why the file is not for this tool, though nothing is wrong with it; empty where something is."""
        if self.loads == "all" or self._lacks:
            return ""
        if self.refused is None or self.refused == self.unfit:
            return self.unfit or "not meant for it"
        return "not meant for it" if self.unmeant else ""

    def refuse_base(self, reason: str) -> None:
        """Note that the tool refuses every file for this base, or every one of this layout."""
        self.refused = self.unfit = reason

    @property
    def loads(self) -> str:
        """`all` of the file, `part` of it (or all with another effect), or `nothing`."""
        if self.refused is not None or len(self.dropped) == self.keys:
            return "nothing"
        return "part" if self.dropped or self.wrong or self.missing or self.unfit else "all"

    def reasons(self) -> list[str]:
        """Why, in plain words, each reason with the first of its keys."""
        if self.refused is not None:
            return [f"refused: {self.refused}"]
        lines = []
        for what, keys in (("not loaded", self.dropped), ("loaded wrongly", self.wrong)):
            for reason, count in Counter(keys.values()).items():
                named = [key for key, why in keys.items() if why == reason]
                more = f" and {count - SHOWN} more" if count > SHOWN else ""
                lines.append(f"{what}: {', '.join(named[:SHOWN])}{more}: {reason}")
        if self.unfit:
            lines.append(f"works wrongly: {self.unfit}")
        if self.missing:
            more = f" and {len(self.missing) - SHOWN} more" if len(self.missing) > SHOWN else ""
            lines.append(f"missing: {', '.join(self.missing[:SHOWN])}{more}")
        return lines

    def act(self, does: str, keys: Iterable[str], reason: str) -> None:
        """Note what the tool `does` at some keys."""
        if does == "refuses":
            self.refused = self.refused or reason
        else:
            self.dropped |= dict.fromkeys(keys, reason)


Sizes = Mapping[str, tuple[int, ...]]
Group = dict[tuple[str, str], str]  # what a file has of one module: (dialect, role) -> key


def judge(tool: str, contents: Contents, base: Base) -> Verdict:
    """What a tool does with an adapter file (LoRA, DoRA, LoHa, LoKr, full differences) on a base.

    Raises:
        KeyError: a tool without rules for adapters.
    """
    verdict = Verdict(tool, len(contents.shapes))
    if told := caution(tool, contents.metadata, base.family):
        verdict.cautions.append(told)
    words = bundled(contents.shapes)
    if words and all(rules.words == "refuses" for rules in ADAPTERS[tool]):
        _unmeant(verdict, words)
        verdict.refused = f"it takes no file with words in it ({next(iter(sorted(verdict.unmeant)))})"
        return verdict
    for rules in ADAPTERS[tool]:
        strangers = [key for key in contents.shapes if not re.match(rules.keys, key)]
        if not strangers:
            _judge(verdict, rules, contents, base)
            return verdict
    verdict.refused = f"{strangers[0]} is no name of a LoRA ({len(strangers)} of {verdict.keys} keys)"
    return verdict


def _judge(verdict: Verdict, rules: Rules, contents: Contents, base: Base) -> None:
    layers = base.layers()
    groups = _groups(verdict, rules, contents, base)
    _words(verdict, rules, contents, base)
    if rules.most is not None and len(verdict.dropped) > rules.most:
        verdict.refused = f"{len(verdict.dropped)} keys that it does not know, it bears {rules.most}"
    for path, group in groups.items():
        _whole(verdict, rules, path, group)
        _fits(verdict, rules, group, contents.shapes, layers[path])
        if ("any", "dora") in group:
            _dora(verdict, group, contents.shapes, layers[path])
    if base.family in rules.whole_attention:
        _attention(verdict, rules.whole_attention[base.family], groups)
    if rules.alphas == "commonest":
        _alphas(verdict, groups, contents)


def _groups(verdict: Verdict, rules: Rules, contents: Contents, base: Base) -> dict[str, Group]:
    """The keys that the tool knows, by the path of their module; the others are noted."""
    names, everywhere = table(base, rules.spellings), everything(base)
    rivals = base.family in rules.rivals and any(_DIFFUSERS.search(key) for key in contents.shapes)
    first = next((key for key in contents.shapes if key.startswith("unet.")), "")
    groups: dict[str, Group] = {}
    for key in contents.shapes:
        found = split(key)
        if _WORD.fullmatch(key):
            continue
        if re.fullmatch(rules.lost, key):
            verdict.act("drops", [key], "the library that it hands this key to expects another ending")
        elif rules.first and "lora_A" in first and _BEFORE_PEFT.fullmatch(key):
            verdict.act("drops", [key], f"it reads all of the UNet as its first key, {first}")
        elif found is None:
            verdict.act(rules.stranger, [key], "no ending of an adapter's")
        elif found.role == "dora" and not rules.dora:
            verdict.act("drops", [key], "magnitudes of this form are left out")
        elif found.role != "dora" and not {f"{found.dialect}.{found.role}", found.dialect} & rules.reads:
            verdict.act(rules.ending, [key], f"{found.ending} is not read")
        elif found.name not in names:
            known = found.name in everywhere
            reason = "it does not know this way of naming" if known else "the base has no module of that name"
            verdict.act(rules.stranger, [key], reason)
        elif rivals and _ORIGINAL.search(key):
            verdict.act("drops", [key], "names of the original code are dropped beside those of diffusers")
        else:
            groups.setdefault(names[found.name], {})[found.dialect, found.role] = key
    return groups


def bundled(keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """The words that lie in a LoRA's file: name -> part of the word (`clip_l` ...) -> key."""
    words: dict[str, dict[str, str]] = {}
    for found in filter(None, map(_WORD.fullmatch, keys)):
        words.setdefault(found["name"], {})[found["part"]] = found[0]
    return words


def _words(verdict: Verdict, rules: Rules, contents: Contents, base: Base) -> None:
    """What becomes of new words that lie in the file beside the LoRA."""
    words = bundled(contents.shapes)
    if not words:
        return
    several = rules.words == "apart" and len(words) > 1
    if rules.words == "drops" or several:
        _unmeant(verdict, words)
        why = f"it reads {len(words)} words in one file as one" if several else "it reads no words in a LoRA"
        verdict.act("drops", sorted(verdict.unmeant), why)
        return
    for name, own in words.items():
        does, why = _word(own, contents.shapes, base)
        if why:
            verdict.act(does if rules.words == "reads" else "drops", own.values(), f"the word {name}: {why}")
    if rules.words == "apart":
        stem = contents.name.removesuffix(".safetensors")
        verdict.cautions.append(
            f"its reader of LoRAs says of {next(iter(words))} `lora key not loaded`; the same file among the "
            f"embeddings gives it, as embedding:{stem}"
        )


def _word(own: Mapping[str, str], shapes: Sizes, base: Base) -> tuple[Does, str]:
    """What a reader of bundles does with a word's tensors, and why; no reason where it takes them.

    One that does not know their parts fails, and with it the file; vectors of a wrong width are left out.
    """
    widths = [
        next(shape[1] for name, shape in tensors.items() if name.endswith("token_embedding.weight"))
        for component, tensors in base.tensors.items()
        if component.startswith("text_encoder")
    ]
    parts = list(BOTH) if len(widths) == 2 else [next((p for p in own if p == _VECTORS), next(iter(own)))]
    if set(parts) != own.keys():
        wanted = " and ".join(BOTH) if len(widths) == 2 else "one tensor"
        # A1111 makes a word of one tensor, and leaves it out where the base's are wider.
        return "drops" if len(own) == 1 else "refuses", f"found {' and '.join(own)}, expected {wanted}"
    for part, width in zip(parts, widths, strict=True):
        shape = shapes[own[part]]
        if len(shape) != 2 or shape[1] != width:
            return "drops", f"{part} is {list(shape)}, the text encoder is {width} wide"
    return "drops", ""


def _unmeant(verdict: Verdict, words: Mapping[str, Mapping[str, str]]) -> None:
    """Words in a LoRA's file are for tools that read them there; the others have the words' own files."""
    verdict.unmeant |= {key for own in words.values() for key in own.values()}
    verdict.cautions.append(
        f"a LoRA with words in it is not meant for {verdict.tool}: take the LoRA's and the words' own files"
    )


def everything(base: Base) -> Mapping[str, str]:
    """Names -> paths, in every spelling of every tool."""
    return table(base, {s: None for known in ADAPTERS.values() for rules in known for s in rules.spellings})


def _dialect(group: Group) -> str:
    """How a module's factors are written; `any` where there are none."""
    return next((dialect for dialect, _ in group if dialect != "any"), "any")


def _whole(verdict: Verdict, rules: Rules, path: str, group: Group) -> None:
    """A module without all of its factors, or with a few of another kind beside them."""
    roles: dict[str, list[str]] = {}
    for dialect, role in group:
        if dialect != "any":
            roles.setdefault(dialect, []).append(role)
    lacking = {dialect: missing(dialect, own) for dialect, own in (roles or {"any": []}).items()}
    for dialect, what in lacking.items():
        if what:
            beside = "beside" if not all(lacking.values()) else ""
            does = next(rules.half[k] for k in (f"{dialect}.{what[0]}", beside, "") if k in rules.half)
            keys = [key for (of, _), key in group.items() if of == dialect or (of == "any" and not beside)]
            verdict.act(does, keys, f"{path} lacks {' and '.join(what)}")


def _fits(verdict: Verdict, rules: Rules, group: Group, shapes: Sizes, layer: tuple[int, ...]) -> None:
    """Factors that do not have the module's size."""
    dialect = _dialect(group)
    if any(key in verdict.dropped for key in group.values()) or dialect == "any":
        return
    has = {role: shapes[key] for (of, role), key in group.items() if of == dialect}
    if missing(dialect, has):
        return
    found = _size(dialect, has)
    matrix = (layer[0], math.prod(layer[1:]))
    flat = rules.flat and found is not None and (found[0], math.prod(found[1:])) == matrix
    if found != layer and not flat:
        reason = f"the factors make {list(found or ())}, the module is {list(layer)}"
        verdict.act(rules.misfit, group.values(), reason)


def _size(dialect: str, has: Sizes) -> tuple[int, ...] | None:
    """The size of the change that factors make; None where they do not fit each other."""
    if dialect in LORA:
        down, up = has["down"], has["up"]
        if "mid" in has:
            return (up[0], down[1], *has["mid"][2:])
        fits = len(down) == len(up) and down[0] == up[1] and math.prod(up[2:]) == 1
        return (up[0], *down[1:]) if fits else None
    if dialect == "loha":
        if "t1" in has:
            return (has["w1_a"][1], has["w1_b"][1], *has["t1"][2:])
        sizes = {(has[f"{w}_a"][0], math.prod(has[f"{w}_b"][1:])) for w in ("w1", "w2")}
        return sizes.pop() if len(sizes) == 1 else None
    if dialect == "lokr":
        (rows, columns), (more_rows, *more) = (_side(has, side) for side in ("w1", "w2"))
        return (rows * more_rows, columns * more[0], *more[1:])
    return has["weight"]


def _side(has: Sizes, side: str) -> tuple[int, ...]:
    """The size of one factor of a Kronecker product, whole or of two factors itself."""
    if side in has:
        return has[side]
    if "t2" in has and side == "w2":
        return (has["w2_a"][1], has["w2_b"][1], *has["t2"][2:])
    return (has[f"{side}_a"][0], math.prod(has[f"{side}_b"][1:]))


def _dora(verdict: Verdict, group: Group, shapes: Sizes, layer: tuple[int, ...]) -> None:
    """Magnitudes are read right only as [1, in, ...], one for each input; peft trains one for each output."""
    key = group["any", "dora"]
    shape = shapes[key]
    if len(shape) < 2 or shape[0] != 1 or shape[1] != layer[1]:
        verdict.wrong[key] = "magnitudes per output channel are divided by the wrong norm"


def _attention(verdict: Verdict, encoder: str, groups: Mapping[str, Group]) -> None:
    """Fused attention changes only where q, k, v and out are all there."""
    layers: dict[str, list[str]] = {}
    for path in groups:
        layer, found, _ = path.partition(".self_attn.")
        if found and path.startswith(f"{encoder}."):
            layers.setdefault(layer, []).append(path)
    for paths in layers.values():
        if len(paths) < 4:
            reason = "it changes this attention only where q, k, v and out are all there"
            verdict.act("drops", [key for path in paths for key in groups[path].values()], reason)


def _alphas(verdict: Verdict, groups: Mapping[str, Group], contents: Contents) -> None:
    """Several alphas in one network: attention and text encoders get the commonest, as do those without."""
    networks: dict[str, dict[str, float]] = {}
    for path, group in groups.items():
        if ("any", "alpha") in group:
            alphas = networks.setdefault(path.partition(".")[0], {})
            alphas[path] = contents.alphas[group["any", "alpha"]]
    for path, group in groups.items():
        network = path.partition(".")[0]
        if network not in networks:
            continue
        commonest = Counter(networks[network].values()).most_common(1)[0][0]
        down = group.get(("kohya", "down"), "")
        rank = contents.shapes[down][0] if down else 0
        alpha = networks[network].get(path, rank)
        heeded = path in networks[network] and _heeded(path)
        if alpha != commonest and not heeded:
            why = f"it uses the commonest alpha of the network, {commonest:g}, in place of each module's own"
            verdict.wrong |= dict.fromkeys(group.values(), why)


def _heeded(path: str) -> bool:
    """Whether diffusers' pattern for a module's own alpha has the module's name: measured with 0.42.1."""
    if path.startswith("unet."):
        return ".to_" not in path
    return path.startswith("text_encoder_2.") and ".mlp." in path

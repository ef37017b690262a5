"""What a tool does with a file of new words' vectors (Textual Inversion), by its table in tools.py."""

from __future__ import annotations

from tuner.export.contents import Contents
from tuner.export.places import Base
from tuner.export.rules import Verdict
from tuner.export.tools import EMBEDDINGS, Table

PAIR = ("clip_l", "clip_g")  # the keys of a base with two text encoders
_OWN = (*PAIR, "clip_h", "emb_params")  # keys that name no word


def judge(tool: str, contents: Contents, base: Base) -> Verdict:
    """What a tool does with the vectors on a base.

    Raises:
        KeyError: a tool without rules for vectors.
    """
    rules, verdict = EMBEDDINGS[tool], Verdict(tool, len(contents.shapes))
    widths = [
        next(shape[1] for name, shape in tensors.items() if name.endswith("token_embedding.weight"))
        for component, tensors in base.tensors.items()
        if component.startswith("text_encoder")
    ]
    if len(widths) == 2:
        used = dict(zip(PAIR, widths, strict=True))
        _pair(verdict, rules, contents)
    else:
        used = {_first(contents, rules.named.get(base.family)): widths[0]}
        _one(verdict, rules, contents, next(iter(used)))
    for key, width in used.items():
        shape = contents.shapes.get(key)
        if shape is None:
            continue
        if len(shape) not in (1, 2) or shape[-1] != width:
            verdict.act(rules.narrow, [key], f"{key} is {list(shape)}, the text encoder is {width} wide")
        elif len(shape) == 1 and not rules.lists:
            verdict.wrong[key] = f"[{width}] is taken for {width} vectors; expected [1, {width}]"
    _trigger(verdict, rules, contents)
    return verdict


def _first(contents: Contents, named: str | None) -> str:
    """The tensor that a reader takes who takes one: the one that it looks for, else the file's first."""
    return named if named is not None and named in contents.shapes else next(iter(contents.shapes))


def _one(verdict: Verdict, rules: Table, contents: Contents, first: str) -> None:
    """A base with one text encoder: one tensor holds all vectors."""
    others = [key for key in contents.shapes if key != first]
    if others:
        reason = "one tensor with all vectors is read, not several"
        verdict.act(rules.strangers, others, reason)


def _pair(verdict: Verdict, rules: Table, contents: Contents) -> None:
    """A base with two text encoders: `clip_l` and `clip_g`, one for each."""
    lacking = [key for key in PAIR if key not in contents.shapes]
    if not lacking:
        others = [key for key in contents.shapes if key not in PAIR]
        verdict.act("drops", others, "only clip_l and clip_g are read")
        return
    reason = f"{' and '.join(lacking)} is missing: the base has two text encoders"
    if rules.half == "refuses":
        verdict.refused = reason
    else:
        verdict.wrong |= dict.fromkeys(contents.shapes, reason)


def _trigger(verdict: Verdict, rules: Table, contents: Contents) -> None:
    """Tools that call the word by the file's name: say so where the key is another."""
    stem = contents.name.removesuffix(".safetensors")
    words = [key for key in contents.shapes if key not in _OWN]
    if rules.trigger == "file" and len(words) == 1 and words[0].strip("<>") != stem:
        verdict.cautions.append(f"prompts call it {stem}, after the file; diffusers calls it {words[0]}")
    if rules.trigger == "key" and not words and len(contents.shapes) == 1:
        verdict.cautions.append(f"prompts call it {next(iter(contents.shapes))} unless told `token=`")

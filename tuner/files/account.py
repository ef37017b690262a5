"""`tuner inspect` and `tuner verify`: what a file is, and what each tool does with it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tuner.errors import UserError
from tuner.export import contents as reading
from tuner.export import rules, rules_checkpoint, rules_controlnet, rules_embedding
from tuner.export.contents import Contents
from tuner.export.identify import ADAPTERS, Identity, identify
from tuner.export.places import Base
from tuner.export.rules import Verdict
from tuner.export.tools import ADAPTERS as ADAPTER_TOOLS
from tuner.export.tools import CHECKPOINTS, CONTROLNETS, EMBEDDINGS
from tuner.files import bases

HASH = "modelspec.hash_sha256"


def tools_for(identity: Identity) -> tuple[str, ...]:
    """The tools that have a use for a file of this kind."""
    if identity.kind in ADAPTERS:
        return tuple(ADAPTER_TOOLS)
    if identity.kind == "embedding":
        return tuple(EMBEDDINGS)
    if identity.kind in ("ControlNet", "Control-LoRA"):
        return tuple(CONTROLNETS)
    if identity.kind == "checkpoint":
        return tuple(CHECKPOINTS)
    return ("diffusers",) if identity.kind == "UNet" else ()


def judge(tool: str, contents: Contents, identity: Identity, base: Base) -> Verdict:
    """What one tool does with a file."""
    if identity.kind in ADAPTERS:
        return rules.judge(tool, contents, base)
    if identity.kind == "embedding":
        return rules_embedding.judge(tool, contents, base)
    if identity.kind in ("ControlNet", "Control-LoRA"):
        return rules_controlnet.judge(tool, contents, base)
    if identity.kind == "checkpoint":
        return rules_checkpoint.judge(tool, contents, base)
    return _component(tool, contents, base)


class Account(NamedTuple):
    """What several tools make of a file.

    Attributes:
        loads: the tools that load all of it.
        aside: why it is not for a tool, though nothing is wrong with it -> those tools.
        problems: why a tool would load it in part or not at all, one for each such tool.
    """

    loads: list[str]
    aside: dict[str, list[str]]
    problems: list[str]

    def told(self) -> str:
        """`ComfyUI and Forge load all of it by their rules of naming; A1111 does not: ...`."""
        verb = "loads" if len(self.loads) == 1 else "load"
        its = "its" if len(self.loads) == 1 else "their"
        parts = [f"{listed(self.loads)} {verb} all of it by {its} rules of naming"] if self.loads else []
        for reason, tools in self.aside.items():
            parts.append(f"{listed(tools)} {'does' if len(tools) == 1 else 'do'} not: {reason}")
        return "; ".join([*parts, *self.problems])


def ask(contents: Contents, base: Base, tools: Sequence[str] = ()) -> Account:
    """Ask tools what they make of a file; all that have a use for one of its kind where none are named."""
    identity = identify(contents)
    found = Account([], {}, [])
    for tool in tools or tools_for(identity):
        verdict = judge(tool, contents, identity, base)
        if verdict.loads == "all":
            found.loads.append(tool)
        elif verdict.aside:
            found.aside.setdefault(verdict.aside, []).append(tool)
        else:
            reasons = "; ".join(verdict.reasons())
            found.problems.append(f"{tool} would load {verdict.loads} of it: {reasons}")
    return found


def summary(path: Path, base: Base, tools: Sequence[str] = ()) -> str:
    """A line about a file that was written from another one: what the tools make of it.

    What a tool does not read of the other file it does not read of this one: that is told, no error.

    Raises:
        UserError: none of the tools loads all of it.
    """
    found = ask(reading.read(path), base, tools)
    if not found.loads:
        raise UserError(f"{path.name} was written, but no tool loads all of it: {found.told()}")
    return f"{path.name}: {found.told()} (on {base.name})"


def listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)


def describe(path: Path, base: str | None) -> dict[str, Any]:
    """What a file is and what each tool does with it, as plain data for JSON.

    Raises:
        UserError: there is no such file, or no such base.
    """
    contents = reading.read(path)
    identity = identify(contents)
    told: dict[str, Any] = {"file": path.name, **identity._asdict(), "metadata": dict(contents.metadata)}
    tools: dict[str, Any] = {}
    if tools_for(identity):
        try:
            made = bases.choose(base, contents, identity)
        except UserError as error:
            if base is not None:
                raise
            told["tools_unknown"] = str(error)
        else:
            told["base"] = made.name
            for tool in tools_for(identity):
                verdict = judge(tool, contents, identity, made)
                tools[tool] = {
                    "loads": verdict.loads,
                    "reasons": verdict.reasons(),
                    "cautions": verdict.cautions,
                }
    return told | {"tools": tools}


def lines(told: Mapping[str, Any]) -> list[str]:
    """A description in lines for people."""
    rows: list[tuple[str, str]] = [
        ("file", told["file"]),
        ("is", f"{told['kind']} ({told['layout']})" if told["layout"] else told["kind"]),
        ("family", told["family"] or "unknown"),
        ("types", _counts(told["dtypes"], "tensors")),
    ]
    for name, what in (
        ("networks", "modules"),
        ("ranks", "modules"),
        ("alphas", "modules"),
        ("tokens", "vectors"),
    ):
        if told[name]:
            rows.append((name, _counts(told[name], what)))
    rows += [("metadata", f"{key} = {_short(value)}") for key, value in sorted(told["metadata"].items())]
    for tool, found in told["tools"].items():
        rows.append((tool, f"loads {found['loads']} on {told['base']}"))
        rows += [("", reason) for reason in (*found["reasons"], *found["cautions"])]
    if "tools_unknown" in told:
        rows.append(("tools", told["tools_unknown"]))
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {text}" for name, text in rows]


def check(path: Path, base: str | Base | None, asked: Sequence[str]) -> list[str]:
    """Account for every key of a file by each tool's rules; a line for each tool.

    Args:
        path: the file.
        base: the base that it was made for, or its name or folder; found by names and sizes where None.
        asked: the tools; all that have a use for such a file where empty.

    Raises:
        UserError: a tool would load the file only in part, or with another effect; or none would load it, or
            one that was asked for would not; or the file is of a kind without rules; or its hash is wrong.
    """
    contents = reading.read(path)
    identity = identify(contents)
    known = tools_for(identity)
    if not known:
        raise UserError(f"{path.name}: there are no rules for this kind of file ({identity.kind})")
    tools = [_tool(name, known) for name in asked] or list(known)
    made = base if isinstance(base, Base) else bases.choose(base, contents, identity)
    _check_hash(path, contents)
    told, problems = [], []
    for tool in tools:
        verdict = judge(tool, contents, identity, made)
        reasons = [*verdict.reasons(), *verdict.cautions]
        if verdict.faulty or (asked and verdict.loads != "all"):
            problems += [
                f"{path.name}: {tool} would load {verdict.loads} of it",
                *(f"  {r}" for r in reasons),
            ]
        count = f"all {verdict.keys} keys" if verdict.loads == "all" else verdict.loads
        told.append("; ".join([f"{path.name}: {tool} loads {count} on {made.name}", *reasons]))
    if problems:
        raise UserError("\n".join(problems))
    if not any(" loads all " in line for line in told):
        raise UserError("\n".join([f"{path.name}: no tool loads it", *told]))
    return told


def _tool(name: str, known: Sequence[str]) -> str:
    """A tool by its name in any case."""
    for tool in known:
        if tool.lower() == name.lower():
            return tool
    raise UserError(f"tool {name}: expected one of {', '.join(known)} for this kind of file")


def _component(tool: str, contents: Contents, base: Base) -> Verdict:
    """A UNet of its own, which only diffusers reads in these names."""
    wanted, verdict = base.tensors["unet"], Verdict(tool, len(contents.shapes))
    verdict.act("drops", [key for key in contents.shapes if key not in wanted], "the UNet has no such tensor")
    verdict.missing = [key for key in wanted if key not in contents.shapes]
    for key, shape in contents.shapes.items():
        if key in wanted and wanted[key] != shape:
            verdict.refused = f"{key} is {list(shape)}, the base's is {list(wanted[key])}"
    return verdict


def _check_hash(path: Path, contents: Contents) -> None:
    """Our own files say the hash of what follows their header."""
    if "tuner.versions" not in contents.metadata or HASH not in contents.metadata:
        return
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if contents.metadata[HASH] != f"0x{digest}":
        raise UserError(f"{path.name}: its tensors are not those that the metadata's {HASH} was made of")


def _counts(counted: Mapping[Any, int], what: str) -> str:
    return ", ".join(f"{name} ({count} {what})" for name, count in counted.items())


def _short(text: str) -> str:
    one = " ".join(text.split())
    return one if len(one) <= 100 else f"{one[:97]}..."

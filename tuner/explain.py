"""Pydantic's errors in plain words: where, what was found, what is expected, and the nearest valid name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import pydantic
from pydantic_core import ErrorDetails
from typing_extensions import is_typeddict

from tuner.block import (
    Block,
    ConflictError,
    Key,
    conflicts_beside,
    field_of,
    is_block,
    item_of,
    keys_of,
    members,
)
from tuner.yaml_source import Document, Problem, dotted, nearest

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a block of keys",
    "model_type": "a block of keys",
    "model_attributes_type": "a block of keys",
    "string_too_short": "text that is not empty",
}
_BOUNDS = {
    "greater_than": ("gt", "a number above"),
    "greater_than_equal": ("ge", "a number of at least"),
    "less_than": ("lt", "a number below"),
    "less_than_equal": ("le", "a number of at most"),
    "multiple_of": ("multiple_of", "a multiple of"),
}


def problems(error: pydantic.ValidationError, root: type[Block], document: Document) -> list[Problem]:
    """Every mistake behind a validation error, and the impossible combinations that the mistakes hid."""
    found: list[Problem] = []
    wishes: dict[Key, tuple[str, list[str], list[str]]] = {}  # what was found, what is expected, hints
    faulty: set[Key] = set()
    for details in error.errors(include_url=False):
        key, kind = _locate(details["loc"], root)
        cause = details.get("ctx", {}).get("error")
        if isinstance(cause, ConflictError):
            continue  # found again below, where nothing is hidden
        if details["type"] == "missing" and isinstance(key[-1], int):
            # A pair with one member: the list is too short, and no key is missing.
            key, kind = _locate(details["loc"][:-1], root)
        faulty.add(key)
        if details["type"] == "missing" and not isinstance(details["input"], (list, tuple)):
            found.append(Problem(document.place(key[:-1]), key, _missing(key, root)))
        elif details["type"] == "extra_forbidden":
            found.append(Problem(document.place(key), key, _unknown(key, root)))
        elif isinstance(cause, ValueError):
            found.append(Problem(document.place(key), key, str(cause)))
        else:
            _, expected, hints = wishes.setdefault(key, (_found(details["input"]), [], []))
            expected.append(_expected(details, kind))
            hints += _hints(details)
    for key, (was, expected, hints) in wishes.items():
        text = f"found {was}, expected {' or '.join(dict.fromkeys(expected))}" + "".join(dict.fromkeys(hints))
        found.append(Problem(document.place(key), key, text))
    for key, message in conflicts_beside(root, document.tree, faulty):
        found.append(Problem(document.place(key), key, message))
    return found


def _locate(location: tuple[int | str, ...], root: type[Block]) -> tuple[Key, Any]:
    """A pydantic location without the names of union members, and the kind of value that is wanted there."""
    kind: Any = root
    key: Key = ()
    for part in location:
        if len(members(kind)) > 1:
            kind = next((member for member in members(kind) if _tag(member) == part), None)
            continue
        key = (*key, part)
        kind = item_of(kind) if isinstance(part, int) else (keys_of(kind) or {}).get(part)
    return key, kind


def _tag(kind: Any) -> str:
    """What pydantic calls a member of a union in its locations."""
    if get_origin(kind) is Literal:
        return f"literal[{','.join(repr(value) for value in get_args(kind))}]"
    if get_origin(kind) is not None:
        comma = ", " if get_origin(kind) is tuple else ","
        return f"{get_origin(kind).__name__}[{comma.join(_tag(part) for part in get_args(kind))}]"
    return str(getattr(kind, "__name__", kind))


def _describe(kind: Any) -> str:
    """What a kind of value is, in words."""
    words = []
    for member in members(kind):
        if get_origin(member) is Literal:
            words.append("one of: " + ", ".join(str(value) for value in get_args(member)))
        elif keys_of(member) is not None:
            words.append("a block of keys")
        elif item_of(member) is not None:
            words.append("a list")
        else:
            names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
            words.append(names.get(member, "a value"))
    return " or ".join(words)


def _missing(key: Key, root: type[Block]) -> str:
    parent, name = _kind_at(root, key[:-1]), str(key[-1])
    if is_typeddict(parent):
        return "is missing"
    field = field_of(parent, name)
    assert field is not None, key
    return f"is missing; expected {_describe(field.annotation)} ({field.description})"


def _unknown(key: Key, root: type[Block]) -> str:
    parent = _kind_at(root, key[:-1])
    names = list(keys_of(parent) or {})
    what = "method" if is_typeddict(parent) else "key"
    like = nearest(str(key[-1]), names)
    if like is None:
        elsewhere = sorted(dotted(other) for other in _all_keys(root) if other[-1] == key[-1])
        like = " or ".join(elsewhere) or None
    guess = f"; did you mean {like}?" if like else ""
    choice = f"expected one of: {', '.join(sorted(names))}" if names else "this block has no keys"
    return f"unknown {what}{guess} ({choice})"


def _kind_at(root: type[Block], key: Key) -> Any:
    kind: Any = root
    for part in key:
        kind = item_of(kind) if isinstance(part, int) else (keys_of(kind) or {}).get(part)
    block = next((member for member in members(kind) if is_block(member) or is_typeddict(member)), None)
    assert block is not None, key
    return block


def _all_keys(kind: Any, at: Key = ()) -> Iterator[Key]:
    for name, inner in (keys_of(kind) or {}).items():
        yield (*at, name)
        yield from _all_keys(inner, (*at, name))


def _found(value: object) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text '{value}'"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}"
    return "a block of keys"


def _choices(details: ErrorDetails, kind: Any) -> list[str]:
    """The values that a literal error allows."""
    for member in members(kind):
        if get_origin(member) is Literal:
            return [str(value) for value in get_args(member)]
    return str(details.get("ctx", {}).get("expected", "")).replace("'", "").replace(" or ", ", ").split(", ")


def _expected(details: ErrorDetails, kind: Any) -> str:
    context = details.get("ctx", {})
    name = details["type"]
    if name in _EXPECTED:
        return _EXPECTED[name]
    if name in _BOUNDS:
        bound, words = _BOUNDS[name]
        return f"{words} {context[bound]:g}"
    if name == "literal_error":
        choices = _choices(details, kind)
        like = nearest(str(details["input"]), choices)
        return f"one of: {', '.join(choices)}" + (f"; did you mean {like}?" if like else "")
    if name == "too_short":
        return f"a list of at least {context['min_length']}"
    if name == "too_long":
        return f"a list of at most {context['max_length']}"
    if name == "missing":
        return f"a list of {len(get_args(members(kind)[0]))}"
    if name == "string_pattern_mismatch":
        return f"text of the form {context['pattern']}"
    return details["msg"][:1].lower() + details["msg"][1:]


def _hints(details: ErrorDetails) -> list[str]:
    """What to write instead, where the mistake is a well-known one."""
    value, name = details["input"], details["type"]
    if name == "bool_type" and isinstance(value, str) and value.lower() in ("yes", "no", "on", "off"):
        return [f"; write {'true' if value.lower() in ('yes', 'on') else 'false'}"]
    if name == "string_type" and isinstance(value, (int, float)) and not isinstance(value, bool):
        return [f"; write '{value}', with the quotes, for this text"]
    if name == "string_type" and value is None:
        return ["; write '' for the empty text"]
    return []

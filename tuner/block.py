"""What a block of a recipe is: its strict settings, its short forms, and its checks across keys.

recipe.py composes blocks, and each method's file holds its own (`class Config(Block)`). A "kind" below is
the annotation of a key: a Block, a TypedDict (the `method` block), a list, a plain type, or a union of these.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    NotRequired,
    Self,
    Union,
    get_args,
    get_origin,
)

import pydantic
from pydantic.fields import FieldInfo
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema
from typing_extensions import is_typeddict

Key = tuple[str | int, ...]  # where a value lies in a recipe: ("data", "source", 0, "path")


class Conflict(NamedTuple):
    """Keys that do not go together, dotted and relative to their block; the problem is shown at the first."""

    keys: tuple[str, ...]
    message: str


class ConflictError(ValueError):
    """All conflicts of one block."""

    def __init__(self, conflicts: list[Conflict]) -> None:
        super().__init__("; ".join(f"{conflict.keys[0]}: {conflict.message}" for conflict in conflicts))
        self.conflicts = conflicts


class Block(pydantic.BaseModel):
    """A block of keys in a recipe: unknown keys are errors, nothing is converted, nothing can be changed.

    A whole number is taken where a number is expected; text is never taken for a number, nor true for 1.
    A subclass may set `short`, the key that a lone value stands for (`base: X` is `base: {path: X}`).
    """

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    short: ClassVar[str | None] = None

    def unused(self) -> dict[str, str]:
        """Keys that have no effect beside the others, with the reason. Giving one is an error."""
        return {}

    def conflicts(self) -> Iterator[Conflict]:
        """What is impossible in this block; every value has its right type here."""
        return iter(())

    def all_conflicts(self) -> list[Conflict]:
        """`conflicts()`, and every key that was given but has no effect."""
        names = field_names(type(self))
        given = {key: why for key, why in self.unused().items() if names[key] in self.model_fields_set}
        unused = [Conflict((key,), f"has no effect: {why}") for key, why in given.items()]
        return unused + list(self.conflicts())

    def resolved(self) -> dict[str, Any]:
        """Every key that has an effect, defaults included, as plain values that load again to an equal block.

        A pair stays a tuple.
        """
        names = field_names(type(self))
        skipped = self.unused()
        return {key: _plain(getattr(self, name)) for key, name in names.items() if key not in skipped}

    @pydantic.model_validator(mode="before")
    @classmethod
    def _expand(cls, value: object) -> object:
        return expand(cls, value)

    @pydantic.model_validator(mode="after")
    def _check(self) -> Self:
        found = self.all_conflicts()
        if found:
            raise ConflictError(found)
        return self

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: pydantic.GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        schema = handler(core_schema)
        return {"anyOf": [{"type": "string"}, schema]} if cls.short else schema


class OneOrMore:
    """Marks a list of blocks that may be written as a lone block, for the JSON schema."""

    def __get_pydantic_json_schema__(
        self, core_schema: CoreSchema, handler: pydantic.GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        schema = handler(core_schema)
        return {"anyOf": [schema["items"], schema]}


def field_names(block: type[Block]) -> dict[str, str]:
    """The key in a recipe -> the name in Python (they differ where a field has an alias)."""
    return {field.alias or name: name for name, field in block.model_fields.items()}


def members(kind: Any) -> list[Any]:
    """The kinds that a union joins, without None; a list of one where the kind is no union."""
    while get_origin(kind) in (Annotated, NotRequired):
        kind = get_args(kind)[0]
    if get_origin(kind) not in (Union, types.UnionType):
        return [kind]
    return [inner for part in get_args(kind) if part is not type(None) for inner in members(part)]


def is_optional(kind: Any) -> bool:
    """Whether null is a value of this kind."""
    while get_origin(kind) in (Annotated, NotRequired):
        kind = get_args(kind)[0]
    return get_origin(kind) in (Union, types.UnionType) and type(None) in get_args(kind)


def is_block(kind: Any) -> bool:
    """Whether the kind is a Block class."""
    return isinstance(kind, type) and issubclass(kind, Block)


def keys_of(kind: Any) -> dict[str, Any] | None:
    """The keys of a block or TypedDict with their kinds; None where the kind has no keys of its own."""
    for member in members(kind):
        if is_block(member):
            return {field.alias or name: field.annotation for name, field in member.model_fields.items()}
        if is_typeddict(member):
            return {name: members(inner)[0] for name, inner in member.__annotations__.items()}
    return None


def field_of(kind: Any, key: str) -> FieldInfo | None:
    """The field that a key of a block is, with its description and default."""
    for member in members(kind):
        if is_block(member) and key in field_names(member):
            field: FieldInfo = member.model_fields[field_names(member)[key]]
            return field
    return None


def item_of(kind: Any) -> Any | None:
    """The kind of a list's items; None where the kind is no list."""
    for member in members(kind):
        if get_origin(member) in (list, tuple):
            return get_args(member)[0]
    return None


def expand(kind: Any, value: object) -> object:
    """Writes short forms out, all the way down: a lone value, one source for a list, an empty block."""
    if value is None:
        return {} if keys_of(kind) is not None and not is_optional(kind) else None
    item = item_of(kind)
    if item is not None:
        alone = len(members(kind)) == 1 and getattr(members(item)[0], "short", None)
        if alone and not isinstance(value, list):
            value = [value]
        return [expand(item, part) for part in value] if isinstance(value, list) else value
    keys = keys_of(kind)
    if keys is None:
        return value
    short = getattr(members(kind)[0], "short", None)
    if short and not isinstance(value, (dict, list, Block)):
        value = {short: value}
    if not isinstance(value, dict):
        return value
    return {key: expand(keys[key], part) if key in keys else part for key, part in value.items()}


def conflicts_beside(
    kind: type[Block], tree: Mapping[str, Any], faulty: set[Key], at: Key = ()
) -> list[tuple[Key, str]]:
    """The conflicts of a block and those below it although some of its values are faulty.

    A faulty or missing value is replaced by its default, or by any value of its kind; a conflict that names
    such a key is left out, since it may be due to the replacement.
    """
    found: list[tuple[Key, str]] = []
    _construct(kind, tree, set(faulty), at, found)
    return found


def _construct(
    kind: type[Block], tree: Mapping[str, Any], faulty: set[Key], at: Key, found: list[tuple[Key, str]]
) -> Block:
    values: dict[str, Any] = {}
    given: set[str] = set()
    for key, name in field_names(kind).items():
        field = kind.model_fields[name]
        here = (*at, key)
        usable = key in tree and here not in faulty
        if usable:
            given.add(name)
            values[name] = _value(field.annotation, tree[key], faulty, here, found)
        elif field.is_required():
            faulty.add(here)
            values[name] = _stand_in(field.annotation, faulty, here, found)
        else:
            values[name] = field.get_default(call_default_factory=True, validated_data={})
    block = kind.model_construct(given, **values)
    for conflict in block.all_conflicts():
        keys = [at + split(key) for key in conflict.keys]
        if not any(_related(key, other) for key in keys for other in faulty):
            found.append((keys[0], conflict.message))
    return block


def split(dotted: str) -> Key:
    """`data.source.0.path` as a key."""
    return tuple(int(part) if part.isdigit() else part for part in dotted.split("."))


def _related(key: Key, other: Key) -> bool:
    length = min(len(key), len(other))
    return key[:length] == other[:length]


def _value(kind: Any, value: Any, faulty: set[Key], at: Key, found: list[tuple[Key, str]]) -> Any:
    """A value without faults of its own, as validation would give it."""
    member = members(kind)[0]
    if is_block(member) and isinstance(value, Mapping):
        return _construct(member, value, faulty, at, found)
    if is_typeddict(member) and isinstance(value, Mapping):
        kinds = keys_of(member) or {}
        good = {key: part for key, part in value.items() if key in kinds and (*at, key) not in faulty}
        return {key: _value(kinds[key], part, faulty, (*at, key), found) for key, part in good.items()}
    if isinstance(value, list):
        item = item_of(kind)
        good_items = [(i, part) for i, part in enumerate(value) if (*at, i) not in faulty]
        parts = [_value(item, part, faulty, (*at, i), found) for i, part in good_items]
        return tuple(parts) if get_origin(member) is tuple and len(parts) == len(value) else parts
    return value


def _stand_in(kind: Any, faulty: set[Key], at: Key, found: list[tuple[Key, str]]) -> Any:
    """Any value of a kind."""
    if is_optional(kind):
        return None
    member = members(kind)[0]
    if is_block(member):
        return _construct(member, {}, faulty, at, found)
    if is_typeddict(member):
        return {}
    if get_origin(member) is Literal:
        return get_args(member)[0]
    if get_origin(member) is tuple:
        return tuple(_stand_in(part, faulty, at, found) for part in get_args(member))
    simple: dict[Any, Any] = {int: 1, float: 1.0, str: "text", bool: False}
    return simple.get(member, [])


def _plain(value: Any) -> Any:
    if isinstance(value, Block):
        return value.resolved()
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return value

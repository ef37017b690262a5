"""Reads a recipe's YAML into plain values, remembering the line of every key, and applies overrides.

YAML 1.2 by ruamel.yaml: `1e-4` is a number, `no` and `16:9` are text. Every problem is kept, so that they
can be shown together.
"""

from __future__ import annotations

import dataclasses
import difflib
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from tuner.block import Key
from tuner.errors import UserError, few

_TAG = "tag:yaml.org,2002:"
_TEXT = {"str", "timestamp", "merge", "value"}  # the last three are YAML 1.1's; here they are text
LARGEST = 2**20
"""Bytes of a recipe; what is larger is another file, and not read."""
MOST = 100_000
"""Values in a recipe, each use of an alias counted: a few lines of them could stand for billions."""


class Place(NamedTuple):
    """Where something was written: a line of a file, or a word of the command line."""

    order: tuple[int, int]
    text: str


@dataclasses.dataclass(frozen=True)
class Problem:
    """One mistake. As text: `recipes/x.yaml:12: train.stpes: unknown key ...`."""

    place: Place
    key: Key
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.place.text, dotted(self.key), self.message) if part)


class RecipeError(UserError):
    """Everything that is wrong with a recipe; its text has one line for each problem."""

    def __init__(self, problems: Iterable[Problem | str]) -> None:
        self.problems = tuple(problems)
        assert self.problems
        super().__init__("\n".join(str(problem) for problem in self.problems))


@dataclasses.dataclass
class Document:
    """A recipe as written: its values, the place of each, and what is wrong with it so far."""

    name: str
    tree: dict[str, Any]
    places: dict[Key, Place]
    problems: list[Problem]

    def place(self, key: Key) -> Place:
        """Where a key was written; where it was not, the place of the block that it belongs to."""
        while key not in self.places:
            key = key[:-1]
        return self.places[key]

    def line(self, number: int) -> Place:
        """A line of the file, from 1."""
        return Place((0, number), f"{self.name}:{number}")

    def fail(self, place: Place, key: Key, message: str) -> None:
        """Notes a problem."""
        self.problems.append(Problem(place, key, message))

    def set(self, key: Key, place: Place) -> None:
        """Says that the value at a key was written at a place, with all that is below it."""
        self.places = {at: old for at, old in self.places.items() if at[: len(key)] != key}
        self.places[key] = place


def dotted(key: Key) -> str:
    """A key as it is written in an override: `data.source.0.path`."""
    return ".".join(str(part) for part in key)


def nearest(word: str, names: Iterable[str]) -> str | None:
    """The name most like a word, if one is like it; capitals do not count."""
    by_lower = {name.lower(): name for name in names}
    match = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[match[0]] if match else None


def read(path: Path) -> Document:
    """Reads a recipe.

    Raises:
        RecipeError: there is no such file, or it is not a YAML mapping. Problems that leave the rest
            readable (a key given twice) are in the document's `problems` instead.
    """
    document = Document(str(path), {}, {}, [])
    whole = Place((0, 0), document.name)
    text = _text(path, whole)
    try:
        root = _yaml().compose(text)
    except YAMLError as error:
        raise RecipeError([_syntax(document, error)]) from None
    except RecursionError:
        raise RecipeError([Problem(whole, (), "nested too deeply")]) from None
    if root is None:
        message = "the file is empty, expected a recipe (base, method, data, train, ...)"
        raise RecipeError([Problem(whole, (), message)])
    if not isinstance(root, MappingNode):
        found = "a list" if isinstance(root, SequenceNode) else "plain text or a lone value"
        place = document.line(root.start_mark.line + 1)
        message = f"found {found}, expected keys and values such as 'base: embedded'"
        raise RecipeError([Problem(place, (), message)])
    document.places[()] = document.line(root.start_mark.line + 1)
    document.tree = _Builder(document).build(root, (), ())
    return document


def _text(path: Path, whole: Place) -> str:
    if path.is_dir():
        inside = sorted(entry.name for entry in path.glob("*.y*ml"))
        hint = f"; it holds: {few(path.name, inside)}" if inside else ""
        raise RecipeError([Problem(whole, (), f"is a folder, expected a recipe file{hint}")])
    try:
        if (size := path.stat().st_size) > LARGEST:
            message = f"{size} bytes are more than the {LARGEST} of a recipe; expected a YAML recipe"
            raise RecipeError([Problem(whole, (), message)])
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise RecipeError([Problem(whole, (), f"no such file{_near_files(path)}")]) from None
    except OSError as error:
        raise RecipeError([Problem(whole, (), f"cannot be read: {error.strerror}")]) from None
    except UnicodeDecodeError as error:
        wide = path.read_bytes()[:2] in (BOM_UTF16_LE, BOM_UTF16_BE)
        message = f"is not text (byte {error.start} is not UTF-8), expected a YAML recipe"
        message = "is text in UTF-16, expected a YAML recipe; save it as UTF-8" if wide else message
        raise RecipeError([Problem(whole, (), message)]) from None


def _near_files(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; there is no folder {path.parent}"
    names = [entry.name for entry in path.parent.iterdir() if entry.is_file()]
    match = difflib.get_close_matches(path.name, names, n=3, cutoff=0.75)
    recipes = sorted(name for name in names if name.endswith((".yaml", ".yml")))
    if match:
        return "; did you mean " + " or ".join(str(path.parent / name) for name in match) + "?"
    return f"; {path.parent} holds{f': {few(path.name, recipes)}' if recipes else ' no recipe'}"


def _yaml() -> YAML:
    return YAML(typ="safe", pure=True)


def _syntax(document: Document, error: YAMLError) -> Problem:
    """A parser's complaint with its line and column."""
    mark = error.problem_mark or error.context_mark if isinstance(error, MarkedYAMLError) else None
    if not isinstance(error, MarkedYAMLError) or mark is None:
        first = next(iter(str(error).splitlines()), "unreadable")
        return Problem(Place((0, 0), document.name), (), f"is not YAML: {first}")
    place = Place((0, mark.line + 1), f"{document.name}:{mark.line + 1}:{mark.column + 1}")
    what = " ".join(part for part in (error.problem, error.context) if part)
    hint = "; indent with spaces, not tabs" if "'\\t'" in what else ""
    return Problem(place, (), f"is not YAML: {what}{hint}")


class _Builder:
    """Turns the parser's nodes into plain values and notes the line of each."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.constructor = _yaml().constructor
        self.count = 0

    def build(self, node: Node, key: Key, above: tuple[Node, ...]) -> Any:
        """`above` holds the nodes that this one lies in, since an alias can point back to one of them."""
        line = self.document.line(node.start_mark.line + 1)
        self.count += 1
        if self.count > MOST:
            message = f"holds more than {MOST} values, aliases written out; write it without them"
            raise RecipeError([Problem(line, key, message)])
        if any(node is other for other in above):
            self.document.fail(line, key, "refers to itself")
            return None
        tag = str(node.tag)
        if not isinstance(node, ScalarNode) and tag not in (f"{_TAG}map", f"{_TAG}seq"):
            self.document.fail(line, key, f"found the tag {tag}; tags are not used in recipes")
        if isinstance(node, MappingNode):
            return self._mapping(node, key, (*above, node))
        if isinstance(node, SequenceNode):
            for i, item in enumerate(node.value):
                self.document.places[(*key, i)] = self.document.line(item.start_mark.line + 1)
            return [self.build(item, (*key, i), (*above, node)) for i, item in enumerate(node.value)]
        assert isinstance(node, ScalarNode)
        return self._scalar(node, key)

    def _mapping(self, node: MappingNode, key: Key, above: tuple[Node, ...]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        first: dict[str, int] = {}
        for name_node, value_node in node.value:
            line = name_node.start_mark.line + 1
            place = self.document.line(line)
            if not isinstance(name_node, ScalarNode):
                self.document.fail(place, key, "found a list or block as a key, expected a name")
                continue
            name = str(name_node.value)
            here = (*key, name)
            if name in first:
                self.document.fail(place, here, f"given twice: here and in line {first[name]}")
            first.setdefault(name, line)
            self.document.set(here, place)
            values[name] = self.build(value_node, here, above)
        return values

    def _scalar(self, node: ScalarNode, key: Key) -> Any:
        place = self.document.place(key)
        kind = str(node.tag).removeprefix(_TAG)
        if "\0" in str(node.value):
            self.document.fail(place, key, "found a zero character (\\0), which no name and no text has")
            return node.value.replace("\0", "")
        if kind in _TEXT:
            return node.value
        if kind not in ("int", "float", "bool", "null"):
            self.document.fail(place, key, f"found the tag {node.tag}; tags are not used in recipes")
            return None
        try:
            return self.constructor.construct_object(node)
        except (ValueError, KeyError):  # an explicit tag before something else: !!int abc
            self.document.fail(place, key, f"found the text '{node.value}' marked as {kind}")
            return None


def override(
    document: Document, words: Sequence[str], expand: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    """Applies `key.sub=value` words in their order; what is wrong with them goes to the document's problems.

    Args:
        document: changed in place.
        words: each value is a YAML scalar or flow value; one that is neither is text.
        expand: writes short forms out, so that `base.revision=X` works on `base: Y`.
    """
    for index, word in enumerate(words):
        place = Place((1, index), f"command line: {word}")
        name, equals, text = word.partition("=")
        parts = name.strip().split(".")
        if not equals or not all(parts):
            document.fail(place, (), "expected KEY=VALUE, such as train.steps=100")
            continue
        scratch = Document("command line", {}, {(): place}, [])
        try:
            value = _override_value(scratch, text)
        except YAMLError as error:
            problem = getattr(error, "problem", None) or "unreadable"
            message = f"the value is not YAML: {problem}; put text with special signs in quotes"
            document.fail(place, (), message)
            continue
        for problem in scratch.problems:
            document.fail(place, (*parts, *problem.key), problem.message)
        document.tree = expand(document.tree)
        _put(document, parts, value, place)
    document.tree = expand(document.tree)


def _override_value(scratch: Document, text: str) -> Any:
    root = _yaml().compose(text)
    if isinstance(root, (MappingNode, SequenceNode)) and not root.flow_style:
        return text  # `prefix=a: b` would be a block mapping, which no one means on a command line
    if root is None:
        return text if text.strip() else None  # a lone comment is text here
    if isinstance(root, ScalarNode) and not root.style and "#" in text and root.value != text.strip():
        return text  # nothing after a # is dropped
    return _Builder(scratch).build(root, (), ())


def _put(document: Document, parts: list[str], value: Any, place: Place) -> None:
    """Sets one value, making the blocks above it where they are missing."""
    node: Any = document.tree
    key: Key = ()
    left = list(parts)
    while left:
        part: str | int = left.pop(0)
        if isinstance(node, list):
            index = _index(document, node, str(part), (key, place))
            if index is None:
                return
            if not str(part).isdigit():
                left.insert(0, str(part))  # the list's only item was left out of the override's key
            part = index
        elif not isinstance(node, dict):
            document.fail(place, key, f"holds one value, so there is no key '{part}' in it")
            return
        key = (*key, part)
        absent = part == len(node) if isinstance(node, list) else part not in node
        if absent or not left:
            document.set(key, place)
            new = value if not left else ([] if left[0].isdigit() else {})
            if absent and isinstance(node, list):
                node.append(new)
            else:
                node[part] = new
        node = node[part]


def _index(document: Document, node: list[Any], part: str, at: tuple[Key, Place]) -> int | None:
    """Which item of a list a part of an override's key means; a name means the only one there is."""
    if part.isdigit() and int(part) <= len(node):
        return int(part)
    if not part.isdigit() and len(node) == 1:
        return 0
    key, place = at
    choices = " or ".join(dotted((*key, i)) for i in range(min(len(node) + 1, 4)))
    document.fail(place, (*key, part), f"the list holds {len(node)}: say which one, as {choices}")
    return None

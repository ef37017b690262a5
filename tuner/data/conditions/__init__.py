"""Condition pictures, one kind a file, found by file name.

Each file has `Config`, the kind's parameters, and `make(picture, config, draw)`: it sees the pixels that are
trained on, uint8 RGB [H, W, 3], after the crop, at training resolution. Its answer is a condition picture,
uint8 [H, W, 3], where 0..255 stand for 0..1; or [H, W, 4], where the fourth channel is 0 in a hole and 255
elsewhere. `values` makes what a network sees of it. Given pictures (`image`) are the caller's matter.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self, cast

import cv2
import numpy as np
import numpy.typing as npt
import pydantic
from pydantic import Field, field_validator

from tuner.block import Block, Conflict
from tuner.data.conditions._seam import Draw, Kind, Picture
from tuner.errors import UserError
from tuner.export.metadata import local_name

__all__ = [
    "GIVEN",
    "Condition",
    "Draw",
    "Picture",
    "kinds",
    "make_condition",
    "parameters",
    "values",
]

GIVEN = "image"
"""What a recipe calls conditions that are given as pictures."""

MASKED = np.float32(-1)


def kinds() -> tuple[str, ...]:
    """The names of the kinds that can be computed."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name for name in names if not name.startswith("_")))


def _config(kind: str) -> type[Kind]:
    found: type[Kind] = importlib.import_module(f"{__name__}.{kind}").Config
    return found


class _Condition(Block):
    """A kind of condition with its parameters: `canny`, or `{kind: canny, low: 50, high: [100, 200]}`."""

    short: ClassVar[str | None] = "kind"

    kind: str = Field(
        "canny",
        description="of the condition picture; image: given ones",
        json_schema_extra={"enum": [*kinds(), GIVEN]},
    )

    @field_validator("kind")
    @classmethod
    def _known(cls, value: str) -> str:
        known = (*kinds(), GIVEN)
        if value not in known:
            like = difflib.get_close_matches(value.lower(), known, n=1)
            guess = f"; did you mean {like[0]}?" if like else ""
            raise ValueError(f"found {value}, expected one of: {', '.join(known)}{guess}")
        return value

    @pydantic.model_validator(mode="after")
    def _fill(self) -> Self:
        """The kind's own values where nothing is said; what belongs to other kinds stays None."""
        for key, value in ({} if self.config is None else dict(self.config)).items():
            self.__dict__[key] = value  # it is frozen from here on
        return self

    @property
    def config(self) -> Kind | None:
        """The kind's own block; None for given pictures."""
        if self.kind == GIVEN:
            return None
        kind = _config(self.kind)
        # Beside mistakes in other places a value may be missing: then it is the kind's own.
        held = {key: value for key in kind.model_fields if (value := getattr(self, key)) is not None}
        return kind.model_construct(self.model_fields_set & kind.model_fields.keys(), **held)

    def unused(self) -> dict[str, str]:
        config = self.config
        own = {} if config is None else type(config).model_fields
        others = {key: f"{self.kind} has none" for key in type(self).model_fields if key not in own}
        others.pop("kind")
        return others | ({} if config is None or self._wants(config) else config.unused())

    def conflicts(self) -> Iterator[Conflict]:
        config = self.config
        if config is None:
            return
        if wants := self._wants(config):
            yield Conflict(("kind", *wants), f"{self.kind} needs {' and '.join(wants)}")
        else:
            yield from config.conflicts()

    def all_conflicts(self) -> list[Conflict]:
        # Nothing is said about parameters where the kind itself is a mistake.
        return [one._replace(keys=(*one.keys, "kind")) for one in super().all_conflicts()]

    def _wants(self, config: Kind) -> list[str]:
        fields = type(config).model_fields
        return [key for key in fields if fields[key].is_required() and getattr(self, key) is None]


def _joined() -> type[_Condition]:
    """The block with the parameters of every kind; one that several have says each one's meaning."""
    fields: dict[str, Any] = {}
    told: dict[str, dict[str, list[str]]] = {}  # of each key the meanings, and which kinds have them
    for kind in kinds():
        for key, field in _config(kind).model_fields.items():
            own = kind if field.is_required() else f"{kind} ({_shown(field.default)})"
            told.setdefault(key, {}).setdefault(str(field.description), []).append(own)
            annotation: Any = field.annotation
            if field.metadata:
                annotation = cast(Any, Annotated)[(annotation, *field.metadata)]
            assert key not in fields or fields[key][0] == annotation, f"{key} differs between kinds"
            meaning = "; ".join(f"{', '.join(who)}: {what}" for what, who in told[key].items())
            fields[key] = (
                annotation,
                Field(None, description=meaning, json_schema_extra=_without_default),
            )
    made = pydantic.create_model(
        "Condition", __base__=_Condition, __doc__=_Condition.__doc__, __module__=__name__, **fields
    )
    return cast(type[_Condition], made)


def _without_default(schema: dict[str, Any]) -> None:
    """None stands for what another kind has, and cannot be written."""
    schema.pop("default", None)


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)


if TYPE_CHECKING:
    Condition = _Condition
else:
    Condition = _joined()


def make_condition(condition: Condition, picture: Picture, draw: Draw, name: str) -> Picture:
    """The condition of one sample; the same in training, at sampling, and by `tuner condition`.

    Args:
        condition: not of given pictures.
        picture: uint8 RGB [H, W, 3], the pixels that are trained on.
        draw: whose random numbers choose among ranges and draw holes.
        name: of the picture's file, for messages.

    Returns:
        uint8 [H, W, 3] or, with a hole, [H, W, 4]; see `values`.

    Raises:
        UserError: it cannot be made of this picture.
    """
    config = condition.config
    assert config is not None, "given pictures are read, not made"
    make = importlib.import_module(f"{__name__}.{condition.kind}").make
    try:
        made: Picture = make(picture, config, draw)
    except UserError:
        raise  # of the model, not of this picture
    except (cv2.error, ValueError, RuntimeError) as error:
        raise UserError(f"{name}: the condition {condition.kind} cannot be made: {error}") from error
    assert made.dtype == np.uint8 and made.shape[:2] == picture.shape[:2] and made.shape[2] in (3, 4)
    return made


def values(condition: Picture) -> npt.NDArray[np.float32]:
    """A condition picture as a network sees it: float32 [3, H, W] in [0, 1], and -1 in the hole.

    condition: uint8 [H, W, 3], or [H, W, 4] with a hole where the fourth channel is below 128.
    """
    seen = condition[:, :, :3].transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    if condition.shape[2] == 4:
        seen[:, condition[:, :, 3] < 128] = MASKED
    return np.ascontiguousarray(seen)


def parameters(condition: Condition) -> dict[str, str | float]:
    """The kind and every parameter that has an effect, for an export's metadata.

    A range is the text "low to high"; a path on this machine is its last part.
    """
    told: dict[str, str | float] = {"condition": condition.kind}
    for key, value in (condition.config.resolved() if condition.config is not None else {}).items():
        if isinstance(value, (list, tuple)):
            told[key] = f"{value[0]:g} to {value[1]:g}"
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            told[key] = float(value)
        elif value is not None:
            told[key] = local_name(value) if isinstance(value, str) else str(value).lower()
    return told

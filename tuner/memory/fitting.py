"""Settings that need less memory, by how little they cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tuner import gather
from tuner.errors import UserError
from tuner.memory.needs import ALL, Needs
from tuner.memory.planning import Passes, plan, precision
from tuner.memory.sizes import show
from tuner.recipe import Recipe
from tuner.rounding import NARROWED, SINGLE

SIDES = (1024, 896, 768, 640, 512, 384, 256, 128, 64)
"""Of pictures that are trained at, in pixels: what is tried where nothing that changes less is enough."""


@dataclass(frozen=True)
class Suggestion:
    """Changed settings.

    Attributes:
        overrides: KEY=VALUE, as the command line takes them.
        peak: bytes that the run would need then, in the phases that have to fit.
        fits: whether that is within the limit.
        cost: what they cost, in words.
    """

    overrides: tuple[str, ...]
    peak: int
    fits: bool
    cost: str


@dataclass(frozen=True)
class _Change:
    values: Mapping[str, Any]  # by key
    cost: str


def fits(
    recipe: Recipe, limit: int, processes: int = 1, device: str = "cpu", phases: Sequence[str] = ALL
) -> list[Suggestion]:
    """What would make a run fit, or come nearer to it.

    First each change that lowers the peak by itself, those that cost least first; then, where none is enough,
    the changes one upon another in that order until they are. Empty where the run fits as it is.

    Args:
        limit: bytes of the device.
        phases: those that have to fit.

    Raises:
        UserError: the recipe cannot be planned.
    """
    passes = Passes()
    now = plan(recipe, processes, device, passes)
    if now.most(phases) <= limit:
        return []
    alone: list[Suggestion] = []
    changes: list[_Change] = []
    together, needs = recipe, now
    for kind in KINDS:
        own = _best(recipe, list(kind(recipe, processes, device)), limit, processes, device, passes, phases)
        if own is None or own[1].most(phases) >= now.most(phases):
            continue
        alone.append(_suggest([own[0]], own[1], limit, phases))
        if needs.most(phases) <= limit:
            continue
        further = list(kind(together, processes, device))
        best = own if not changes else _best(together, further, limit, processes, device, passes, phases)
        if best is not None and best[1].most(phases) < needs.most(phases):
            changes.append(best[0])
            together, needs = changed(together, best[0].values), best[1]
    if len(changes) < 2 or any(one.fits for one in alone):
        return alone
    return [*alone, _suggest(changes, needs, limit, phases)]


def lines(suggestions: list[Suggestion], limit: int) -> list[str]:
    """What is suggested, as text."""
    told = [
        f"{' '.join(one.overrides)}: {show(one.peak)}{'' if one.fits else ', not enough'} ({one.cost})"
        for one in suggestions
    ]
    if not any(one.fits for one in suggestions):
        least = f"; the least is {show(min(one.peak for one in suggestions))}" if suggestions else ""
        told.append(f"nothing here makes it fit into {show(limit)}{least}")
    return told


def changed(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe with other values, by dotted key."""
    for key, value in values.items():
        recipe = _set(recipe, key.split("."), value)
    return recipe


def _set(tree: Any, path: list[str], value: Any) -> Any:
    first, *rest = path
    old = tree[first] if isinstance(tree, dict) else getattr(tree, first)
    new = _set(old, rest, value) if rest else value
    return {**tree, first: new} if isinstance(tree, dict) else tree.model_copy(update={first: new})


def _suggest(changes: list[_Change], needs: Needs, limit: int, phases: Sequence[str]) -> Suggestion:
    overrides = [f"{key}={_written(value)}" for change in changes for key, value in change.values.items()]
    costs = "; ".join(dict.fromkeys(change.cost for change in changes))
    most = needs.most(phases)
    return Suggestion(tuple(overrides), most, most <= limit, costs)


def _written(value: object) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _best(
    recipe: Recipe,
    kind: list[_Change],
    limit: int,
    processes: int,
    device: str,
    passes: Passes,
    phases: Sequence[str],
) -> tuple[_Change, Needs] | None:
    """Of changes of one kind, the mildest that is enough, or else the strongest.

    The stronger, the less is needed: so the strongest is asked first, and the mildest found by halving.
    """

    def asked(change: _Change) -> Needs | None:
        other = changed(recipe, change.values)
        if list(other.all_conflicts()):
            return None
        try:
            return plan(other, processes, device, passes)
        except UserError:
            return None

    if not kind or (strongest := asked(kind[-1])) is None:
        return None
    best, low, high = (kind[-1], strongest), 0, len(kind) - 1
    while low < high and best[1].most(phases) <= limit:
        middle = (low + high) // 2
        needs = asked(kind[middle])
        if needs is not None and needs.most(phases) <= limit:
            best, high = (kind[middle], needs), middle
        else:
            low = middle + 1
    return best


def _looks(recipe: Recipe, processes: int, device: str) -> Iterator[_Change]:
    if recipe.preview.every and recipe.preview.count > 1:
        yield _Change({"preview.count": 1}, "one preview each time")


def _caches(recipe: Recipe, processes: int, device: str) -> Iterator[_Change]:
    if recipe.data.cache == "off":
        yield _Change({"data.cache": None}, "pictures and captions are encoded once, and lie on the disk")


def _divided(recipe: Recipe, processes: int, device: str) -> Iterator[_Change]:
    sizes, now = gather.batch_sizes(recipe), recipe.train.accumulate
    if "contrastive" in recipe.method:
        return
    for accumulate in range(now + 1, min(sizes) // processes + 1):
        micro = max(sizes) // (accumulate * processes)
        # Of the many ways only those that halve the pictures of a pass, and single ones.
        if not any(size % (accumulate * processes) for size in sizes) and (micro & (micro - 1) == 0):
            yield _Change({"train.accumulate": accumulate}, "the same step in more passes")


def _lower(recipe: Recipe, processes: int, device: str) -> Iterator[_Change]:
    if device == "cuda" and precision(recipe, device) == "fp32":
        yield _Change({"train.precision": "bf16"}, "frozen weights and activations are rounded")


def _eight(recipe: Recipe, processes: int, device: str) -> Iterator[_Change]:
    if device == "cuda" and recipe.train.optimiser.name.lower() == "adamw":
        yield _Change({"train.optimiser.name": "adamw8bit"}, "the optimiser's state in 8 bits")


def _again(recipe: Recipe, processes: int, device: str) -> Iterator[_Change]:
    if not recipe.train.gradient_checkpointing:
        yield _Change({"train.gradient_checkpointing": True}, "steps take about 1.4 times as long")


def _quantised(recipe: Recipe, processes: int, device: str) -> Iterator[_Change]:
    method: dict[str, Any] = recipe.method
    exact = {"full", "autoencoder", "contrastive"} & method.keys()
    branch, lora = method.get("controlnet"), method.get("lora")
    exact |= {"controlnet"} if branch is not None and branch.unlock_decoder_at is not None else set()
    if lora is not None and (lora.kind != "lora" or lora.init == "orthogonal" or lora.merge):
        exact.add("lora")
    if device == "cuda" and recipe.base.quantise is None and not exact and not recipe.base.new:
        yield _Change({"base.quantise": "nf4"}, "the frozen base in 4 bits: a little less exact, slower")


def _rounded(recipe: Recipe, processes: int, device: str) -> Iterator[_Change]:
    about, large = recipe.train, {"full", "controlnet"} & recipe.method.keys()  # of adapters it is little
    single = about.optimiser.name.lower() in SINGLE and set(recipe.method) <= set(NARROWED)
    if large and single and about.trained_precision == "fp32" and precision(recipe, device) == "bf16":
        yield _Change(
            {"train.trained_precision": "bf16"}, "trained weights are rounded, up or down at random"
        )


def _average(recipe: Recipe, processes: int, device: str) -> Iterator[_Change]:
    if recipe.train.ema is not None:
        yield _Change({"train.ema": None}, "no average of the weights")


def _rank(recipe: Recipe, processes: int, device: str) -> Iterator[_Change]:
    lora: Any = recipe.method.get("lora")
    if lora is not None and lora.start is None:
        for rank in (64, 32, 16, 8, 4):
            if rank < lora.rank:
                yield _Change({"method.lora.rank": rank}, "adapters that can learn less")


def _smaller(recipe: Recipe, processes: int, device: str) -> Iterator[_Change]:
    side = recipe.data.resolution
    if isinstance(side, int) and "contrastive" not in recipe.method:
        for other in SIDES:
            if side // 2 <= other < side:
                yield _Change({"data.resolution": other}, "smaller pictures")


KINDS = (
    _looks,
    _caches,
    _divided,
    _lower,
    _eight,
    _again,
    _quantised,
    _rounded,
    _average,
    _rank,
    _smaller,
)
"""Changes by what they do, the cheapest kind first; each gives its changes, the mildest first."""

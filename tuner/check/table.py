"""A check's findings as lines of text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tuner.chart import number
from tuner.check.findings import Findings
from tuner.check.room import size
from tuner.data.buckets import Bucket, Row
from tuner.data.buckets import lines as bucket_lines
from tuner.progress import duration

SHOWN = 40
"""Problems that are listed; the rest is counted, and in the JSON."""

Facts = Mapping[str, Any]


def lines(found: Findings) -> list[str]:
    """Everything, section by section; the problems last, where they are seen."""
    facts, told = found.facts, list[str]()
    for title, section in SECTIONS.items():
        if facts.get(title.lower()) and (rows := list(section(facts[title.lower()]))):
            told += [title, *(f"  {row}" for row in rows), ""]
    for title, texts in (("Notes", found.notes), ("Not checked", found.unchecked)):
        if texts:
            told += [title, *(f"  {line}" for text in texts for line in text.splitlines()), ""]
    if not found.problems:
        return [*told, "No problems: a run would start."]
    told.append(f"{len(found.problems)} problem{'s' if len(found.problems) > 1 else ''}")
    for one in found.problems[:SHOWN]:
        first, *rest = one.text.splitlines() or [""]
        told += [f"  {one.about}: {first}", *(f"    {line}" for line in rest)]
    if (more := len(found.problems) - SHOWN) > 0:
        told.append(f"  ... and {more} more; --json lists all")
    return told


def _pairs(pairs: Mapping[str, object]) -> Iterator[str]:
    """Names and values, the values below each other."""
    shown = {name: value for name, value in pairs.items() if value not in (None, "", [])}
    wide = max(map(len, shown), default=0)
    for name, value in shown.items():
        yield f"{name.ljust(wide)}  {number(value) if isinstance(value, (int, float)) else value}"


def _recipe(about: Facts) -> Iterator[str]:
    yield from _pairs(
        {
            "name": about["name"],
            "method": " + ".join(about["method"]),
            "precision": about["precision"],
            "device": about["device"],
            "output": about["output"],
        }
    )


def _base(about: Facts) -> Iterator[str]:
    kind = [about.get("family"), about.get("prediction"), "inpainting" if about.get("inpainting") else None]
    yield from _pairs({"path": about["path"], "kind": ", ".join(one for one in kind if one)})
    rows = []
    for name, one in about.get("components", {}).items():
        types = ", ".join(one.get("types", {}))
        held = size(sum(file["bytes"] for file in one.get("files", ())))
        numbers = f"{one['parameters']:,}" if "parameters" in one else ""
        digest = "new" if one.get("new") else one.get("sha256", "")[:12]
        rows.append([name, numbers, types, held if one.get("files") else "", digest])
    if rows:
        yield from _columns([["component", "numbers", "types", "files", "sha256"], *rows])


def _method(about: Facts) -> Iterator[str]:
    yield from _pairs({"trained": about["trained"]})
    rows = [["trained in", "tensors", "numbers"]]
    for name, one in about["methods"].items():
        for place, counts in one["modules"].items():
            rows.append([f"{name}: {place}", f"{counts['tensors']:,}", f"{counts['numbers']:,}"])
    yield from _columns(rows)


def _data(about: Facts) -> Iterator[str]:
    rows = [["source", "kind", "samples", "repeats", "weight", "captions by"]]
    for title, key in (("", "sources"), (" (held out)", "heldout")):
        for one in about[key]:
            by = one.get("captions_by", "")
            told = ", ".join(f"{kind} {count}" for kind, count in by.items()) if isinstance(by, dict) else by
            times = ", ".join(map(str, one.get("repeats", ())))
            rows.append(
                [
                    one["path"] + title,
                    one["kind"],
                    *(str(one.get(k, "")) for k in ("samples",)),
                    times,
                    f"{one['weight']:g}" if "weight" in one else "",
                    told,
                ]
            )
    yield from _columns(rows)
    yield from _pairs(
        {
            "usable samples": about.get("samples"),
            "masks": about.get("masks"),
            "conditions": about.get("conditions"),
            "left out": len(about["left_out"]) or None,
        }
    )
    if classes := about.get("class_pictures"):
        yield f"class pictures: {classes['there']} of {classes['wanted']} are there"


def _captions(about: Facts) -> Iterator[str]:
    length = about["length"]
    spread = "" if length is None else ", ".join(f"{key} {value}" for key, value in length.items())
    yield from _pairs(
        {
            "looked at": about["looked_at"],
            "empty": about["empty"],
            "different": about["different"],
            about["unit"]: spread,
            "cut": about["cut"],
            "first words": ", ".join(f"{word} {count}" for word, count in about["first_words"]),
        }
    )
    for source, steps in about["operators"].items():
        yield ("operators: " if source == "all" else f"operators of source {source}: ") + "; ".join(steps)
    yield from _bars(about["histogram"])


def _sizes(about: Facts) -> Iterator[str]:
    loss = about["crop_loss"]
    yield from _pairs(
        {
            "width": ", ".join(f"{key} {value}" for key, value in about["width"].items()),
            "height": ", ".join(f"{key} {value}" for key, value in about["height"].items()),
            "enlarged": f"{about['enlarged']} of {about['pictures']}, "
            f"the most {about['most_enlarged']:.3g} times",
            "crop loss": f"mean {loss['mean']:.1%}, most {loss['most']:.1%}",
        }
    )


def _buckets(about: Sequence[Facts]) -> Iterator[str]:
    keys = ("samples", "entries", "batches", "last", "crop_loss", "enlarged")
    yield from bucket_lines(
        [Row(Bucket(one["height"], one["width"]), *(one[key] for key in keys)) for one in about]
    )


def _plan(about: Facts) -> Iterator[str]:
    stages = about.get("stages") or [about]
    batches = [
        f"{one['batch_size']} = {about['processes']} process x {about['accumulate']} accumulated x "
        f"{one['micro_batch']}"
        for one in stages
    ]
    made = about["checkpoints"]
    yield from _pairs(
        {
            "samples": about["samples"],
            "an epoch": _epoch(about),
            "steps": f"{about['steps']:,}"
            + (f" ({about['epochs']:.4g} epochs)" if "epochs" in about else ""),
            "pictures seen": about["images"],
            "batch": ", then ".join(dict.fromkeys(batches)),
            "checkpoints": f"{made['written']} written, {made['kept']} kept",
            "exports": about["exports"],
            "previews": f"{about['previews']} times" if about["previews"] else None,
            "validations": about["validations"] or None,
            "evaluated": f"{about['evaluated']} samples" if about["evaluated"] else None,
        }
    )


def _epoch(about: Facts) -> str | None:
    """What an epoch has, of one stage after the other."""
    if "entries_per_epoch" not in about:
        return None
    stages = about["stages"] or [about]
    each = [f"{one['entries_per_epoch']:,} pictures in {one['steps_per_epoch']:,} steps" for one in stages]
    return ", then ".join(each)


def _time(about: Facts) -> Iterator[str]:
    yield from _pairs(
        {
            "a step": f"{about['seconds_per_step']:.3g} s",
            "pictures a second": about["images_per_second"],
            "all steps": duration(math.ceil(about["seconds"])),
            "measured": f"the median of {about['measured_steps']} steps on {about['device']}",
            "not in it": "encoding, previews, validation, evaluation, export",
        }
    )


def _disk(about: Facts) -> Iterator[str]:
    for place in ("output", "cache"):
        one = about[place]
        parts = [f"{key} {size(one[key])}" for key in ("checkpoints", "exports", "previews") if one.get(key)]
        if one.get("pictures"):
            parts.append(f"{one['pictures']:,} encoded pictures")
        needs = f"{size(one['bytes'])} ({', '.join(parts)}), " if one.get("bytes") else ""
        if one:
            yield f"{place}  {needs}{size(one['free'])} free"
    for what, why in about["cache"].get("uncached", {}).items():
        yield f"{what} are encoded in each step, not cached: {why}"
    if holds := about["output"].get("holds"):
        yield f"the output holds {holds}"


def _memory(about: Facts) -> Iterator[str]:
    yield from about["lines"]
    if "total" in about:
        yield f"{size(about['free'])} of {size(about['total'])} are free here"


SECTIONS: dict[str, Callable[[Any], Iterator[str]]] = {
    "Recipe": _recipe,
    "Base": _base,
    "Method": _method,
    "Data": _data,
    "Captions": _captions,
    "Sizes": _sizes,
    "Buckets": _buckets,
    "Plan": _plan,
    "Time": _time,
    "Disk": _disk,
    "Memory": _memory,
}


def _bars(rows: Sequence[Sequence[int]], wide: int = 30) -> Iterator[str]:
    """A histogram of characters, without the ranges that have nothing."""
    most = max((count for _, _, count in rows), default=0)
    for low, high, count in (row for row in rows if row[2]):
        where = str(low) if low == high else f"{low}-{high}"
        yield f"{where.rjust(9)}  {'#' * math.ceil(wide * count / most)} {count}"


def _columns(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table, its first column to the left and the others to the right."""
    wide = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for first, *others in rows:
        cells = [first.ljust(wide[0]), *(cell.rjust(n) for cell, n in zip(others, wide[1:], strict=True))]
        yield "  ".join(cells).rstrip()

"""Statistics of captions: how many are kept, how they begin, how long they are, how they score."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

from tuner.captioning.keeping import Picture, Scored

FIRST = 20
"""First words that are counted; of others the file gives the number together."""
SHOWN = 5
STEP = 5
"""Words that one column of the printed histogram covers."""


def figures(pictures: Sequence[Picture], unusable: int, least: float | None) -> dict[str, Any]:
    """What is written to statistics.json.

    Args:
        unusable: pictures that could not be used.
        least: the score from which on captions were kept; None: there is no filter.
    """
    groups: dict[str, list[Scored]] = {"new": [], "original": []}
    for picture in pictures:
        for one in picture.captions:
            groups["new" if one.new else "original"].append(one)
    return {
        "pictures": len(pictures) + unusable,
        "unusable": unusable,
        "left_without_caption": sum(not picture.kept for picture in pictures),
        "least_score": least,
        **{name: _group(ones) for name, ones in groups.items()},
    }


def lines(told: dict[str, Any]) -> list[str]:
    """The same in short, to print."""
    out = [
        f"{told['pictures']} pictures, {told['unusable']} that cannot be used, "
        f"{told['left_without_caption']} left without a caption"
    ]
    for name in ("new", "original"):
        group = told[name]
        if not group["count"]:
            out.append(f"{name}: none")
            continue
        out.append(f"{name}: {_counted(group)}")
        if group["kept"]:
            words, firsts = group["words"], list(group["first_words"].items())[:SHOWN]
            shares = (f"{word} {number / group['kept']:.0%}" for word, number in firsts)
            out.append(f"  first words: {', '.join(shares)}")
            out.append(f"  words: {_columns(words['histogram'])}; mean {words['mean']:.1f}")
    return out


def _counted(group: dict[str, Any]) -> str:
    text = f"{group['count']} captions, {group['kept']} kept"
    if group["scores"] is not None:
        scores = group["scores"]
        text += (
            f", {group['rejected']} rejected ({group['reject_rate']:.1%}); scores {scores['min']:.3f} to "
            f"{scores['max']:.3f}, median {scores['median']:.3f}"
        )
    return f"{text}; {group['different']} different among the kept"


def _columns(histogram: dict[str, int]) -> str:
    """A histogram by number of words as text: `1-5: 3, 6-10: 80`."""
    wide: Counter[int] = Counter()
    for words, number in histogram.items():
        wide[max(0, int(words) - 1) // STEP] += number
    parts = (f"{STEP * at + 1}-{STEP * (at + 1)}: {number}" for at, number in sorted(wide.items()))
    return ", ".join(parts)


def _group(ones: Sequence[Scored]) -> dict[str, Any]:
    kept = [one.said.text for one in ones if one.kept]
    scores = [one.score for one in ones if one.score is not None]
    lengths = [len(text.split()) for text in kept]
    firsts = Counter(word for text in kept if (word := _first(text)))
    return {
        "count": len(ones),
        "kept": len(kept),
        "rejected": len(ones) - len(kept),
        "reject_rate": (len(ones) - len(kept)) / len(ones) if ones else 0.0,
        "different": len(set(kept)),
        "scores": _scores(scores) if scores else None,
        "first_words": dict(firsts.most_common(FIRST)),
        "other_first_words": sum(firsts.values()) - sum(n for _, n in firsts.most_common(FIRST)),
        "words": {
            "mean": statistics.fmean(lengths) if lengths else 0.0,
            "histogram": {str(words): number for words, number in sorted(Counter(lengths).items())},
        },
    }


def _first(text: str) -> str:
    """The first word without case and punctuation."""
    bare = (word.strip(".,;:!?\"'()[]{}").lower() for word in text.split())
    return next((word for word in bare if word), "")


def _scores(scores: Sequence[float]) -> dict[str, Any]:
    """Least, middle, greatest and mean; how many lie in each twentieth between least and greatest."""
    low, high = min(scores), max(scores)
    width = (high - low) / 20 or 1.0
    bins = Counter(min(19, math.floor((score - low) / width)) for score in scores)
    return {
        "min": low,
        "median": statistics.median(scores),
        "max": high,
        "mean": statistics.fmean(scores),
        "histogram": [[low + width * at, bins[at]] for at in range(20)],
    }

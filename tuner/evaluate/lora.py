"""Is the style of the training pictures drawn, and is what the prompt names still right?"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np

from tuner.evaluate.judge import read
from tuner.evaluate.measures import Look, Picture, Values, judged, table, without_records
from tuner.sample import sheet, write_png


def measure(look: Look) -> dict[str, Values]:
    """The share of pictures in the trained style, and of right attributes, with and without the LoRA."""
    styles = Counter(s.scene["style"] for s in look.trained if s.scene)
    named = look.named("short")
    if not styles or named is None:
        without_records("LoRA")
        return {}
    style = styles.most_common(1)[0][0]
    prompts = look.prompts("short")
    named = [replace(n, style=None) for n in named]
    pictures = {
        "with the LoRA": look.sampler.pictures(prompts),
        "base alone": look.sampler.pictures(prompts, adapted=False),
    }
    rows = {name: {"style": _share(made, style), **judged(made, named)} for name, made in pictures.items()}
    place = look.output / "evaluation" / "style.png"
    write_png(place, sheet({name: made[:8] for name, made in pictures.items()}, prompts[:8]))
    new, old = rows["with the LoRA"], rows["base alone"]
    verdict = (
        f"the style ({style}) is drawn in {new['style']:.0%} of the pictures with the LoRA, "
        f"{old['style']:.0%} with the base; all that the prompt names is right in {new['all']:.0%}, "
        f"with the base in {old['all']:.0%}"
    )
    return {"style": table(rows, verdict, picture="evaluation/style.png")}


def _share(pictures: list[Picture], style: str) -> float:
    return float(np.mean([read(picture).style == style for picture in pictures]))

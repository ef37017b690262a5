"""What can be asked of `tuner caption`: its options, and the command itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from tuner.options import option, signature

MODEL, FILTER, DATA, MACHINE = "Captioner", "Filter", "Pictures", "Machine"


@dataclass(frozen=True)
class Asked:
    """The options as they were given; None where they were not."""

    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="Pictures at any depth; nothing in it is changed.")
    ]
    out: Annotated[
        Path,
        option("--out", "A folder of its own: links to what is kept, metadata.jsonl, scores; resumed.", DATA),
    ]
    model: Annotated[
        str | None,
        option("--model", "BLIP, BLIP-2, GIT or another image-to-text model: a folder or a Hub id.", MODEL),
    ] = None
    revision: Annotated[str | None, option("--revision", "Branch, tag or commit of --model.", MODEL)] = None
    prompt: Annotated[
        str | None, option("--prompt", "What each caption goes on from; it is cut off again.", MODEL)
    ] = None
    beams: Annotated[int | None, option("--beams", "Of beam search; 3, with 1 greedy.", MODEL)] = None
    top_p: Annotated[
        float | None, option("--top-p", "Draw from the nucleus of this probability, as 0.9.", MODEL)
    ] = None
    seed: Annotated[int | None, option("--seed", "Of what --top-p draws; 0.", MODEL)] = None
    longest: Annotated[int | None, option("--longest", "Tokens of a caption at most; 40.", MODEL)] = None
    shortest: Annotated[int | None, option("--shortest", "Tokens of a caption at least; 0.", MODEL)] = None
    kind: Annotated[
        str | None, option("--kind", "What new captions are called for captions.choose; new.", MODEL)
    ] = None
    filter: Annotated[
        str | None,
        option("--filter", "BLIP or BLIP-2 with ITM, or CLIP: a folder, a Hub id, embedded.", FILTER),
    ] = None
    filter_revision: Annotated[
        str | None, option("--filter-revision", "Branch, tag or commit of --filter.", FILTER)
    ] = None
    threshold: Annotated[
        float | None,
        option("--threshold", "Least score: ITM's probability (0.5 if absent), CLIP's cosine.", FILTER),
    ] = None
    share: Annotated[
        float | None, option("--share", "Keep this share of all captions instead, the best.", FILTER)
    ] = None
    caption_column: Annotated[
        str | None, option("--caption-column", "Of a listing, with the captions that are there; text.", DATA)
    ] = None
    condition_from: Annotated[
        str | None, option("--condition-from", "As in a recipe: these pictures get no captions.", DATA)
    ] = None
    mask_from: Annotated[
        str | None, option("--mask-from", "As in a recipe: these pictures get no captions.", DATA)
    ] = None
    batch: Annotated[int, option("--batch", "Pictures at once.", MACHINE)] = 8
    device: Annotated[str, option("--device", "auto, cpu, cuda, cuda:1 ...", MACHINE)] = "auto"
    dtype: Annotated[
        str | None,
        option("--dtype", "Of the captioner: fp32, bf16, fp16; bf16 on a GPU. A filter has fp32.", MACHINE),
    ] = None


def caption(**given: Any) -> None:
    """Caption a folder by a local model and filter old and new captions by how they match (CapFilt)."""
    from tuner.captioning.capfilt import run

    run(Asked(**given))


caption.__signature__ = signature(Asked)  # type: ignore[attr-defined]
caption.__annotations__ = get_type_hints(Asked, include_extras=True)

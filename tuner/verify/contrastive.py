"""The CLIP pair's folders embed captions and pictures as the trained pair does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F

from tuner.method import Card, Method
from tuner.methods.contrastive import Contrastive
from tuner.verify.compare import one, same_output, short
from tuner.verify.component import folder_name, read_back
from tuner.verify.scene import PROMPTS, Scene


def check(scene: Scene, method: Method, files: Sequence[Path], card: Card) -> dict[Path, str]:
    """Prove `diffusers/image_encoder/`, and `diffusers/text_encoder/` where it was trained.

    Raises:
        VerifyError: a folder's tensors, configuration or outputs are not the trained encoder's.
    """
    assert isinstance(method, Contrastive)
    side = int(method.image_encoder.config.image_size)
    ids = scene.family.tokenize(PROMPTS).to(scene.family.device).ids[:, 0]
    pixels = F.interpolate(scene.picture, (side, side)) * 2 - 1
    of = {"text_encoder": (ids, "last_hidden_state"), "image_encoder": (pixels, "image_embeds")}
    lines: dict[Path, str] = {}
    for name, trained in method.networks().items():
        path, (inputs, output) = one(files, f"diffusers/{name}/model.safetensors"), of[name]
        loaded, count = read_back(path, trained, card)
        found, wanted = (getattr(network(inputs), output) for network in (loaded, trained))
        error = same_output(f"{folder_name(path)}: the output", found, wanted, card.dtype)
        lines[path] = (
            f"{folder_name(path)}: all {count} tensors loaded by transformers; "
            f"the output differs by {error:.1e} of its size ({short(card.dtype)})"
        )
    return lines

"""The autoencoder's folder encodes and decodes as the trained one does, in the scale that was measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from tuner.method import Card, Method
from tuner.methods.autoencoder import Autoencoder
from tuner.verify.compare import VerifyError, one, same_output, short
from tuner.verify.component import folder_name, read_back
from tuner.verify.scene import Scene

SCALE = 1e-3
"""How far scaling_factor times the latents' deviation may be off 1: it is written with five decimals."""


def check(scene: Scene, method: Method, files: Sequence[Path], card: Card) -> dict[Path, str]:
    """Prove `diffusers/vae/`.

    Raises:
        VerifyError: its tensors, configuration, latents or pictures are not the trained autoencoder's.
    """
    assert isinstance(method, Autoencoder)
    path = one(files, "diffusers/vae/diffusion_pytorch_model.safetensors")
    where = folder_name(path)
    loaded, count = read_back(path, method.vae, card, but=("scaling_factor",))
    pixels = scene.picture * 2 - 1
    errors = []
    means = [vae.encode(pixels).latent_dist.mean for vae in (loaded, method.vae)]  # type: ignore[operator]
    errors.append(same_output(f"{where}: the latents", means[0], means[1], card.dtype))
    seen = [vae.decode(means[1]).sample for vae in (loaded, method.vae)]  # type: ignore[operator]
    errors.append(same_output(f"{where}: the decoded picture", seen[0], seen[1], card.dtype))
    _scale(where, float(loaded.config.scaling_factor), method)  # type: ignore[union-attr,arg-type]
    return {
        path: f"{where}: all {count} tensors loaded by diffusers; "
        f"latents and pictures differ by {max(errors):.1e} of their size at most ({short(card.dtype)})"
    }


def _scale(where: str, factor: float, method: Autoencoder) -> None:
    """The scaling factor brings the latents, as training measured them, to a deviation of 1."""
    count, total, squares = method.moments.tolist()
    if count == 0:
        return  # not one step was trained
    deviation = math.sqrt(squares / count - (total / count) ** 2)
    if not abs(factor * deviation - 1) <= SCALE:
        raise VerifyError(
            f"{where}: scaling_factor {factor} does not fit the latents' deviation {deviation:.5g}"
        )

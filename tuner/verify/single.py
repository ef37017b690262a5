"""A checkpoint in the original layout as diffusers reads it, beside this project's own reader."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tuner.verify.compare import LOADING, VerifyError, same_tensors

OTHERS = ("unet", "vae", "scheduler", "tokenizer", "text_encoder", "image_encoder", "feature_extractor")
SECOND = ("tokenizer_2", "text_encoder_2")


def read(path: Path, name: str, folder: Path, family: str) -> nn.Module:
    """One network of a checkpoint through `from_single_file`, in float32 on the CPU.

    Args:
        name: its component name: `unet`, `text_encoder` or `text_encoder_2`.
        folder: a diffusers folder of the same sizes, whose configurations are used.
        family: sd1, sd2 or sdxl.

    Raises:
        VerifyError: diffusers does not take it.
    """
    import diffusers

    about = {"config": str(folder), "local_files_only": True, "torch_dtype": torch.float32}
    try:
        if name == "unet":
            made: nn.Module = diffusers.UNet2DConditionModel.from_single_file(
                str(path), subfolder="unet", **about
            )
            return made
        # transformers' classes have no such loader of their own: a pipeline of nothing else.
        second = family == "sdxl"
        kind: Any = diffusers.StableDiffusionXLPipeline if second else diffusers.StableDiffusionPipeline
        without = (*OTHERS, *(SECOND if second else ("safety_checker",)))
        pipe = kind.from_single_file(str(path), **about, **{n: None for n in without if n != name})
    except (*LOADING, AttributeError) as error:  # its converters ask for keys and shapes as they come
        raise VerifyError(f"{path.name}: diffusers does not read its {name}: {error}") from error
    network: nn.Module = getattr(pipe, name)
    return network


def same(
    path: Path, states: Mapping[str, Mapping[str, Tensor]], folder: Path, family: str, dtype: torch.dtype
) -> str:
    """Compare what diffusers makes of networks of a checkpoint, one at a time; a part of the file's line.

    Args:
        states: the tensors that they have, by component name.
        dtype: the file's.

    Raises:
        VerifyError: diffusers does not read one, or a tensor is another one.
    """
    for name, state in states.items():
        found = read(path, name, folder, family).state_dict()
        stored = {key: tensor.to(dtype) for key, tensor in found.items()}
        same_tensors(f"{path.name}, read by diffusers: {name}", stored, state, dtype)
    assert states
    return f"diffusers' from_single_file reads the same {' and '.join(states)}"

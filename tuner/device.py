"""The machine a run finds: precision, threads, processes."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator

from tuner.errors import UserError
from tuner.progress import say

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 itself (AVX512_BF16 or AMX)."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def precision(asked: str) -> str:
    """What `auto` means here: bf16 where the hardware computes in it, else fp32."""
    if asked != "auto":
        return asked
    has = torch.cuda.is_bf16_supported() if torch.cuda.is_available() else cpu_has_bf16()
    return "bf16" if has else "fp32"


def quiet() -> None:
    """Let the libraries say errors only: what else they say of this project's own calls helps nobody."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def deterministic(on: bool) -> None:
    """Let every operation give the same bits each time, or be an error where it cannot; before any of them.

    https://docs.pytorch.org/docs/stable/notes/randomness.html
    """
    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA's matrix library starts
    torch.use_deterministic_algorithms(on)
    torch.backends.cudnn.deterministic = on
    torch.backends.cudnn.benchmark = False


def start(asked: str, threads: int | None, same_bits: bool = False) -> Accelerator:
    """The accelerator in the recipe's precision, whatever the launcher says, and the CPU's threads.

    Args:
        same_bits: `train.deterministic`.

    Raises:
        UserError: fp16 is asked for without a GPU; processes do not find one another.
    """
    quiet()
    deterministic(same_bits)
    chosen = precision(asked)
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION")
    if chosen == "fp16" and not torch.cuda.is_available():
        raise UserError("train.precision: fp16 needs a GPU, and none is here; take bf16, fp32 or auto")
    # Unless it is told that the CPU is meant, accelerate takes processes on a machine without a GPU for
    # single runs, which would all write to one output.
    alone = not torch.accelerator.is_available()
    accelerator = Accelerator(mixed_precision="no" if chosen == "fp32" else chosen, cpu=alone)
    if (started := int(os.environ.get("WORLD_SIZE", "1"))) != accelerator.num_processes:
        raise UserError(
            f"{started} processes were started, but accelerate sees {accelerator.num_processes}: they would "
            "train beside one another; see `accelerate env`"
        )
    if launcher not in (None, "no") and launcher != chosen:
        say(f"the launcher asks for {launcher}; the recipe's precision is used: {chosen}")
    if accelerator.device.type == "cpu":
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // local))
    return accelerator

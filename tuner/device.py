"""The machine a run finds: precision, threads, processes."""

from __future__ import annotations

import functools
import logging
import os
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from tuner import allocator, processes
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

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
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


@dataclass(frozen=True)
class Sharding:
    """How the launcher wants networks shared out among the processes (FSDP2).

    Attributes:
        reshard: a block's parts are let go of between its forward and its backward.
    """

    reshard: bool = True


@functools.cache
def sharding() -> Sharding | None:
    """What the launcher asks for; None: every process holds everything.

    Read once, from the environment variables that `accelerate launch` makes of its configuration
    (fsdp_config), and taken away there: accelerate, which refuses it on the CPU, and transformers would act
    on them on their own.

    Raises:
        UserError: what is asked for is not done here.
    """
    if _told("ACCELERATE_USE_DEEPSPEED", False):
        # In backward() its engine clips and steps, at each micro-batch: accumulation, the guard and the
        # recipe's clipping would have no effect, and a checkpoint would hold the first process's part alone.
        raise UserError(
            "distributed_type (ACCELERATE_USE_DEEPSPEED): DeepSpeed is not supported; expected FSDP2, which "
            "shares out the same: launch/accelerate/fsdp2.yaml is as ZeRO-3, fsdp2_kept.yaml as ZeRO-2"
        )
    if not _told("ACCELERATE_USE_FSDP", False):
        return None
    if (found := os.environ.get("FSDP_VERSION", "1")) != "2":
        raise UserError(f"fsdp_version (FSDP_VERSION): found {found}; expected 2, FSDP2 is what is supported")
    if _told("FSDP_OFFLOAD_PARAMS", False):
        raise UserError("fsdp_offload_params (FSDP_OFFLOAD_PARAMS): found true; expected false")
    if _told("FSDP_ACTIVATION_CHECKPOINTING", False):
        raise UserError(
            "fsdp_activation_checkpointing (FSDP_ACTIVATION_CHECKPOINTING): found true; expected false: "
            "the recipe says it (train.gradient_checkpointing)"
        )
    asked = Sharding(_told("FSDP_RESHARD_AFTER_FORWARD", True))
    left = {key: os.environ.pop(key) for key in sorted(os.environ) if key.startswith("FSDP_")}
    del os.environ["ACCELERATE_USE_FSDP"]
    usual = {"FSDP_AUTO_WRAP_POLICY": "NO_WRAP", "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
    for key in ("FSDP_TRANSFORMER_CLS_TO_WRAP", "FSDP_IGNORED_MODULES", *usual):
        if left.get(key, usual.get(key)) != usual.get(key):
            say(f"{key}={left[key]} has no effect: networks are parted, and checkpoints written, in one way")
    return asked


def _told(key: str, default: bool) -> bool:
    """A switch among the environment's variables."""
    found = os.environ.get(key, str(default)).lower()
    if found not in ("true", "false", "1", "0"):
        raise UserError(f"{key}: found {found}; expected true or false")
    return found in ("true", "1")


def start(asked: str, threads: int | None, same_bits: bool = False) -> Accelerator:
    """The accelerator in the recipe's precision, whatever the launcher says, and the CPU's threads.

    Args:
        same_bits: `train.deterministic`.

    Raises:
        UserError: fp16 is asked for without a GPU; processes do not find one another, or are more than
            there are GPUs.
    """
    quiet()
    deterministic(same_bits)
    chosen = precision(asked)
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION")
    parted = sharding()  # before accelerate looks at the same variables
    if chosen == "fp16" and not torch.cuda.is_available():
        raise UserError("train.precision: fp16 needs a GPU, and none is here; take bf16, fp32 or auto")
    # Unless it is told that the CPU is meant, accelerate takes processes on a machine without a GPU for
    # single runs, which would all write to one output.
    alone = not torch.accelerator.is_available()
    _check_devices()
    accelerator = Accelerator(
        mixed_precision="no" if chosen == "fp32" else chosen,
        cpu=alone,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=processes.WAIT)],
    )
    if (started := int(os.environ.get("WORLD_SIZE", "1"))) != accelerator.num_processes:
        raise UserError(
            f"{started} processes were started, but accelerate sees {accelerator.num_processes}: they would "
            "train beside one another; see `accelerate env`"
        )
    if parted is not None and accelerator.num_processes == 1:
        say("FSDP2: there is one process, which holds everything")
    if launcher not in (None, "no") and launcher != chosen:
        say(f"the launcher asks for {launcher}; the recipe's precision is used: {chosen}")
    if accelerator.device.type == "cpu":
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // local))
        allocator.keep_freed()
    return accelerator


def _check_devices() -> None:
    """Raises UserError where two processes would have one GPU, which nccl refuses later, and in riddles."""
    _, number = processes.local()
    there = torch.cuda.device_count() if torch.cuda.is_available() else number
    if number > there:
        raise UserError(
            f"{number} processes were started on this machine, which has {there} GPU(s): start as many "
            "(PROCESSES with launch/train.sh, --nproc_per_node with torchrun)"
        )

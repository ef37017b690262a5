"""A training step of the embedded UNet with plain and with fused attention, side by side, on the CPU.

    python benchmarks/attention.py [--threads 1] [--rounds 5]

The two take turns in one process; the figure is the ratio of the medians (fused / plain), above 1 where plain
matrix products are faster.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

EMBEDDED = Path(__file__).resolve().parents[1] / "tuner" / "embedded"
CASES = {"64 px, batch 64": (8, 64), "128 px, batch 32": (16, 32), "256 px, batch 8": (32, 8)}


def step(unet: Any, latents: torch.Tensor, hidden: torch.Tensor) -> float:
    """Seconds of a forward and a backward pass under bf16 autocast."""
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        seen = unet(latents, torch.full((len(latents),), 500), hidden).sample
    seen.float().square().mean().backward()
    unet.zero_grad(set_to_none=True)
    return time.perf_counter() - start


def main() -> None:
    """Print a table of medians and their ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(EMBEDDED, subfolder="unet", torch_dtype=torch.float32)
    kinds = {"fused": AttnProcessor2_0(), "plain": AttnProcessor()}
    for name, (side, batch) in CASES.items():
        latents, hidden = torch.randn(batch, 4, side, side), torch.randn(batch, 77, 256)
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        for turn in range(arguments.rounds + 1):
            for kind, processor in kinds.items():
                unet.set_attn_processor(processor)
                seconds = step(unet, latents, hidden)
                if turn:  # the first of each is a warm-up
                    times[kind].append(seconds)
        fused, plain = (statistics.median(times[kind]) for kind in ("fused", "plain"))
        print(f"{name}: fused {fused:.3f} s, plain {plain:.3f} s, ratio {fused / plain:.2f}")


if __name__ == "__main__":
    main()

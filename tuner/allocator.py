"""Memory of the C library's allocator, kept from one step to the next.

By itself glibc gives large freed blocks back to the system, and each step asks for the same ones again, page
by page. Told to keep them, a training step on the CPU has a few page faults in place of thousands
(benchmarks/cpu.py), and its peak is the same.
"""

from __future__ import annotations

import ctypes
import os

# Of malloc.h: what is larger is mapped by itself; what may lie free at the heap's end; how much it grows by.
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
KEPT = {MMAP_THRESHOLD: 1 << 30, TRIM_THRESHOLD: (1 << 31) - 1, TOP_PAD: 64 << 20}


def keep_freed() -> bool:
    """Let the allocator keep what is freed; whether it does.

    Not where the environment has settings of its own (MALLOC_..., GLIBC_TUNABLES) or another allocator
    (LD_PRELOAD), nor where the C library is no glibc.
    """
    if any(key.startswith("MALLOC_") or key in ("GLIBC_TUNABLES", "LD_PRELOAD") for key in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    return mallopt is not None and all(mallopt(key, value) == 1 for key, value in KEPT.items())

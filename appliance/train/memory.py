"""The memory of a training process: how its C library keeps it, and how much it has taken at most."""

from __future__ import annotations

import ctypes
import resource

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEEP = (1 << 31) - 1


def keep_freed_memory() -> None:
    """Have freed tensors kept for the next ones instead of given back to the system.

    Taking a page again costs a fault and its zeroing, which is a third of the time of a training step on a CPU. Where
    the C library has no such setting nothing changes. Source: mallopt(3).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, KEEP)


def give_back_freed_memory() -> None:
    """Give back to the system what is kept now. Source: malloc_trim(3)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def peak_memory() -> int:
    """Most bytes held so far: tensors on the GPU, without one the resident memory of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

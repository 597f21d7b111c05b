"""What this box has, and how busy it is."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Set
from pathlib import Path

import psutil

from appliance import api, gpu


def measure(home: Path) -> api.Hardware:
    """The box now; the disk is that of `home`."""
    memory = psutil.virtual_memory()
    disk = psutil.disk_usage(str(home))
    return api.Hardware(
        cores=os.cpu_count() or 1,
        cpu_load=psutil.cpu_percent(interval=None),
        memory_total=memory.total,
        memory_used=memory.total - memory.available,
        disk_total=disk.total,
        disk_free=disk.free,
        gpus=tuple(
            api.Gpu(
                name=card.name,
                memory_total=card.memory_total,
                memory_used=card.memory_used,
                utilisation=card.utilisation,
            )
            for card in gpu.cards()
        ),
    )


def free_memory() -> int | None:
    """Bytes that a model may still take: of the GPU, else of the machine; None where the GPU does not tell."""
    card = gpu.chosen()
    if card is None:
        return int(psutil.virtual_memory().available)
    return None if card.memory_total is None or card.memory_used is None else card.memory_total - card.memory_used


def total_memory() -> int | None:
    """Bytes of the GPU, else of the machine; None where the GPU does not tell."""
    card = gpu.chosen()
    return int(psutil.virtual_memory().total) if card is None else card.memory_total


def held_by(pids: Set[int]) -> int:
    """Bytes that processes hold of what models are in: of the GPU, else of the machine; 0 where nobody tells."""
    if gpu.chosen() is not None:
        return gpu.held_by(pids) or 0
    held = 0
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            memory = psutil.Process(pid).memory_info()
            held += memory.rss - memory.shared
    return held


def has_gpu() -> bool:
    """Whether an NVIDIA GPU can be used here."""
    return gpu.chosen() is not None

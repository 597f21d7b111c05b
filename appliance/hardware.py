"""What this box has, and how busy it is."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import psutil

from appliance import api


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
        gpus=_gpus(),
    )


def free_memory() -> int:
    """Bytes that a model may still take: of the first GPU, else of the machine."""
    gpus = _gpus()
    return gpus[0].memory_total - gpus[0].memory_used if gpus else int(psutil.virtual_memory().available)


def total_memory() -> int:
    """Bytes of the first GPU, else of the machine."""
    gpus = _gpus()
    return gpus[0].memory_total if gpus else int(psutil.virtual_memory().total)


def has_gpu() -> bool:
    """Whether an NVIDIA GPU can be used here."""
    return _nvml() is not None


@functools.cache
def _nvml() -> Any | None:
    """The initialised NVML binding, or None where there is no driver or no GPU."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return pynvml if pynvml.nvmlDeviceGetCount() else None
    except pynvml.NVMLError:
        return None


def _gpus() -> tuple[api.Gpu, ...]:
    nvml = _nvml()
    if nvml is None:
        return ()
    try:
        return tuple(_gpu(nvml, index) for index in range(nvml.nvmlDeviceGetCount()))
    except nvml.NVMLError:
        return ()


def _gpu(nvml: Any, index: int) -> api.Gpu:
    device = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = nvml.nvmlDeviceGetMemoryInfo(device)
    return api.Gpu(
        name=str(nvml.nvmlDeviceGetName(device)),
        memory_total=int(memory.total),
        memory_used=int(memory.used),
        utilisation=int(nvml.nvmlDeviceGetUtilizationRates(device).gpu),
    )

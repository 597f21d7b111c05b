"""The NVIDIA GPU that this box works on: one, the same for what is measured, for workers and for engines."""

from __future__ import annotations

import os
from collections.abc import Set
from dataclasses import dataclass
from typing import Any

from appliance.errors import InvalidInput
from appliance.settings import load_settings

_HIDDEN = ("", "-1", "NoDevFiles")
"""What CUDA_VISIBLE_DEVICES is set to where no GPU is to be used."""
_HOLDS_FP8, _MULTIPLIES_FP8 = (8, 0), (8, 9)
"""Least compute capabilities: vLLM's Marlin kernels take weights in FP8, and the card itself multiplies in FP8."""


@dataclass(frozen=True)
class Card:
    """A GPU, or a part of one (MIG), as the driver tells; None for a figure that it does not tell."""

    number: int
    """Its place in the order of the PCI bus; of a part, that of the GPU."""
    uuid: str
    """Empty where it does not answer."""
    name: str
    memory_total: int | None
    memory_used: int | None
    utilisation: int | None
    """Percent."""
    capability: tuple[int, int] | None = None
    """Compute capability: major and minor version."""

    @property
    def holds_fp8(self) -> bool:
        """Whether a model's weights can be served in FP8 on it; no where it does not tell what it can."""
        return self.capability is not None and self.capability >= _HOLDS_FP8

    @property
    def multiplies_fp8(self) -> bool:
        """Whether it multiplies in FP8, so that what goes into a layer is rounded too."""
        return self.capability is not None and self.capability >= _MULTIPLIES_FP8


def cards() -> tuple[Card, ...]:
    """All GPUs, of one that is cut (MIG) its parts; none where no driver answers."""
    nvml = _driver()
    if nvml is None:
        return ()
    found: list[Card] = []
    for number in range(nvml.nvmlDeviceGetCount()):
        device = _told(nvml, "GetHandleByIndex", number)
        if device is None:  # it is lost, or not for this user
            found.append(Card(number, "", "a GPU that does not answer", None, None, None))
            continue
        capability = _told(nvml, "GetCudaComputeCapability", device)
        found += [_card(nvml, number, part, capability) for part in _parts(nvml, device) or [device]]
    return tuple(found)


def chosen() -> Card | None:
    """The GPU by the setting `gpu`, else by CUDA_VISIBLE_DEVICES, else the one with the most memory; None without one.

    Raises InvalidInput where there is none of that name.
    """
    known = cards()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    wanted = load_settings().gpu
    if not wanted and visible is not None:
        wanted = visible.split(",")[0].strip()
        if wanted in _HIDDEN:
            return None
    if not known:
        return None
    if not wanted:
        return max(known, key=lambda card: (bool(card.uuid), card.memory_total or 0))
    for card in known:
        if wanted == str(card.number) or card.uuid.startswith(wanted):
            return card
    raise InvalidInput(
        "no_such_gpu",
        f"there is no GPU {wanted} here",
        "set APPLIANCE_GPU to one of " + ", ".join(f"{card.number} ({card.name}, {card.uuid})" for card in known),
    )


def environment() -> dict[str, str]:
    """What a child's environment has so that it sees the chosen GPU alone, and counts as the driver does."""
    card = chosen()
    return {"CUDA_VISIBLE_DEVICES": card.uuid or str(card.number), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"} if card else {}


def held_by(pids: Set[int]) -> int | None:
    """Bytes of the chosen GPU that these processes hold; None where the driver does not tell, or there is no GPU."""
    nvml, card = _driver(), chosen()
    if nvml is None or card is None:
        return None
    device = _told(nvml, "GetHandleByUUID", card.uuid)
    using = device and _told(nvml, "GetComputeRunningProcesses", device)
    if using is None:
        return None
    held = [one.usedGpuMemory for one in using if one.pid in pids]
    return None if None in held else sum(held)


_started: list[Any] = []
"""The binding to the driver, once that has answered: it may come up after the daemon."""


def _driver() -> Any | None:
    import pynvml

    try:
        if not _started:
            pynvml.nvmlInit()
            _started.append(pynvml)
        return pynvml if pynvml.nvmlDeviceGetCount() else None
    except pynvml.NVMLError:
        return None


def _parts(nvml: Any, device: Any) -> list[Any]:
    """Handles of the parts of a GPU that is cut."""
    count = _told(nvml, "GetMaxMigDeviceCount", device) or 0
    parts = (_told(nvml, "GetMigDeviceHandleByIndex", device, at) for at in range(count))
    return [part for part in parts if part is not None]


def _card(nvml: Any, number: int, device: Any, capability: Any | None) -> Card:
    memory = _told(nvml, "GetMemoryInfo", device)
    rates = _told(nvml, "GetUtilizationRates", device)
    return Card(
        number,
        str(_told(nvml, "GetUUID", device) or ""),
        str(_told(nvml, "GetName", device) or "NVIDIA GPU"),
        int(memory.total) if memory else None,
        int(memory.used) if memory else None,
        int(rates.gpu) if rates else None,
        (int(capability[0]), int(capability[1])) if capability else None,
    )


def _told(nvml: Any, what: str, *of: Any) -> Any | None:
    """What the driver tells of a device; None where it does not, as of parts and virtual GPUs."""
    try:
        return getattr(nvml, f"nvmlDevice{what}")(*of)
    except nvml.NVMLError:
        return None

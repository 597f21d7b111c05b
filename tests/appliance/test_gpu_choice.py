"""Which GPU of a box is worked on, with a driver that is made here."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from appliance import gpu, hardware
from appliance.errors import InvalidInput
from appliance.supervisor import processes

GIB = 1 << 30


class NVMLError(Exception):
    pass


@dataclass
class Device:
    uuid: str
    total: int | None
    used: int = 0
    load: int | None = 7
    parts: list[Device] = field(default_factory=list)
    users: Mapping[int, int | None] | None = None
    capability: tuple[int, int] | None = (8, 6)
    lost: bool = False
    """It has fallen off the bus, or is not for this user."""


class Driver:
    """NVML's binding over `devices`; with `asleep` it does not answer."""

    NVMLError = NVMLError

    def __init__(self, *devices: Device) -> None:
        self.devices, self.asleep = devices, False

    def nvmlInit(self) -> None:
        if self.asleep:
            raise NVMLError

    def nvmlDeviceGetCount(self) -> int:
        return len(self.devices)

    def nvmlDeviceGetHandleByIndex(self, number: int) -> Device:
        if self.devices[number].lost:
            raise NVMLError
        return self.devices[number]

    def nvmlDeviceGetMaxMigDeviceCount(self, device: Device) -> int:
        if not device.parts:
            raise NVMLError
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, device: Device, at: int) -> Device:
        if at >= len(device.parts):
            raise NVMLError
        return device.parts[at]

    def nvmlDeviceGetCudaComputeCapability(self, device: Device) -> tuple[int, int]:
        if device.capability is None:
            raise NVMLError
        return device.capability

    def nvmlDeviceGetUUID(self, device: Device) -> str:
        return device.uuid

    def nvmlDeviceGetName(self, device: Device) -> str:
        return f"the {device.uuid}"

    def nvmlDeviceGetMemoryInfo(self, device: Device) -> Any:
        if device.total is None:
            raise NVMLError
        return SimpleNamespace(total=device.total, used=device.used)

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> Device:
        device = next((device for device in self.devices if device.uuid == uuid and not device.lost), None)
        if device is None:
            raise NVMLError
        return device

    def nvmlDeviceGetComputeRunningProcesses(self, device: Device) -> Any:
        if device.users is None:
            raise NVMLError
        return [SimpleNamespace(pid=pid, usedGpuMemory=held) for pid, held in device.users.items()]

    def nvmlDeviceGetUtilizationRates(self, device: Device) -> Any:
        if device.load is None:
            raise NVMLError
        return SimpleNamespace(gpu=device.load)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_started", [])
    for variable in ("APPLIANCE_GPU", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(variable, raising=False)


def plug(monkeypatch: pytest.MonkeyPatch, *devices: Device) -> Driver:
    driver = Driver(*devices)
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    return driver


DISPLAY, BIG = Device("GPU-aa11", 2 * GIB, GIB), Device("GPU-bb22", 24 * GIB, 4 * GIB)


def test_without_a_driver_there_is_none_and_one_that_comes_up_later_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = plug(monkeypatch, BIG)
    driver.asleep = True
    assert (gpu.cards(), gpu.chosen(), gpu.environment(), hardware.has_gpu()) == ((), None, {}, False)
    driver.asleep = False
    assert hardware.has_gpu()


def test_the_one_with_the_most_memory_is_worked_on_by_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plug(monkeypatch, DISPLAY, BIG)
    assert gpu.environment() == {"CUDA_VISIBLE_DEVICES": "GPU-bb22", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert (hardware.free_memory(), hardware.total_memory()) == (20 * GIB, 24 * GIB)
    row = processes.spawn(
        processes.new_row("worker", "r", "sft"), ["/usr/bin/env"], {"A": "b"}, tmp_path / "log", tmp_path
    )
    while processes.alive(row):
        pass
    said = dict(line.split("=", 1) for line in (tmp_path / "log").read_text().splitlines())
    assert (said["CUDA_VISIBLE_DEVICES"], said["CUDA_DEVICE_ORDER"], said["A"]) == ("GPU-bb22", "PCI_BUS_ID", "b")


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("APPLIANCE_GPU", "0", "GPU-aa11"),
        ("APPLIANCE_GPU", "GPU-aa", "GPU-aa11"),
        ("CUDA_VISIBLE_DEVICES", "0,1", "GPU-aa11"),
        ("CUDA_VISIBLE_DEVICES", "GPU-bb22", "GPU-bb22"),
        ("CUDA_VISIBLE_DEVICES", "", None),
        ("CUDA_VISIBLE_DEVICES", "-1", None),
    ],
)
def test_another_is_named(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, expected: str | None) -> None:
    plug(monkeypatch, DISPLAY, BIG)
    monkeypatch.setenv(variable, value)
    card = gpu.chosen()
    assert (card and card.uuid) == expected


@pytest.mark.parametrize(
    ("capability", "holds", "multiplies"),
    [
        ((7, 5), False, False),
        ((8, 0), True, False),
        ((8, 6), True, False),
        ((8, 9), True, True),
        ((9, 0), True, True),
        ((12, 0), True, True),
        (None, False, False),
    ],
)
def test_what_a_card_can_in_fp8(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, holds: bool, multiplies: bool
) -> None:
    plug(monkeypatch, Device("GPU-bb22", 24 * GIB, capability=capability))
    card = gpu.chosen()
    assert card
    assert (card.holds_fp8, card.multiplies_fp8) == (holds, multiplies)


def test_the_setting_wins_and_one_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plug(monkeypatch, DISPLAY, BIG)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("APPLIANCE_GPU", "1")
    assert gpu.environment()["CUDA_VISIBLE_DEVICES"] == "GPU-bb22"
    monkeypatch.setenv("APPLIANCE_GPU", "2")
    with pytest.raises(InvalidInput, match=r"no GPU 2 here .* one of 0 \(the GPU-aa11, GPU-aa11\), 1 "):
        gpu.chosen()


def test_one_that_is_lost_is_listed_and_another_is_worked_on(monkeypatch: pytest.MonkeyPatch) -> None:
    plug(monkeypatch, Device("GPU-ee55", 80 * GIB, lost=True), BIG)
    assert [(card.number, card.name) for card in gpu.cards()] == [
        (0, "a GPU that does not answer"),
        (1, "the GPU-bb22"),
    ]
    assert gpu.environment()["CUDA_VISIBLE_DEVICES"] == "GPU-bb22"


def test_the_only_one_when_lost_is_not_the_same_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    plug(monkeypatch, Device("GPU-ee55", 80 * GIB, lost=True))
    assert gpu.environment()["CUDA_VISIBLE_DEVICES"] == "0", "so that PyTorch says what is wrong with it"
    assert (hardware.has_gpu(), hardware.total_memory(), gpu.held_by({1})) == (True, None, None)


MIG = ((1, 10, 0), (2, 40, 8))


def test_of_a_card_that_is_cut_the_parts_are_known_by_their_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [Device(f"MIG-{n}", size * GIB, used * GIB, None, capability=None) for n, size, used in MIG]
    plug(monkeypatch, Device("GPU-cc33", 80 * GIB, parts=parts, capability=(9, 0)))
    assert [(card.number, card.uuid) for card in gpu.cards()] == [(0, "MIG-1"), (0, "MIG-2")]
    assert gpu.environment()["CUDA_VISIBLE_DEVICES"] == "MIG-2"
    assert [card.capability for card in gpu.cards()] == [(9, 0), (9, 0)], "which the whole card tells"
    assert hardware.free_memory() == 32 * GIB
    assert [card.utilisation for card in hardware.measure(Path("/")).gpus] == [None, None]


def test_what_a_virtual_gpu_does_not_tell_is_missing_not_the_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    plug(monkeypatch, Device("GPU-dd44", None, load=None))
    (shown,) = hardware.measure(Path("/")).gpus
    assert (shown.memory_total, shown.memory_used, shown.utilisation) == (None, None, None)
    assert (hardware.has_gpu(), hardware.free_memory(), hardware.total_memory()) == (True, None, None)


@pytest.mark.parametrize(
    ("users", "held"), [({7: 3 * GIB, 8: GIB, 9: 5 * GIB}, 4 * GIB), ({}, 0), ({7: None}, 0), (None, 0)]
)
def test_what_our_own_processes_hold_is_told_where_the_driver_tells_it(
    monkeypatch: pytest.MonkeyPatch, users: dict[int, int | None] | None, held: int
) -> None:
    plug(monkeypatch, DISPLAY, Device("GPU-bb22", 24 * GIB, 20 * GIB, users=users))
    assert hardware.held_by({7, 8}) == held


def test_without_a_gpu_processes_hold_memory_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    plug(monkeypatch)
    assert hardware.held_by({os.getpid(), 1 << 30}) > 1 << 20

"""What is said of a GPU that cannot be used, with a driver and a PyTorch that are made here."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import add_run, failure, make_model, stage, work

from appliance import gpu, probe_gpu
from appliance.doctor import _gpu as doctors
from appliance.errors import ApplianceError
from appliance.gpu import Card
from appliance.home import Home
from appliance.probe_gpu import Check, checks, probe, require_gpu, require_working_gpu

CARD = Card(0, "GPU-1", "a card", 24 << 30, 0, 0)


def driver(version: str = "580.65.06") -> Any:
    return SimpleNamespace(nvmlSystemGetDriverVersion=lambda: version)


def stand_in(
    *, seen: bool = True, build: str | None = "13.0", capability: tuple[int, int] = (8, 9), wrong: bool = False
) -> Any:
    """PyTorch, whose GPU is the processor; `wrong`: one that multiplies wrongly."""

    def fails() -> None:
        raise RuntimeError("CUDA driver version is insufficient for CUDA runtime version")

    class Product(torch.Tensor):
        def cuda(self) -> Any:
            return self * (1.5 if wrong else 1)

    cuda = SimpleNamespace(
        is_available=lambda: seen,
        init=fails,
        get_device_capability=lambda: capability,
        get_device_name=lambda: "a card",
        mem_get_info=lambda: (20 << 30, 24 << 30),
    )
    return SimpleNamespace(
        cuda=cuda,
        __version__="2.13.0",
        version=SimpleNamespace(cuda=build),
        arange=lambda count: torch.arange(count).as_subclass(Product),
        allclose=torch.allclose,
    )


def failed(found: list[Check]) -> list[str]:
    return [f"{check.name}: {check.said}; {check.mend}" for check in found if not check.passed]


def nothing() -> None:
    pass


@pytest.fixture(autouse=True)
def tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A directory with a compiler, and another with Python's headers."""
    (tmp_path / "Python.h").touch()
    (tmp_path / "gcc").touch()
    (tmp_path / "gcc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    return tmp_path


def test_a_gpu_that_works_passes_every_check() -> None:
    found = list(checks(driver(), stand_in(), nothing))
    assert failed(found) == []
    names = ["driver", "compiler", "headers", "torch", "capability", "product", "kernel", "memory"]
    assert [check.name for check in found] == names
    assert found[-1].said == "21.5 of 25.8 GB are free"


def test_an_old_driver_is_named() -> None:
    found = failed(list(checks(driver("570.86.10"), stand_in(seen=False), nothing)))
    assert found[0] == "driver: NVIDIA driver 570.86.10; install driver 580 or newer"
    assert failed(list(checks(driver("1000.1"), stand_in(), nothing))) == []


@pytest.mark.parametrize(
    ("build", "uvm", "said"),
    [
        (None, True, "PyTorch 2.13.0 is a build without CUDA; run setup.sh again"),
        ("13.0", False, "PyTorch finds no /dev/nvidia-uvm; run `sudo modprobe nvidia_uvm`"),
        ("13.0", True, "PyTorch cannot use CUDA: RuntimeError: CUDA driver version is insufficient"),
    ],
)
def test_why_torch_does_not_see_it_is_said_and_ends_the_checks(
    monkeypatch: pytest.MonkeyPatch, build: str | None, uvm: bool, said: str
) -> None:
    monkeypatch.setattr(probe_gpu.Path, "exists", lambda path: uvm or "nvidia" not in str(path))
    found = list(checks(driver(), stand_in(seen=False, build=build), nothing))
    assert [check.name for check in found][-1] == "torch"
    assert said in failed(found)[0]


@pytest.mark.parametrize(("capability", "passed"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_a_card_without_bfloat16_is_named(capability: tuple[int, int], passed: bool) -> None:
    found = failed(list(checks(driver(), stand_in(capability=capability), nothing)))
    assert (found == []) == passed
    assert passed or "a card has compute capability 7.5; use a card from 8.0 on" in found[0]


def test_what_kernels_are_compiled_with_is_missed(tools: Path) -> None:
    (tools / "gcc").unlink()
    (tools / "Python.h").unlink()
    found = failed(list(checks(driver(), stand_in(), nothing)))
    assert found == ["compiler: no C compiler; install gcc", f"headers: no {tools}/Python.h; install python3-dev"]


def test_a_wrong_product_and_a_kernel_that_does_not_compile_are_told() -> None:
    def breaks() -> None:
        raise subprocess.CalledProcessError(1, "gcc")

    product, kernel = failed(list(checks(driver(), stand_in(wrong=True), breaks)))
    assert product.startswith("product: a product in bfloat16 fails: ArithmeticError: another result")
    assert kernel.startswith("kernel: a Triton kernel fails: CalledProcessError: Command 'gcc' returned")


def python(folder: Path, script: str) -> str:
    """A program that stands in for the process of the checks."""
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\n{script}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_checks_of_a_process_that_hangs_or_dies_have_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "chosen", lambda: CARD)
    monkeypatch.setattr(probe_gpu, "_SECONDS", 1)
    good = json.dumps({"name": "driver", "passed": True, "said": "fine", "mend": ""})
    assert failed(probe(python(tmp_path, f"print({good!r})"))) == []
    (killed,) = failed(probe(python(tmp_path, f"import os\nprint({good!r}, flush=True)\nos.kill(os.getpid(), 9)")))
    assert killed.startswith("gpu: the check ended with -9")
    assert failed(probe(python(tmp_path, "import time\ntime.sleep(60)")))[0].startswith("gpu: it did not answer in 1 s")


def test_without_a_driver_there_is_nothing_to_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "chosen", lambda: None)
    assert probe("/no/such/program") == []
    require_working_gpu()
    require_gpu(stand_in(seen=False))
    assert doctors().status == "warn"


def test_daemon_and_doctor_say_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "chosen", lambda: CARD)
    told = [Check("driver", True, "fine"), Check("headers", False, "no Python.h", "install python3-dev")]
    for module in ("probe_gpu", "doctor"):
        monkeypatch.setattr(f"appliance.{module}.probe", lambda: told)
    with pytest.raises(ApplianceError, match=r"a GPU that cannot be used: no Python\.h — install python3-dev"):
        require_working_gpu()
    assert (doctors().status, doctors().summary, doctors().fix) == ("fail", "no Python.h", "install python3-dev")
    told.pop()
    require_working_gpu()
    assert (doctors().status, doctors().summary) == ("ok", "a card can be trained and served on")


def test_a_worker_that_does_not_see_the_gpu_trains_on_no_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Home(tmp_path / "home")
    home.create()
    make_model(home.models / "tiny")
    run = add_run(home, "r", stage("sft", "FACTS", max_steps=1))
    monkeypatch.setattr(gpu, "chosen", lambda: CARD)
    assert work(run, "sft") != 0
    assert failure(run, "sft")["code"] == "gpu_unusable"
    assert "there is a GPU, and PyTorch" in failure(run, "sft")["reason"]

"""Whether the GPU of this box can be trained and served on, a check at a time: `python -m appliance.probe_gpu`.

A process of its own, because it takes the GPU. Each line of its output is a check as JSON; it exits with 0 where all
are passed. Without an NVIDIA driver that answers there is nothing to check.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from appliance import gpu
from appliance.errors import ApplianceError, InvalidInput, reason

LEAST_DRIVER = 580
"""PyTorch's build is for CUDA 13."""
LEAST_CAPABILITY = (8, 0)
"""bfloat16, and PyTorch's FlashAttention."""
_SECONDS = 300


@dataclass(frozen=True)
class Check:
    name: str
    passed: bool
    said: str
    mend: str = ""


def probe(python: str = sys.executable) -> list[Check]:
    """All checks, run in a process of their own; empty where no driver answers. A hang is a check that failed."""
    if gpu.chosen() is None:
        return []
    environment = {**os.environ, **gpu.environment()}
    command = [python, "-m", "appliance.probe_gpu"]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return [Check("gpu", False, f"it did not answer in {_SECONDS} s", "see `nvidia-smi` and `dmesg`")]
    found = [Check(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode and all(check.passed for check in found):
        last = (done.stderr.strip() or "no word").splitlines()[-1]
        found.append(Check("gpu", False, f"the check ended with {done.returncode}: {last}", "see `dmesg`"))
    return found


def require_working_gpu() -> None:
    """Raise ApplianceError where a driver answers and its GPU cannot be trained and served on."""
    if failed := next((check for check in probe() if not check.passed), None):
        advice = f"{failed.mend}; or set CUDA_VISIBLE_DEVICES to nothing, to work without it"
        raise ApplianceError("gpu_unusable", f"there is a GPU that cannot be used: {failed.said}", advice)


def require_gpu(torch: Any) -> None:
    """Raise ApplianceError where a driver answers and `torch` does not see its GPU: nothing falls back to the CPU."""
    if gpu.chosen() is not None and not torch.cuda.is_available():
        found = _torch(torch)
        raise ApplianceError("gpu_unusable", f"there is a GPU, and {found.said}", found.mend)


def checks(nvml: Any, torch: Any, trial: Callable[[], None]) -> Iterator[Check]:
    """The checks, each told as soon as it is done; what follows from one that failed is left out.

    `trial` compiles and runs a Triton kernel.
    """
    driver = str(nvml.nvmlSystemGetDriverVersion())
    yield Check(
        "driver",
        int(driver.partition(".")[0]) >= LEAST_DRIVER,
        f"NVIDIA driver {driver}",
        f"install driver {LEAST_DRIVER} or newer",
    )
    yield _compiler()
    yield _headers()
    yield (seen := _torch(torch))
    if not seen.passed:
        return
    capability = torch.cuda.get_device_capability()
    yield Check(
        "capability",
        capability >= LEAST_CAPABILITY,
        f"{torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]}",
        "use a card from 8.0 on (Ampere: RTX 30, A100 or newer), or APPLIANCE_GPU for another card of the box",
    )
    yield _tried("product", "a product in bfloat16", lambda: _product(torch), "see `dmesg` and `nvidia-smi`")
    yield _tried("kernel", "a Triton kernel", trial, "install gcc and python3-dev, and see `dmesg`")
    free, total = torch.cuda.mem_get_info()
    yield Check("memory", True, f"{free / 1e9:.1f} of {total / 1e9:.1f} GB are free")


def _torch(torch: Any) -> Check:
    if torch.cuda.is_available():
        return Check("torch", True, f"PyTorch {torch.__version__} sees it")
    if torch.version.cuda is None:
        return Check("torch", False, f"PyTorch {torch.__version__} is a build without CUDA", "run setup.sh again")
    if not Path("/dev/nvidia-uvm").exists():
        return Check("torch", False, "PyTorch finds no /dev/nvidia-uvm", "run `sudo modprobe nvidia_uvm`")
    try:
        torch.cuda.init()
        why = "no reason given"
    except Exception as error:  # whatever CUDA says
        why = reason(error)
    return Check(
        "torch", False, f"PyTorch cannot use CUDA: {why}", f"install driver {LEAST_DRIVER} or newer, or reboot"
    )


def _compiler() -> Check:
    found = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    return Check("compiler", bool(found), f"C compiler {found}" if found else "no C compiler", "install gcc")


def _headers() -> Check:
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return Check("headers", header.exists(), str(header) if header.exists() else f"no {header}", "install python3-dev")


def _tried(name: str, what: str, trial: Callable[[], None], mend: str) -> Check:
    try:
        trial()
    except Exception as error:  # compilers and drivers fail in ways of their own
        return Check(name, False, f"{what} fails: {reason(error)}", mend)
    return Check(name, True, f"{what} is right")


def _product(torch: Any) -> None:
    """Raise ArithmeticError where the GPU multiplies wrongly."""
    left, right = (torch.arange(4096.0).reshape(64, 64) % 7 - 3 for _ in range(2))
    found = (left.bfloat16().cuda() @ right.bfloat16().cuda()).float().cpu()
    if not torch.allclose(found, left @ right, rtol=0.01, atol=0.5):
        raise ArithmeticError("another result than the processor's")


def _kernel() -> None:
    """Compile a kernel of Triton and run it. Raises ArithmeticError for a wrong result, and whatever Triton raises."""
    import torch

    from appliance.probe_kernel import doubled

    values = torch.arange(300.0, device="cuda")
    if not torch.equal(doubled(values), 2 * values):
        raise ArithmeticError("another result than PyTorch's")


def main() -> int:
    """Print the checks; 0 where all are passed, or there is no GPU."""
    try:
        if gpu.chosen() is None:
            return 0
    except InvalidInput as error:
        print(json.dumps(asdict(Check("gpu", False, error.message, error.next))))
        return 1
    import pynvml
    import torch

    passed = True
    for check in checks(pynvml, torch, _kernel):
        print(json.dumps(asdict(check)), flush=True)
        passed &= check.passed
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())

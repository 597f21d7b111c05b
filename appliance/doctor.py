"""What the appliance needs on this box: each thing ok, to be wished better, or broken, with its remedy."""

from __future__ import annotations

import importlib.util
import locale
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import psutil

from appliance import gpu, hardware
from appliance.errors import ApplianceError, InvalidInput
from appliance.home import Home
from appliance.probe_gpu import probe
from appliance.settings import Settings


@dataclass(frozen=True)
class Finding:
    """`fix` is empty where nothing has to be done."""

    name: str
    status: Literal["ok", "warn", "fail"]
    summary: str
    fix: str = ""


def examine(settings: Settings) -> list[Finding]:
    """All checks, each independent of the others. Heavy libraries are tried in a process of their own."""
    return [
        _imports("torch", "import torch; print(torch.__version__)"),
        _imports("training", "import trl, peft, transformers; print(trl.__version__)"),
        _imports("nf4", "import bitsandbytes; print(bitsandbytes.__version__)"),
        _engine(),
        _gpu(),
        _memory(),
        _home(settings),
        _port(settings),
        _terminal(),
    ]


def _imports(name: str, code: str) -> Finding:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    if done.returncode == 0:
        return Finding(name, "ok", done.stdout.strip().splitlines()[-1])
    last = (done.stderr.strip() or "it does not import").splitlines()[-1]
    return Finding(name, "fail", last, "install the appliance's dependencies again")


def _engine() -> Finding:
    if importlib.util.find_spec("vllm"):
        return Finding("engine", "ok", "vLLM is installed")
    if hardware.has_gpu():
        return Finding("engine", "warn", "the embedded engine serves, vLLM is not installed", "pip install '.[vllm]'")
    return Finding("engine", "ok", "the embedded engine serves; vLLM is for a GPU")


def _gpu() -> Finding:
    try:
        card = gpu.chosen()
    except InvalidInput as error:
        return Finding("gpu", "fail", error.message, error.next)
    if card is None:
        fix = "check nvidia-smi if there should be one"
        return Finding("gpu", "warn", "no NVIDIA GPU: everything works, slowly", fix)
    if failed := [check for check in probe() if not check.passed]:
        return Finding("gpu", "fail", "; ".join(check.said for check in failed), failed[0].mend)
    return Finding("gpu", "ok", f"{card.name} can be trained and served on")


def _memory() -> Finding:
    total = psutil.virtual_memory().total
    if total < 8e9:
        return Finding("memory", "warn", f"{total / 1e9:.0f} GB", "train only the smallest models here")
    return Finding("memory", "ok", f"{total / 1e9:.0f} GB")


def _home(settings: Settings) -> Finding:
    home = Home(settings.home, settings.socket)
    try:
        home.create()
    except ApplianceError as error:
        return Finding("home", "fail", error.message, error.next)
    free = shutil.disk_usage(home.root).free
    if free < 5e9:
        return Finding("home", "warn", f"{home.root}: {free / 1e9:.1f} GB free", "free some space before a run")
    return Finding("home", "ok", f"{home.root}: {free / 1e9:.0f} GB free")


def _port(settings: Settings) -> Finding:
    with socket.socket(socket.AF_UNIX) as control:
        try:
            control.connect(str(Home(settings.home, settings.socket).control_socket()))
            return Finding("daemon", "ok", "it answers")
        except OSError:
            pass
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            problem = f"no daemon, and {settings.host}:{settings.port} cannot be had: {error.strerror}"
            return Finding("daemon", "fail", problem, "set APPLIANCE_PORT to a free port")
    return Finding("daemon", "warn", "it is not running", "appliance serve")


def _terminal() -> Finding:
    encoding = locale.getpreferredencoding(False)
    if encoding.upper().replace("-", "") != "UTF8":
        return Finding("terminal", "warn", f"the locale's encoding is {encoding}", "export LANG=C.UTF-8")
    return Finding("terminal", "ok", "UTF-8")

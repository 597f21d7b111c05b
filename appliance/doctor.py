"""What the appliance needs on this box: each thing ok, to be wished better, or broken, with its remedy."""

from __future__ import annotations

import asyncio
import importlib.util
import locale
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from appliance import api, gpu, hardware
from appliance.client import Client
from appliance.errors import ApplianceError, InvalidInput, NotAllowed
from appliance.home import find_socket, is_there
from appliance.probe_gpu import probe
from appliance.settings import Settings
from appliance.words import size

Answer = api.Status | ApplianceError
"""What the daemon says of itself, or why it does not."""


@dataclass(frozen=True)
class Finding:
    """`fix` is empty where nothing has to be done."""

    name: str
    status: Literal["ok", "warn", "fail"]
    summary: str
    fix: str = ""


def examine(settings: Settings) -> list[Finding]:
    """All checks, which change nothing. Heavy libraries are tried in a process of their own."""
    daemon = asyncio.run(_ask(settings))
    return [
        _imports("torch", "import torch; print(torch.__version__)"),
        _imports("training", "import trl, peft, transformers; print(trl.__version__)"),
        _imports("nf4", "import bitsandbytes; print(bitsandbytes.__version__)"),
        _engine(),
        _gpu(),
        _memory(),
        _home(settings, daemon),
        _daemon(settings, daemon),
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
        return Finding("memory", "warn", size(total), "train only the smallest models here")
    return Finding("memory", "ok", size(total))


def _home(settings: Settings, daemon: Answer) -> Finding:
    """The home of the daemon that answers, else the one that would be made. Nothing is made."""
    if isinstance(daemon, api.Status):
        return _space(Path(daemon.home), daemon.hardware.disk_free)
    if isinstance(daemon, NotAllowed):
        return Finding("home", "warn", "the service's, which only its group may ask for", daemon.next)
    existing = settings.home
    while not is_there(existing):
        existing = existing.parent
    if not os.access(existing, os.W_OK | os.X_OK):
        return Finding("home", "fail", f"{existing} may not be written to", "set APPLIANCE_HOME to a path of your own")
    return _space(settings.home, shutil.disk_usage(existing).free)


def _space(home: Path, free: int) -> Finding:
    if free < 5e9:
        return Finding("home", "warn", f"{home}: {size(free)} free", "free some space before a run")
    return Finding("home", "ok", f"{home}: {size(free)} free")


def _daemon(settings: Settings, daemon: Answer) -> Finding:
    if isinstance(daemon, api.Status):
        return Finding("daemon", "ok", f"it answers on {find_socket(settings)}")
    if daemon.code != "daemon_unreachable":
        return Finding("daemon", "fail", daemon.message, daemon.next)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            problem = f"no daemon, and {settings.host}:{settings.port} cannot be had: {error.strerror}"
            return Finding("daemon", "fail", problem, "set APPLIANCE_PORT to a free port")
    return Finding("daemon", "warn", "it is not running", "appliance serve")


async def _ask(settings: Settings) -> Answer:
    async with Client(find_socket(settings)) as client:
        try:
            return await client.status()
        except ApplianceError as error:
            return error


def _terminal() -> Finding:
    encoding = locale.getpreferredencoding(False)
    if encoding.upper().replace("-", "") != "UTF8":
        return Finding("terminal", "warn", f"the locale's encoding is {encoding}", "export LANG=C.UTF-8")
    return Finding("terminal", "ok", "UTF-8")

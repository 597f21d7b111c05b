"""Processes that start in milliseconds: forks of one that has imported torch and its like."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["appliance.train.stage", "appliance.release.merge", "appliance.release.verify"])


def start(log: Path, work: Callable[..., int], *arguments: Any) -> BaseProcess:
    """Start `work`, a function of a module, which returns the exit status. What it prints goes to `log`."""
    process = _CONTEXT.Process(target=_run, args=(log, work, arguments), daemon=True)
    process.start()
    return process


def _run(log: Path, work: Callable[..., int], arguments: tuple[Any, ...]) -> None:
    import torch

    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, sys.stdout.fileno())
    os.dup2(output, sys.stderr.fileno())
    torch.set_num_threads(1)
    sys.exit(work(*arguments))

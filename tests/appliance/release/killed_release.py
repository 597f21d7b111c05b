"""Kills the making of a release at each of its steps: python killed_release.py RUN_DIR STAGE.

A step is a call that changes the disk for good. The process forks, and the fork kills itself before its n-th step, for
n from 1 on until it gets through. STAGE is merge, verify or finalise. The last line says how many steps there were.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from appliance import worker
from appliance.home import Home
from appliance.release import merge, verify  # noqa: F401  so that no fork has to import them
from appliance.release.gates import Gate
from appliance.release.manifest import finalise
from appliance.train.recipe import parse_recipe

STEPS = ((os, "fsync"), (os, "replace"), (os, "rename"), (os, "link"), (shutil, "rmtree"), (shutil, "copyfile"))


def work(run: Path, stage: str) -> int:
    if stage != "finalise":
        return worker.main(run, stage)
    gates = {name: Gate(True) for name in ("parity", "stopping")}
    finalise(Home(run.parent.parent), run.name, parse_recipe((run / "recipe.toml").read_text()), gates)
    return 0


def fatal(function: Callable[..., Any], left: list[None]) -> Callable[..., Any]:
    def step(*arguments: Any, **named: Any) -> Any:
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        left.pop()
        return function(*arguments, **named)

    return step


def survives(run: Path, stage: str, steps: int) -> bool:
    """Whether the work ends before its next step after so many."""
    child = os.fork()
    if not child:
        torch.set_num_threads(1)
        left = [None] * steps
        for module, name in STEPS:
            setattr(module, name, fatal(getattr(module, name), left))
        os._exit(work(run, stage))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    return status == 0


if __name__ == "__main__":
    run, stage = Path(sys.argv[1]), sys.argv[2]
    made = run.parent.parent / "releases" / run.name if stage == "finalise" else run / stage / "result.json"
    steps = 0
    while not survives(run, stage, steps):
        steps += 1
        whole = made / "manifest.json" if stage == "finalise" else made
        assert whole.exists() or not made.exists(), f"half a {stage} after {steps} steps"
    print(steps)

"""Kills the making of a release at each of its steps.

A step is a call that changes the disk for good. A fork does the work and kills itself before its n-th step, for n from
1 on until one gets through.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forked import start

from appliance import worker
from appliance.home import Home
from appliance.release.conclude import finalise
from appliance.release.gates import Gate
from appliance.train.recipe import parse_recipe

STEPS = ((os, "fsync"), (os, "replace"), (os, "rename"), (os, "link"), (shutil, "rmtree"), (shutil, "copyfile"))


def killed_at_each_step(run: Path, stage: str) -> int:
    """The steps of `stage` (merge, verify or finalise), after each of which there is all of its result or none."""
    made = run.parent.parent / "releases" / run.name if stage == "finalise" else run / stage / "result.json"
    whole = made / "manifest.json" if stage == "finalise" else made
    log = run / "log.txt"
    for steps in itertools.count():
        fork = start(log, work, run, stage, steps)
        fork.join()
        if fork.exitcode == 0:
            return steps
        assert fork.exitcode == -signal.SIGKILL, log.read_text()[-3000:]
        assert whole.exists() or not made.exists(), f"half a {stage} after {steps} steps"
    raise AssertionError("the count has no end")


def work(run: Path, stage: str, steps: int) -> int:
    """Work on `run` until this process kills itself after so many steps, or is done before."""
    left = [None] * steps
    for module, name in STEPS:
        setattr(module, name, fatal(getattr(module, name), left))
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

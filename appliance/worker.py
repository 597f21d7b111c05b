"""The process that runs one stage: `python -m appliance.worker RUN_DIR STAGE`, its output going to the run's log."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from appliance.errors import ApplianceError, Exit, is_out_of_memory, reason
from appliance.home import Home, disk_error, write_json
from appliance.probe_gpu import require_gpu
from appliance.train.events import EventLog
from appliance.train.interruption import Interruption
from appliance.train.recipe import AFTER_TRAINING, Recipe, parse_recipe

QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Set before the libraries are imported: they read it then."""
PATIENT = {"OMP_WAIT_POLICY": "passive"}
"""Threads that wait spin by default, which slows a step many times over as soon as anything else wants a core."""


def main(run: Path, stage: str) -> int:
    """Run `stage` of the run in directory `run`; returns the exit status.

    0 where result.json is there in the end, 1 where failure.json says why not, 5 where another worker is at it.
    SystemExit(75) where SIGTERM has interrupted it.
    """
    interruption = Interruption()
    with open(run / "worker.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another worker is at {run}; leaving it alone", file=sys.stderr)
            return Exit.CONFLICT
        return _run(run, stage, interruption)


def _run(run: Path, stage: str, interruption: Interruption) -> int:
    folder = run / stage
    if (folder / "result.json").exists():
        return Exit.OK
    folder.mkdir(exist_ok=True)
    (folder / "failure.json").unlink(missing_ok=True)
    events = EventLog(run / "events.jsonl")
    events.append("stage_started", stage)
    begun = time.monotonic()
    try:
        recipe = parse_recipe((run / "recipe.toml").read_text())
        figures = _stage(Home(run.parent.parent), run, recipe, stage, events, interruption)
    except Exception as error:
        failure = _explain(error, run, stage)
        print(failure, file=sys.stderr) if failure is error else traceback.print_exc()
        write_json(folder / "failure.json", {"code": failure.code, "reason": failure.message, "next": failure.next})
        events.append("failed", stage, reason=failure.message, next=failure.next)
        return Exit.FAILED
    seconds = round(time.monotonic() - begun, 1)
    write_json(folder / "result.json", {**figures, "seconds": seconds})
    events.append("stage_finished", stage, seconds=seconds)
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)
    return Exit.OK


def _stage(
    home: Home, run: Path, recipe: Recipe, stage: str, events: EventLog, interruption: Interruption
) -> dict[str, Any]:
    """The stage's figures. Only here are torch and its like imported."""
    import torch

    require_gpu(torch)
    if stage == "merge" and recipe.rechecks:
        from appliance.release.recheck import recheck_stage

        return recheck_stage(home, run, recipe)
    if stage == "merge":
        from appliance.release.merge import merge_stage

        return merge_stage(home, run, recipe)
    if stage == "verify":
        from appliance.release.verify import verify_stage

        return verify_stage(home, run, recipe, events, os.environ.get("APPLIANCE_LIVE_RELEASE", ""))
    from appliance.train.memory import keep_freed_memory
    from appliance.train.stage import train_stage

    keep_freed_memory()
    return train_stage(home, run, recipe, stage, events, interruption)


def _explain(error: Exception, run: Path, stage: str) -> ApplianceError:
    """What a person is told of `error`."""
    if isinstance(error, ApplianceError):
        return error
    if is_out_of_memory(error):
        advice = 'set gradient_checkpointing = "on" or a smaller max_length or adapter rank, or use qlora'
        if stage in AFTER_TRAINING:
            advice = "free memory, resume the run, or train a smaller base: its merged weights are loaded in 16 bits"
        return ApplianceError("out_of_memory", f"{stage} ran out of memory", advice)
    if "No space left on device" in str(error):
        return disk_error(OSError(errno.ENOSPC, ""), run)
    return ApplianceError("internal", reason(error), "see the log")


if __name__ == "__main__":
    os.environ.update({**PATIENT, **os.environ, **QUIET})
    # On some processors bitsandbytes misses an optional kernel, which nothing here would call.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    sys.exit(main(Path(sys.argv[1]).absolute(), sys.argv[2]))

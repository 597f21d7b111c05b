"""Runs of the worker in a home of a bench's own, and what they have said. This module needs no torch."""

from __future__ import annotations

import json
import os
import platform
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from appliance.data.importer import import_files
from appliance.data.requests import ImportRequest, Source
from appliance.home import Home
from appliance.train.checkpoints import newest_usable, origin, step_of
from appliance.train.events import EventLog
from appliance.train.interruption import INTERRUPTED
from appliance.train.recipe import dump_recipe, parse_recipe

Figures = dict[str, float]
"""Tokens, seconds, and peak (bytes) of one run."""
LEAVE_AFTER = 2
"""Steps after which the worker is asked to leave."""
WORKER = ("-m", "appliance.worker")


def queued(home: Home, recipe: str) -> Path:
    """A run of `recipe` that has not begun."""
    run = home.runs / f"bench-{len(list(home.runs.iterdir()))}"
    run.mkdir()
    (run / "recipe.toml").write_text(dump_recipe(parse_recipe(recipe)))
    return run


def imported(home: Home, file: Path) -> str:
    """The id of the dataset that a file becomes."""
    request = ImportRequest(files=[Source(path=file, filename=file.name)], name="rows")
    return str(import_files(request, home)["id"])


def said(run: Path, kind: str, stage: str = "sft") -> list[dict[str, Any]]:
    """The events of one kind of a run's stage."""
    events = EventLog(run / "events.jsonl").read()
    return [event for event in events if (event["event"], event["stage"]) == (kind, stage)]


def trained_in(run: Path, stage: str = "sft", after: int = 0) -> Figures:
    """Tokens and seconds of the steps of a run's stage, those after the first few; and peak bytes."""
    steps = said(run, "step", stage)
    first = before = steps[after - 1]["tokens"] if after else 0
    seconds = 0.0
    for event in steps[after:]:
        seconds += (event["tokens"] - before) / event["tokens_per_second"]
        before = event["tokens"]
    return {"tokens": before - first, "seconds": seconds, "peak": max(event["memory"] for event in steps)}


def seconds_to_leave(run: Path, worker: Sequence[str] = WORKER) -> float:
    """From SIGTERM in the middle of a step to the end of a worker that leaves a whole checkpoint."""
    with subprocess.Popen([sys.executable, *worker, str(run), "sft"], stdout=sys.stderr) as process:
        while len(steps := said(run, "step")) < LEAVE_AFTER:
            assert process.poll() is None, "it trains"
            time.sleep(0.02)
        time.sleep((steps[-1]["time"] - steps[-2]["time"]) / 2)
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        status = process.wait()
        seconds = time.monotonic() - begun
    assert status == INTERRUPTED, status
    checkpoint, faults = newest_usable(run / "sft", origin(parse_recipe((run / "recipe.toml").read_text()), "sft"))
    assert checkpoint is not None, faults
    assert not faults, faults
    assert step_of(checkpoint) == len(said(run, "step")), "no step is lost"
    return seconds


def run_python(argv: list[str]) -> str:
    """What a Python process prints on its standard output. Raises CalledProcessError, after its words on stderr."""
    return subprocess.run([sys.executable, *argv], check=True, stdout=subprocess.PIPE, text=True).stdout


def rate(runs: list[Figures]) -> float:
    return sum(run["tokens"] for run in runs) / sum(run["seconds"] for run in runs)


def made_up(file: Path) -> Path:
    """Rows with the lengths of instruction data: half of them short, a few ten times as long."""
    draw = random.Random(2)
    words = ["river", "stone", "lamp", "cloud", "amber", "quiet", "harbour", "window", "seven", "garden"]
    rows = []
    for number in range(200):
        answer = " ".join(draw.choices(words, k=min(int(draw.lognormvariate(4.5, 0.8)), 600)))
        rows.append(json.dumps({"instruction": f"Question {number}: what is next?", "output": answer}))
    file.write_text("\n".join(rows))
    return file


def machine() -> dict[str, Any]:
    """What the figures were measured on and with."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    packages = ("torch", "transformers", "trl", "peft", "bitsandbytes")
    processor = names[0] if names else platform.machine()
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "versions": {name: version(name) for name in packages},
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)

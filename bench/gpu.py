"""What bench/gpu.sh runs: see there."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

import psutil
from gpu_parts import PARTS, Part, shapes
from runs import say

WEIGHTS = next(part for part in PARTS if part.name == "weights")
SCRATCH = 28 << 30
"""Bytes that base models and runs take."""
DRY_PATIENCE = 5
"""How many times longer a part may take without a GPU."""
LAST_WORDS = 30
"""Lines of its output that are kept of a part that failed."""
Found = dict[str, Any]
"""What a part has said, by its name."""

RATIOS: dict[str, Callable[[Found], float]] = {
    "head_log_prob_difference": lambda found: found["stack"]["head"]["log_prob_difference"],
    "head_gradient_difference": lambda found: found["stack"]["head"]["gradient_difference"],
    "rounding_difference": lambda found: found["rounding"]["difference"],
    "attention_difference": lambda found: found["attention"]["difference"],
    "fp8_difference": lambda found: found["fp8"]["difference"],
    "layers_over_publishers": lambda found: _pass_seconds(found, "publishers") / _pass_seconds(found, "ours"),
    "layers_over_ligers": lambda found: _pass_seconds(found, "ligers") / _pass_seconds(found, "ours"),
    "sft_peak_gib": lambda found: found["sft_checkpointed"]["peak"] / 2**30,
    "sft_forecast_off": lambda found: _off(found["sft"]["forecast"], found["sft"]["peak"]),
    "sft_checkpointed_forecast_off": lambda found: _off(
        found["sft_checkpointed"]["forecast"], found["sft_checkpointed"]["peak"]
    ),
    "dpo_forecast_off": lambda found: _off(found["dpo"]["forecast"], found["dpo"]["peak"]),
    "dpo_first_loss_off": lambda found: _off(found["dpo"]["losses"][0], math.log(2)),
    "dpo_peak_over_sft": lambda found: found["dpo"]["peak"] / found["dpo"]["sft_peak"],
    "leave_seconds": lambda found: found["interrupted"]["leave_seconds"],
    "halved": lambda found: found["out_of_memory"]["halved"],
    "short_rows_over_padded": lambda found: _faster(found, "short_packed", "short_padded"),
    "short_rows_over_plain_trl": lambda found: _faster(found, "short_packed", "short_plain_trl"),
    "long_rows_over_plain_trl": lambda found: _faster(found, "sft_checkpointed", "long_plain_trl"),
    "sft_over_checkpointed": lambda found: _faster(found, "sft", "sft_checkpointed"),
    "sft_peak_over_plain_trl": lambda found: found["sft_checkpointed"]["peak"] / found["long_plain_trl"]["peak"],
}
AT_MOST = {
    "head_log_prob_difference": 0.05,
    "head_gradient_difference": 0.02,
    "rounding_difference": 0.001,
    "attention_difference": 0.02,
    "fp8_difference": 0.01,
    "sft_peak_gib": 8.0,
    "sft_forecast_off": 0.1,
    "sft_checkpointed_forecast_off": 0.1,
    "dpo_forecast_off": 0.1,
    "dpo_first_loss_off": 0.02,
    "dpo_peak_over_sft": 1.1,
    "leave_seconds": 20.0,
}
AT_LEAST = {
    "layers_over_publishers": 1.0,
    "halved": 1.0,
    "short_rows_over_padded": 1.0,
    "short_rows_over_plain_trl": 3.0,
    "long_rows_over_plain_trl": 1.0,
}


def main() -> int:
    """Run the parts that were asked for; 1 where one of them failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--parts", type=numbers, default=range(1, len(PARTS) + 1), help="as 1-4,7; 0: none")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokenizer", type=Path, default=Path(".cache/home/models/smollm2-135m"))
    parser.add_argument("--scratch", type=Path, help="where base models are made and runs lie")
    parser.add_argument("--keep", action="store_true", help="leave the base models for the next call")
    parser.add_argument("--dry", action="store_true")
    given = parser.parse_args()
    out = given.out or Path(tempfile.mkdtemp(prefix="bench-gpu-"))
    out.mkdir(parents=True, exist_ok=True)
    results = out / "parts.jsonl"
    scratch = (given.scratch or _roomy(given.dry)) / "bench-gpu"
    scratch.mkdir(parents=True, exist_ok=True)
    chosen = [PARTS[number - 1] for number in given.parts if number]
    made = all((scratch / shape).is_dir() for shape in shapes(given.dry))
    if any(part.trains for part in chosen) and WEIGHTS not in chosen and not made:
        chosen.insert(0, WEIGHTS)
    argv = [str(scratch), str(given.tokenizer)]
    if given.dry:
        argv.append("--dry")
        chosen = [part._replace(seconds=DRY_PATIENCE * part.seconds) for part in chosen]
    try:
        run_parts(chosen, argv, results)
    finally:
        if not given.keep:
            shutil.rmtree(scratch, ignore_errors=True)
    reported = read(results)
    print(json.dumps(record(reported, dry=given.dry)))
    return int(any(reported[part.name]["state"] != "passed" for part in chosen))


def numbers(text: str) -> list[int]:
    """1-3,5 as 1, 2, 3, 5."""
    found: list[int] = []
    for piece in text.split(","):
        first, _, last = piece.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def run_parts(parts: Sequence[Part], argv: Sequence[str], results: Path) -> None:
    """Run the parts: those whose speed counts alone, those beside each other that follow one another without."""
    steps: list[list[Part]] = []
    for (timed, _), group in groupby(parts, key=lambda part: (part.timed, part.trains)):
        together = list(group)
        steps += [[part] for part in together] if timed else [together]
    for side_by_side in steps:
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 4)) as pool:
            list(pool.map(lambda part: run_part(part, argv, results), side_by_side))


def run_part(part: Part, argv: Sequence[str], results: Path) -> None:
    """Run one part in a process of its own, and write down how it ended."""
    say(f"{part.name} ...")
    write(results, part.name, "cut off", 0.0, {})
    begun = time.monotonic()
    command = [sys.executable, str(Path(__file__).parent / "gpu_parts.py"), part.name, *argv]
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            said, _ = process.communicate(timeout=part.seconds)
            state = "passed" if process.returncode == 0 else "failed"
        except subprocess.TimeoutExpired:
            state, said = f"stopped after {part.seconds} s", ""
            for worker in psutil.Process(process.pid).children(recursive=True):
                worker.kill()
            process.kill()
            process.wait()
        log.seek(0)
        last_words = [line[:400] for line in log.read().splitlines()[-LAST_WORDS:]]
    figures = json.loads(said.splitlines()[-1]) if state == "passed" else {"last_words": last_words}
    write(results, part.name, state, round(time.monotonic() - begun, 1), figures)
    say(f"{part.name}: {state} {json.dumps(figures)[:900]}")


def write(results: Path, part: str, state: str, seconds: float, figures: dict[str, Any]) -> None:
    """Append how a part stands, on disk when this returns."""
    line = json.dumps({"part": part, "state": state, "seconds": seconds, "figures": figures})
    with open(results, "a") as file:
        file.write(f"{line}\n")
        file.flush()
        os.fsync(file.fileno())


def read(results: Path) -> dict[str, dict[str, Any]]:
    """The last that is known of each part."""
    lines = results.read_text().splitlines() if results.exists() else []
    return {entry["part"]: entry for entry in map(json.loads, lines)}


def record(reported: dict[str, dict[str, Any]], *, dry: bool) -> dict[str, Any]:
    """The bench's record over what parts have reported. One that did not run or did not pass has met nothing."""
    found = {name: entry["figures"] for name, entry in reported.items() if entry["state"] == "passed"}
    states = {part.name: reported[part.name]["state"] if part.name in reported else "not run" for part in PARTS}
    ratios = {}
    for name, ratio in RATIOS.items():
        with contextlib.suppress(KeyError):
            ratios[name] = round(ratio(found), 4)
    missed = [
        *(name for name, most in AT_MOST.items() if not ratios.get(name, math.inf) <= most),
        *(name for name, least in AT_LEAST.items() if not ratios.get(name, -math.inf) >= least),
    ]
    return {
        "bench": "gpu",
        "dry_run": dry,
        "ratios": ratios,
        "targets": {"at_most": AT_MOST, "at_least": AT_LEAST},
        "met": not (dry or missed) and set(states.values()) == {"passed"},
        "missed": missed,
        "parts": states,
        "seconds": {name: entry["seconds"] for name, entry in reported.items()},
        "figures": found,
        "machine": found.get("stack", {}).get("machine"),
    }


def _off(found: float, wanted: float) -> float:
    return abs(found / wanted - 1)


def _faster(found: Found, one: str, other: str) -> float:
    return float(found[one]["tokens_per_second"] / found[other]["tokens_per_second"])


def _pass_seconds(found: Found, layers: str) -> float:
    """Of the longest pass with those layers."""
    return max(float(one["seconds"]) for one in found["layers"][layers].values())


def _roomy(dry: bool) -> Path:
    """Where base models can be made: in memory where there is room, else on the disk."""
    memory = Path("/dev/shm")
    if not dry and memory.is_dir() and shutil.disk_usage(memory).free > SCRATCH:
        return memory
    return Path(tempfile.gettempdir())


if __name__ == "__main__":
    sys.exit(main())

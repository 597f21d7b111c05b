"""What bench/gpu.sh runs: see there."""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from random_llama import write_model

from appliance.data.importer import import_files
from appliance.data.requests import ImportRequest, Source
from appliance.home import Home
from appliance.train.recipe import dump_recipe, parse_recipe

ON_GPU = torch.cuda.is_available()
SHAPE = "8b" if ON_GPU else "tiny"
LENGTH = 2048 if ON_GPU else 128
STEPS = 12 if ON_GPU else 6
PEER = Path(__file__).parent / "plain_trl.py"
TARGETS = {
    "sft_peak_gib_at_most": 8.0,
    "dpo_peak_over_sft_at_most": 1.1,
    "sft_forecast_within": 0.1,
    "tokens_per_second_over_plain_trl_at_least": 1.0,
}

RECIPE = """
name = "gpu"
base = "random"
fidelity_tolerance = 1.0
[adapter]
kind = "qlora"
[[stages]]
method = "sft"
dataset = "{sft}"
batch_size = 1
max_steps = {steps}
learning_rate = 1e-4
max_length = {length}
evaluate_every = 1000
checkpoint_every = 1000
[[stages]]
method = "dpo"
dataset = "{dpo}"
batch_size = 1
max_steps = {steps}
learning_rate = 1e-4
max_length = {length}
evaluate_every = 1000
checkpoint_every = 1000
"""


def main(tokenizer: Path) -> int:
    root = Path(tempfile.mkdtemp(prefix="bench-gpu-"))
    home = Home(root)
    home.create()
    try:
        return measure(home, tokenizer)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def measure(home: Home, tokenizer: Path) -> int:
    parameters = write_model(home.models / "random", SHAPE, tokenizer)
    say(f"{SHAPE}: {parameters / 1e9:.2f} billion parameters")
    sft, dpo = (import_rows(home, name) for name in ("sft", "dpo"))
    run = home.runs / "gpu-1"
    run.mkdir(parents=True)
    recipe = parse_recipe(RECIPE.format(sft=sft, dpo=dpo, steps=STEPS, length=LENGTH))
    (run / "recipe.toml").write_text(dump_recipe(recipe))
    for stage in ("sft", "dpo", "merge", "verify"):
        say(f"{stage} ...")
        subprocess.run([sys.executable, "-m", "appliance.worker", str(run), stage], check=True, stdout=sys.stderr)
    rows = home.datasets / sft / "rows.jsonl"
    command = [sys.executable, str(PEER), str(home.models / "random"), str(rows), "--adapter", "qlora"]
    command += ["--batch-size", "1", "--max-length", str(LENGTH)]
    peer = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
    peer["tokens_per_second"] = round(peer["tokens"] / peer["seconds"], 1)
    ours = {stage: figures(run, stage) for stage in ("sft", "dpo")}
    merge, verify = (json.loads((run / stage / "result.json").read_text()) for stage in ("merge", "verify"))
    ratios = {
        "tokens_per_second_over_plain_trl": round(ours["sft"]["tokens_per_second"] / peer["tokens_per_second"], 3),
        "sft_peak_over_plain_trl": round(ours["sft"]["peak"] / peer["peak"], 3),
        "sft_forecast_over_peak": round(ours["sft"]["forecast"] / ours["sft"]["peak"], 3),
        "dpo_peak_over_sft": round(ours["dpo"]["peak"] / ours["sft"]["peak"], 3),
        "sft_peak_gib": round(ours["sft"]["peak"] / 2**30, 2),
    }
    met = (
        ratios["sft_peak_gib"] <= TARGETS["sft_peak_gib_at_most"]
        and ratios["dpo_peak_over_sft"] <= TARGETS["dpo_peak_over_sft_at_most"]
        and abs(ratios["sft_forecast_over_peak"] - 1) <= TARGETS["sft_forecast_within"]
        and ratios["tokens_per_second_over_plain_trl"] >= TARGETS["tokens_per_second_over_plain_trl_at_least"]
    )
    record = {
        "bench": "gpu",
        "dry_run": not ON_GPU,
        "ratios": ratios,
        "targets": TARGETS,
        "met": met and ON_GPU,
        "machine": torch.cuda.get_device_name()
        if ON_GPU
        else f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "shape": SHAPE,
        "parameters": parameters,
        "length": LENGTH,
        "ours": ours,
        "plain_trl": peer,
        "merge": {"seconds": merge["seconds"], "kept": merge["kept"], "losses": merge["losses"]},
        "gates": {name: gate["passed"] for name, gate in verify["gates"].items()},
        "versions": versions(),
    }
    print(json.dumps(record))
    return 0


def import_rows(home: Home, name: str) -> str:
    """A dataset whose every row nearly fills the length; its id."""
    words = ["river", "stone", "lamp", "cloud", "amber", "quiet", "harbour", "window", "seven", "garden"]
    rows = []
    for number in range(STEPS + 8):
        text = " ".join(words[(number * 7 + place * place) % len(words)] for place in range(int(LENGTH * 0.6)))
        prompt = f"Question {number}: tell me all about it."
        answer = {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]}
        pair = {"prompt": prompt, "chosen": text, "rejected": " ".join(text.split()[::-2])}
        rows.append(answer if name == "sft" else pair)
    file = home.incoming / f"{name}.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    request = ImportRequest(files=[Source(path=file, filename=file.name)], name=name)
    return str(import_files(request, home)["id"])


def figures(run: Path, stage: str) -> dict[str, float]:
    """Median tokens a second after the first steps, and the peak of memory, from the stage's own events."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["event"] == "step" and event["stage"] == stage]
    return {
        "tokens_per_second": statistics.median(event["tokens_per_second"] for event in steps[3:]),
        "peak": max(event["memory"] for event in steps),
        "forecast": json.loads((run / stage / "result.json").read_text())["memory_forecast"],
    }


def versions() -> dict[str, Any]:
    found = {}
    for package in ("torch", "transformers", "trl", "peft", "bitsandbytes"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

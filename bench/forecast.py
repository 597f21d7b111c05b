"""The forecast of a stage's memory against the peak that the stage then reaches, over shapes from tiny to 135M.

    python bench/forecast.py [--tokenizer BASE] [--only N ...]

Each stage trains two steps in a worker of its own, on a random-weight Llama and rows of varied length. Both figures are
of the worker's resident memory (on a GPU, of what torch has held). Some cases have set the forecast's constants
("fitted"), others show whether these hold. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from random_llama import write_model
from runs import imported, machine, say

from appliance.home import Home
from appliance.train.model import ON_GPU
from appliance.train.recipe import dump_recipe, parse_recipe

TARGET = 0.10 if ON_GPU else 0.15
USUAL = {"checkpointing": "off", "answers": "long"}
FITTED: tuple[dict[str, Any], ...] = (
    {"shape": "tiny", "method": "sft", "kind": "lora", "rank": 8, "length": 256, "micro": 0},
    {"shape": "tiny", "method": "sft", "kind": "lora", "rank": 8, "length": 2048, "micro": 1},
    {"shape": "30m", "method": "sft", "kind": "lora", "rank": 64, "length": 512, "micro": 2},
    {"shape": "30m", "method": "dpo", "kind": "qlora", "rank": 16, "length": 512, "micro": 0},
    {"shape": "135m", "method": "sft", "kind": "lora", "rank": 16, "length": 256, "micro": 0},
    {"shape": "135m", "method": "sft", "kind": "qlora", "rank": 16, "length": 512, "micro": 1},
    {"shape": "135m", "method": "sft", "kind": "lora", "rank": 128, "length": 1024, "micro": 0},
    {"shape": "135m", "method": "sft", "kind": "dora", "rank": 16, "length": 256, "micro": 2},
    {"shape": "135m", "method": "sft", "kind": "lora", "rank": 16, "length": 512, "micro": 0, "checkpointing": "on"},
    {"shape": "30m", "method": "dpo", "kind": "lora", "rank": 16, "length": 512, "micro": 0, "checkpointing": "on"},
)
"""What the forecast's constants were set by."""
OTHERS: tuple[dict[str, Any], ...] = (
    {"shape": "30m", "method": "kto", "kind": "lora", "rank": 16, "length": 512, "micro": 0},
    {"shape": "135m", "method": "dpo", "kind": "qlora", "rank": 16, "length": 256, "micro": 0},
    {"shape": "135m", "method": "sft", "kind": "rslora", "rank": 32, "length": 384, "micro": 1},
    {"shape": "135m", "method": "sft", "kind": "rslora", "rank": 8, "length": 768, "micro": 0, "checkpointing": "on"},
    {"shape": "30m", "method": "kto", "kind": "dora", "rank": 32, "length": 384, "micro": 2, "checkpointing": "on"},
    {"shape": "135m", "method": "sft", "kind": "lora", "rank": 16, "length": 512, "micro": 0, "answers": "short"},
)
"""What they were not set by: whether they hold."""
CASES = tuple(USUAL | case | {"fitted": case in FITTED} for case in (*FITTED, *OTHERS))
RECIPE = """
name = "bench"
base = "{shape}"
eval_share = 0.0
[adapter]
kind = "{kind}"
rank = {rank}
[[stages]]
method = "{method}"
dataset = "{dataset}"
max_steps = 2
batch_size = 4
micro_batch_size = {micro}
gradient_checkpointing = "{checkpointing}"
max_length = {length}
learning_rate = 1e-4
samples = 0
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokenizer", type=Path, default=Path(".cache/home/models/smollm2-135m"))
    parser.add_argument("--only", type=int, nargs="+", default=range(len(CASES)))
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench-forecast-") as folder:
        home = Home(Path(folder))
        home.create()
        for shape in {CASES[number]["shape"] for number in given.only}:
            write_model(home.models / shape, shape, given.tokenizer)
        for number in given.only:
            rows.append(CASES[number] | measure(home, number, CASES[number]))
            say("  ".join(f"{name} {value}" for name, value in rows[-1].items()))
    ratios = {f"case_{number}": row["forecast_over_peak"] for number, row in zip(given.only, rows, strict=True)}
    met = all(abs(ratio - 1) <= TARGET for ratio in ratios.values())
    record = {"bench": "forecast", "ratios": ratios, "targets": {"within": TARGET}, "met": met, "table": rows}
    print(json.dumps(record | {"machine": machine()}))


def measure(home: Home, number: int, case: dict[str, Any]) -> dict[str, Any]:
    """The forecast and the peak of one stage, in MiB."""
    file = home.incoming / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in made_up(case)))
    dataset = imported(home, file)
    run = home.runs / f"case-{number}"
    run.mkdir()
    (run / "recipe.toml").write_text(dump_recipe(parse_recipe(RECIPE.format(dataset=dataset, **case))))
    command = [sys.executable, "-m", "appliance.worker", str(run), case["method"]]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    result = json.loads((run / case["method"] / "result.json").read_text())
    forecast, peak = result["memory_forecast"], result["memory_peak"]
    return {"forecast": forecast >> 20, "peak": peak >> 20, "forecast_over_peak": round(forecast / peak, 3)}


def made_up(case: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of which the longest nearly fills the case's length, mostly by the answer or by the question."""
    draw = random.Random(3)
    words = ("river", "stone", "lamp", "cloud", "amber", "quiet", "harbour", "window", "seven", "garden")
    rows: list[dict[str, Any]] = []
    for number in range(8):
        text = " ".join(draw.choices(words, k=int((case["length"] - 80) * draw.uniform(0.3, 0.7))))
        prompt, answer = f"Question {number}: what is next?", text
        if case["answers"] == "short":
            prompt, answer = f"{prompt} {text}", "amber"
        match case["method"]:
            case "sft":
                rows.append({"instruction": prompt, "output": answer})
            case "dpo":
                rows.append({"prompt": prompt, "chosen": answer, "rejected": answer[::2]})
            case "kto":
                rows.append({"prompt": prompt, "completion": answer, "label": number % 2 == 0})
    return rows


if __name__ == "__main__":
    main()
